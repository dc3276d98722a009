"""ATN502: the call did not come back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncheck.model import CaseResult, Finding, Severity, Status
from attncheck.rules import remedies, values, wording
from attncheck.rules.base import Rule, extent, group_by_op, most_common, rank_lines

DOCS = """\
## What it does
Fires where a case did not end before its deadline. The message tells what each rank was last
doing.

## Why is this bad?
A hanging job costs its whole allocation until a timeout, and says nothing. Under NCCL the
watchdog ends it after ten minutes, with a stack that names a collective and not the attention
call.

## Example
```python
with FakeTensorMode():
    # DTensors on CPU: the search for a decomposition never ends
    F.scaled_dot_product_attention(q, k, v)
```

## What to do
See in the message whether ranks wait in a collective or one of them is still computing. In the
first case bring the inputs to explicit placements before the call. In the second the case may only
be slow: give it more time and look again.
"""


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    for group in group_by_op(results, lambda r: r.outcome.status is Status.HANG):
        texts = most_common(wording.first_line(r.outcome.message) for r in group.results)
        yield RULE.finding(
            group,
            f"{group.subject} does not come back in {group.cases}",
            message=[*extent(group, results), *texts[:2], *rank_lines(group.results)],
            remedies=[*remedies.working(group, results), values.report_it(group)],
        )


RULE = Rule(
    id="ATN502",
    name="hang",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=judge,
)
