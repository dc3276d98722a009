"""The view of a matrix that every format renders: which combination works, and what changed between versions.

Beside `attncheck.view`, which does the same for one report. As there, all text is free of control
characters, and escaping is the format's business. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from packaging.version import InvalidVersion, Version

from attncheck import casesview, compare, surroundings, view
from attncheck.casesview import CasesView
from attncheck.cells import Bisection, Cell, Matrix, Turn
from attncheck.model import (
    UNPLANNED,
    Case,
    CaseChange,
    CaseResult,
    ChangeKind,
    Finding,
    Outcome,
    Reason,
    Report,
    Severity,
    Status,
)
from attncheck.text import clean, clean_tree, count, listing, one_line
from attncheck.view import BOTH, STYLES, FindingView, Row, Step, Works, operator_name

# Of a version, as a key: which of its packages has which version; '' where the cell is without.
Versions = Mapping[str, str]


@dataclass(frozen=True)
class Combination:
    """A cell of the matrix, in numbers.

    `works`: how many operators are right with the view's placement, forward and backward; `right` cases of
    `ran`, `free` ones of these (without communication nobody asked for), `wrong` ones, `died` ones (hang,
    crash, ranks that diverged), and `idle` ones, which did not run. `best`: no other has more operators that
    work, nor as many and more cases that are right, nor as many and more that are free. `environment`: what
    of its surroundings not all cells have; `notices` likewise. `ran` is 0 where there is no report, for the
    reason in `problem`.
    """

    name: str
    works: int = 0
    right: int = 0
    free: int = 0
    ran: int = 0
    wrong: int = 0
    died: int = 0
    idle: int = 0
    reused: int = 0
    best: bool = False
    problem: str = ""
    environment: tuple[tuple[str, str], ...] = ()
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grid:
    """Operators down, versions of one package (`across`) over the top.

    A row holds for all versions of the other packages, or for those in its `setting`. `title` says which
    cases it is about.
    """

    title: str
    across: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def differing(self) -> tuple[Row, ...]:
        """Rows whose cells are not all alike, or that hold for some versions of other packages only."""
        return tuple(row for row in self.rows if row.setting or len(set(row.cells)) > 1)

    @property
    def folded(self) -> Grid:
        """With neighbouring columns that are alike in every row as one."""
        columns = [*zip(*(row.cells for row in self.rows), strict=True)]
        runs: list[list[int]] = []
        for at in range(len(columns)):
            if runs and columns[at] == columns[runs[-1][0]]:
                runs[-1].append(at)
            else:
                runs.append([at])
        if len(runs) in (0, len(columns)):
            return self
        rows = (
            dataclasses.replace(row, cells=tuple(row.cells[run[0]] for run in runs))
            for row in self.rows
        )
        names = tuple(_run([self.columns[at] for at in run]) for run in runs)
        return dataclasses.replace(self, columns=names, rows=tuple(rows))


class Way(str, Enum):
    """How cases changed from one version to another, in the order in which it is told."""

    WORSE = "worse"
    GONE = "gone"  # could be run before, and no more
    COSTLIER = "costlier"  # right before and after, with more communication
    BETTER = "better"
    CHEAPER = "cheaper"
    NEW = "new"  # could not be run before, whatever comes of it now


@dataclass(frozen=True)
class Move:
    """Cases of one operator that changed in the same way. `before` and `after` are statuses in words;
    `where`: placements, directions, settings; `others`: in which versions of the other packages, empty for
    all; `detail`: the numbers of one of them; `lost`: they were right, and no longer are."""

    way: Way
    operator: str
    before: str
    after: str
    rules: tuple[str, ...]
    where: str
    others: str
    detail: str
    cases: tuple[str, ...]
    lost: bool

    @property
    def change(self) -> str:
        """`supported -> wrong (ATN201)`."""
        rules = f" ({listing(self.rules)})" if self.rules else ""
        words = self.after if self.before == self.after else f"{self.before} -> {self.after}"
        return words + rules

    @property
    def extent(self) -> str:
        """`2 cases; heads; forward; causal; with flash-attn 2.8.3`."""
        others = f"with {self.others}" if self.others else ""
        parts = (count(len(self.cases), "case"), self.where, others, self.detail)
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True)
class Shift:
    """What changed from one version of a package to the next one of the matrix, all others being equal."""

    package: str
    before: str
    after: str
    moves: tuple[Move, ...]

    @property
    def title(self) -> str:
        return f"{self.package} {self.before} -> {self.after}"

    def by_way(self) -> dict[Way, list[Move]]:
        return {
            way: own for way in Way if (own := [move for move in self.moves if move.way is way])
        }

    @property
    def counted(self) -> str:
        """`12 cases worse, 3 new`."""
        totals = {
            way: len({case for move in moves for case in move.cases})
            for way, moves in self.by_way().items()
        }
        return ", ".join(f"{number} {way.value}" for way, number in totals.items()) or "no change"


@dataclass(frozen=True)
class Spread:
    """A finding (`mark` tells it from others) as it is in the newest cell that has it (`of`), and in which
    cells it is: `seen`; `not_in` those whose cases have none of it, and `idle` those in which none of them
    ran. `seen` is empty for all cells, the others for none."""

    mark: tuple[str, str]
    finding: FindingView
    of: str
    seen: str
    not_in: str
    idle: str

    @property
    def extent(self) -> str:
        """`torch 2.6.0 and 2.9.1; not in torch 2.11.0 to 2.15.0`."""
        parts = (
            self.seen or "every combination",
            f"not in {self.not_in}" if self.not_in else "",
            f"could not run in {self.idle}" if self.idle else "",
        )
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True)
class Idle:
    """Cases that did not run for the same reason: how many in each cell (`45 to 143 cases`), in which
    `cells`; empty for all."""

    cases: str
    reason: str
    detail: str
    operators: tuple[str, ...]
    cells: str


@dataclass(frozen=True)
class BisectionView:
    """`answer`: sentences; `turns`: what changed, in how many cases; `skipped`: versions and why."""

    answer: tuple[str, ...]
    turns: tuple[tuple[str, str, str], ...]
    tried: str
    skipped: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class MatrixView:
    """`placement`: what `Combination.works` is about, of `operators`. `environment`: what all cells share.
    `grids`: with this placement first, where there are several."""

    headline: tuple[str, ...]
    notices: tuple[str, ...]
    bisection: BisectionView | None
    placement: str
    operators: int
    combinations: tuple[Combination, ...]
    grids: tuple[Grid, ...]
    legend: tuple[Status, ...]
    shifts: tuple[Shift, ...]
    findings: tuple[Spread, ...]
    severities: tuple[tuple[Severity, int], ...]
    idle: tuple[Idle, ...]
    environment: tuple[tuple[str, str], ...]
    steps: tuple[Step, ...]

    @property
    def unbuilt(self) -> tuple[Combination, ...]:
        return tuple(each for each in self.combinations if not each.ran and each.problem)

    @property
    def reused(self) -> str:
        """`12 of 1400 were known from before, and not run again`; empty where none was."""
        reused = sum(each.reused for each in self.combinations)
        total = sum(each.ran + each.idle for each in self.combinations)
        return f"{reused} of {total} were known before, and not run again" if reused else ""

    @property
    def sharded(self) -> str:
        """`heads sharded`."""
        return _sharded(self.placement)


def build(matrix: Matrix) -> MatrixView:
    """Everything that a format needs of a matrix, for any that `attncheck.saved.read` accepts."""
    shown = _Shown()
    cells = [_Ran.of(cell, shown) for cell in _in_order(matrix.cells)]
    # A report may have findings without a case: what could not be loaded.
    built = [cell for cell in cells if cell.report is not None]
    ran = [cell for cell in built if cell.results]
    all_built, laid = (_Laid.of([cell.versions for cell in own]) for own in (built, ran))
    placements = view.placements_of([r for cell in ran for r in cell.results])
    lead = view.placement_to_name([Works(placement) for placement in placements])
    placement = lead.placement if lead else ""
    combinations, operators = _combinations(cells, placement)
    shifts = _shifts(ran, laid)
    findings = _findings(built, all_built)
    shared, combinations = _environments(matrix, cells, combinations)
    statuses = {result.outcome.status for cell in ran for result in cell.results}
    made = MatrixView(
        headline=(),
        notices=_shared_notices(matrix, cells),
        bisection=_bisection(matrix.bisection, ran) if matrix.bisection else None,
        placement=placement,
        operators=operators,
        combinations=combinations,
        grids=_grids(ran, laid, placements, placement),
        legend=tuple(status for status in Status if status in statuses),
        shifts=shifts,
        findings=findings,
        severities=_severities(findings),
        idle=_idle(built, all_built),
        environment=shared,
        steps=(),
    )
    headline = _headline(made, cells, laid)
    return dataclasses.replace(made, headline=headline, steps=_steps(made, matrix, ran))


def cases(matrix: Matrix, made: MatrixView) -> CasesView:
    """Every case of every cell; `version` says of which. Of a case that is right and communicates nothing
    there is no more to say, or ten cells would be too much for a page. `made`: what `build` makes of the
    same matrix."""
    numbers = {spread.mark: number for number, spread in enumerate(made.findings)}
    parts = []
    for cell, combination in zip(_in_order(matrix.cells), made.combinations, strict=True):
        if cell.report is None:
            continue
        findings: dict[str, list[int]] = {}
        for finding in cell.report.findings:
            for case in finding.cases:
                own = findings.setdefault(one_line(clean(case), 300), [])
                own.append(numbers[_mark(finding)])
        results = tuple(map(_in_brief, cell.report.cases))
        report = Report(cell.report.environment, results, ())
        parts.append(casesview.Part(report, combination.name, findings))
    return casesview.build_all(parts)


def _in_brief(result: CaseResult) -> CaseResult:
    outcome = result.outcome
    if outcome.status is not Status.SUPPORTED:
        return result
    return CaseResult(result.case, Outcome(outcome.status, standins=outcome.standins))


def _sharded(placement: str) -> str:
    return f"{placement} sharded" if placement in ("heads", "batch", "sequence") else placement


# --- cells ---------------------------------------------------------------------------------------


class _Shown:
    """Results, cleaned, with what this view shows of each. What cells share is cleaned once."""

    def __init__(self) -> None:
        self._cases: dict[int, Case] = {}

    def __call__(self, result: CaseResult) -> CaseResult:
        case = self._cases.get(id(result.case))
        if case is None:
            case = self._cases[id(result.case)] = view.shown_case(result).case
        outcome = result.outcome
        shown = Outcome(
            outcome.status,
            clean(outcome.message),
            reason=outcome.reason,
            standins=clean_tree(outcome.standins),
        )
        return CaseResult(case, shown)


@dataclass(frozen=True)
class _Ran:
    """A cell, cleaned. `results` leaves out what no case could be planned of; it is empty where there is no
    report. `report` is as it was read."""

    cell: Cell
    name: str
    versions: Versions
    results: tuple[CaseResult, ...] = ()
    report: Report | None = None
    known: Mapping[compare.Key, compare.Known] = field(default_factory=dict)

    @classmethod
    def of(cls, cell: Cell, shown: _Shown) -> _Ran:
        versions = {
            one_line(clean(package), 60): one_line(clean(version), 60)
            for package, version in cell.versions.items()
        }
        name = one_line(clean(cell.name), 200) or "(no versions)"
        if cell.report is None:
            return cls(cell, name, versions)
        results = tuple(shown(r) for r in cell.report.cases if r.case.placement != UNPLANNED)
        return cls(cell, name, versions, results, cell.report, compare.recall(cell.report))


_DIED = (Status.HANG, Status.CRASH, Status.DIVERGED)


def _combinations(cells: Sequence[_Ran], placement: str) -> tuple[tuple[Combination, ...], int]:
    """Each cell in numbers, and how many operators were planned with this placement in any."""
    planned: set[str] = set()
    made = []
    for cell in cells:
        here = [r for r in cell.results if one_line(r.case.placement, 60) == placement]
        by_operator = view.grouped(here, operator_name)
        planned |= set(by_operator)
        statuses = [result.outcome.status for result in cell.results]
        ran = sum(status.ran for status in statuses)
        made.append(
            Combination(
                name=cell.name,
                works=sum(_works(who, own) for who, own in by_operator.items()),
                right=sum(status.usable for status in statuses),
                free=statuses.count(Status.SUPPORTED),
                ran=ran,
                wrong=statuses.count(Status.WRONG),
                died=sum(status in _DIED for status in statuses),
                idle=len(statuses) - ran,
                reused=cell.cell.reused,
                problem=one_line(clean(cell.cell.problem), 600),
            )
        )
    best = max(map(_worth, made), default=(0, 0, 0))
    ranked = (
        dataclasses.replace(each, best=each.ran > 0 and _worth(each) == best) for each in made
    )
    return tuple(ranked), len(planned)


def _worth(combination: Combination) -> tuple[int, int, int]:
    return combination.works, combination.right, combination.free


def _works(who: str, results: Sequence[CaseResult]) -> bool:
    """Whether every case of an operator is right; one that was not come to leaves it open."""
    if any(result.outcome.reason is Reason.NOT_RUN for result in results):
        return False
    kind, _ = view.usability(who, results)
    return kind == "both"


# --- which versions ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Laid:
    """Some cells by their versions: `axes` are the packages that differ, `across` the one with most versions
    (of several, the first)."""

    cells: tuple[Versions, ...]
    axes: Mapping[str, tuple[str, ...]]
    across: str

    @classmethod
    def of(cls, cells: Sequence[Versions]) -> _Laid:
        packages = dict.fromkeys(package for cell in cells for package in cell)
        every = {p: ordered(c.get(p, "") for c in cells) for p in packages}
        axes = {package: own for package, own in every.items() if len(own) > 1}
        across = max(axes or every, key=lambda package: len(every[package]), default="")
        return cls(tuple(cells), axes, across)

    @property
    def columns(self) -> tuple[str, ...]:
        return ordered(cell.get(self.across, "") for cell in self.cells)

    def others(self, cell: Versions) -> tuple[str, ...]:
        """The versions of the packages that do not stand across."""
        return tuple(cell.get(p, "") for p in self.axes if p != self.across)

    def extent(self, chosen: Iterable[int]) -> str:
        """Some cells (by their place) in as few words as possible; empty for all of them."""
        some = sorted(set(chosen))
        if len(some) == len(self.cells):
            return ""
        axes = {p: self._versions(p, some) for p in self.axes}
        for package in (self.across, *self.axes):
            within = [
                i for i, c in enumerate(self.cells) if c.get(package, "") in axes.get(package, ())
            ]
            if within == some:
                return _of(package, self.axes[package], axes[package])
        product = [
            i
            for i, c in enumerate(self.cells)
            if all(c.get(p, "") in own for p, own in axes.items())
        ]
        if product == some:
            narrowed = [p for p, own in axes.items() if len(own) < len(self.axes[p])]
            return " with ".join(_of(p, self.axes[p], axes[p]) for p in narrowed)
        return listing((self._name(i) for i in some), 4)

    def _versions(self, package: str, some: Iterable[int]) -> tuple[str, ...]:
        own = {self.cells[i].get(package, "") for i in some}
        return tuple(version for version in self.axes[package] if version in own)

    def _name(self, at: int) -> str:
        return " + ".join(_of(p, (), (self.cells[at].get(p, ""),)) for p in self.axes)


def ordered(versions: Iterable[str]) -> tuple[str, ...]:
    """Different versions, the oldest first; in their order where one of them is none.

    >>> ordered(["2.13.0", "2.9.1", "2.13.0"])
    ('2.9.1', '2.13.0')
    """
    different = tuple(dict.fromkeys(versions))
    try:
        return tuple(sorted(different, key=lambda text: Version(text or "0")))
    except InvalidVersion:
        return different


def _in_order(cells: Sequence[Cell]) -> list[Cell]:
    """By their versions; of those with the same version of the first package, by the second."""
    packages = dict.fromkeys(package for cell in cells for package in cell.versions)
    order = {p: ordered(cell.versions.get(p, "") for cell in cells) for p in packages}
    return sorted(cells, key=lambda c: [order[p].index(c.versions.get(p, "")) for p in packages])


def _of(package: str, every: Sequence[str], some: Sequence[str]) -> str:
    """`torch 2.6.0 to 2.11.0`, where these are neighbours among all; `torch 2.6.0, 2.13.0`, where not."""
    has = [version for version in some if version]
    told = [f"{package} {_run(has, every)}"] if has else []
    return " or ".join([*told, *([f"no {package}"] if "" in some else [])])


def _run(some: Sequence[str], every: Sequence[str] = ()) -> str:
    """
    >>> _run(["2.6.0", "2.7.0", "2.8.0"]), _run(["2.6.0", "2.8.0"], ["2.6.0", "2.7.0", "2.8.0"])
    ('2.6.0 to 2.8.0', '2.6.0 and 2.8.0')
    """
    places = [every.index(version) for version in some] if every else [*range(len(some))]
    if len(some) > 2 and places == [*range(places[0], places[-1] + 1)]:
        return f"{some[0] or 'none'} to {some[-1] or 'none'}"
    names = [version or "none" for version in some]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


# --- operators by version ------------------------------------------------------------------------

Profile = dict[str, tuple["view.Cell | None", ...]]  # by direction, a cell for each column


def _grids(
    cells: Sequence[_Ran], laid: _Laid, placements: Sequence[str], placement: str
) -> tuple[Grid, ...]:
    if not cells:
        return ()
    tables = [_Table(cells, laid, "")]
    if len(placements) > 1:
        tables.insert(0, _Table(cells, laid, placement))
    return tuple(table.grid() for table in tables)


class _Table:
    """Lays out the cases of one placement, or of all."""

    def __init__(self, cells: Sequence[_Ran], laid: _Laid, placement: str) -> None:
        self.laid = laid
        self.placement = placement
        self.columns = laid.columns
        # (versions of the other packages, column) -> (operator, direction) -> results
        self.placed: dict[tuple[tuple[str, ...], str], dict[tuple[str, str], list[CaseResult]]] = {}
        self.operators: dict[str, None] = {}
        for cell in cells:
            at = laid.others(cell.versions), cell.versions.get(laid.across, "")
            here = self.placed.setdefault(at, {})
            for result in cell.results:
                if placement in ("", one_line(result.case.placement, 60)):
                    key = operator_name(result), one_line(result.case.direction, 20)
                    here.setdefault(key, []).append(result)
                    if result.outcome.status is not Status.UNAVAILABLE:
                        self.operators[key[0]] = None
        self.combos = sorted(
            {others for others, _ in self.placed},
            key=lambda combo: [
                laid.axes[package].index(version)
                for package, version in zip(self._other_packages(), combo, strict=True)
            ],
        )

    def grid(self) -> Grid:
        what = f"with {_sharded(self.placement)}" if self.placement else "with any placement"
        rows = [row for operator in self.operators for row in self.rows(operator)]
        names = tuple(version or "none" for version in self.columns)
        return Grid(what, self.laid.across, names, tuple(rows))

    def rows(self, operator: str) -> Iterable[Row]:
        others = _Laid.of(
            [dict(zip(self._other_packages(), combo, strict=True)) for combo in self.combos]
        )
        for places, profile in self.alike(operator):
            said = others.extent(places)
            rows = [
                Row(operator, said, direction, profile[direction])
                for direction in sorted(profile, key=lambda d: (d != "forward", d))
            ]
            if len(rows) > 1 and len({row.cells for row in rows}) == 1:
                rows = [dataclasses.replace(rows[0], direction=BOTH)]
            yield from rows

    def _other_packages(self) -> list[str]:
        return [package for package in self.laid.axes if package != self.laid.across]

    def alike(self, operator: str) -> list[tuple[list[int], Profile]]:
        """Combinations of the other packages between which the operator makes no difference."""
        groups: list[tuple[list[int], Profile, set[str]]] = []
        for at, combo in enumerate(self.combos):
            profile, there = self.profile(operator, combo)
            for places, known, covered in groups:
                if self.agree(profile, there, known, covered):
                    places.append(at)
                    self.fill(known, profile, there - covered)
                    covered |= there
                    break
            else:
                groups.append(([at], profile, there))
        return [(places, profile) for places, profile, _ in groups]

    def profile(self, operator: str, combo: tuple[str, ...]) -> tuple[Profile, set[str]]:
        """The operator's cells by direction, and the columns of which there is a cell of the matrix."""
        found: dict[str, dict[str, view.Cell]] = {}
        there = set()
        for column in self.columns:
            if (combo, column) in self.placed:
                there.add(column)
                for (who, direction), results in self.placed[combo, column].items():
                    if who == operator:
                        found.setdefault(direction, {})[column] = view.cell_of(results)
        return {d: tuple(own.get(c) for c in self.columns) for d, own in found.items()}, there

    def agree(self, one: Profile, there: set[str], other: Profile, covered: set[str]) -> bool:
        """Whether two profiles are the same wherever there is a cell of the matrix for both."""
        both = [i for i, column in enumerate(self.columns) if column in there & covered]
        empty: tuple[view.Cell | None, ...] = (None,) * len(self.columns)
        return all(
            one.get(direction, empty)[i] == other.get(direction, empty)[i]
            for direction in {**one, **other}
            for i in both
        )

    def fill(self, known: Profile, profile: Profile, columns: set[str]) -> None:
        """Take from the second what the first lacks."""
        for direction, cells in profile.items():
            own = known.get(direction, (None,) * len(self.columns))
            known[direction] = tuple(
                new if column in columns else old
                for column, old, new in zip(self.columns, own, cells, strict=True)
            )


# --- what changed --------------------------------------------------------------------------------


def _shifts(cells: Sequence[_Ran], laid: _Laid) -> tuple[Shift, ...]:
    """By package, then in the order of the versions."""
    found: dict[tuple[str, str, str], dict[int, list[CaseChange]]] = {}
    for package in laid.axes:
        for before, after in _neighbours(cells, package, laid):
            old, new = (cells[i].versions.get(package, "") or "none" for i in (before, after))
            changes = compare.compare(cells[before].known, cells[after].known)
            found.setdefault((package, old, new), {})[after] = [*changes]
    operators = _operators(cells)
    shifts = [
        Shift(package, before, after, _moves(by_cell, cells, laid, package, operators))
        for (package, before, after), by_cell in found.items()
    ]
    packages = [*laid.axes]
    order = {p: [version or "none" for version in own] for p, own in laid.axes.items()}
    shifts.sort(key=lambda s: (packages.index(s.package), order[s.package].index(s.after)))
    return tuple(shifts)


def _neighbours(cells: Sequence[_Ran], package: str, laid: _Laid) -> Iterable[tuple[int, int]]:
    """Pairs of cells that differ in this package alone, and have no other version of it between them."""
    lines: dict[tuple[str, ...], list[int]] = {}
    for i, cell in enumerate(cells):
        others = tuple(cell.versions.get(p, "") for p in laid.axes if p != package)
        lines.setdefault(others, []).append(i)
    for line in lines.values():
        line.sort(key=lambda i: laid.axes[package].index(cells[i].versions.get(package, "")))
        yield from itertools.pairwise(line)


def _operators(cells: Iterable[_Ran]) -> dict[str, CaseResult]:
    """A result for each case, by its id: for what all of them say alike."""
    return {r.case.id: r for cell in cells for r in cell.results}


Told = tuple[Way, str, "Status | None", "Status | None"]


def _moves(
    by_cell: Mapping[int, Sequence[CaseChange]],
    cells: Sequence[_Ran],
    laid: _Laid,
    package: str,
    results: Mapping[str, CaseResult],
) -> tuple[Move, ...]:
    """Changes in each of several cells (`by_cell`: that of the newer version), those alike once."""
    alike: dict[tuple[Told, frozenset[str]], dict[int, list[CaseChange]]] = {}
    for at, changes in by_cell.items():
        groups: dict[Told, list[CaseChange]] = {}
        for change in changes:
            way = _way(change)
            if way is not None:
                told = way, _operator(change, results), change.before, change.after
                groups.setdefault(told, []).append(change)
        for told, own in groups.items():
            cases = frozenset(change.case for change in own)
            alike.setdefault((told, cases), {})[at] = own
    line = _Laid.of(
        [{p: cells[at].versions.get(p, "") for p in laid.axes if p != package} for at in by_cell]
    )
    places = {at: i for i, at in enumerate(by_cell)}
    moves = [
        (
            told,
            _move(told, next(iter(own.values())), line.extent(places[at] for at in own), results),
        )
        for (told, _), own in alike.items()
    ]
    moves.sort(key=lambda pair: _alarm(*pair))
    return tuple(move for _, move in moves)


def _alarm(told: Told, move: Move) -> tuple[int, bool, int, int, str, str]:
    """The way, then what was right and no longer is, then what is worst, then what is most."""
    way, operator, _, after = told
    rank = after.rank if after is not None else len(Status)
    return [*Way].index(way), not move.lost, rank, -len(move.cases), operator, move.others


def _way(change: CaseChange) -> Way | None:
    """How a case changed; None where it did not, or where both are failures of the same kind."""
    ran_before = change.before is not None and change.before.ran
    ran_after = change.after is not None and change.after.ran
    if not ran_before:
        return Way.NEW if ran_after else None
    if not ran_after:
        return Way.GONE
    assert change.after is not None
    if change.before is change.after and not change.after.usable:
        return None
    right = _usable(change.before) and _usable(change.after)
    if change.kind is ChangeKind.COSTLIER or (
        right and change.before is Status.SUPPORTED is not change.after
    ):
        return Way.COSTLIER
    if change.kind.regressed or change.kind is ChangeKind.IGNORED:
        return Way.WORSE
    if change.kind in (ChangeKind.BETTER, ChangeKind.FIXED):
        return Way.CHEAPER if right else Way.BETTER
    return None


def _operator(change: CaseChange, results: Mapping[str, CaseResult]) -> str:
    case = clean(change.case)
    return operator_name(results[case]) if case in results else one_line(case, 80)


def _move(
    told: Told, changes: Sequence[CaseChange], others: str, results: Mapping[str, CaseResult]
) -> Move:
    way, operator, before, after = told
    ids = [clean(change.case) for change in changes]
    found = [results[case] for case in ids if case in results]
    aspects: tuple[Iterable[str], ...] = (
        view.placements_of(found),
        sorted({one_line(r.case.direction, 20) for r in found}, reverse=True),
        dict.fromkeys(view.setting_name(r) for r in found),
    )
    # A failed case says enough by its status.
    numbers = (change.detail for change in changes if change.detail)
    detail = next(numbers, "") if before is after else ""
    rules = dict.fromkeys(rule for change in changes for rule in change.rules)
    return Move(
        way=way,
        operator=operator,
        before=_word(before),
        after=_word(after),
        rules=tuple(one_line(clean(rule), 40) for rule in rules) if way is Way.WORSE else (),
        where="; ".join(text for names in aspects if (text := listing(names, 4))),
        others=others,
        detail=one_line(f"for one of them {detail}" if len(ids) > 1 and detail else detail, 300),
        cases=tuple(one_line(case, 300) for case in ids),
        lost=way is Way.WORSE and _usable(before) and not _usable(after),
    )


def _usable(status: Status | None) -> bool:
    return status is not None and status.usable


def _word(status: Status | None) -> str:
    return STYLES[status].word if status is not None else "not there"


# --- findings ------------------------------------------------------------------------------------


def _findings(cells: Sequence[_Ran], laid: _Laid) -> tuple[Spread, ...]:
    """Each once, the worst first; in which cells it is, and how it is in the newest of these."""
    found: dict[tuple[str, str], dict[int, Finding]] = {}
    for at, cell in enumerate(cells):
        for finding in cell.report.findings if cell.report else ():
            found.setdefault(_mark(finding), {})[at] = finding
    by_id = [{r.case.id: r for r in cell.results} for cell in cells]
    ran = [{case for case, r in own.items() if r.outcome.status.ran} for own in by_id]
    spreads = []
    for mark, own in found.items():
        newest = max(own)
        finding = clean_tree(own[newest])
        cases = {clean(case) for each in own.values() for case in each.cases}
        idle = [i for i in range(len(cells)) if i not in own and not cases & ran[i]]
        absent = [i for i in range(len(cells)) if i not in own and i not in idle]
        spread = Spread(
            mark=mark,
            finding=view.finding_view(finding, by_id[newest]),
            of=cells[newest].name,
            seen=laid.extent(own),
            not_in=laid.extent(absent) if absent else "",
            idle=laid.extent(idle) if idle else "",
        )
        spreads.append((view.badness(finding, by_id[newest]), -len(own), spread))
    spreads.sort(key=lambda each: (each[0][:2], each[1], each[0][2:]))
    return tuple(spread for _, _, spread in spreads)


def _mark(finding: Finding) -> tuple[str, str]:
    """What tells a finding from others, whatever the versions."""
    said = finding.fingerprint or f"{finding.kernel_op} {finding.title}"
    return clean(finding.rule), clean(said)


def _severities(findings: Iterable[Spread]) -> tuple[tuple[Severity, int], ...]:
    counts = Counter(spread.finding.severity for spread in findings)
    return tuple((severity, counts[severity]) for severity in Severity if counts[severity])


# --- what did not run ----------------------------------------------------------------------------


def _idle(cells: Sequence[_Ran], laid: _Laid) -> tuple[Idle, ...]:
    found: dict[tuple[str, str], dict[int, view.NotRun]] = {}
    for at, cell in enumerate(cells):
        for entry in view.not_run(_everything(cell)):
            found.setdefault((entry.reason, entry.detail), {})[at] = entry
    order = sorted(found.items(), key=lambda item: -max(e.count for e in item[1].values()))
    return tuple(
        Idle(
            _from_to([entry.count for entry in own.values()]),
            reason,
            detail,
            tuple(dict.fromkeys(o for entry in own.values() for o in entry.operators)),
            laid.extent(own),
        )
        for (reason, detail), own in order
    )


def _from_to(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return count(most, "case") if least == most else f"{least} to {count(most, 'case')}"


def _everything(cell: _Ran) -> Iterable[CaseResult]:
    """With what no case could be planned of."""
    cases = cell.report.cases if cell.report else ()
    yield from cell.results
    yield from (view.shown_case(r) for r in cases if r.case.placement == UNPLANNED)


# --- the environment -----------------------------------------------------------------------------


def _environments(
    matrix: Matrix, cells: Sequence[_Ran], combinations: Sequence[Combination]
) -> tuple[tuple[tuple[str, str], ...], tuple[Combination, ...]]:
    """What all cells share, and the combinations with what else theirs is."""
    own = [dict(_surroundings(cell)) for cell in cells]
    there = [pairs for pairs in own if pairs]
    shared = dict(_free_form(matrix))
    for name, text in (there[0] if there else {}).items():
        if len(there) > 1 and all(pairs.get(name) == text for pairs in there):
            shared.setdefault(name, text)
    common = _shared_notices(matrix, cells)
    with_own = (
        dataclasses.replace(
            combination,
            environment=tuple(p for p in pairs.items() if shared.get(p[0]) != p[1]),
            notices=tuple(notice for notice in _notices(cell) if notice not in common),
        )
        for combination, pairs, cell in zip(combinations, own, cells, strict=True)
    )
    return tuple(shared.items()), tuple(with_own)


def _surroundings(cell: _Ran) -> tuple[tuple[str, str], ...]:
    if cell.report is None:
        return ()
    env = clean_tree(cell.report.environment)
    return surroundings.environment(Report(env, cell.results, ()))


def _free_form(matrix: Matrix) -> Iterable[tuple[str, str]]:
    """What a matrix says of itself: that is for its maker to decide."""
    for name, value in clean_tree(matrix.environment).items():
        text = one_line(surroundings.in_words(value), 1000)
        if text and name not in ("notes", "probe_errors"):
            yield one_line(str(name).replace("_", " "), 60), text


def _notices(cell: _Ran) -> tuple[str, ...]:
    return surroundings.notices(clean_tree(cell.report.environment)) if cell.report else ()


def _shared_notices(matrix: Matrix, cells: Sequence[_Ran]) -> tuple[str, ...]:
    """Those that hold for every cell."""
    each = [_notices(cell) for cell in cells if cell.report is not None]
    common = [n for n in (each[0] if each else ()) if all(n in others for others in each)]
    return tuple(dict.fromkeys([*surroundings.notices(clean_tree(matrix.environment)), *common]))


# --- a bisection ---------------------------------------------------------------------------------


def _bisection(bisection: Bisection, cells: Sequence[_Ran]) -> BisectionView:
    told = clean_tree(bisection)
    results = _operators(cells)
    turns: dict[tuple[str, Status, Status], list[Turn]] = {}
    for turn in told.turns:
        who = operator_name(results[turn.case]) if turn.case in results else turn.case
        turns.setdefault((one_line(who, 80), turn.before, turn.after), []).append(turn)
    tried = f"{len(told.tried)} of {count(len(told.candidates), 'release')} tried"
    return BisectionView(
        answer=tuple(one_line(text, 1000) for text in _answer(told, turns, tried)),
        turns=tuple(
            (who, f"{STYLES[before].word} -> {STYLES[after].word}", _of_turns(own, results))
            for (who, before, after), own in turns.items()
        ),
        tried=one_line(", ".join(told.tried), 400),
        skipped=tuple(
            (one_line(version, 60), one_line(why, 600)) for version, why in told.skipped.items()
        ),
    )


def _of_turns(turns: Sequence[Turn], results: Mapping[str, CaseResult]) -> str:
    found = [results[turn.case] for turn in turns if turn.case in results]
    parts = (
        count(len(turns), "case"),
        listing(view.placements_of(found), 4),
        " and ".join(sorted({one_line(r.case.direction, 20) for r in found}, reverse=True)),
        listing(dict.fromkeys(map(view.setting_name, found)), 4),
    )
    return "; ".join(part for part in parts if part)


def _answer(
    told: Bisection, turns: Mapping[tuple[str, Status, Status], Sequence[Turn]], tried: str
) -> Iterable[str]:
    if not told.before or not told.after:
        ends = " and ".join(dict.fromkeys([*told.candidates[:1], *told.candidates[-1:]]))
        yield (
            f"Nothing changes: {told.selection or 'every case'} is the same in {told.package} {ends} "
            f"({tried}). What changes and changes back between them would not be seen."
        )
        return
    for who, before, after in [*turns][:3]:
        yield (
            f"{who} changes from {STYLES[before].word} to {STYLES[after].word} between {told.package} "
            f"{told.before} and {told.after} ({tried})."
        )
    if len(turns) > 3:
        yield f"{len(turns) - 3} more change there."
    if not turns:
        yield f"A status changes between {told.package} {told.before} and {told.after} ({tried})."
    between = _between(told)
    if between:
        yield (
            f"Which of {listing([*between, told.after], 6)} is the first one is not known: "
            f"{listing(between, 6)} gave no answer."
        )


def _between(told: Bisection) -> list[str]:
    """Versions that gave no answer, between the last without and the first with the change."""
    if told.before not in told.candidates or told.after not in told.candidates:
        return []
    first, last = (told.candidates.index(version) for version in (told.before, told.after))
    return [*told.candidates[first + 1 : last]]


# --- the headline --------------------------------------------------------------------------------


def _headline(made: MatrixView, cells: Sequence[_Ran], laid: _Laid) -> tuple[str, ...]:
    """Which combination works, what was not tried, what got worse: a few sentences."""
    ran = [each for each in made.combinations if each.ran]
    if not made.combinations:
        return ("The matrix has no combination: nothing was run.",)
    bisected = made.bisection.answer if made.bisection else ()
    if not ran:
        return (*bisected, *_not_built(made, cells), "Nothing ran, so nothing can be concluded.")
    answer = () if made.bisection else _best(made, laid, cells)
    return (*bisected, *answer, *_not_built(made, cells), *_in_part(made), *_got_worse(made))


def _best(made: MatrixView, laid: _Laid, cells: Sequence[_Ran]) -> Iterable[str]:
    """Which combinations have most, and which least."""
    here = [c for c, cell in zip(made.combinations, cells, strict=True) if cell.results]
    tried = [each for each in here if each.ran]
    counts = {each.works for each in tried}
    most, least = max(counts), min(counts)

    def named(holds: Callable[[Combination], bool]) -> str:
        places = [i for i, each in enumerate(here) if each.ran and holds(each)]
        return here[places[0]].name if len(places) == 1 else laid.extent(places)

    what = f"right with {made.sharded}, forward and backward"
    all_of = count(made.operators, "operator")
    right = f"{most or 'None'} of {all_of} {'is' if most < 2 else 'are'} {what}"
    if len(tried) == 1:
        yield f"{right}, in {tried[0].name}: the only combination that ran."
        return
    if most == least:
        yield f"{right}, in {'each' if most else 'any'} of {count(len(tried), 'combination')}."
    else:
        yield f"{right}, in {named(lambda each: each.works == most)}: no combination has more."
    best = next(each for each in tried if each.best)
    if not all(each.best for each in tried if each.works == most):
        yield (
            f"First of these: {named(lambda each: each.best)}, where {best.right} of {best.ran} cases are "
            f"right, {best.free} without communication nobody asked for."
        )
    if most != least:
        yield f"The fewest, {least}, are right in {named(lambda each: each.works == least)}."


def _got_worse(made: MatrixView) -> Iterable[str]:
    """Where most of what was right no longer is."""
    if not made.shifts:
        return
    lost = {shift: [move for move in shift.moves if move.lost] for shift in made.shifts}
    sizes = {
        shift: len({case for move in moves for case in move.cases}) for shift, moves in lost.items()
    }
    shown = sorted((shift for shift in lost if sizes[shift]), key=lambda shift: -sizes[shift])
    if not shown:
        yield "No case that was right gets worse from one version to the next."
    for shift in shown[:2]:
        who = listing(dict.fromkeys(move.operator for move in lost[shift]), 3)
        verb = "case that was right gets" if sizes[shift] == 1 else "cases that were right get"
        yield (
            f"From {shift.package} {shift.before} to {shift.after} {sizes[shift]} {verb} worse: {who}."
        )


def _not_built(made: MatrixView, cells: Sequence[_Ran]) -> Iterable[str]:
    """Combinations without a report, those with the same problem together."""
    problems: dict[str, list[str]] = {}
    for each, cell in zip(made.combinations, cells, strict=True):
        if cell.cell.report is None:
            problems.setdefault(each.problem or "no reason given", []).append(each.name)
    for problem, names in problems.items():
        yield f"Not run: {listing(names, 3)}: {one_line(problem, 240).rstrip('.')}."


def _in_part(made: MatrixView) -> Iterable[str]:
    for each in made.combinations:
        if each.ran and each.problem:
            yield f"{each.name} ran in part: {one_line(each.problem, 240).rstrip('.')}."


# --- how to go on --------------------------------------------------------------------------------


def _steps(made: MatrixView, matrix: Matrix, cells: Sequence[_Ran]) -> tuple[Step, ...]:
    steps = []
    bisect = _to_bisect(made, cells)
    if bisect is not None and matrix.bisection is None:
        steps.append(bisect)
    first = next(iter(made.findings), None)
    if first is not None and first.finding.rule:
        rule = shlex.quote(first.finding.rule)
        steps.append(Step(f"attncheck explain {rule}", f"what {first.finding.name or rule} means"))
    best = next((each for each in reversed(made.combinations) if each.best), None)
    if best is not None:
        name = shlex.quote(best.name)
        steps.append(
            Step(
                f"attncheck report matrix.json --cell {name}",
                "one combination in full, with what to do",
            )
        )
    if len(cells) > 1:
        names = " ".join(f"--cell {shlex.quote(cells[i].name)}" for i in (0, -1))
        steps.append(Step(f"attncheck diff matrix.json {names}", "two combinations, case by case"))
    steps.append(
        Step(
            "attncheck matrix ... --output json:matrix.json",
            "everything, for these commands and CI",
        )
    )
    steps.append(
        Step("attncheck matrix ... --output html:matrix.html", "the same to click through")
    )
    return tuple(steps)


def _to_bisect(made: MatrixView, cells: Sequence[_Ran]) -> Step | None:
    """Where versions lie far apart, the next question is which release it was: of what most was lost to."""
    lost = {
        shift: [move for move in shift.moves if move.lost]
        for shift in made.shifts
        if shift.package == "torch"
    }
    shift = max(lost, key=lambda each: sum(len(move.cases) for move in lost[each]), default=None)
    if shift is None or not lost[shift]:
        return None
    results, move = _operators(cells), lost[shift][0]
    found = [results[case].case for case in move.cases if case in results]
    case = min(found, key=lambda each: each.direction != "forward", default=None)
    if case is None:
        return None
    chosen = {"operator": case.operator, "placement": case.placement, "direction": case.direction}
    selection = ", ".join(f"{name}={one_line(text, 80)}" for name, text in chosen.items())
    versions = {"torch": f"{shift.before},{shift.after}"}
    versions |= {p: v for p, v in cells[-1].versions.items() if p != "torch" and v}
    options = [f"--{package} {shlex.quote(version)}" for package, version in versions.items()]
    command = " ".join(["attncheck matrix", *options, f"--bisect {shlex.quote(selection)}"])
    return Step(command, f"which release between them made it {move.after}")
