"""ATN103: an ordinary tensor met DTensors in one kernel op."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncheck.model import CaseResult, Finding, Severity
from attncheck.rules import missing, remedies
from attncheck.rules.base import Rule
from attncheck.rules.remedies import PLAIN

INSIDE = "the operator itself makes an ordinary tensor, which DTensor does not take beside its own"

DOCS = """\
## What it does
Names every kernel op that got ordinary tensors and DTensors together, which DTensor refuses.

## Why is this bad?
The call raises. The ordinary tensor is often one the caller never sees: the causal mask that the
MATH backend of SDPA makes inside, `cu_seqlens` of a varlen call, a plain attention mask.

## Example
```python
mask = torch.ones(18, 18, dtype=torch.bool).tril()       # an ordinary tensor
F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # q, k, v are DTensors
# RuntimeError: aten.add.Tensor got mixed torch.Tensor and DTensor, need to convert all
# torch.Tensor to DTensor before calling distributed operators!
```

## What to do
Where the ordinary tensor is an argument, pass it as a replicated DTensor:
`DTensor.from_local(mask, mesh, [Replicate()])`. Where the operator makes it itself, no strategy
helps: call the operator through `local_map`, or through the wrapper that `attncheck fix` writes
for functions that it knows, or take another one that the finding lists as working.
"""


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    for group, refusals in missing.groups(results, missing.MIXED, lambda _: True):
        wrap = remedies.wrap_plain(group, results)
        passed = not _inside(group.results)
        yield RULE.finding(
            group,
            f"{group.subject} got ordinary tensors together with DTensors in {group.cases}",
            message=[*missing.details(group, refusals, results), _where_from(group.results)],
            remedies=[
                *(wrap if passed else ()),
                *remedies.on_local_shards(group, results, "" if passed else INSIDE),
                *(() if passed else wrap),
            ],
        )


def _inside(results: Sequence[CaseResult]) -> int:
    """In how many cases the operator itself makes the ordinary tensor."""
    return sum(PLAIN not in r.case.placements.values() for r in results)


def _where_from(results: Sequence[CaseResult]) -> str:
    inside = _inside(results)
    if not inside:
        return ""
    some = "these" if inside == len(results) else f"{inside} of these"
    return f"In {some} cases no argument is an ordinary tensor: the operator makes one itself."


RULE = Rule(
    id="ATN103",
    name="mixed-tensor",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=judge,
)
