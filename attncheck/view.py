"""The view model that every report format renders: symbols, grouping and next steps, computed once.

Formats stay thin: they lay out what stands here and decide nothing. All text in a `View` is already
free of control characters (a report may come from elsewhere, and hold what a kernel printed);
escaping for a format's own syntax is the format's business. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from attncheck import auditview, changes, surroundings
from attncheck.auditview import AuditView
from attncheck.changes import ComparisonView
from attncheck.model import (
    BYPASSES_DISPATCHER,
    UNJUDGED,
    UNPLANNED,
    Case,
    CaseResult,
    Comparison,
    Finding,
    MissingOp,
    Outcome,
    Reason,
    Remedy,
    Report,
    Severity,
    Status,
    worst,
)
from attncheck.probing import PATTERNS
from attncheck.text import clean, clean_tree, count, listing, one_line, size

T = TypeVar("T")


@dataclass(frozen=True)
class RenderOptions:
    """How to render. `width`: columns; `unicode`: False for an output that can print only ASCII; `folder`:
    the project, for formats that point at its lines; None for no project."""

    color: bool = False
    width: int = 100
    unicode: bool = True
    verbose: bool = False
    folder: Path | None = None


# --- statuses ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Style:
    """How a status is shown: one symbol, its word, one colour, and what the legend says of it."""

    symbol: str
    ascii: str
    word: str
    color: str
    meaning: str

    def mark(self, unicode: bool) -> str:
        return self.symbol if unicode else self.ascii


STYLES: Mapping[Status, Style] = {
    Status.HANG: Style("H", "H", "hang", "bold red", "hang"),
    Status.CRASH: Style("C", "C", "crash", "bold red", "crash"),
    Status.DIVERGED: Style("D", "D", "diverged", "bold red", "ranks diverged"),
    Status.WRONG: Style("\u2260", "!", "wrong", "bold magenta", "wrong numbers, no error"),
    Status.MISSING_STRATEGY: Style(
        "\u2717", "x", "missing strategy", "red", "no sharding strategy"
    ),
    Status.MIXED_TENSOR: Style("M", "M", "mixed tensor", "red", "plain tensor met a DTensor"),
    Status.ERROR: Style("E", "E", "error", "red", "other exception"),
    Status.DRIFT: Style("\u2248", "%", "drift", "yellow", "drift: rounding that grew"),
    Status.REDISTRIBUTED: Style(
        "\u2194", "~", "redistributed", "cyan", "right, with communication nobody asked for"
    ),
    Status.SUPPORTED: Style("\u2713", "+", "supported", "green", "right"),
    Status.UNAVAILABLE: Style("\u00b7", "-", "unavailable", "dim", "could not run here"),
    Status.UNKNOWN: Style("?", "?", "unknown", "yellow", "the check itself failed"),
}

SEVERITY_COLORS: Mapping[Severity, str] = {
    Severity.ERROR: "bold red",
    Severity.WARNING: "yellow",
    Severity.INFO: "cyan",
}

REASONS: Mapping[Reason, str] = {
    Reason.PACKAGE_MISSING: "package missing",
    Reason.PACKAGE_CLASH: "another package under its name",
    Reason.EXTENSION_NOT_LOADABLE: "extension not loadable",
    Reason.VERSION_UNSUPPORTED: "version unsupported",
    Reason.DEVICE_MISSING: "device missing",
    Reason.SETTING_REFUSED: "the operator refuses this setting",
    Reason.PROBE_NOT_LOADABLE: "probe not loadable",
    Reason.OP_MISSING: "kernel op not registered",
    Reason.SIGNATURE_UNKNOWN: "nothing says how to call it",
    Reason.NOT_SIMULATED: "its ranks cannot be simulated",
    Reason.NOT_RUN: "not run",
}


# --- the view ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """Cases that share a row and a column: `ok` of `total` are usable.

    `status` is the worst one; a check that failed hides a pass, never a failure. `total` leaves out
    cases that were unavailable.
    """

    status: Status
    ok: int
    total: int


BOTH = "both"


@dataclass(frozen=True)
class Row:
    """A line of a matrix: a cell for each of the view's placements, None where there is no case.

    `direction` is `BOTH` where forward and backward have the same cells.
    """

    operator: str
    setting: str
    direction: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Usable:
    """An operator that works with a placement, and what its costliest case communicates."""

    operator: str
    cost: str
    free: bool
    share: str = ""


@dataclass(frozen=True)
class Works:
    """What one placement pattern leaves usable.

    `both`: forward and backward in every setting that ran; `forward`: every forward; `part`: both
    in some settings (`share` says how many).
    """

    placement: str
    both: tuple[Usable, ...] = ()
    forward: tuple[Usable, ...] = ()
    part: tuple[Usable, ...] = ()

    @property
    def nothing(self) -> bool:
        return not (self.both or self.forward or self.part)


@dataclass(frozen=True)
class RemedyView:
    """A remedy and whether this scan saw it working (`proof`, in words)."""

    kind: str
    text: str
    code: str
    proven: bool
    proof: str


@dataclass(frozen=True)
class FindingView:
    """A finding with what a reader asks next: where it is seen, and what to do first."""

    rule: str
    name: str
    severity: Severity
    title: str
    where: str
    details: tuple[str, ...]
    remedies: tuple[RemedyView, ...]
    cases: tuple[str, ...]
    fingerprint: str

    @property
    def first_remedy(self) -> int | None:
        """Index of the remedy to show in full: the best one that has code; they come best first."""
        if not self.remedies:
            return None
        return next((i for i, remedy in enumerate(self.remedies) if remedy.code), 0)


@dataclass(frozen=True)
class Group:
    """The findings about one kernel op, worst first; it is empty where no op stands out."""

    kernel_op: str
    findings: tuple[FindingView, ...]

    @property
    def title(self) -> str:
        return self.kernel_op or "No single kernel op"


@dataclass(frozen=True)
class Missing:
    """A kernel op without a sharding strategy: how many cases it stops, and of which operators."""

    op: str
    cases: int
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """Cases that had one status without a fix (`not run` where nobody knows), and have another with it."""

    before: str
    after: Status
    cases: tuple[str, ...]


@dataclass(frozen=True)
class NotRun:
    """Cases that did not run (or whose check failed) for the same reason."""

    count: int
    reason: str
    detail: str
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """A command that takes the reader on, and what it is for."""

    command: str
    purpose: str


@dataclass(frozen=True)
class View:
    """`missing` is empty where the headline names them all; `changes` but where a fix was verified;
    `comparison` where the report was held against another; `audit` where its cases are a model's attention
    calls, which are then told there by call, and not by placement."""

    headline: tuple[str, ...]
    changes: tuple[Change, ...]
    missing: tuple[Missing, ...]
    placements: tuple[str, ...]
    rows: tuple[Row, ...]
    compact: tuple[Row, ...]
    legend: tuple[Status, ...]
    works: tuple[Works, ...]
    groups: tuple[Group, ...]
    not_run: tuple[NotRun, ...]
    environment: tuple[tuple[str, str], ...]
    phases: tuple[tuple[str, str], ...]
    notices: tuple[str, ...]
    summary: tuple[tuple[Status, int], ...]
    severities: tuple[tuple[Severity, int], ...]
    exit_line: str
    steps: tuple[Step, ...]
    comparison: ComparisonView | None = None
    audit: AuditView | None = None

    @property
    def findings(self) -> tuple[FindingView, ...]:
        return tuple(finding for group in self.groups for finding in group.findings)

    @property
    def regressions(self) -> tuple[FindingView, ...]:
        """Of a comparison, the findings about cases that got worse."""
        worse = self.comparison.regressed if self.comparison is not None else frozenset()
        found = (f for f in self.findings if any((case, f.rule) in worse for case in f.cases))
        return tuple(sorted(found, key=lambda finding: finding.severity.rank))


def build(report: Report) -> View:
    """Everything that a format needs of a report, for any report that `load_report` accepts."""
    report = _shown(report)
    # What no case could be planned of has nothing to lay out; it is in `not_run`.
    planned = [r for r in report.cases if r.case.placement != UNPLANNED]
    placements = placements_of(planned)
    rows = _rows(planned, placements, with_setting=True)
    works = tuple(_works(planned, placement) for placement in placements)
    groups = _groups(report)
    audit = _audit(report)
    statuses = {result.outcome.status for result in report.cases}
    return View(
        headline=audit.headline if audit else _headline(report, works),
        changes=_changes(report.cases),
        missing=_missing_list(report.cases),
        placements=placements,
        rows=rows,
        compact=() if audit else _merged(_rows(_ran(planned), placements, with_setting=False)),
        legend=tuple(status for status in Status if status in statuses),
        works=() if audit else works,
        groups=groups,
        not_run=not_run(report.cases),
        environment=surroundings.environment(report),
        phases=surroundings.phases(report.environment),
        notices=surroundings.notices(report.environment),
        summary=tuple((Status(name), number) for name, number in report.summary.items()),
        severities=_severities(report.findings),
        exit_line=_exit_line(report),
        steps=_steps(report, groups, audit),
        comparison=changes.build(report.comparison, report.cases) if report.comparison else None,
        audit=audit,
    )


def _audit(report: Report) -> AuditView | None:
    if report.audit is None:
        return None
    command = str(report.environment.get("command", ""))
    return auditview.build(report.audit, report.cases, command)


def _shown(report: Report) -> Report:
    """The report, cleaned, with what a view shows of each case: the rest is nine tenths of its text."""
    return dataclasses.replace(
        report,
        environment=clean_tree(report.environment),
        cases=tuple(map(shown_case, report.cases)),
        findings=clean_tree(report.findings),
    )


def shown_case(result: CaseResult) -> CaseResult:
    case, outcome = result.case, result.outcome
    name = {"name": clean(str(case.setting["name"]))} if "name" in case.setting else {}
    return CaseResult(
        Case(
            id=clean(case.id),
            probe=clean(case.probe),
            operator=clean(case.operator),
            route=clean(case.route),
            setting=name,
            mesh={clean(axis): size for axis, size in case.mesh.items()},
            placement=clean(case.placement),
            placements={},
            direction=clean(case.direction),
        ),
        Outcome(
            outcome.status,
            clean(outcome.message),
            clean(outcome.kernel_op),
            outcome.reason,
            clean(outcome.exception_type),
            missing_ops=clean_tree(outcome.missing_ops),
            collectives=clean_tree(outcome.collectives),
            spread={clean(name): spread for name, spread in outcome.spread.items()},
            standins=clean_tree(outcome.standins),
        ),
        result.before,
    )


# --- who, where ----------------------------------------------------------------------------------


def operator_name(result: CaseResult) -> str:
    """The operator as shown: with its route where that is not plain dispatch."""
    case = result.case
    name = one_line(case.operator, 80)
    return name if case.route == "dtensor" else f"{name} via {one_line(case.route, 40)}"


def setting_name(result: CaseResult) -> str:
    # A report from elsewhere may lack the name that our planner always gives.
    return one_line(str(result.case.setting.get("name", "(unnamed)")), 60)


def mesh_text(mesh: Mapping[str, Any]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in mesh.items())


def placements_of(results: Sequence[CaseResult]) -> tuple[str, ...]:
    """The placements of a report, in the order in which the patterns are defined, then others."""
    order = {name: i for i, name in enumerate(PATTERNS)}
    names = dict.fromkeys(one_line(result.case.placement, 60) for result in results)
    return tuple(
        sorted(names, key=lambda n: [order.get(part, len(order)) for part in n.split(",")])
    )


def grouped(
    results: Iterable[CaseResult], key: Callable[[CaseResult], T]
) -> dict[T, list[CaseResult]]:
    groups: dict[T, list[CaseResult]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups


# --- the matrix ----------------------------------------------------------------------------------


def _rows(
    results: Sequence[CaseResult], placements: Sequence[str], *, with_setting: bool
) -> tuple[Row, ...]:
    several_meshes = len({mesh_text(r.case.mesh) for r in results}) > 1

    def setting(result: CaseResult) -> str:
        mesh = f" ({mesh_text(result.case.mesh)})" if several_meshes else ""
        return setting_name(result) + mesh if with_setting else ""

    # The plan orders cases by what is cheap to run; here an operator's rows stand together.
    order = {who: i for i, who in enumerate(dict.fromkeys(map(operator_name, results)))}
    settings = {s: i for i, s in enumerate(dict.fromkeys(map(setting, results)))}
    rows = grouped(
        results, lambda r: (operator_name(r), setting(r), one_line(r.case.direction, 20))
    )
    keys = sorted(rows, key=lambda k: (order[k[0]], settings[k[1]], k[2] != "forward", k[2]))
    return tuple(Row(*key, cells=_cells(rows[key], placements)) for key in keys)


def _ran(results: Sequence[CaseResult]) -> Sequence[CaseResult]:
    """Without the operators of which nothing ran (they are in `not_run`), unless that is all of them."""
    ran = {operator_name(r) for r in results if r.outcome.status is not Status.UNAVAILABLE}
    return [r for r in results if operator_name(r) in ran] or results


def _merged(rows: Iterable[Row]) -> tuple[Row, ...]:
    """One row where an operator's directions have the same cells."""
    out: list[Row] = []
    for row in rows:
        if out and (out[-1].operator, out[-1].cells) == (row.operator, row.cells):
            out[-1] = dataclasses.replace(out[-1], direction=BOTH)
        else:
            out.append(row)
    return tuple(out)


def _cells(results: Sequence[CaseResult], placements: Sequence[str]) -> tuple[Cell | None, ...]:
    by_placement = grouped(results, lambda r: one_line(r.case.placement, 60))
    return tuple(cell_of(by_placement[p]) if p in by_placement else None for p in placements)


def cell_of(results: Sequence[CaseResult]) -> Cell:
    statuses = [result.outcome.status for result in results]
    failed = [s for s in statuses if s.ran and not s.usable]
    hidden = not failed and Status.UNKNOWN in statuses
    status = Status.UNKNOWN if hidden else worst(failed or statuses)
    total = sum(s is not Status.UNAVAILABLE for s in statuses)
    return Cell(status, sum(s.usable for s in statuses), total)


# --- what works ----------------------------------------------------------------------------------


def _works(results: Sequence[CaseResult], placement: str) -> Works:
    here = [r for r in results if one_line(r.case.placement, 60) == placement]
    found: dict[str, list[Usable]] = {"both": [], "forward": [], "part": []}
    for who, own in grouped(here, operator_name).items():
        kind, usable = usability(who, own)
        if usable is not None:
            found[kind].append(usable)
    return Works(placement, **{kind: tuple(usables) for kind, usables in found.items()})


def usability(who: str, results: Sequence[CaseResult]) -> tuple[str, Usable | None]:
    """Whether an operator's cases of one placement work in `both` directions, `forward`, `part`."""
    tried = [r for r in results if r.outcome.status is not Status.UNAVAILABLE]
    settings = grouped(tried, lambda r: (setting_name(r), mesh_text(r.case.mesh)))
    good = [cases for cases in settings.values() if _works_both(cases)]
    forward = [r for r in tried if r.case.direction == "forward"]
    share = f"{len(good)} of {count(len(settings), 'setting')}"
    if settings and len(good) == len(settings):
        return "both", _usable(who, tried)
    if forward and all(r.outcome.status.usable for r in forward):
        return "forward", _usable(who, forward, f"backward in {share}" if good else "")
    if good:
        return "part", _usable(who, [r for cases in good for r in cases], share)
    return "", None


def _works_both(results: Sequence[CaseResult]) -> bool:
    directions = {r.case.direction for r in results}
    return "backward" in directions and all(r.outcome.status.usable for r in results)


def _usable(who: str, results: Sequence[CaseResult], share: str = "") -> Usable:
    costliest = max(results, key=lambda r: (sum(c.bytes for c in r.outcome.collectives), r.case.id))
    cost = communication(costliest.outcome)
    return Usable(who, cost or "no communication", not cost, share)


def communication(outcome: Outcome) -> str:
    """`3 all_gather, 1 all_reduce, 96 KiB a rank`; empty without communication."""
    counts: Counter[str] = Counter()
    for collective in outcome.collectives:
        counts[one_line(collective.name, 40)] += collective.count
    if not counts:
        return ""
    calls = ", ".join(f"{number} {name}" for name, number in counts.most_common())
    return f"{calls}, {size(sum(c.bytes for c in outcome.collectives))} a rank"


# --- the headline --------------------------------------------------------------------------------


def _headline(report: Report, works: Sequence[Works]) -> tuple[str, ...]:
    """What is broken, then what works: a few sentences for a person whose job just died."""
    if not report.cases:
        return ("No case was planned: nothing was checked.",)
    if not any(result.outcome.status.ran for result in report.cases):
        return (_nothing_ran(report.cases),)
    return (*_problems(report.cases), *_what_works(report.cases, works), *_way_out(report))


def _way_out(report: Report) -> tuple[str, ...]:
    """Where the next step stands, for whoever stops reading here."""
    mended = sum(1 for f in report.findings if f.severity is Severity.ERROR and f.remedies)
    if not mended:
        return ()
    return (
        f"The way out of {count(mended, 'error')} stands below under Findings, at `do`: code to paste, and "
        "whether this scan saw it work.",
    )


def _nothing_ran(results: Sequence[CaseResult]) -> str:
    reasons = Counter(why_not_run(result.outcome) for result in results)
    cases = count(len(results), "case")
    return f"Nothing ran: {cases} ({listing(reasons)}). Nothing can be concluded."


def missing_kernel_ops(results: Iterable[CaseResult]) -> tuple[str, ...]:
    """Every kernel op without a sharding strategy: forward ones first, then by cases stopped."""
    cases: Counter[str] = Counter()
    forward: set[str] = set()
    for result in results:
        missing = {(one_line(op.op, 160), op.phase) for op in _missing_ops(result.outcome)}
        cases.update({op for op, _ in missing})
        forward |= {op for op, phase in missing if phase != "backward"}
    return tuple(sorted(cases, key=lambda op: (op not in forward, -cases[op], op)))


def _missing_ops(outcome: Outcome) -> tuple[MissingOp, ...]:
    named = tuple(op for op in outcome.missing_ops if op.kind in ("strategy", "propagation"))
    if not named and outcome.status is Status.MISSING_STRATEGY and outcome.kernel_op:
        return (MissingOp(outcome.kernel_op, "", "strategy", ""),)
    return named


# "Which ones?" is the question of somebody whose job just died: they are all named, in the headline where
# that can be read, and else in a list of their own.
NAMED_IN_HEADLINE = 6


def _missing_list(results: Sequence[CaseResult]) -> tuple[Missing, ...]:
    ops = missing_kernel_ops(results)
    if len(ops) <= NAMED_IN_HEADLINE:
        return ()
    stopped: dict[str, list[CaseResult]] = {op: [] for op in ops}
    for result in results:
        for op in {one_line(op.op, 160) for op in _missing_ops(result.outcome)}:
            stopped[op].append(result)
    return tuple(
        Missing(op, len(hit), tuple(dict.fromkeys(map(operator_name, hit))))
        for op, hit in stopped.items()
    )


def _changes(results: Sequence[CaseResult]) -> tuple[Change, ...]:
    """Worst first."""
    if all(result.before is None for result in results):
        return ()
    cases: dict[tuple[str, Status], list[str]] = {}
    for result in results:
        before = STYLES[result.before].word if result.before is not None else "not run"
        cases.setdefault((before, result.outcome.status), []).append(result.case.id)
    ordered = sorted(cases.items(), key=lambda item: (item[0][1].rank, item[0][0]))
    return tuple(Change(before, after, tuple(ids)) for (before, after), ids in ordered)


def _missing(results: Sequence[CaseResult]) -> str:
    ops = missing_kernel_ops(results)
    if not ops:
        return ""
    verb = "kernel op has" if len(ops) == 1 else "kernel ops have"
    if len(ops) <= NAMED_IN_HEADLINE:
        return f"{len(ops)} {verb} no sharding strategy: {', '.join(ops)}."
    return (
        f"{len(ops)} {verb} no sharding strategy, all listed under Missing: "
        f"{listing(ops, NAMED_IN_HEADLINE // 2)}."
    )


def _bypasses(outcome: Outcome) -> bool:
    return outcome.exception_type == BYPASSES_DISPATCHER


# What else is said of the cases of which something holds, most alarming first.
_BROKEN: tuple[tuple[str, Callable[[Outcome], bool]], ...] = (
    ("wrong numbers without any error", lambda o: o.status is Status.WRONG),
    (
        "hang, crash or ranks that diverge",
        lambda o: o.status in (Status.HANG, Status.CRASH, Status.DIVERGED),
    ),
    ("functions that DTensors would reach as null pointers", _bypasses),
    ("plain tensors mixed with DTensors", lambda o: o.status is Status.MIXED_TENSOR),
    ("other exceptions", lambda o: o.status is Status.ERROR and not _bypasses(o)),
    ("rounding that grew", lambda o: o.status is Status.DRIFT),
)


def _problems(results: Sequence[CaseResult]) -> tuple[str, ...]:
    missing = _missing(results)
    others = []
    for what, holds in _BROKEN:
        hit = [r for r in results if holds(r.outcome)]
        if hit:
            who = listing(dict.fromkeys(map(operator_name, hit)), 2)
            others.append(f"{what} in {count(len(hit), 'case')} ({who})")
    if not missing and not others:
        return ("Every case that ran gave right results.",)
    text = "; ".join(others)
    also = f"Also found: {text}." if missing else f"Found: {text}."
    return tuple(sentence for sentence in (missing, also if others else "") if sentence)


def _what_works(results: Sequence[CaseResult], works: Sequence[Works]) -> Iterable[str]:
    best = placement_to_name(works)
    if best is None:
        return
    operators = len(
        {operator_name(r) for r in results if one_line(r.case.placement, 60) == best.placement}
    )
    name = (
        f"{best.placement} sharded"
        if best.placement in ("heads", "batch", "sequence")
        else best.placement
    )
    if best.both:
        verb = f"{'operator' if operators == 1 else 'operators'} work{'s' * (len(best.both) == 1)}"
        names = listing((usable.operator for usable in best.both), 4)
        yield f"{len(best.both)} of {operators} {verb} with {name}, forward and backward: {names}."
    else:
        yield f"No operator works in every setting with {name}, forward and backward."


def placement_to_name(works: Sequence[Works]) -> Works | None:
    """The placement that the headline is about: heads, as tensor parallelism shards, if tried."""
    for wanted in (
        lambda n: n == "heads",
        lambda n: "heads" in n.split(","),
        lambda n: n != "replicate",
    ):
        found = next((w for w in works if wanted(w.placement)), None)
        if found is not None:
            return found
    return works[0] if works else None


# --- findings ------------------------------------------------------------------------------------


def _groups(report: Report) -> tuple[Group, ...]:
    """What stops most cases first: jobs die of it. Then the worst first."""
    by_id = {result.case.id: result for result in report.cases}
    groups: dict[str, list[Finding]] = {}
    lead = _leading_op(report.cases)
    for finding in sorted(
        report.findings,
        key=lambda f: (one_line(f.kernel_op, 160) != lead, *badness(f, by_id)),
    ):
        groups.setdefault(one_line(finding.kernel_op, 160), []).append(finding)
    return tuple(
        Group(op, tuple(finding_view(finding, by_id) for finding in findings))
        for op, findings in groups.items()
    )


def _leading_op(results: Sequence[CaseResult]) -> str:
    """The first op without a strategy, or the function that is no op where that stops more cases."""
    cases = Counter(one_line(r.outcome.kernel_op, 160) for r in results if _bypasses(r.outcome))
    first = missing_kernel_ops(results)[:1]
    for result in results:
        cases.update({one_line(op.op, 160) for op in _missing_ops(result.outcome)} & set(first))
    return max([*first, *cases], key=lambda op: cases[op], default="")


def badness(finding: Finding, by_id: Mapping[str, CaseResult]) -> tuple[int, int, int, str, str]:
    statuses = [by_id[case].outcome.status for case in finding.cases if case in by_id]
    rank = worst(statuses).rank if statuses else len(Status)
    return (finding.severity.rank, rank, -len(finding.cases), finding.rule, finding.fingerprint)


def finding_view(finding: Finding, by_id: Mapping[str, CaseResult]) -> FindingView:
    results = [by_id[case] for case in finding.cases if case in by_id]
    return FindingView(
        rule=one_line(finding.rule, 40),
        name=one_line(finding.name, 80),
        severity=finding.severity,
        title=one_line(finding.title, 300),
        where=_where(finding, results),
        details=_details(finding, results),
        remedies=tuple(_remedy(remedy, by_id) for remedy in finding.remedies),
        cases=tuple(one_line(case, 300) for case in finding.cases),
        fingerprint=one_line(finding.fingerprint, 80),
    )


# Rules begin a message with the extent of a finding: `where` need not say the same again.
_OPERATORS, _PLACEMENTS = "Operators: ", "Placements affected: "


def _where(finding: Finding, results: Sequence[CaseResult]) -> str:
    """`flash_attn_func; batch, heads; forward and backward; 12 cases`."""
    parts = [
        listing(dict.fromkeys(map(operator_name, results)), 4),
        "" if _PLACEMENTS in finding.message else listing(placements_of(results), 7),
        " and ".join(sorted({one_line(r.case.direction, 20) for r in results}, reverse=True)),
        count(len(finding.cases), "case"),
    ]
    return "; ".join(part for part in parts if part)


def _details(finding: Finding, results: Sequence[CaseResult]) -> tuple[str, ...]:
    """The finding's own message, line by line; without one, what its worst case said."""
    text = finding.message
    if not text and results:
        text = min(results, key=lambda r: r.outcome.status.rank).outcome.message
    lines = [one_line(line, 2000) for line in text.split("\n") if not line.startswith(_OPERATORS)]
    return tuple(line for line in lines if line)


_NOT_RUN = "Not run in this scan."


def _remedy(remedy: Remedy, by_id: Mapping[str, CaseResult]) -> RemedyView:
    """Evidence is believed only as far as the report itself shows those cases to be right."""
    seen = sum(case in by_id and by_id[case].outcome.status.usable for case in remedy.evidence)
    if seen:
        proof = f"seen working in this scan: {count(seen, 'case')}"
    elif remedy.evidence:
        proof = "its evidence is not in this report"
    else:
        proof = "not run in this scan"
    text = one_line(remedy.text, 2000).removesuffix(_NOT_RUN).rstrip()
    return RemedyView(one_line(remedy.kind, 40), text, remedy.code.strip("\n"), seen > 0, proof)


def _severities(findings: Iterable[Finding]) -> tuple[tuple[Severity, int], ...]:
    counts = Counter(finding.severity for finding in findings)
    return tuple((severity, counts[severity]) for severity in Severity if counts[severity])


# --- cases that did not run ----------------------------------------------------------------------


def why_not_run(outcome: Outcome) -> str:
    if outcome.status is Status.UNKNOWN:
        return "the check itself failed"
    return REASONS[outcome.reason] if outcome.reason else "unavailable, no reason given"


def _detail(outcome: Outcome) -> str:
    """What was said, on one line. Of a refusal in many lines, the first: ATN401 shows them all."""
    said = outcome.message.strip()
    if outcome.status is Status.UNAVAILABLE:
        said = said.partition("\n")[0]
    return one_line(said, 300)


def not_run(results: Iterable[CaseResult]) -> tuple[NotRun, ...]:
    idle = [result for result in results if not result.outcome.status.ran]
    groups = grouped(idle, lambda r: (why_not_run(r.outcome), _detail(r.outcome)))
    found = [
        NotRun(len(own), reason, detail, tuple(dict.fromkeys(map(operator_name, own))))
        for (reason, detail), own in groups.items()
    ]
    return tuple(sorted(found, key=lambda n: -n.count))


# --- how to go on --------------------------------------------------------------------------------


def _exit_line(report: Report) -> str:
    """The exit code of this scan and why, in words: what `commands.common.exit_code` decides."""
    # A check that failed says nothing of the operator: it makes a scan inconclusive, never failed.
    counts = dict(_severities(f for f in report.findings if f.rule not in UNJUDGED))
    errors, warnings = counts.get(Severity.ERROR, 0), counts.get(Severity.WARNING, 0)
    if errors:
        return f"{count(errors, 'error')}: exit code 1 with the default --fail-on error."
    inconclusive = report.inconclusive
    if inconclusive and not any(result.outcome.status.ran for result in report.cases):
        return "Nothing ran, so the scan is inconclusive: exit code 3."
    found = f"No errors, {count(warnings, 'warning')}" if warnings else "No errors or warnings"
    if inconclusive:
        return f"{found}, but too much did not run to call it clean: exit code 3."
    return f"{found}: exit code 0 with the default --fail-on error."


EXIT_CODES = "0 clean, 1 findings at or above --fail-on, 2 usage or internal error, 3 inconclusive"


def _steps(report: Report, groups: Sequence[Group], audit: AuditView | None) -> tuple[Step, ...]:
    if report.comparison is not None:
        return tuple(_steps_after(report.comparison))
    steps = []
    first = groups[0].findings[0] if groups else None
    if first is not None:
        steps.append(
            Step(f"attncheck explain {first.rule}", f"what {first.name or first.rule} means")
        )
    if audit is not None:
        return (*steps, *(Step(command, purpose) for command, purpose in audit.steps))
    options = _what_brings_it(str(report.environment.get("command", "")))
    if first is not None and (globs := _mendable(report, first)):
        chosen = [option for option in options if not option.startswith("--ranks")]
        command = " ".join(["attncheck fix", *chosen, globs, "--write attncheck_fixes.py"])
        steps.append(Step(command, "a module that registers its strategies, once it is verified"))
    operator = _operator_of(report, first)
    if operator:
        command = " ".join(["attncheck scan", *options, f"--operator {shlex.quote(operator)} -v"])
        steps.append(Step(command, "run it alone, every case listed"))
    if isinstance(report.environment.get("mesh"), Mapping):  # of several it is a list
        steps.append(
            Step(
                "attncheck scan ... --mesh 2 --mesh 3 --mesh 2x2",
                "what is right on 2 ranks can be wrong on 3 or on two axes",
            )
        )
    drifts = any(r.outcome.status is Status.DRIFT for r in report.cases)
    if drifts and not any(r.outcome.spread for r in report.cases):
        steps.append(
            Step("attncheck scan ... --repeats 20", "twenty sets of values: is a drift rounding?")
        )
    steps.append(
        Step("attncheck scan ... --output markdown:report.md", "a report to paste into an issue")
    )
    steps.append(
        Step("attncheck scan ... --output json:report.json", "everything, for CI or other formats")
    )
    return tuple(steps)


def _steps_after(comparison: Comparison) -> Iterable[Step]:
    """What to do about a comparison."""
    rules = (rule for c in comparison.changes if c.kind.regressed for rule in c.rules)
    if rule := next(rules, ""):
        yield Step(f"attncheck explain {one_line(rule, 40)}", "what the first one means")
    if not comparison.verdict:
        yield Step("attncheck diff ... -v", "every case, and the whole of the newer report")
        return
    yield Step("attncheck gate ... -v", "every case, and the whole report")
    yield Step("attncheck gate ... --output html:report.html", "the same to click through")
    if any(change.kind.regressed for change in comparison.changes):
        yield Step("attncheck baseline write", "live with it: write it down as known")
    if comparison.stale:
        yield Step("attncheck baseline prune", "remove what is stale")


# Options of a scan without which its operators are not there, or not on the same ranks.
_BRINGING = ("--with", "--import", "--probe", "--device", "--mesh", "--ranks")


def _what_brings_it(command: str) -> list[str]:
    """Of a scan's command line, what another scan of one of its operators needs too.

    >>> _what_brings_it("attncheck scan --with flash-attn --level quick --ranks=4 -q")
    ['--with flash-attn', '--ranks 4']
    """
    try:
        words = shlex.split(command)
    except ValueError:
        return []
    parts = [word.split("=", 1) if word.startswith("--") else [word] for word in words]
    pairs = itertools.pairwise(itertools.chain.from_iterable(parts))
    return [f"{option} {shlex.quote(value)}" for option, value in pairs if option in _BRINGING]


def _mendable(report: Report, first: FindingView) -> str:
    """The option that selects the ops of the first finding's package which lack a strategy, or ''."""
    if not first.rule.startswith("ATN10"):
        return ""
    ids = {*first.cases}
    missing = (m for r in report.cases if r.case.id in ids for m in r.outcome.missing_ops)
    ops = [m.op for m in missing if m.kind != "mixed" and not m.op.startswith("higher_order.")]
    namespace, _, _ = ops[0].partition(".") if ops else ("", "", "")
    # PyTorch's own ops are many, and most of them somebody else's business.
    glob = f"{namespace}.*" if namespace not in ("", "aten") else "".join(ops[:1])
    return f"--kernel-op {shlex.quote(glob)}" if glob else ""


def _operator_of(report: Report, first: FindingView | None) -> str:
    if first is None or not first.cases:
        return ""
    wanted = first.cases[0]
    return next(
        (one_line(r.case.operator, 80) for r in report.cases if one_line(r.case.id, 300) == wanted),
        "",
    )
