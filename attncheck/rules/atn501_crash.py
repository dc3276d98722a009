"""ATN501: the process died."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncheck.model import CaseResult, Finding, Remedy, Severity, Status
from attncheck.rules import remedies, values, wording
from attncheck.rules.base import (
    Group,
    Rule,
    empty_roles,
    extent,
    group_by_op,
    most_common,
    rank_lines,
)

DOCS = """\
## What it does
Fires where a worker process died while the case ran: a segmentation fault, a floating point
exception, an abort, or the system's memory killer.

## Why is this bad?
No exception is raised and nothing can be caught: the whole job goes down, often without a Python
traceback.

## Example
```python
q = distribute_tensor(torch.randn(1, 4, 128, 64), mesh, [Shard(0)])  # batch 1 over 2 ranks
# rank 1 has no rows: floating point exception
F.scaled_dot_product_attention(q, k, v, is_causal=True)
```

## What to do
Where shards are empty or uneven, use sizes that the ranks divide, or redistribute before the
call. An operator that is no dispatcher op (pybind, Triton, CuTe) gets a null pointer from a
DTensor: call it through `local_map` only.
"""


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    for group in group_by_op(results, lambda r: r.outcome.status is Status.CRASH):
        texts = most_common(wording.first_line(r.outcome.message) for r in group.results)
        yield RULE.finding(
            group,
            f"{group.subject} kills the process in {group.cases}",
            message=[*extent(group, results), *texts[:3], *rank_lines(group.results)],
            remedies=[
                *_empty_shards(group),
                *remedies.working(group, results),
                values.report_it(group),
            ],
        )


def _empty_shards(group: Group) -> list[Remedy]:
    empty = [empty_roles(result.case) for result in group.results]
    if not all(empty):
        return []
    sizes = wording.listing(text for roles in empty for text in roles)
    text = (
        f"In every one of these cases some rank holds an empty shard ({sizes}): use sizes that "
        "fill every rank, or a placement that does not split them."
    )
    return [remedies.untried("redistribute", text)]


RULE = Rule(
    id="ATN501",
    name="crash",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=judge,
)
