"""ATN207: the same call gives another result the second time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncheck.model import CaseResult, Fact, Finding, Severity
from attncheck.rules import remedies, values
from attncheck.rules.base import Rule

DOCS = """\
## What it does
Runs every working call a second time, when propagation is served from DTensor's cache, and fires
where the result is not that of the first call.

## Why is this bad?
A test that calls once passes. `register_sharding` derives its cache key from the first integer
argument on, so floats and booleans before it (`dropout_p`, `causal`) are not part of the key: a
strategy that depends on `causal` is served to the non-causal call that comes later.

## Example
```python
flash_attn_func(q, k, v, causal=True)   # fills the cache
flash_attn_func(q, k, v, causal=False)  # gets the strategy that was made for causal=True
```

## What to do
Register the strategy with `RuntimeSchemaInfo(static_argnum=<first argument that is no tensor>)`,
and clear both of DTensor's propagation caches (the Python one and the C++ one) after registering.
"""


def _is_stale(fact: Fact) -> bool:
    return fact.code == "second_call_differs"


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    for group in values.with_fact(results, _is_stale):
        yield RULE.finding(
            group,
            f"{group.subject} gives another result on the second call in {group.cases}",
            message=values.details(group, results, _is_stale),
            remedies=[
                remedies.untried(
                    "strategy",
                    "Put the flags into the cache key of the strategy with "
                    "`RuntimeSchemaInfo(static_argnum=<first argument that is no tensor>)`, and "
                    "clear both propagation caches after registering.",
                ),
                *remedies.working(group, results),
            ],
        )


RULE = Rule(
    id="ATN207",
    name="stale-second-call",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=judge,
)
