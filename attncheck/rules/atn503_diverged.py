"""ATN503: ranks took different paths through the same call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncheck.model import CaseResult, Finding, Remedy, Severity, Status
from attncheck.rules import remedies, values, wording
from attncheck.rules.base import Group, Rule, extent, group_by_op, most_common, rank_lines

DOCS = """\
## What it does
Fires where the ranks of one call did different things: different collectives, different
exceptions, or one rank left the call while another waits in it. The message tells each rank's
last op and hash seed.

## Why is this bad?
The job hangs, sometimes. Sharding propagation may break ties in the order of a hashed set, and
Python seeds its hashes per process: one rank gathers where the other reduces, on some runs and
not on others.

## Example
```python
q = DTensor.from_local(q_part, mesh, [Partial()])
k = DTensor.from_local(k_full, mesh, [Replicate()])
torch.matmul(q, k)  # PYTHONHASHSEED 6 on one rank and 7 on the other: they choose differently
```

## What to do
Bring the inputs to explicit, common placements before the call, so that nothing is left to
choose. The same `PYTHONHASHSEED` on every rank makes the choice common, but hides the cause.
"""


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    for group in group_by_op(results, lambda r: r.outcome.status is Status.DIVERGED):
        texts = most_common(wording.first_line(r.outcome.message) for r in group.results)
        yield RULE.finding(
            group,
            f"{group.subject} takes different paths on different ranks in {group.cases}",
            message=[*extent(group, results), *texts[:2], *rank_lines(group.results)],
            remedies=[
                *remedies.working(group, results),
                _explicit(group),
                values.report_it(group),
            ],
        )


def _explicit(group: Group) -> Remedy:
    text = (
        "Redistribute the inputs to explicit, common placements before the call, so that "
        "propagation has nothing to choose."
    )
    seeds = {state.hash_seed for result in group.results for state in result.outcome.ranks}
    if len(seeds) > 1:
        text += (
            " One `PYTHONHASHSEED` for all ranks makes a choice by hash order common, but hides it."
        )
    return remedies.untried("redistribute", text)


RULE = Rule(
    id="ATN503",
    name="diverged",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=judge,
)
