"""ATN206: a local tensor's shape is not what its placement says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncheck.model import CaseResult, Fact, Finding, Severity
from attncheck.rules import remedies, values
from attncheck.rules.base import Rule

DOCS = """\
## What it does
Compares the local tensor of every rank with what the result's placement and global shape say it
should be, and fires where they contradict each other.

## Why is this bad?
DTensor validates no strategy. A wrong placement (of the log-sum-exp, say) passes registration and
the call itself, and fails at a later collective, on another line, or gathers garbage.

## Example
```python
@register_sharding(torch.ops.flash_attn._flash_attn_forward.default)
def strategy(q, k, v, *flags):
    heads = Shard(2)
    lse = Shard(2)  # wrong: the log-sum-exp is (batch, heads, sequence), its heads are dim 1
    return [([heads, lse, Replicate(), Replicate()], [heads, heads, heads] + [None] * len(flags))]
```

## What to do
Mend the placement in the strategy that states it. Until then use an operator or a placement that
the finding lists as working, or choose sizes that the ranks divide.
"""


def _is_shape(fact: Fact) -> bool:
    return fact.code == "local_shape"


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    for group in values.with_fact(results, _is_shape):
        yield RULE.finding(
            group,
            f"{group.subject} returns shapes that contradict their placements in {group.cases}",
            message=values.details(group, results, _is_shape),
            remedies=[*remedies.working(group, results), values.report_it(group)],
        )


RULE = Rule(
    id="ATN206",
    name="illegal-placement",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=judge,
)
