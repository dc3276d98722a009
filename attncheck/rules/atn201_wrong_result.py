"""ATN201: the output is wrong, by an error that no rounding explains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncheck.model import CaseResult, Fact, Finding, Severity, Status
from attncheck.rules import remedies, values
from attncheck.rules.base import Rule, group_by_op, has_fact, is_gradient

DOCS = """\
## What it does
Fires where the output of a distributed call is wrong against a float64 reference on whole
tensors: the error is beyond twice what the same operator shows unsharded in the same dtype, and
so large that rounding does not explain it, or the output is not finite where the reference is. A
case that the oracle calls wrong for no reason that another rule covers is reported here too.

## Why is this bad?
Nothing raises. The model trains or answers with wrong numbers, and the loss may look plausible.

## Example
```python
# 12 query heads, 3 kv heads, heads sharded over 2 ranks: rank 0 gets 6 query heads and 2 kv heads
q = distribute_tensor(torch.randn(2, 12, 128, 64), mesh, [Shard(1)])
k = distribute_tensor(torch.randn(2, 3, 128, 64), mesh, [Shard(1)])
# query heads meet the wrong kv heads
out = F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
```

## What to do
Do not deploy the affected placements. Use an operator or a placement that the finding lists as
working. Where the finding says that the ranks do not divide a size, choose a degree of
parallelism that does.
"""


def _is_wrong(fact: Fact) -> bool:
    return fact.code == "wrong_result" or (
        fact.code == "nonfinite" and not is_gradient(fact.subject)
    )


def _applies(result: CaseResult) -> bool:
    outcome = result.outcome
    if any(_is_wrong(fact) for fact in outcome.facts):
        return True
    return outcome.status is Status.WRONG and not has_fact(outcome, values.JUDGED)


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    for group in group_by_op(results, _applies):
        yield RULE.finding(
            group,
            f"{group.subject} gives a wrong result in {group.cases}",
            message=values.details(group, results, _is_wrong, lambda name: not is_gradient(name)),
            remedies=[*remedies.working(group, results), values.report_it(group)],
        )


RULE = Rule(
    id="ATN201",
    name="wrong-result",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=judge,
)
