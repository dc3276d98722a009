"""What a rule is, and what rules share: grouping cases into findings, and describing them.

Nothing here may depend on the order of the results: the same outcomes make the same findings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from attncheck import HOMEPAGE
from attncheck.inventory import without_build_id
from attncheck.model import (
    Case,
    CaseResult,
    Fact,
    Finding,
    MissingOp,
    Outcome,
    Remedy,
    Severity,
    Status,
    fingerprint,
)
from attncheck.probing import HEADS, KV_HEADS, PATTERNS
from attncheck.rules import wording

if TYPE_CHECKING:
    from attncheck.static.installed import Installation

DTENSOR = "dtensor"  # the route of plain dispatch

Judge = Callable[[Sequence[CaseResult]], Iterable[Finding]]
Examine = Callable[["Installation"], Iterable[Finding]]


def no_case(results: Sequence[CaseResult]) -> Iterable[Finding]:
    """The `judge` of a rule about what is installed, which no case can break."""
    return ()


@dataclass(frozen=True)
class Rule:
    """One rule: what it is called, what it means, and how it judges the results of a scan.

    `name` says what is wrong, in kebab-case. `docs` is Markdown with the sections "What it does",
    "Why is this bad?", "Example" and "What to do". `judge` gets all results of a scan, in any
    order; `examine`, where a rule has it, gets what is installed in an environment.
    """

    id: str
    name: str
    since: str
    severity: Severity
    docs: str
    judge: Judge
    examine: Examine | None = None

    @property
    def static(self) -> bool:
        """Whether it is about what is installed, and never about cases."""
        return self.judge is no_case

    @property
    def docs_url(self) -> str:
        """Where the rule is explained on the web: its heading in the catalogue, as GitHub anchors it."""
        return f"{HOMEPAGE}/blob/main/reports/published/rules.md#{self.id.lower()}-{self.name}"

    def finding(
        self,
        group: Group,
        title: str,
        *,
        message: Iterable[str] = (),
        remedies: Iterable[Remedy] = (),
    ) -> Finding:
        """A finding of this rule about a group of cases. Empty lines of `message` are left out."""
        return Finding(
            rule=self.id,
            name=self.name,
            severity=self.severity,
            title=title,
            kernel_op=group.kernel_op,
            cases=tuple(result.case.id for result in group.results),
            fingerprint=fingerprint(self.id, without_build_id(group.subject)),
            message="\n".join(line for line in message if line),
            remedies=tuple(remedies),
        )

    def about(
        self,
        subject: str,
        title: str,
        *,
        message: Iterable[str] = (),
        remedies: Iterable[Remedy] = (),
        severity: Severity | None = None,
    ) -> Finding:
        """A finding about something installed: one without cases. `severity`: the rule's, where None."""
        found = self.finding(Group(subject, "", ()), title, message=message, remedies=remedies)
        return replace(found, severity=severity or self.severity)


@dataclass(frozen=True)
class Group:
    """The cases of one finding, by id. `subject` is the kernel op or, where no op stands out, the
    operator (or probe) by name; `kernel_op` is empty then."""

    subject: str
    kernel_op: str
    results: tuple[CaseResult, ...]

    @property
    def cases(self) -> str:
        """`12 cases of flash_attn_func, flash_attn_varlen_func`."""
        return f"{wording.count(len(self.results), 'case')} of {operators(self.results)}"


def group_by(
    results: Iterable[CaseResult], subjects: Callable[[CaseResult], Iterable[tuple[str, str]]]
) -> list[Group]:
    """Group results under each `(subject, kernel_op)` that `subjects` names (none: left out)."""
    found: dict[tuple[str, str], dict[str, CaseResult]] = {}
    for result in results:
        for key in subjects(result):
            found.setdefault(key, {})[result.case.id] = result
    return [
        Group(subject, op, tuple(by_id[case] for case in sorted(by_id)))
        for (subject, op), by_id in sorted(found.items())
    ]


def group_by_op(
    results: Iterable[CaseResult], applies: Callable[[CaseResult], bool]
) -> list[Group]:
    """The results a rule applies to, grouped by the op that the outcome is about."""
    return group_by(results, lambda r: [subject_of(r)] if applies(r) else [])


def subject_of(result: CaseResult) -> tuple[str, str]:
    """`(subject, kernel_op)` of a result: its kernel op, else its operator."""
    op = result.outcome.kernel_op
    return (op or result.case.operator, op)


# --- outcomes ------------------------------------------------------------------------------------


def missing_ops(outcome: Outcome, direction: str, kinds: Sequence[str]) -> tuple[MissingOp, ...]:
    """Every op of these kinds that DTensor refused. A case that failed so without naming an op
    counts as one nameless op: no failed case may go without a finding."""
    named = tuple(op for op in outcome.missing_ops if op.kind in kinds)
    kind = {Status.MISSING_STRATEGY: "strategy", Status.MIXED_TENSOR: "mixed"}.get(outcome.status)
    if not named and kind in kinds and not outcome.missing_ops:
        return (MissingOp(outcome.kernel_op, direction, kind or "", outcome.message),)
    return named


def has_fact(outcome: Outcome, codes: Sequence[str]) -> bool:
    return any(fact.code in codes for fact in outcome.facts)


def is_gradient(tensor: str) -> bool:
    return tensor.startswith("grad")


def fact_lines(
    results: Sequence[CaseResult], wanted: Callable[[Fact], bool], limit: int = 3
) -> list[str]:
    """`out of case ...: detail` for the first facts, one per case, and how many cases more."""
    lines = []
    for result in results:
        facts = [fact for fact in result.outcome.facts if wanted(fact)]
        if facts:
            text = "; ".join(f"{f.subject}: {f.detail}".strip(": ") or f.code for f in facts)
            lines.append(f"{result.case.id}: {text}.")
    more = len(lines) - limit
    return lines[:limit] + (
        [f"The same kind in {wording.count(more, 'more case')}."] if more > 0 else []
    )


def traffic(outcome: Outcome) -> int:
    """Bytes that one rank sends in this case."""
    return sum(collective.bytes for collective in outcome.collectives)


def exception_text(outcome: Outcome, width: int = 400) -> str:
    """`RuntimeError: first line of the text`."""
    line = wording.first_line(outcome.message, width)
    kind = outcome.exception_type
    return line if not kind or line.startswith(kind) else f"{kind}: {line}".rstrip(": ")


def most_common(texts: Iterable[str]) -> list[str]:
    """Distinct non-empty texts, the most frequent first, ties by text."""
    counts = Counter(text for text in texts if text)
    return sorted(counts, key=lambda text: (-counts[text], text))


def rank_lines(results: Sequence[CaseResult]) -> list[str]:
    """What each rank was last doing, in the first case that tells."""
    result = next((r for r in results if r.outcome.ranks), None)
    if result is None:
        return []
    lines = [f"In {result.case.id}:"]
    for state in sorted(result.outcome.ranks, key=lambda s: s.rank):
        parts = [f"last op {state.last_op}" if state.last_op else "no op entered"]
        parts.append(wording.count(state.collectives, "collective"))
        if state.exception:
            parts.append(wording.first_line(state.exception, 160))
        lines.append(f"- rank {state.rank} (hash seed {state.hash_seed}): " + ", ".join(parts))
    return lines


# --- where it happens ----------------------------------------------------------------------------


def operators(results: Iterable[CaseResult]) -> str:
    return wording.listing(result.case.operator for result in results)


def extent(group: Group, results: Sequence[CaseResult]) -> list[str]:
    """Which operators, placements, settings and meshes are affected, and which are not.

    Only cases of the same operators, routes and directions count; "not affected" are values under
    which every such case is usable.
    """
    affected = {result.case.id for result in group.results}
    called = {
        (r.case.probe, r.case.operator, r.case.route, r.case.direction) for r in group.results
    }
    peers = [
        r
        for r in results
        if (r.case.probe, r.case.operator, r.case.route, r.case.direction) in called
    ]
    lines = [f"Operators: {operators(group.results)}."]
    aspects: tuple[tuple[str, Callable[[Case], str]], ...] = (
        ("Placements", lambda case: case.placement),
        ("Settings", lambda case: case.setting_name),
        ("Meshes", lambda case: wording.mesh(case.mesh)),
    )
    for label, value_of in aspects:
        bad = {value_of(r.case) for r in peers if r.case.id in affected}
        usable = {value_of(r.case) for r in peers if r.outcome.status.usable}
        broken = {value_of(r.case) for r in peers if not r.outcome.status.usable}
        good = usable - broken - bad
        if label == "Meshes" and len(bad | good) < 2:
            continue
        rest = wording.listing(good) or "none in this scan"
        lines.append(f"{label} affected: {wording.listing(bad)}; not affected: {rest}.")
    return lines


def ranks_per_role(case: Case) -> dict[str, int]:
    """Into how many parts the placement splits each role; axes that split the same one multiply."""
    parts: dict[str, int] = {}
    for pattern, ranks in zip(case.placement.split(","), case.mesh.values(), strict=False):
        for role in PATTERNS.get(pattern, ()):
            parts[role] = parts.get(role, 1) * ranks
    return parts


def uneven_roles(case: Case) -> list[str]:
    """Roles whose size the ranks do not divide: `3 kv_heads over 2 ranks`."""
    return [
        f"{total} {role} over {parts} ranks"
        for role, parts in ranks_per_role(case).items()
        if (total := _size(case.setting, role)) % parts
        and not (total == 1 and _is_broadcast(case, role))
    ]


def empty_roles(case: Case) -> list[str]:
    """Roles of which some rank gets nothing: `torch.chunk` leaves the last ranks empty."""
    out = []
    for role, parts in ranks_per_role(case).items():
        total = _size(case.setting, role)
        if total and -(-total // parts) * (parts - 1) >= total and not _is_broadcast(case, role):
            out.append(f"{total} {role} over {parts} ranks")
    return out


def _is_broadcast(case: Case, role: str) -> bool:
    # One kv head that every query head uses (MQA) is kept whole by its probe where it broadcasts.
    if role != KV_HEADS or "k" not in case.placements:
        return False
    return not any("S(" in placement for placement in case.placements["k"])


def _size(setting: Mapping[str, object], role: str) -> int:
    """The size of a role in the setting; 0 where the setting does not have it."""
    value = setting.get(role, setting.get(HEADS) if role == KV_HEADS else 0)
    return value if isinstance(value, int) else 0


def uneven_line(results: Sequence[CaseResult]) -> str:
    """One sentence where uneven shards are common to every case, else empty."""
    uneven = [uneven_roles(result.case) for result in results]
    if not uneven or not all(uneven):
        return ""
    texts = wording.listing(text for roles in uneven for text in roles)
    return f"In every one of these cases the ranks do not divide the sharded size: {texts}."
