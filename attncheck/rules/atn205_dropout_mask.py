"""ATN205: the dropout mask of a sharded call is not a dropout mask of the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncheck.model import CaseResult, Fact, Finding, Remedy, Severity
from attncheck.rules import remedies, values
from attncheck.rules.base import Group, Rule

DOCS = """\
## What it does
Reads the dropout mask off the output and fires where shards drew exactly the same mask, where the
rate is not the one that was asked for, or where values are neither dropped nor scaled as dropout
scales them. Values are never compared with an unsharded run: sharding may draw other random
numbers.

## Why is this bad?
No SDPA op is among DTensor's random ops, so each rank draws from its own generator. With equal
seeds the shards share one mask, and what looks like many independent draws is one draw repeated.

## Example
```python
torch.manual_seed(0)  # on every rank, as is good practice for replicas
out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)  # heads sharded
# head 0 on rank 0 and head 2 on rank 1 drop the same elements
```

## What to do
Give each rank of a sharded mesh axis its own seed before the call (and ranks of a replicated axis
the same one), or use an operator that the finding lists as working.
"""

_CODES = {
    "dropout_shared": "shards share one mask",
    "dropout_rate": "the rate is not the one asked for",
    "dropout_values": "values are neither dropped nor scaled",
}


def _is_dropout(fact: Fact) -> bool:
    return fact.code in _CODES


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    for group in values.with_fact(results, _is_dropout):
        yield RULE.finding(
            group,
            f"{group.subject} draws a wrong dropout mask ({_what(group)}) in {group.cases}",
            message=values.details(group, results, _is_dropout),
            remedies=[*remedies.working(group, results), *_seeds(group)],
        )


def _codes(group: Group) -> list[str]:
    seen = {fact.code for result in group.results for fact in result.outcome.facts}
    return [code for code in _CODES if code in seen]


def _what(group: Group) -> str:
    return "; ".join(_CODES[code] for code in _codes(group))


def _seeds(group: Group) -> list[Remedy]:
    shared = next(
        (r for r in group.results if any(f.code == "dropout_shared" for f in r.outcome.facts)), None
    )
    if shared is None:
        return []
    axes = [
        axis
        for axis, pattern in zip(shared.case.mesh, shared.case.placement.split(","), strict=False)
        if pattern != "replicate"
    ]
    # The rank's position along the sharded axes, as one number.
    ranks = "0"
    for axis in axes:
        index = f'mesh.get_local_rank("{axis}")'
        ranks = index if ranks == "0" else f"({ranks}) * {shared.case.mesh[axis]} + {index}"
    text = "Seed the generator by the rank's position along the sharded mesh axes before the call."
    return [remedies.untried("strategy", text, f"torch.manual_seed(seed + {ranks})\n")]


RULE = Rule(
    id="ATN205",
    name="dropout-mask",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=judge,
)
