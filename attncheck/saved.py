"""Reading saved reports.

A default scan makes a report of 6 MB, `attncheck diff` reads two of them and is to answer at once. So msgspec
decodes and checks in C what `attncheck.model` describes. The decoder of `model`, which takes ten times as
long and names the place of whatever is not as expected, stays the authority: what msgspec refuses is read
again by it.
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


@functools.cache
def _decoder() -> msgspec.json.Decoder[_Document]:
    return msgspec.json.Decoder(_Document)


def load_report(text: str, where: str = "report") -> Report:
    """Parse a saved report. Raises UserError where the text is no report of a version we can read."""
    if (report := _fast(text)) is not None:
        return report
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
    return from_json(Report, document, where)


def read_report(file: Path) -> Report:
    """A saved report. Raises UserError where the file cannot be read, or is none that we can."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot read {file}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(
            f"{file} is not a text file; expected a report written by --output json."
        ) from None
    return load_report(text, str(file))


def _fast(text: str) -> Report | None:
    """The report that this JSON holds, or None where it holds none, or one that only `model` can read (NaN,
    half a surrogate pair)."""
    try:
        document = _decoder().decode(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    if document.schema_version != SCHEMA_VERSION:
        return None
    return Report(
        document.environment,
        tuple(entry.result() for entry in document.cases),
        document.findings,
        document.schema_version,
        document.comparison,
    )
