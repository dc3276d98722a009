"""What the ATN1xx rules share: an op that DTensor refused, in all the cases that met it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from attncheck.model import CaseResult, MissingOp
from attncheck.rules import wording
from attncheck.rules.base import Group, extent, group_by, missing_ops, most_common

STRATEGY = ("strategy", "propagation")
MIXED = ("mixed",)

Wanted = Callable[[MissingOp], bool]


def of(result: CaseResult, kinds: Sequence[str], wanted: Wanted) -> list[MissingOp]:
    refused = missing_ops(result.outcome, result.case.direction, kinds)
    return [op for op in refused if wanted(op)]


def groups(
    results: Sequence[CaseResult], kinds: Sequence[str], wanted: Wanted
) -> Iterator[tuple[Group, list[MissingOp]]]:
    """One group per refused op, with every refusal of it."""

    def subjects(result: CaseResult) -> Iterable[tuple[str, str]]:
        return {(op.op or result.case.operator, op.op) for op in of(result, kinds, wanted)}

    for group in group_by(results, subjects):
        refusals = [
            op
            for result in group.results
            for op in of(result, kinds, wanted)
            if op.op == group.kernel_op
        ]
        yield group, refusals


def details(
    group: Group, refusals: Sequence[MissingOp], results: Sequence[CaseResult]
) -> list[str]:
    texts = most_common(wording.first_line(op.message) for op in refusals)
    others = {
        op.op
        for result in group.results
        for op in result.outcome.missing_ops
        if op.op and op.op != group.kernel_op
    }
    return [
        *extent(group, results),
        *(f"PyTorch: {text}" for text in texts[:2]),
        f"Also refused in these cases: {wording.listing(others)}." if others else "",
    ]
