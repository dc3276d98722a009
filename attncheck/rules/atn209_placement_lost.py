"""ATN209: DTensors went in, an ordinary tensor came out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncheck.model import CaseResult, Fact, Finding, Severity
from attncheck.rules import remedies, values
from attncheck.rules.base import Rule

DOCS = """\
## What it does
Fires where an operator was called on DTensors and returned an ordinary tensor, as output or as
gradient.

## Why is this bad?
An ordinary tensor says nothing of its distribution. The next op takes a shard for the whole, or
meets a DTensor and raises far from the cause. Operators that unwrap their inputs, or write into a
buffer made with `torch.empty`, do this.

## Example
```python
def attention(qkv):
    out = torch.empty(qkv.shape[:2] + qkv.shape[3:])  # an ordinary tensor, of the global shape
    return kernel(qkv, out=out)

attention(qkv)  # qkv is a DTensor; the result is not
```

## What to do
Call the operator through `local_map`, which wraps the local result with the placement you state,
or wrap it yourself with `DTensor.from_local`.
"""


def _is_lost(fact: Fact) -> bool:
    return fact.code == "plain_result"


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    for group in values.with_fact(results, _is_lost):
        yield RULE.finding(
            group,
            f"{group.subject} returns ordinary tensors for DTensors in {group.cases}",
            message=values.details(group, results, _is_lost),
            remedies=[*remedies.working(group, results), *remedies.local_map(group, results)],
        )


RULE = Rule(
    id="ATN209",
    name="placement-lost",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=judge,
)
