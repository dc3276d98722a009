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
    """What was said, line by line, the most frequent first. Texts that begin alike count as one, and the
    most frequent of them speaks: what follows differs in the shapes that it names."""
    messages = [r.outcome.message for r in group.results]
    lines = []
    for first in most_common(map(wording.first_line, messages))[:limit]:
        text = most_common(m for m in messages if wording.first_line(m) == first)[0]
        lines += [first, *(line.rstrip() for line in text.strip().splitlines()[1:] if line.strip())]
    return lines


def settings(group: Group) -> str:
    return f"Settings: {wording.listing(r.case.setting_name for r in group.results)}."
