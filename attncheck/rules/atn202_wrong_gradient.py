"""ATN202: a gradient is wrong or missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncheck.model import CaseResult, Fact, Finding, Severity
from attncheck.rules import remedies, values
from attncheck.rules.base import Rule, is_gradient

DOCS = """\
## What it does
Fires where a gradient is wrong against a float64 reference on whole tensors (by more than
rounding explains), is not finite where the reference is, or never reached an input that requires
one.

## Why is this bad?
Forward equality proves nothing about training. With a wrong gradient nothing raises: the model
learns something else, or one projection never learns.

## Example
```python
attention = local_map(
    flash_attn_func,
    out_placements=[Shard(1)],
    # queries sharded, keys and values whole
    in_placements=([Shard(1)], [Replicate()], [Replicate()]),
    device_mesh=mesh,
)
attention(q, k, v).sum().backward()
# every rank has only its own queries' share of k.grad, yet k.grad is called replicated
```

## What to do
Use an operator or a placement that the finding lists as working in both directions. With
`local_map`, say what the local gradients are (`in_grad_placements`). With a strategy of your own,
make sure that arguments written in place (`dq`, `dk`, `dv`) are never redistributed.
"""


def _is_wrong(fact: Fact) -> bool:
    if fact.code in ("wrong_gradient", "gradient_missing"):
        return True
    return fact.code == "nonfinite" and is_gradient(fact.subject)


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    for group in values.with_fact(results, _is_wrong):
        yield RULE.finding(
            group,
            f"{group.subject} gives wrong gradients in {group.cases}",
            message=values.details(group, results, _is_wrong, is_gradient),
            remedies=[*remedies.working(group, results), values.report_it(group)],
        )


RULE = Rule(
    id="ATN202",
    name="wrong-gradient",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=judge,
)
