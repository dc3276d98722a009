"""Findings as CI shows them: each at the line that pins what it is about, with what a gate says of it.

Beside `attncheck.view`, for formats that are read by other programs (SARIF, JUnit, workflow annotations). As
there, all text is free of control characters, and escaping is the format's business. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from attncheck.changes import ChangeGroup
from attncheck.compare import TIMED
from attncheck.locations import Location, distribution_of, locator
from attncheck.model import UNJUDGED, CaseResult, ChangeKind, Report, Severity
from attncheck.text import clean, listing, one_line
from attncheck.view import FindingView, View, operator_name


class State(str, Enum):
    """A finding against the baseline; in the words of SARIF."""

    NEW = "new"
    UPDATED = "updated"
    UNCHANGED = "unchanged"


@dataclass(frozen=True)
class Annotation:
    """A finding and the line that pins the distribution of its kernel op.

    `state`: None where there is no baseline, or none has such findings; `accepted`: why nobody minds it,
    where the baseline knows all of it.
    """

    finding: FindingView
    kernel_op: str
    location: Location
    operators: tuple[str, ...]
    placements: tuple[str, ...]
    state: State | None = None
    accepted: str = ""


@dataclass(frozen=True)
class Regression:
    """Cases, of any operators, that a gate fails for in the same way.

    `change` is in words (`supported -> wrong (ATN201)`); `detail`: the numbers of one of them; `finding`: the
    worst about the first of them.
    """

    kind: ChangeKind
    change: str
    detail: str
    operators: tuple[str, ...]
    cases: tuple[str, ...]
    location: Location
    finding: FindingView | None = None


def case_name(case_id: str) -> str:
    """A case's id as the view writes it: by it findings, changes and results are matched."""
    return one_line(clean(case_id), 300)


def by_case(groups: Iterable[ChangeGroup]) -> dict[str, ChangeGroup]:
    """What became of each case that changed."""
    return {case: group for group in groups for case in group.cases}


def build(report: Report, view: View, folder: Path | None) -> tuple[Annotation, ...]:
    """Every finding. The worst severity first; of one severity the first about each kernel op, then the
    second about each: of a long list only the head is read. `view`: of the same report; `folder`: the
    project, or None."""
    results = {case_name(result.case.id): result for result in report.cases}
    changes = by_case(view.comparison.groups) if view.comparison else {}
    locate = locator(folder)
    found: list[tuple[int, int, Annotation]] = []
    for group in view.groups:
        seen: Counter[Severity] = Counter()
        for finding in group.findings:
            own = [results[case] for case in finding.cases if case in results]
            state = _state(finding, changes) if view.comparison else None
            annotation = Annotation(
                finding,
                group.kernel_op,
                locate(_distribution(group.kernel_op, own[:1])),
                tuple(dict.fromkeys(one_line(clean(operator_name(r))) for r in own)),
                tuple(dict.fromkeys(one_line(clean(r.case.placement), 60) for r in own)),
                state,
                _accepted(finding, changes, view) if state is State.UNCHANGED else "",
            )
            found.append((finding.severity.rank, seen[finding.severity], annotation))
            seen[finding.severity] += 1
    return tuple(annotation for _, _, annotation in sorted(found, key=lambda item: item[:2]))


def regressions(report: Report, view: View, folder: Path | None) -> tuple[Regression, ...]:
    """What a gate fails for, in few entries: the changes of `ComparisonView`, operators taken together.

    In the order of `ChangeKind`; of one kind, what hits most cases first.
    """
    if view.comparison is None:
        return ()
    results = {case_name(result.case.id): result for result in report.cases}
    locate = locator(folder)
    merged: dict[tuple[object, ...], Regression] = {}
    for group in (group for group in view.comparison.groups if group.gates):
        one = _regression(group, view, results, locate)
        key = (one.kind, one.change, one.location, one.finding and one.finding.fingerprint)
        merged[key] = _joined(merged[key], one) if key in merged else one
    order = {kind: number for number, kind in enumerate(ChangeKind)}
    return tuple(sorted(merged.values(), key=lambda r: (order[r.kind], -len(r.cases))))


def _joined(first: Regression, more: Regression) -> Regression:
    return replace(
        first,
        detail=first.detail or more.detail,
        operators=tuple(dict.fromkeys((*first.operators, *more.operators))),
        cases=(*first.cases, *more.cases),
    )


def _regression(
    group: ChangeGroup,
    view: View,
    results: Mapping[str, CaseResult],
    locate: Callable[[str], Location],
) -> Regression:
    about = [
        (findings.kernel_op, finding)
        for findings in view.groups
        for finding in findings.findings
        if finding.rule in group.rules and group.cases[0] in finding.cases
    ]
    kernel_op, finding = min(about, key=lambda x: x[1].severity.rank, default=("", None))
    own = [results[case] for case in group.cases[:1] if case in results]
    location = locate(_distribution(kernel_op, own))
    return Regression(
        group.kind, group.change, group.detail, (group.operator,), group.cases, location, finding
    )


def _distribution(kernel_op: str, results: Iterable[CaseResult]) -> str:
    """Whose the kernel op is; where no op stands out, whose the first of the cases is."""
    for result in results:
        kernel_op = kernel_op or clean(result.outcome.kernel_op) or clean(result.case.probe)
    return distribution_of(kernel_op)


def _state(finding: FindingView, changes: Mapping[str, ChangeGroup]) -> State | None:
    """None for findings that no baseline holds: what could not be judged, and what a slow machine shows.

    A change says which rules hold of a case now, not which held before: a finding is new where each of its
    cases is new or worse by it.
    """
    if finding.severity is Severity.INFO or finding.rule in (*UNJUDGED, *TIMED):
        return None
    kinds = [
        changes[case].kind
        for case in finding.cases
        if case in changes and finding.rule in changes[case].rules and changes[case].kind.regressed
    ]
    if not kinds:
        return State.UNCHANGED
    whole = len(kinds) == len(finding.cases) and {*kinds} <= {ChangeKind.NEW, ChangeKind.WORSE}
    return State.NEW if whole else State.UPDATED


def _accepted(finding: FindingView, changes: Mapping[str, ChangeGroup], view: View) -> str:
    against = view.comparison.against if view.comparison else ""
    written = [
        changes[case].reason
        for case in finding.cases
        if case in changes and finding.rule in changes[case].rules and changes[case].reason
    ]
    return f"known in {against}" + (f": {listing(dict.fromkeys(written))}" if written else "")
