"""ATN102: DTensor has no sharding strategy for a backward kernel op."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncheck.model import CaseResult, Finding, MissingOp, Severity
from attncheck.rules import missing, remedies
from attncheck.rules.base import Rule

DOCS = """\
## What it does
Names every kernel op that DTensor refuses in the backward pass for want of a sharding strategy.

## Why is this bad?
Inference works, so the gap shows only when training starts: the first `backward()` raises, after
the model was loaded and sharded. Operators that register their forward alone are common.

## Example
```python
# DTensors on a CPU mesh: forward is decomposed, and works
out = F.scaled_dot_product_attention(q, k, v)
out.sum().backward()
# Operator aten._scaled_dot_product_flash_attention_for_cpu_backward.default does not have a
# sharding strategy registered.
```

## What to do
As for a missing forward strategy: `attncheck fix` writes and verifies one for both directions; the
alternatives listed with a finding work in both, too. Take care when you register one by hand:
`flash_attn::_flash_attn_backward` writes `dq`, `dk` and `dv` in place, and a strategy that
redistributes them writes the gradients into temporaries. They are then wrong, and nothing raises.
The module that `attncheck fix` writes refuses such a call: bring q, k and v to one common
placement before it.
"""


def _is_backward(op: MissingOp) -> bool:
    return op.phase == "backward"


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    for group, refusals in missing.groups(results, missing.STRATEGY, _is_backward):
        yield RULE.finding(
            group,
            f"{group.subject} has no sharding strategy: backward fails for {group.cases}",
            message=missing.details(group, refusals, results),
            remedies=remedies.instead_of_a_strategy(group, results, backward=True),
        )


RULE = Rule(
    id="ATN102",
    name="missing-backward-strategy",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=judge,
)
