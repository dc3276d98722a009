"""What the ATN4xx rules share: cases that could not run, by reason."""

from __future__ import annotations

from collections.abc import Sequence

from attncheck.model import CaseResult, Reason, Status
from attncheck.rules import wording
from attncheck.rules.base import Group, group_by, most_common


def by_operator(results: Sequence[CaseResult], reasons: Sequence[Reason | None]) -> list[Group]:
    return group_by(results, lambda r: [(r.case.operator, "")] if _is(r, reasons) else [])


def by_probe(results: Sequence[CaseResult], reasons: Sequence[Reason | None]) -> list[Group]:
    """For what concerns a probe's file or package as a whole: one finding, not one per operator."""
    return group_by(results, lambda r: [(r.case.probe, "")] if _is(r, reasons) else [])


def _is(result: CaseResult, reasons: Sequence[Reason | None]) -> bool:
    return result.outcome.status is Status.UNAVAILABLE and result.outcome.reason in reasons


def texts(group: Group, limit: int = 3) -> list[str]:
    """What was said, the most frequent first."""
    return most_common(wording.first_line(r.outcome.message) for r in group.results)[:limit]


def settings(group: Group) -> str:
    return f"Settings: {wording.listing(r.case.setting_name for r in group.results)}."
