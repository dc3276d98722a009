"""Reading saved reports, and matrices of them.

A default scan makes a report of 6 MB, `attncheck diff` reads two of them and is to answer at once; a matrix
holds several. So msgspec decodes and checks in C what `attncheck.model` and `attncheck.cells` describe. The
decoder of `model`, which takes ten times as long and names the place of whatever is not as expected, stays
the authority: what msgspec refuses is read again by it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from attncheck.audited import Audit
from attncheck.cells import Matrix, MatrixDocument, decoded, is_matrix, matrix_from, uncollected
from attncheck.errors import UserError
from attncheck.model import (
    SCHEMA_VERSION,
    Case,
    CaseResult,
    Comparison,
    Finding,
    Outcome,
    Report,
    Status,
    from_json,
)
from attncheck.text import count

_CASE_FIELDS = tuple(f.name for f in dataclasses.fields(Case))


@dataclass(frozen=True)
class _Entry(Case):
    """An entry of the document's `cases`, where a case and its outcome are one object."""

    outcome: Outcome = field(kw_only=True)
    before: Status | None = None

    def result(self) -> CaseResult:
        case = Case(**{name: getattr(self, name) for name in _CASE_FIELDS})
        return CaseResult(case, self.outcome, self.before)


@dataclass(frozen=True)
class _Document:
    schema_version: int
    environment: Mapping[str, Any]
    cases: tuple[_Entry, ...]
    findings: tuple[Finding, ...]
    comparison: Comparison | None = None
    audit: Audit | None = None


@functools.cache
def _decoder() -> msgspec.json.Decoder[_Document]:
    return msgspec.json.Decoder(_Document)


@functools.cache
def _matrix_decoder() -> msgspec.json.Decoder[MatrixDocument]:
    return msgspec.json.Decoder(MatrixDocument)


def load(text: str, where: str = "report") -> Report | Matrix:
    """Parse a saved report or matrix. Raises UserError where the text is none of a version we can read."""
    if (report := _fast(text)) is not None:
        return report
    if (matrix := _fast_matrix(text)) is not None:
        return decoded(matrix, where)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}.") from None
    if not isinstance(document, dict) or "schema_version" not in document:
        raise UserError(f"{where} is not an attncheck report: it has no schema_version.")
    if "entries" in document and "cases" not in document:
        raise UserError(f"{where} is a baseline; expected a report written by --output json.")
    version = document["schema_version"]
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{where} has schema_version {version}; this attncheck reads {SCHEMA_VERSION}."
        )
    if is_matrix(document):
        return matrix_from(document, where)
    return from_json(Report, document, where)


def load_report(text: str, where: str = "report") -> Report:
    """Parse a saved report. Raises UserError where the text is no report of a version we can read."""
    return _one(load(text, where), where)


def read(file: Path) -> Report | Matrix:
    """A saved report or matrix. Raises UserError where the file cannot be read, or is none that we can."""
    return load(_text(file), str(file))


def read_report(file: Path) -> Report:
    """A saved report. Raises UserError where the file cannot be read, or is none that we can."""
    return _one(read(file), str(file))


def _one(saved: Report | Matrix, where: str) -> Report:
    if isinstance(saved, Report):
        return saved
    raise UserError(
        f"{where} is a matrix of {count(len(saved.cells), 'combination')}, and one report is expected: "
        f"`attncheck report {where} --cell NAME --format json -o cell.json` takes one out of it."
    )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot read {file}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(
            f"{file} is not a text file; expected a report written by --output json."
        ) from None


# What msgspec raises, or Python while it makes text of JSON.
_REFUSED = (msgspec.MsgspecError, UnicodeError, RecursionError)


def _fast(text: str) -> Report | None:
    """The report that this JSON holds, or None where it holds none, or one that only `model` can read (NaN,
    half a surrogate pair)."""
    try:
        with uncollected():
            document = _decoder().decode(text)
    except _REFUSED:
        return None
    if document.schema_version != SCHEMA_VERSION:
        return None
    return Report(
        document.environment,
        tuple(entry.result() for entry in document.cases),
        document.findings,
        document.schema_version,
        document.comparison,
        document.audit,
    )


def _fast_matrix(text: str) -> MatrixDocument | None:
    """Likewise."""
    try:
        with uncollected():
            document = _matrix_decoder().decode(text)
    except _REFUSED:
        return None
    return document if document.schema_version == SCHEMA_VERSION else None
