"""What the ATN2xx rules share: facts of the oracle, grouped by op and told with their numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from attncheck.model import DIAGNOSES, MODEL, CaseResult, ErrorStat, Fact, Remedy, Spread
from attncheck.rules.base import (
    Group,
    extent,
    fact_lines,
    group_by_op,
    uneven_line,
)
from attncheck.rules.wording import number

# Every fact that some ATN2xx rule judges: a wrong case with none of them is ATN201's.
JUDGED = (
    "wrong_result",
    "wrong_gradient",
    "nonfinite",
    "gradient_missing",
    "replicas_differ",
    "replica_wrong",
    "dropout_shared",
    "dropout_rate",
    "dropout_values",
    "local_shape",
    "second_call_differs",
    "plain_result",
)


def with_fact(results: Sequence[CaseResult], wanted: Callable[[Fact], bool]) -> Iterator[Group]:
    yield from group_by_op(results, lambda r: any(wanted(fact) for fact in r.outcome.facts))


def details(
    group: Group,
    results: Sequence[CaseResult],
    wanted: Callable[[Fact], bool],
    tensors: Callable[[str], bool] | None = None,
) -> list[str]:
    """Where it happens, what was seen, and the worst number among `tensors`, if given."""
    worst = _worst(group.results, tensors) if tensors else None
    return [
        *extent(group, results),
        *(_sentences(worst) if worst else ()),
        *fact_lines(group.results, wanted),
        uneven_line(group.results),
    ]


@dataclass(frozen=True)
class _Worst:
    result: CaseResult
    tensor: str
    stat: ErrorStat
    spread: Spread | None


def _worst(results: Sequence[CaseResult], wanted: Callable[[str], bool]) -> _Worst | None:
    """The largest error relative to its bound among the wanted tensors."""
    found = [
        _Worst(result, tensor, stat, result.outcome.spread.get(tensor))
        for result in results
        for tensor, stat in result.outcome.errors.items()
        if wanted(tensor)
    ]

    def order(worst: _Worst) -> tuple[float, str, str]:
        ratio = worst.stat.ratio if math.isfinite(worst.stat.ratio) else math.inf
        # Ties go to the first case by id, so that the order of the results does not show.
        return -ratio, worst.result.case.id, worst.tensor

    return min(found, key=order, default=None)


def _sentences(worst: _Worst) -> Iterator[str]:
    stat, tensor = worst.stat, worst.tensor
    yield (
        f"Worst case {worst.result.case.id}: {tensor} is off by {number(stat.max)} against "
        f"float64{stat.note}, {number(stat.ratio)} times the bound "
        f"{number(stat.bound)} (the operator on whole tensors: "
        f"{number(stat.unsharded_max)}; largest value: {number(stat.scale)})."
    )
    if stat.worst is not None and math.isfinite(stat.max):
        yield (
            f"Its errors: mean {number(stat.mean)}, RMS {number(stat.rms)} (on whole tensors "
            f"{number(stat.unsharded_rms)}), {number(stat.ulps)} units in the last place where it is worst "
            f"(median {number(stat.ulps_median)}); of what sharding changed {stat.sign_bias:+.0%} go up and "
            f"{stat.size_bias:+.0%} away from zero (rounding: about 0)."
        )
    for fact in worst.result.outcome.facts:
        if fact.code in DIAGNOSES and fact.subject in (tensor, ""):
            yield f"There {fact.detail}."
    if worst.spread is not None:
        yield _spread_sentence(worst.spread)


_NATURES = {
    "rounding": "that is rounding: its direction and its place change with the values",
    "order": "that is a reduction whose order changes: the same values give other bits in another call",
    "systematic": "that is a bug, no rounding: the same direction, place or size with all values",
    "": "too few to say what it is",
}


def _spread_sentence(spread: Spread) -> str:
    many = f"Over {spread.repeats} sets of values its ratio to the bound is {number(spread.ratio_min)} to "
    many += f"{number(spread.ratio_max)} (median {number(spread.ratio_median)}; seed {spread.worst_seed})"
    if not spread.beyond:
        return f"{many}."
    return f"{many}, beyond it in {spread.beyond}: {_NATURES.get(spread.nature, spread.nature)}."


def report_it(group: Group) -> Remedy:
    """To whom: an operator has maintainers, a model is the user's own."""
    if group.results and all(result.case.probe == MODEL for result in group.results):
        return Remedy(
            "report",
            "Mend the model or its plan where the likely cause says, and audit it again with `--numeric`.",
        )
    return Remedy(
        "report",
        f"Report {group.subject} to its maintainers with this finding and one of its case ids, which says "
        "how to run it again.",
    )
