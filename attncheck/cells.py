"""The document of `attncheck matrix`: the same cases in several cells, a combination of versions each.

Every cell holds a report like that of a scan. As JSON, what many cells share stands once: a case, and an
outcome that was re-used. Torch-free.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from attncheck.errors import UserError
from attncheck.model import (
    SCHEMA_VERSION,
    Case,
    CaseResult,
    Finding,
    Outcome,
    Report,
    Status,
    from_json,
    to_json,
)
from attncheck.text import listing

T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """One combination of versions, by package (`torch` first).

    `report` is what a scan there says, None where there was none, for the reason in `problem`. `reused`: how
    many of its outcomes were not run for this matrix, since nothing that can affect them had changed.
    """

    versions: Mapping[str, str]
    report: Report | None = None
    problem: str = ""
    reused: int = 0

    @property
    def name(self) -> str:
        """`torch 2.9.1 + flash-attn 2.8.3.post2`"""
        return " + ".join(f"{package} {version}" for package, version in self.versions.items())


@dataclass(frozen=True)
class Turn:
    """A case of which the status changed: `before` in the last version without the change, `after` since."""

    case: str
    before: Status
    after: Status


@dataclass(frozen=True)
class Bisection:
    """Between which two neighbours of `candidates` (versions of `package`, oldest first) statuses change.

    `before` is the last version in which the cases are as in the oldest, `after` the first in which they are
    not; both empty where the oldest and the newest agree. `tried`: in this order; `skipped`: those that gave
    no answer, and why.
    """

    package: str
    selection: str
    candidates: tuple[str, ...]
    tried: tuple[str, ...]
    before: str = ""
    after: str = ""
    turns: tuple[Turn, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Matrix:
    """Cells in the order of their versions. `environment` is what they share: command, date, machine, and
    what was asked for."""

    environment: Mapping[str, Any]
    cells: tuple[Cell, ...]
    bisection: Bisection | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The packages that differ between cells and their versions, '' where a cell is without."""
        packages = dict.fromkeys(package for cell in self.cells for package in cell.versions)
        versions = {
            package: tuple(dict.fromkeys(cell.versions.get(package, "") for cell in self.cells))
            for package in packages
        }
        return {package: own for package, own in versions.items() if len(own) > 1}

    def cell(self, name: str) -> Cell:
        """The cell of this name, or the only one that has these versions: `torch 2.9.1`, `torch==2.9.1`,
        `2.9.1`. Raises UserError."""
        named = [cell for cell in self.cells if cell.name == name]
        wanted = {" ".join(part.replace("=", " ").split()) for part in name.split("+")}
        found = named or [cell for cell in self.cells if wanted <= _said(cell)]
        if len(found) == 1:
            return found[0]
        names = listing((repr(cell.name) for cell in found or self.cells), 12)
        raise UserError(
            f"{'No cell is' if not found else f'{len(found)} cells are'} {name!r}: expected one of {names}."
        )


def _said(cell: Cell) -> set[str]:
    """All that a cell may be asked for by: its versions, with their packages and alone."""
    return {f"{package} {version}" for package, version in cell.versions.items()} | {
        *cell.versions.values()
    }


# --- codec ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _CellDocument:
    """A cell and its report, which it has if it has an environment. `cases` and `outcomes`, as long as each
    other: indexes into those of the document."""

    versions: Mapping[str, str]
    problem: str = ""
    reused: int = 0
    environment: Mapping[str, Any] | None = None
    cases: tuple[int, ...] = ()
    outcomes: tuple[int, ...] = ()
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class MatrixDocument:
    """The JSON of a matrix."""

    schema_version: int
    environment: Mapping[str, Any]
    cases: tuple[Case, ...]
    outcomes: tuple[Outcome, ...]
    cells: tuple[_CellDocument, ...]
    bisection: Bisection | None = None


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Holds Python's garbage collector off while a document of millions of objects is made, all of which
    stay: it would look through them again and again, which takes three times as long as making them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def is_matrix(document: object) -> bool:
    """Whether parsed JSON is meant to be the document of a matrix, and not a report."""
    return isinstance(document, Mapping) and "cells" in document


class _Places(Generic[T]):
    """A list without duplicates. What is equal is looked for among what has the same key alone."""

    def __init__(self, key: Callable[[T], object]) -> None:
        self.all: list[T] = []
        self._key = key
        self._at: dict[object, list[int]] = {}

    def index(self, value: T) -> int:
        known = self._at.setdefault(self._key(value), [])
        for at in known:
            if self.all[at] is value or self.all[at] == value:
                return at
        known.append(len(self.all))
        self.all.append(value)
        return known[-1]


def dump_matrix(matrix: Matrix) -> str:
    """The matrix as JSON text. Of its reports, what a comparison or a fix adds is left out."""
    cases: _Places[Case] = _Places(lambda case: case.id)
    # Outcomes hold times: equal ones are nearly always one that was re-used.
    outcomes: _Places[Outcome] = _Places(lambda o: (o.status, o.message, *o.timings.values()))

    def document(cell: Cell) -> _CellDocument:
        common = (dict(cell.versions), cell.problem, cell.reused)
        if cell.report is None:
            return _CellDocument(*common)
        return _CellDocument(
            *common,
            cell.report.environment,
            tuple(cases.index(result.case) for result in cell.report.cases),
            tuple(outcomes.index(result.outcome) for result in cell.report.cases),
            cell.report.findings,
        )

    cells = tuple(map(document, matrix.cells))
    whole = MatrixDocument(
        matrix.schema_version, matrix.environment, tuple(cases.all), tuple(outcomes.all), cells,
        matrix.bisection,
    )  # fmt: skip
    with uncollected():
        return json.dumps(to_json(whole), ensure_ascii=False, allow_nan=False) + "\n"


def matrix_from(document: Any, where: str = "matrix") -> Matrix:
    """The matrix of parsed JSON. Raises UserError where it is none that we can read."""
    return decoded(from_json(MatrixDocument, document, where), where)


def decoded(document: MatrixDocument, where: str = "matrix") -> Matrix:
    """The matrix of a document. Raises UserError where its indexes lead nowhere."""
    cells = tuple(
        _cell(document, cell, f"{where}.cells[{i}]") for i, cell in enumerate(document.cells)
    )
    return Matrix(document.environment, cells, document.bisection, document.schema_version)


def _cell(document: MatrixDocument, cell: _CellDocument, where: str) -> Cell:
    if cell.environment is None:
        return Cell(cell.versions, None, cell.problem, cell.reused)
    if len(cell.cases) != len(cell.outcomes):
        raise UserError(
            f"{where}: expected as many outcomes as cases ({len(cell.cases)}), found {len(cell.outcomes)}."
        )
    cases = _looked_up(document.cases, cell.cases, f"{where}.cases")
    outcomes = _looked_up(document.outcomes, cell.outcomes, f"{where}.outcomes")
    results = tuple(map(CaseResult, cases, outcomes))
    report = Report(cell.environment, results, cell.findings, document.schema_version)
    return Cell(cell.versions, report, cell.problem, cell.reused)


def _looked_up(values: Sequence[T], indexes: Sequence[int], where: str) -> list[T]:
    for at in indexes:
        if not 0 <= at < len(values):
            raise UserError(f"{where}: expected an index below {len(values)}, found {at}.")
    return [values[at] for at in indexes]
