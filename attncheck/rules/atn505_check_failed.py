"""ATN505: the check itself failed, so that nothing is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncheck.model import ENGINES_DISAGREE, CaseResult, Finding, Remedy, Severity, Status
from attncheck.rules.base import Rule, exception_text, extent, group_by_op, has_fact, most_common

DOCS = """\
## What it does
Fires where a case ended in an error of attncheck's own or of the probe, not of what was tested.

## Why is this bad?
The case has no verdict. It is neither a pass nor a failure of the operator, and must not be read
as one.

## Example
```python
def reference(setting, t):
    return attention(t["q"], t["K"], t["v"])  # KeyError: 'K', in the probe
```

## What to do
With a probe of your own, mend the probe. Otherwise it is a bug of attncheck: report it with the
case id and the text of the finding.
"""


def _failed(result: CaseResult) -> bool:
    # Where two engines disagree nothing failed: that is ATN506.
    outcome = result.outcome
    return outcome.status is Status.UNKNOWN and not has_fact(outcome, (ENGINES_DISAGREE,))


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    for group in group_by_op(results, _failed):
        texts = most_common(exception_text(r.outcome) for r in group.results)
        yield RULE.finding(
            group,
            f"{group.subject} was not judged: the check itself failed in {group.cases}",
            message=[
                *texts[:3],
                "This is a bug of attncheck or of the probe, not a verdict on the operator.",
                *extent(group, results),
            ],
            remedies=[
                Remedy(
                    "report",
                    "Report it to attncheck with the case ids, or mend the probe if it is yours.",
                )
            ],
        )


RULE = Rule(
    id="ATN505",
    name="check-failed",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=judge,
)
