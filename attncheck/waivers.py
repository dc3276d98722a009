"""Findings that a team lives with: the tables under `ignore` in [tool.attncheck], each with its reason.

A waiver takes cases out of findings, never out of the report: what it silenced, why and until when stands in
the environment, for every format to say. Torch-free, and pure: the caller says what day it is.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from attncheck import rules
from attncheck.errors import UserError, unknown
from attncheck.model import Case, CaseResult, Finding, Report
from attncheck.plan import matches

# Globs over the cases of a finding; `kernel-op` is over the finding itself.
GLOBS = ("operator", "setting", "placement", "direction", "route", "kernel-op")
KEYS = ("rule", *GLOBS, "reason", "until")
# What became of a waiver, as the report records it.
APPLIED, EXPIRED, STALE = "applied", "expired", "stale"


@dataclass(frozen=True)
class Waiver:
    """`rule` is what `rules.expand` takes; `globs` has those of `GLOBS` that are given; `until` is the last
    day on which it holds, None for no end."""

    rule: str
    reason: str
    globs: tuple[tuple[str, str], ...] = ()
    until: datetime.date | None = None

    def record(self) -> dict[str, str]:
        """As a table again, in JSON values: what `parse` takes."""
        until = {} if self.until is None else {"until": self.until.isoformat()}
        return {"rule": self.rule, **dict(self.globs), "reason": self.reason, **until}

    def covers(self, case: Case, kernel_op: str) -> bool:
        """Whether this case is meant, in a finding about this kernel op."""
        # A report from elsewhere may lack the name that our planner always gives.
        named = {
            "operator": case.operator,
            "setting": str(case.setting.get("name", "")),
            "placement": case.placement,
            "direction": case.direction,
            "route": case.route,
            "kernel-op": kernel_op,
        }
        return all(matches(named[key], (glob,)) for key, glob in self.globs)


def parse(table: Mapping[str, Any], where: str) -> Waiver:
    """One table. Raises UserError naming `where`, the key and what was expected."""
    for key in table:
        if key not in KEYS:
            raise unknown(f"key in {where}:", key, KEYS)
    for key in ("rule", "reason"):
        if key not in table:
            raise UserError(f"{where}: {key} is missing; expected a table with rule and reason.")
    texts = {key: _text(table[key], key, where) for key in table if key != "until"}
    try:
        rules.expand([texts["rule"]])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return Waiver(
        rule=texts["rule"],
        reason=texts["reason"],
        globs=tuple((key, texts[key]) for key in GLOBS if key in texts),
        until=_date(table["until"], where) if "until" in table else None,
    )


def _text(value: Any, key: str, where: str) -> str:
    """On one line."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key} must be a text that is not empty, found {value!r}.")
    return " ".join(value.split())


def _date(value: Any, where: str) -> datetime.date:
    """TOML has dates of its own; as a text it is written the same."""
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        return value
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        try:
            return datetime.date.fromisoformat(value)
        except ValueError:
            pass
    raise UserError(f"{where}: until must be a date like 2027-01-31, found {value!r}.")


def apply(report: Report, waivers: Sequence[Waiver], today: datetime.date) -> Report:
    """The report without what the waivers silence; the environment's `ignored` says what became of each.

    Cases that a waiver covers are taken out of the findings of its rule, and a finding without cases goes
    away. One that loses but some keeps its title, which says what was measured, and a line of its message
    says how many are ignored. `ignored` has a waiver's table, `state` and the number of `cases` that it
    covers: a waiver that ended (`until` is before `today`) or that covers nothing is there too. For a
    report without waivers: to one that had some applied, see `merging.judged_again`.
    """
    if not waivers:
        return report
    by_id = {result.case.id: result for result in report.cases}
    meant = [(waiver, rules.expand([waiver.rule])) for waiver in waivers]
    covered: dict[Waiver, set[str]] = {waiver: set() for waiver in waivers}
    findings = []
    for finding in report.findings:
        silenced: dict[str, Waiver] = {}
        for waiver, ids in meant:
            hit = _covered(waiver, finding, by_id) if finding.rule in ids else ()
            covered[waiver].update(hit)
            if _holds(waiver, today):
                silenced = {**dict.fromkeys(hit, waiver), **silenced}  # the first in the file
        if silenced:
            finding = _without(finding, silenced)
        if finding.cases or not silenced:
            findings.append(finding)
    ignored = [
        {**waiver.record(), "state": _state(waiver, hit, today), "cases": len(hit)}
        for waiver, hit in covered.items()
    ]
    environment = {**report.environment, "ignored": ignored}
    return replace(report, findings=tuple(findings), environment=environment)


def _covered(waiver: Waiver, finding: Finding, by_id: Mapping[str, CaseResult]) -> tuple[str, ...]:
    return tuple(
        case
        for case in finding.cases
        if case in by_id and waiver.covers(by_id[case].case, finding.kernel_op)
    )


def _holds(waiver: Waiver, today: datetime.date) -> bool:
    return waiver.until is None or today <= waiver.until


def _state(waiver: Waiver, covered: set[str], today: datetime.date) -> str:
    if not _holds(waiver, today):
        return EXPIRED
    return APPLIED if covered else STALE


def _without(finding: Finding, silenced: Mapping[str, Waiver]) -> Finding:
    left = tuple(case for case in finding.cases if case not in silenced)
    lines = [finding.message] if finding.message else []
    for waiver in dict.fromkeys(silenced.values()):
        count = sum(1 for by in silenced.values() if by is waiver)
        lines.append(f"{count} of its {len(finding.cases)} cases are ignored: {waiver.reason}")
    return replace(finding, cases=left, message="\n".join(lines))


def recorded(environment: Mapping[str, Any], where: str) -> tuple[Waiver, ...]:
    """The waivers that were applied to a report, from its environment. Raises UserError."""
    records = environment.get("ignored", ())
    if not _are_tables(records):
        raise UserError(f"{where}: environment.ignored is not as attncheck scan writes it.")
    kept = ({key: r[key] for key in KEYS if key in r} for r in records)
    return tuple(parse(table, f"environment.ignored of {where}") for table in kept)


def _are_tables(records: Any) -> bool:
    return isinstance(records, Iterable) and all(isinstance(r, Mapping) for r in records)
