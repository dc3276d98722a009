"""When did it change: the first release in which the status of a case is another, in about log2 runs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from packaging.version import Version

from attncheck.cells import Bisection, Cell, Matrix, Turn
from attncheck.errors import UserError, unknown
from attncheck.matrix import releases
from attncheck.matrix.running import (
    Combination,
    Log,
    MatrixRequest,
    Progress,
    Session,
    combinations,
    described,
    version_of,
)
from attncheck.model import Status
from attncheck.plan import Selection, parse_mesh
from attncheck.provision import Provision
from attncheck.text import listing

# What a selection may name, and the field of `plan.Selection` that takes it.
_FIELDS = {
    "operator": "operators",
    "setting": "settings",
    "placement": "placements",
    "direction": "directions",
    "route": "routes",
}

# The status of each case, by id; None where the cell has no report.
Statuses = Mapping[str, Status] | None


def parse_selection(text: str, base: Selection) -> tuple[Selection, dict[str, int] | None]:
    """`operator=sdpa, placement=heads, mesh=2x2` to what it selects, and its mesh if it names one.

    Values are globs. Raises UserError.
    """
    chosen: dict[str, tuple[str, ...]] = {}
    mesh = None
    # Of `mesh=dp=2,tp=2` the second part is no name of ours, but an axis and its size.
    for part in re.split(
        r"[,;]\s*(?=[\w-]+\s*=(?!\s*\d+\s*(?:[,;]|$)))", text.strip().strip(",; ")
    ):
        name, _, value = (each.strip() for each in part.partition("="))
        if not value:
            raise UserError(
                f"--bisect {text!r}: {part!r} is not NAME=VALUE; expected e.g. 'operator=sdpa, "
                "placement=heads'."
            )
        if name == "mesh":
            mesh = parse_mesh(value)
        elif name in _FIELDS:
            chosen[_FIELDS[name]] = (*chosen.get(_FIELDS[name], ()), value)
        else:
            raise unknown("name in --bisect", name, (*_FIELDS, "mesh"))
    return Selection(**{**vars(base), **chosen}), mesh


@dataclass
class Walk:
    """The versions to choose from, oldest first, and what each that was tried said."""

    versions: tuple[str, ...]
    look: Callable[[str], Cell]
    cells: dict[str, Cell] = field(default_factory=dict)

    def statuses(self, at: int) -> Statuses:
        version = self.versions[at]
        if version not in self.cells:
            self.cells[version] = self.look(version)
        report = self.cells[version].report
        return None if report is None else {r.case.id: r.outcome.status for r in report.cases}

    def first(self, order: Sequence[int]) -> int | None:
        """The first position of `order` that gives an answer."""
        return next((at for at in order if self.statuses(at) is not None), None)

    def turn(self) -> tuple[int, int] | None:
        """Two positions, with no answer between them, of which the first is as the oldest and the second is
        not; None where the oldest and the newest agree."""
        every = range(len(self.versions))
        low, high = self.first(every), self.first(every[::-1])
        if low is None or high is None:
            first = self.cells[self.versions[0]].problem
            raise UserError(f"None of {listing(self.versions)} could be run. {first}")
        start = self.statuses(low)
        if self.statuses(high) == start:
            return None
        while (middle := self.first(_outwards(low, high))) is not None:
            if self.statuses(middle) == start:
                low = middle
            else:
                high = middle
        return low, high


def _outwards(low: int, high: int) -> list[int]:
    """The positions strictly between, those in the middle first."""
    return sorted(range(low + 1, high), key=lambda at: (abs(2 * at - low - high), at))


def bisect(request: MatrixRequest, selection: str, log: Log, on_progress: Progress) -> Matrix:
    """Walk the versions of the one package of which several are asked for: those given or, where it is two,
    every release between them. Raises UserError, or launch.Interrupted."""
    began = time.time()
    chosen, mesh = parse_selection(selection, request.scan.selection)
    asked = replace(request.scan, selection=chosen, meshes=(mesh,) if mesh else request.scan.meshes)
    request = replace(request, scan=asked)
    package, versions = _axis(request)
    if len(versions) == 2:
        versions = _released(package, versions, request, log)
    else:
        versions = tuple(sorted(versions, key=Version))
    session = Session(request, log, on_progress)
    log(
        f"{len(session.cases)} cases, {len(versions)} releases of {package}: {listing(versions, 30)}"
    )
    combined = combinations(request)[0]
    walk = Walk(versions, lambda version: session.cell(_with(combined, package, version)))
    turn = walk.turn()
    skipped = {v: cell.problem for v, cell in walk.cells.items() if cell.report is None}
    told = Bisection(package, selection, versions, tuple(walk.cells), skipped=skipped)
    if turn is not None:
        low, high = turn
        told = replace(told, before=versions[low], after=versions[high], turns=_turns(walk, *turn))
    cells = tuple(walk.cells[version] for version in versions if version in walk.cells)
    return Matrix(described(request, session.cases, began), cells, told)


def _axis(request: MatrixRequest) -> tuple[str, tuple[str, ...]]:
    """The package to walk, and the versions given. Raises UserError unless it is just one."""
    given = {"torch": request.torch, **request.packages}
    several = {
        package: tuple(dict.fromkeys(version_of(package, text) for text in texts))
        for package, texts in given.items()
        if len(set(texts)) > 1
    }
    if len(several) != 1:
        raise UserError(
            f"--bisect walks the versions of one package, and {listing(several) or 'none'} has several: "
            "expected e.g. --torch 2.6.0,2.15.0, and one version of the others."
        )
    return next(iter(several.items()))


def _released(
    package: str, versions: Sequence[str], request: MatrixRequest, log: Log
) -> tuple[str, ...]:
    from attncheck import knowledge

    known = knowledge.releases(package)
    low, high = versions
    return releases.between(package, low, high, request.source.options, known, log)


def _with(combination: Combination, package: str, version: str) -> Combination:
    if package == "torch":
        return replace(combination, torch=version)
    packages = tuple(
        Provision(package, version) if p.package == package else p for p in combination.packages
    )
    return replace(combination, packages=packages)


def _turns(walk: Walk, low: int, high: int) -> tuple[Turn, ...]:
    before, after = walk.statuses(low), walk.statuses(high)
    assert before is not None
    assert after is not None
    both = [case for case in before if case in after]
    return tuple(
        Turn(case, before[case], after[case]) for case in both if before[case] is not after[case]
    )
