"""ATN302: the first call of a shape spends seconds in sharding propagation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncheck.model import CaseResult, Finding, Severity
from attncheck.rules import remedies, wording
from attncheck.rules.base import Rule, extent, group_by_op

# Propagation by decomposition was measured at 7 s and more for one call of SDPA, a registered
# strategy at milliseconds. A slow machine or a first import stays below 5 s.
SLOW_MS = 5000.0

DOCS = """\
## What it does
Fires where the first call of a case took 5 seconds or more, and compares it with the second.

## Why is this bad?
For an op without a strategy, PyTorch may search over its decompositions for one. The search is
paid again for every new shape, dtype and scalar argument: a job with variable lengths pays it all
the time, and one rank that pays it alone lets the others run into their timeout.

## Example
```python
F.scaled_dot_product_attention(q, k, v)          # DTensors on CPU, not causal: 7 to 30 s
F.scaled_dot_product_attention(q, k, v)          # 0.02 to 0.08 s
F.scaled_dot_product_attention(longer, k2, v2)   # a new shape: 7 to 30 s again
```

## What to do
Register a strategy for the op (what has one is not searched for), call the operator through
`local_map`, or keep the set of shapes small and run each once before timeouts matter.
"""


def _first(result: CaseResult) -> float:
    return result.outcome.timings.get("first", 0.0)


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    for group in group_by_op(results, lambda r: _first(r) >= SLOW_MS):
        worst = min(group.results, key=lambda r: (-_first(r), r.case.id))
        yield RULE.finding(
            group,
            f"{group.subject} takes up to {wording.duration(_first(worst))} for its first call in "
            f"{group.cases}",
            message=[
                *extent(group, results),
                _comparison(worst),
                "It is paid again for every new shape, dtype and scalar argument.",
            ],
            remedies=[
                *remedies.strategy(group, results),
                *remedies.local_map(group, results),
            ],
        )


def _comparison(worst: CaseResult) -> str:
    first, warm = _first(worst), worst.outcome.timings.get("warm", 0.0)
    text = f"Slowest case {worst.case.id}: first call {wording.duration(first)}"
    if warm <= 0:
        return f"{text}, no second call."
    ratio = wording.number(first / warm) if first / warm < 1000 else f"{first / warm:.0f}"
    return f"{text}, second {wording.duration(warm)}: {ratio} times."


RULE = Rule(
    id="ATN302",
    name="slow-propagation",
    since="0.1.0",
    severity=Severity.WARNING,
    docs=DOCS,
    judge=judge,
)
