"""The view of a comparison that every format renders: what changed, grouped so that a screen holds it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from attncheck.model import CaseChange, CaseResult, ChangeKind, Comparison, Difference, Status
from attncheck.text import clean, clean_tree, count, listing, one_line


@dataclass(frozen=True)
class ChangeGroup:
    """Cases of one operator that changed in the same way.

    `before` and `after` are statuses in words; `where`: placements, directions, settings; `detail`: the
    numbers of one of them; `reason` and `until`: what the baseline says of them; `gates`: a gate fails for
    it.
    """

    kind: ChangeKind
    operator: str
    before: str
    after: str
    rules: tuple[str, ...]
    where: str
    detail: str
    reason: str
    until: str
    cases: tuple[str, ...]
    gates: bool

    @property
    def change(self) -> str:
        """`supported -> wrong (ATN201)`."""
        rules = f" ({', '.join(self.rules)})" if self.rules else ""
        words = self.after if self.before == self.after else f"{self.before} -> {self.after}"
        return words + rules

    @property
    def extent(self) -> str:
        """`heads; forward; causal; 2 cases`."""
        parts = [self.where, count(len(self.cases), "case")]
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True)
class ComparisonView:
    """`groups`: those for which a gate fails first, then in the order of `ChangeKind`; `counts`: cases by
    kind, unchanged ones included; `regressed`: cases that got worse in some way, each with the rules that
    this is about."""

    against: str
    verdict: str
    exit_code: int
    environment: tuple[Difference, ...]
    counts: tuple[tuple[ChangeKind, int], ...]
    groups: tuple[ChangeGroup, ...]
    stale: int
    regressed: frozenset[tuple[str, str]]

    @property
    def headline(self) -> str:
        return self.verdict or (
            "Nothing changed." if not self.groups else f"Against {self.against}: {self.counted}."
        )

    @property
    def counted(self) -> str:
        """`3 new, 12 unchanged`."""
        return ", ".join(f"{number} {word(kind)}" for kind, number in self.counts)


def word(kind: ChangeKind) -> str:
    return kind.value.replace("_", " ")


def build(comparison: Comparison, results: Sequence[CaseResult]) -> ComparisonView:
    """`results`: the report's cases, from which a change has its operator and the rest of what it says."""
    comparison = clean_tree(comparison)
    by_id = {result.case.id: result for result in results}
    groups: dict[tuple[object, ...], list[CaseChange]] = {}
    for change in comparison.changes:
        key = (
            not change.gates,
            tuple(ChangeKind).index(change.kind),
            _operator(change, by_id),
            change.before,
            change.after,
            change.rules,
            change.reason,
            change.until,
        )
        groups.setdefault(key, []).append(change)
    kinds = [change.kind for change in comparison.changes]
    counts = {kind: kinds.count(kind) for kind in ChangeKind}
    counts[ChangeKind.UNCHANGED] += comparison.unchanged
    return ComparisonView(
        against=one_line(comparison.against, 200),
        verdict=one_line(comparison.verdict, 400),
        exit_code=comparison.exit_code,
        environment=tuple(
            Difference(one_line(d.name, 60), one_line(d.before, 200), one_line(d.after, 200))
            for d in comparison.environment
        ),
        counts=tuple((kind, number) for kind, number in counts.items() if number),
        groups=tuple(
            _group(changes, by_id)
            for _, changes in sorted(groups.items(), key=lambda item: item[0][:2])
        ),
        stale=comparison.stale,
        regressed=frozenset(
            (one_line(c.case, 300), one_line(rule, 40))
            for c in comparison.changes
            if c.kind.regressed
            for rule in c.rules
        ),
    )


def _operator(change: CaseChange, by_id: Mapping[str, CaseResult]) -> str:
    """Of a case that the report does not have, what its id says: operator/setting/route/mesh/..."""
    if change.case in by_id:
        return one_line(by_id[change.case].case.operator, 80)
    parts = clean(change.case).split("/")
    return one_line(parts[-6] if len(parts) >= 6 else change.case, 80)


def _group(changes: Sequence[CaseChange], by_id: Mapping[str, CaseResult]) -> ChangeGroup:
    first = changes[0]
    found = [by_id[change.case].case for change in changes if change.case in by_id]
    aspects: tuple[Iterable[str], ...] = (
        (case.placement for case in found),
        sorted({case.direction for case in found}, reverse=True),
        (str(case.setting.get("name", "")) for case in found),
    )
    detail = next((change.detail for change in changes if change.detail), "")
    more = f", for one of them: {detail}" if detail and len(changes) > 1 else detail
    return ChangeGroup(
        kind=first.kind,
        operator=_operator(first, by_id),
        before=_status(first.before),
        after=_status(first.after),
        rules=tuple(one_line(rule, 40) for rule in first.rules),
        where="; ".join(one_line(text, 200) for text in map(_listed, aspects) if text),
        detail=one_line(more.removeprefix(", "), 300),
        reason=one_line(first.reason, 300),
        until=one_line(first.until, 40),
        cases=tuple(one_line(change.case, 300) for change in changes),
        gates=first.gates,
    )


def _listed(names: Iterable[str]) -> str:
    return listing(dict.fromkeys(names), 4)


def _status(status: Status | None) -> str:
    return status.value.replace("_", " ") if status is not None else "not there"
