"""ATN301: the result is right, but DTensor communicated without being asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from attncheck.model import CaseResult, Finding, Severity, Status
from attncheck.rules import remedies, wording
from attncheck.rules.base import Group, Rule, extent, group_by

DOCS = """\
## What it does
Fires where a call gives the right result at the price of collectives that DTensor put in by
itself, and tells which kernel op caused them, how many, and how many bytes one rank sends.

## Why is this bad?
Tensor parallelism is lost in silence: the inputs are gathered, every rank computes everything,
and the step is slower than on one GPU. An all-gather per attention layer rarely shows in a small
test.

## Example
```python
q, k, v = (distribute_tensor(x, mesh, [Shard(1)]) for x in (q, k, v))  # heads
out = F.scaled_dot_product_attention(q, k, v)  # CPU, not causal: runs through a decomposition
out.placements  # (Replicate(),) after three all-gathers
```

## What to do
Use an operator or a placement that the finding lists as free of communication, or call the
operator through `local_map`. `torch.distributed.tensor.debug.CommDebugMode` shows the same
collectives in your own model.
"""


def _subjects(result: CaseResult) -> Iterable[tuple[str, str]]:
    outcome, case = result.outcome, result.case
    # What communicates by design (another route, ring attention) is `supported` with its collectives.
    if outcome.status is not Status.REDISTRIBUTED:
        return ()
    ops = {c.kernel_op or outcome.kernel_op for c in outcome.collectives} or {outcome.kernel_op}
    return {(op or case.operator, op) for op in ops}


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    for group in group_by(results, _subjects):
        result, counts, sent = _dearest(group)
        cost = f": up to {wording.size(sent)} per rank and call" if sent else ""
        yield RULE.finding(
            group,
            f"{group.subject} communicates unasked in {group.cases}{cost}",
            message=[
                *extent(group, results),
                f"Dearest case {result.case.id}: {counts}." if counts else "",
                _lost_parallelism(group),
            ],
            remedies=[
                *remedies.working(group, results, free=True),
                *remedies.local_map(group, results),
            ],
        )


def _dearest(group: Group) -> tuple[CaseResult, str, int]:
    """The case in which this op sends most, its collectives in words, and the bytes."""
    best = min(group.results, key=lambda r: (-_sent(r, group), r.case.id))
    totals: Counter[tuple[str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    for collective in best.outcome.collectives:
        if (collective.kernel_op or best.outcome.kernel_op) == group.kernel_op:
            totals[collective.name, collective.phase] += collective.bytes
            counts[collective.name, collective.phase] += collective.count
    texts = [
        f"{counts[key]} {key[0]} in {key[1]} ({wording.size(totals[key])} per rank)"
        for key in sorted(counts)
    ]
    return best, ", ".join(texts), sum(totals.values())


def _sent(result: CaseResult, group: Group) -> int:
    own = result.outcome.kernel_op
    return sum(
        c.bytes for c in result.outcome.collectives if (c.kernel_op or own) == group.kernel_op
    )


def _lost_parallelism(group: Group) -> str:
    """Says so where sharded inputs gave a replicated output."""
    lost = [
        r.case.placement
        for r in group.results
        if set(r.outcome.outputs.get("out", ())) == {"R"}
        and any("S(" in p for placements in r.case.placements.values() for p in placements)
    ]
    if not lost:
        return ""
    return f"The output comes back replicated with {wording.listing(lost)}: parallelism ends here."


RULE = Rule(
    id="ATN301",
    name="implicit-redistribution",
    since="0.1.0",
    severity=Severity.WARNING,
    docs=DOCS,
    judge=judge,
)
