"""ATN203: rounding grew beyond what the operator shows unsharded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncheck.model import CaseResult, Fact, Finding, Severity, Status
from attncheck.rules import remedies, values
from attncheck.rules.base import Group, Rule, group_by_op

DOCS = """\
## What it does
Fires where the error against a float64 reference exceeds twice the error of the same operator on
whole tensors in the same dtype (plus the roundings of a reduction over the ranks), while it still
looks like rounding: below 16 times that bound, and no row of values is wrong.

    bound = 2 * err_unsharded + 2 * sqrt(2 * ranks) * eps(dtype) * max|reference|

The factor 2: two maxima over N draws of one error distribution, of which one is twice the other with
a probability of about N^-3. The second term: reducing n parts rounds n parts, n - 1 sums and the
result, whose errors together grow like the square root of their number. 16: a sum of 256 terms
carried out in the working precision is sqrt(256) times worse, and no probe has a longer one. What
healthy operators measure is in reports/published/trust/false-alarms.md.

## Why is this bad?
Results change with the degree of parallelism by more than the dtype explains: an evaluation that
is reproducible on one GPU is not on eight. Often a reduction runs in a lower precision than it
should.

## Example
```python
# a pending sum, left over from a row-wise linear
q = DTensor.from_local(q_part.bfloat16(), mesh, [Partial()])
F.scaled_dot_product_attention(q, k, v)  # the sum is carried out in bfloat16, inside the call
```

## What to do
Run it again with `--repeats 20`: with twenty sets of values attncheck tells rounding (direction and
place change) from a reduction whose order changes from call to call (the same values give other
bits) and from a bug (the same direction, place or size every time).

Reduce partial sums before the call, in float32 where it matters, or use an operator or a
placement that the finding lists as working. If the drift is acceptable for you, ignore the rule
for these cases.
"""


def _is_drift(fact: Fact) -> bool:
    return fact.code in ("drift_result", "drift_gradient")


def _applies(result: CaseResult) -> bool:
    if any(_is_drift(fact) for fact in result.outcome.facts):
        return True
    # A drift without any fact still gets its finding; one that is all in its replicas is ATN204's.
    return result.outcome.status is Status.DRIFT and not result.outcome.facts


def _nature(group: Group) -> str:
    """What repeated cases say of the cause, the worst of it: ` (a bug, by 12 sets of values)`."""
    spreads = [s for r in group.results for s in r.outcome.spread.values() if s.beyond]
    for nature, words in (
        ("systematic", "a bug"),
        ("order", "a reduction whose order changes"),
        ("rounding", "rounding"),
    ):
        counts = [s.repeats for s in spreads if s.nature == nature]
        if counts:
            return f" ({words}, by {max(counts)} sets of values)"
    return ""


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    for group in group_by_op(results, _applies):
        yield RULE.finding(
            group,
            f"{group.subject} drifts beyond its unsharded rounding in {group.cases}{_nature(group)}",
            message=values.details(group, results, _is_drift, lambda _: True),
            remedies=remedies.working(group, results),
        )


RULE = Rule(
    id="ATN203",
    name="drift",
    since="0.1.0",
    severity=Severity.WARNING,
    docs=DOCS,
    judge=judge,
)
