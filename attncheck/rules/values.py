"""What the ATN2xx rules share: facts of the oracle, grouped by op and told with their numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from attncheck.model import CaseResult, Fact, Remedy
from attncheck.rules.base import (
    Group,
    extent,
    fact_lines,
    group_by_op,
    uneven_line,
    worst_error,
)

# Every fact that some ATN2xx rule judges: a wrong case with none of them is ATN201's.
JUDGED = (
    "wrong_result",
    "wrong_gradient",
    "nonfinite",
    "gradient_missing",
    "replicas_differ",
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
    return [
        *extent(group, results),
        worst_error(group.results, tensors) if tensors else "",
        *fact_lines(group.results, wanted),
        uneven_line(group.results),
    ]


def report_it(what: str) -> Remedy:
    return Remedy(
        "report",
        f"Report {what} to its maintainers with this finding and one of its case ids, which says "
        "how to run it again.",
    )
