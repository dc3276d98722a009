"""What became of each case: two reports, or a report and a baseline, held against each other. Torch-free.

A case is recognised by what is tested (`Key`), never by the version it was tested on. Numbers are compared
only where both sides have a right result: how wrong a wrong result is says nothing.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attncheck.errors import unknown
from attncheck.model import (
    REGRESSIONS,
    UNJUDGED,
    UNPLANNED,
    Case,
    CaseChange,
    CaseResult,
    ChangeKind,
    Comparison,
    Difference,
    Outcome,
    Report,
    Severity,
    Status,
    mesh_id,
)
from attncheck.surroundings import in_words

# How much an error (in parts of its bound) may grow before it is no noise of the values, measured by
# tests/oracle/gate_noise.py. Of one set of values each; and of medians over many, which say more.
NOISE, NOISE_OF_MEDIANS, MANY = 3.0, 1.5, 10
FLOOR = 0.3  # below it an error is a lucky one, and not what its growth is counted from
LARGEST = 1e300  # beyond it an error is as good as infinite, and a baseline could not round it
# Rules about seconds: machines of CI are shared, and no gate can rest on them.
TIMED = ("ATN302",)
# Rules about what grows where the status stays: rounding, and unasked communication.
ABOUT_DRIFT, ABOUT_COST = ("ATN203",), ("ATN301",)

# Whose numbers can be compared: all of the call was done, and by and large well.
RIGHT = (Status.SUPPORTED, Status.REDISTRIBUTED, Status.DRIFT)


@dataclass(frozen=True, order=True)
class Key:
    """What is tested: an operator on a route, in a setting, on a mesh, so placed, in a direction."""

    operator: str
    setting: str
    route: str
    mesh: str
    placement: str
    direction: str

    def __str__(self) -> str:
        return "/".join(
            [self.operator, self.setting, self.route, self.mesh, self.placement, self.direction]
        )


def key_of(case: Case) -> Key:
    setting = str(case.setting.get("name", UNPLANNED))
    mesh = mesh_id(case.mesh)
    return Key(case.operator, setting, case.route, mesh, case.placement, case.direction)


@dataclass(frozen=True)
class Measured:
    """The error of a case: `error` of the result or gradient that comes nearest to its bound, `unsharded`
    that of the same operator on whole tensors (both absolute), `ratio` the error in parts of the bound: the
    median of it over `repeats` sets of values, where there were several."""

    error: float
    unsharded: float
    ratio: float
    repeats: int = 1


@dataclass(frozen=True)
class Accepted:
    """What people wrote beside a finding that they live with. `until`: a date, or None for good."""

    reason: str = ""
    until: datetime.date | None = None


@dataclass(frozen=True)
class Known:
    """What is known of a case: its status, the findings about it by rule, its numbers, and who accepts it.

    `case` is its id where there is one; `bytes`: what one rank sends in all its collectives.
    """

    status: Status
    rules: Mapping[str, Severity] = field(default_factory=dict)
    measured: Measured | None = None
    bytes: int = 0
    accepted: Mapping[str, Accepted] = field(default_factory=dict)
    case: str = ""


@dataclass(frozen=True)
class Policy:
    """When a gate fails. `allow`: kinds of change that it lets pass; `fail_on`: the lowest severity of a new
    finding, None for no finding; `strict`: also for entries of the baseline that are stale."""

    allow: tuple[ChangeKind, ...] = ()
    fail_on: Severity | None = Severity.ERROR
    strict: bool = False


def kinds(names: Iterable[str]) -> tuple[ChangeKind, ...]:
    """The kinds of change that a gate can be told to allow. Raises UserError for another name."""
    known = [kind.value for kind in REGRESSIONS]
    out = []
    for name in names:
        if name not in known:
            raise unknown("kind of change", name, known)
        out.append(ChangeKind(name))
    return tuple(out)


# --- what a report says of its cases -------------------------------------------------------------


def recall(report: Report) -> dict[Key, Known]:
    """What a report knows of each case. Of two with the same key the worse one counts, and before it one
    whose check failed: nothing may pass for what the other says."""
    rules: dict[str, dict[str, Severity]] = {}
    for finding in report.findings:
        if finding.severity is Severity.INFO or finding.rule in (*UNJUDGED, *TIMED):
            continue
        for case in finding.cases:
            rules.setdefault(case, {})[finding.rule] = finding.severity
    known: dict[Key, Known] = {}
    for result in report.cases:
        key, one = key_of(result.case), _known(result, rules.get(result.case.id, {}))
        if key not in known or _precedence(one) < _precedence(known[key]):
            known[key] = one
    return known


def _precedence(known: Known) -> tuple[bool, int]:
    return known.status is not Status.UNKNOWN, known.status.rank


def _known(result: CaseResult, rules: Mapping[str, Severity]) -> Known:
    outcome = result.outcome
    return Known(
        status=outcome.status,
        rules=rules,
        measured=_measured(outcome),
        bytes=sum(collective.bytes for collective in outcome.collectives),
        case=result.case.id,
    )


def _measured(outcome: Outcome) -> Measured | None:
    finite = {
        name: stat
        for name, stat in outcome.errors.items()
        if all(0 <= number < LARGEST for number in (stat.max, stat.unsharded_max, stat.ratio))
    }
    if not finite:
        return None
    # Where the case was repeated the median of its ratios says more than that of one seed.
    ratios = {name: stat.ratio for name, stat in finite.items()}
    spreads = {
        name: spread
        for name, spread in outcome.spread.items()
        if name in finite and spread.repeats > 1 and 0 <= spread.ratio_median < LARGEST
    }
    ratios |= {name: spread.ratio_median for name, spread in spreads.items()}
    worst = max(ratios, key=lambda name: (ratios[name], name))
    repeats = spreads[worst].repeats if worst in spreads else 1
    stat = finite[worst]
    return Measured(stat.max, stat.unsharded_max, ratios[worst], repeats)


# --- comparing -----------------------------------------------------------------------------------


def compare(
    before: Mapping[Key, Known],
    after: Mapping[Key, Known],
    policy: Policy | None = None,
    today: datetime.date = datetime.date.min,
) -> tuple[CaseChange, ...]:
    """What became of every case of either side, unchanged ones included, in the order of `ChangeKind`.

    `policy`: None for a mere comparison, which gates nothing. `today` decides which acceptances of `before`
    have expired.
    """
    order = {kind: i for i, kind in enumerate(ChangeKind)}
    changes = [
        (key, _change(key, before.get(key), after.get(key), policy, today))
        for key in {**after, **before}
    ]
    changes.sort(key=lambda pair: (order[pair[1].kind], pair[0]))
    return tuple(change for _, change in changes)


def _change(
    key: Key, old: Known | None, new: Known | None, policy: Policy | None, today: datetime.date
) -> CaseChange:
    expired = _expired(old, new, today)
    kind, rules, detail = _kind(old, new, expired)
    accepted = _acceptance(old, rules)
    severities = [new.rules[rule] for rule in rules if new is not None and rule in new.rules]
    return CaseChange(
        case=(new.case if new else "") or (old.case if old else "") or str(key),
        kind=kind,
        before=old.status if old else None,
        after=new.status if new else None,
        rules=tuple(sorted(rules)),
        detail=detail,
        reason=accepted.reason,
        until=accepted.until.isoformat() if accepted.until else "",
        gates=policy is not None and _gates(kind, severities, policy),
    )


def _gates(kind: ChangeKind, severities: Sequence[Severity], policy: Policy) -> bool:
    if kind not in REGRESSIONS or kind in policy.allow:
        return False
    if kind is not ChangeKind.NEW:
        return True  # down from what it was: whatever its severity
    limit = policy.fail_on
    return limit is not None and any(severity.rank <= limit.rank for severity in severities)


def _acceptance(old: Known | None, rules: Iterable[str]) -> Accepted:
    written = [old.accepted[rule] for rule in sorted(rules) if rule in old.accepted] if old else []
    return written[0] if written else Accepted()


def _expired(old: Known | None, new: Known | None, today: datetime.date) -> dict[str, str]:
    """Rules that still hold of a case, and were accepted until a day that has passed: that day."""
    if old is None or new is None:
        return {}
    return {
        rule: accepted.until.isoformat()
        for rule, accepted in old.accepted.items()
        if accepted.until is not None and accepted.until < today and rule in new.rules
    }


Judged = tuple[ChangeKind, Iterable[str], str]


def _kind(old: Known | None, new: Known | None, expired: Mapping[str, str]) -> Judged:
    """What became of one case, the rules that it is about, and its numbers in words."""
    if new is None:
        assert old is not None
        detail = "no case of that name was planned"
        return (ChangeKind.NOT_RUN if old.status.ran else ChangeKind.UNCHANGED), old.rules, detail
    if new.status is Status.UNKNOWN:
        same = old is not None and old.status is Status.UNKNOWN
        return (ChangeKind.UNCHANGED if same else ChangeKind.NOT_RUN), (), "the check itself failed"
    worse = old is not None and old.status.ran and new.status.rank < old.status.rank
    if expired and not worse:
        days = ", ".join(sorted(set(expired.values())))
        return ChangeKind.NEW, expired, f"accepted until {days}, which has passed"
    if old is None or not old.status.ran:
        return _first_seen(old, new)
    if not new.status.ran:
        # What says why it cannot be run any more (an extension that does not load) is a finding.
        gained = set(new.rules) - set(old.rules)
        return (ChangeKind.NEW, gained, "") if gained else (ChangeKind.NOT_RUN, old.rules, "")
    if worse:
        kind = ChangeKind.WORSE if new.rules else ChangeKind.IGNORED
        return kind, new.rules, _numbers(old, new)
    if new.status.rank > old.status.rank:
        gone = not new.rules and new.status.usable
        return (ChangeKind.FIXED if gone else ChangeKind.BETTER), old.rules, _numbers(old, new)
    return _same_status(old, new)


def _first_seen(old: Known | None, new: Known) -> Judged:
    if gained := set(new.rules) - set(old.rules if old else ()):
        return ChangeKind.NEW, gained, ""
    if old is None:
        return ChangeKind.ADDED, (), ""
    # It could not be run before: that it can be now is good news, whatever it says.
    return (ChangeKind.BETTER if new.status.ran else ChangeKind.UNCHANGED), old.rules, ""


def _same_status(old: Known, new: Known) -> Judged:
    if gained := set(new.rules) - set(old.rules):
        return ChangeKind.NEW, gained, ""
    if old.status in RIGHT:
        if drifted(old.measured, new.measured):
            return ChangeKind.DRIFTED, {*new.rules} & {*ABOUT_DRIFT}, _numbers(old, new)
        if new.bytes > old.bytes:
            return ChangeKind.COSTLIER, {*new.rules} & {*ABOUT_COST}, _numbers(old, new)
        if new.bytes < old.bytes:
            return ChangeKind.BETTER, old.rules, _numbers(old, new)
    if set(old.rules) - set(new.rules):
        kind = ChangeKind.BETTER if new.rules else ChangeKind.FIXED
        # A failure without any rule is one whose rules are ignored now.
        kind = kind if new.rules or new.status.usable else ChangeKind.UNCHANGED
        return kind, set(old.rules) - set(new.rules), ""
    return ChangeKind.UNCHANGED, new.rules, ""


def drifted(old: Measured | None, new: Measured | None) -> bool:
    """Whether the error grew beyond what other values of the same tensors would show."""
    if old is None or new is None:
        return False
    noise = NOISE_OF_MEDIANS if min(old.repeats, new.repeats) >= MANY else NOISE
    return new.ratio > noise * max(old.ratio, FLOOR)


def _numbers(old: Known, new: Known) -> str:
    parts = []
    if old.bytes != new.bytes and old.status in RIGHT and new.status in RIGHT:
        times = f" ({new.bytes / old.bytes:.3g} times)" if old.bytes and new.bytes else ""
        parts.append(f"{old.bytes} -> {new.bytes} bytes a rank{times}")
    if drifted(old.measured, new.measured):
        assert old.measured is not None
        assert new.measured is not None
        parts.append(
            f"error {old.measured.ratio:.2g} -> {new.measured.ratio:.2g} of its bound "
            f"({old.measured.error:.2g} -> {new.measured.error:.2g}; unsharded "
            f"{old.measured.unsharded:.2g} -> {new.measured.unsharded:.2g})"
        )
    return "; ".join(parts)


# --- the environment -----------------------------------------------------------------------------

# What decides verdicts, in the order in which it is told; packages come first.
_FACTS = (
    "attncheck",
    "python",
    "device",
    "gpu",
    "engine",
    "level",
    "hash_seeds",
    "repeats",
    "fixes",
)


def facts(environment: Mapping[str, Any]) -> dict[str, str]:
    """What of a report's environment decides verdicts, as text by name: packages first."""
    packages = environment.get("packages")
    out = {}
    if isinstance(packages, Mapping):
        first = [name for name in ("torch", "flash-attn", "xformers") if name in packages]
        names = [*first, *sorted(str(n) for n in packages if n not in first)]
        out = {name: str(packages[name]) for name in names}
    for name in _FACTS:
        if environment.get(name) not in (None, "", [], {}):
            value = environment[name]
            # Of fixes the files are named; what became of each op is in the report.
            out[name.replace("_", " ")] = in_words(
                [*value] if isinstance(value, Mapping) else value
            )
    return out


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[Difference, ...]:
    """What is not the same in two `facts`, in their order."""
    return tuple(
        Difference(name, before.get(name, ""), after.get(name, ""))
        for name in {**after, **before}
        if before.get(name) != after.get(name)
    )


# --- the comparison ------------------------------------------------------------------------------


def stale(before: Mapping[Key, Known], after: Mapping[Key, Known]) -> Iterator[tuple[Key, str]]:
    """Entries (a case and a rule, '' for none) that say what is no longer so: the finding is gone, or the
    case is no longer planned."""
    for key, old in before.items():
        new = after.get(key)
        if new is None:
            yield from ((key, rule) for rule in old.rules or ("",))
        elif new.status.ran:
            yield from ((key, rule) for rule in old.rules if rule not in new.rules)


def compare_reports(old: Report, new: Report, against: str) -> Comparison:
    """What `attncheck diff` says."""
    changes = compare(recall(old), recall(new))
    shown = tuple(c for c in changes if c.kind is not ChangeKind.UNCHANGED)
    return Comparison(
        against=against,
        environment=differences(facts(old.environment), facts(new.environment)),
        changes=shown,
        unchanged=len(changes) - len(shown),
    )
