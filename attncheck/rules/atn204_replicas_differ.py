"""ATN204: ranks that should hold the same values hold different ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncheck.model import CaseResult, Fact, Finding, Severity
from attncheck.rules import remedies, values
from attncheck.rules.base import Rule

DOCS = """\
## What it does
Fires where a result is called replicated over some ranks, and those ranks hold different values.

## Why is this bad?
The placement is a promise that later ops rely on without looking. Replicas that differ make every
rank train another model, and collectives chosen from the placement silently drop the differences.

## Example
```python
torch.manual_seed(rank)  # replicas with different seeds
# all Replicate, and another mask on each rank
out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
```

## What to do
Where dropout is involved, seed the ranks that hold replicas alike. Otherwise use an operator or a
placement that the finding lists as working: a replicated output of sharded work is usually a
partial sum that nobody reduced.
"""


def _is_differing(fact: Fact) -> bool:
    return fact.code == "replicas_differ"


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    for group in values.with_fact(results, _is_differing):
        yield RULE.finding(
            group,
            f"{group.subject} leaves different values on ranks that should agree in {group.cases}",
            message=values.details(group, results, _is_differing),
            remedies=[*remedies.working(group, results), values.report_it(group)],
        )


RULE = Rule(
    id="ATN204",
    name="replicas-differ",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=judge,
)
