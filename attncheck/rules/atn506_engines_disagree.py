"""ATN506: real processes and simulated ranks disagree, so that one of the two has a bug."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncheck.model import ENGINES_DISAGREE, CaseResult, Finding, Remedy, Severity
from attncheck.rules.base import Rule, extent, fact_lines, group_by_op, has_fact

DOCS = """\
## What it does
Fires where `--engine both` ran a case with a real process for each rank and again with all ranks
simulated in one process, and the two disagree: on the status, on what is wrong with a result, on its
placement, on the ops that DTensor refused, or on a collective, its count or its bytes.

## Why is this bad?
The same program with the same values cannot have two verdicts. One of the two has a bug: the
operator or its sharding strategy (it asks for its rank, or keeps something between calls),
PyTorch's simulation, or attncheck. Until it is known which, the case has no verdict.

## Example
```python
def my_attention(q, k, v):
    if int(os.environ["RANK"]) == 0:  # all simulated ranks run in the process of rank 0
        return F.scaled_dot_product_attention(q, k, v)
    return fallback(q, k, v)
```

## What to do
Run the case with `--engine processes` and with `--engine simulated` and compare the two reports. Code
that reads its rank from the environment should take it from the device mesh. What is left is a bug
of PyTorch's `LocalTensorMode` or of attncheck: report it with the case id.
"""


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    for group in group_by_op(results, lambda r: has_fact(r.outcome, (ENGINES_DISAGREE,))):
        yield RULE.finding(
            group,
            f"{group.subject} was not judged: real processes and simulated ranks disagree in "
            f"{group.cases}",
            message=[
                *fact_lines(group.results, lambda fact: fact.code == ENGINES_DISAGREE),
                "One of the two has a bug; this is not a verdict on the operator.",
                *extent(group, results),
            ],
            remedies=[
                Remedy(
                    "report",
                    "Run the cases with each engine alone, see which of the two is right, and report the "
                    "other: PyTorch's LocalTensorMode, or attncheck.",
                )
            ],
        )


RULE = Rule(
    id="ATN506",
    name="engines-disagree",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=judge,
)
