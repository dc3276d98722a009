"""The baseline: a committed file of what is known of each case, and which findings a team lives with.

One entry a line, sorted, so that a rewrite shows as what changed and nothing else: numbers that differ by no
more than noise stay as they were, and what people wrote (`reason`, `until`) stays with its entry. Torch-free.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from attncheck import compare, rules
from attncheck.compare import Accepted, Key, Known, Measured, Policy
from attncheck.errors import UserError, unknown
from attncheck.model import ChangeKind, Comparison, Report, Severity, Status
from attncheck.text import clean, count, listing, one_line

SCHEMA_VERSION = 1
DEFAULT_FILE = "attncheck-baseline.json"

_KEY = ("operator", "setting", "route", "mesh", "placement", "direction")
_FIELDS = (
    *_KEY,
    "rule",
    "status",
    "error",
    "unsharded",
    "ratio",
    "repeats",
    "bytes",
    "reason",
    "until",
)


@dataclass(frozen=True)
class Baseline:
    """`known`: the cases; `environment`: what they were run in, by name (see `compare.facts`); `seed`: that
    of their values, with which they are run again."""

    known: Mapping[Key, Known]
    environment: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None

    @property
    def entries(self) -> int:
        """Lines of the file: one for each finding of a case, one for a case without any."""
        return sum(len(known.rules) or 1 for known in self.known.values())


# --- the file ------------------------------------------------------------------------------------


def dump(baseline: Baseline) -> str:
    """The file's text: JSON, one entry a line, sorted by what is tested."""
    lines = sorted(
        ((key, rule), json.dumps(_entry(key, rule, known)))
        for key, known in baseline.known.items()
        for rule in known.rules or ("",)
    )
    head = json.dumps(dict(baseline.environment), indent=1)
    head = "\n ".join(head.split("\n"))
    body = ",\n".join(line for _, line in lines)
    entries = f"[\n{body}\n]" if body else "[]"
    seed = f'\n "seed": {baseline.seed},' if baseline.seed is not None else ""
    schema = f'"schema_version": {SCHEMA_VERSION}'
    return f'{{\n {schema},\n "environment": {head},{seed}\n "entries": {entries}\n}}\n'


def _entry(key: Key, rule: str, known: Known) -> dict[str, Any]:
    entry: dict[str, Any] = {name: getattr(key, name) for name in _KEY}
    if rule:
        entry["rule"] = rule
    entry["status"] = known.status.value
    if known.measured is not None:
        measured = known.measured
        entry["error"] = _short(measured.error)
        entry["unsharded"] = _short(measured.unsharded)
        entry["ratio"] = _short(measured.ratio)
        if measured.repeats > 1:
            entry["repeats"] = measured.repeats
    if known.bytes:
        entry["bytes"] = known.bytes
    accepted = known.accepted.get(rule, Accepted())
    if accepted.reason:
        entry["reason"] = accepted.reason
    if accepted.until is not None:
        entry["until"] = accepted.until.isoformat()
    return entry


def _short(number: float) -> float:
    """Three digits: more would only make lines differ."""
    return float(f"{number:.3g}")


def read(file: Path) -> Baseline:
    """The baseline in a file. Raises UserError where it cannot be read or is none that we can read."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"There is no baseline {file}; `attncheck baseline write` makes one of what is known today."
        ) from None
    except OSError as error:
        raise UserError(f"Cannot read the baseline {file}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not a text file; expected a baseline.") from None
    return load(text, str(file))


def load(text: str, where: str = "baseline") -> Baseline:
    """Parse a baseline. Raises UserError, in a sentence that names the entry, where it is not as expected."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}.") from None
    if not isinstance(document, dict) or "schema_version" not in document:
        raise UserError(f"{where} is no attncheck baseline: it has no schema_version.")
    if document["schema_version"] != SCHEMA_VERSION:
        raise UserError(
            f"{where} has schema_version {document['schema_version']!r}; this attncheck reads "
            f"{SCHEMA_VERSION}."
        )
    if "entries" not in document:
        what = "a report; a baseline" if "cases" in document else "no baseline: one"
        raise UserError(f"{where} is {what} has entries (`attncheck baseline write` makes it).")
    environment, entries = document.get("environment", {}), document["entries"]
    if not isinstance(environment, dict) or not all(
        isinstance(value, str) for value in environment.values()
    ):
        raise UserError(f"{where}: environment must be an object of strings.")
    if not isinstance(entries, list):
        raise UserError(f"{where}: entries must be a list.")
    seed = int(_number(document, "seed", where)) if "seed" in document else None
    return Baseline(_known(entries, where), environment, seed)


def _known(entries: Iterable[Any], where: str) -> dict[Key, Known]:
    known: dict[Key, Known] = {}
    seen: dict[tuple[Key, str], int] = {}
    for number, entry in enumerate(entries, 1):
        place = f"{where}, entry {number}"
        key, rule, one = _parsed(entry, place)
        if (key, rule) in seen:
            raise UserError(f"{place} says the same case and rule as entry {seen[key, rule]}.")
        seen[key, rule] = number
        before = known.get(key)
        if before is None:
            known[key] = one
            continue
        known[key] = replace(
            before,
            status=min(before.status, one.status, key=lambda status: status.rank),
            rules={**before.rules, **one.rules},
            accepted={**before.accepted, **one.accepted},
        )
    return known


def _parsed(entry: Any, place: str) -> tuple[Key, str, Known]:
    if not isinstance(entry, dict):
        raise UserError(f"{place} must be an object.")
    for name in entry:
        if name not in _FIELDS:
            raise unknown(f"field in {place}:", str(name), _FIELDS)
    key = Key(*(_text(entry, name, place) for name in _KEY))
    status = _text(entry, "status", place)
    known_statuses = [s.value for s in Status if s is not Status.UNKNOWN]  # which is no verdict
    if status not in known_statuses:
        raise unknown(f"status in {place}:", status, known_statuses)
    rule = _text(entry, "rule", place) if "rule" in entry else ""
    measured = None
    if "ratio" in entry:
        error, unsharded, ratio = (
            _number(entry, n, place) for n in ("error", "unsharded", "ratio")
        )
        repeats = int(_number(entry, "repeats", place)) if "repeats" in entry else 1
        measured = Measured(error, unsharded, ratio, repeats)
    accepted = _accepted(entry, place)
    known = Known(
        status=Status(status),
        rules={rule: _severity(rule)} if rule else {},
        measured=measured,
        bytes=int(_number(entry, "bytes", place)) if "bytes" in entry else 0,
        accepted={rule: accepted} if accepted != Accepted() else {},
    )
    return key, rule, known


def _text(entry: Mapping[str, Any], name: str, place: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str):
        raise UserError(f"{place}: {name} must be a string, found {value!r:.60}.")
    return value


def _number(entry: Mapping[str, Any], name: str, place: str) -> float:
    value = entry.get(name)
    # A larger int is no number of bytes, and may be more than a float can hold.
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
        return value
    if isinstance(value, float) and 0 <= value < math.inf:
        return value
    raise UserError(f"{place}: {name} must be a number from 0 on, found {value!r:.60}.")


def _accepted(entry: Mapping[str, Any], place: str) -> Accepted:
    reason = entry.get("reason", "")
    if not isinstance(reason, str):
        raise UserError(f"{place}: reason must be a string, found {reason!r:.60}.")
    if "until" not in entry:
        return Accepted(reason)
    try:
        return Accepted(reason, datetime.date.fromisoformat(entry["until"]))
    except (TypeError, ValueError):
        raise UserError(
            f"{place}: until must be a date like 2027-01-31, found {entry['until']!r:.60}."
        ) from None


def _severity(rule: str) -> Severity:
    """Of a rule that a newer attncheck knows, and this one does not, the worst is assumed."""
    return next((r.severity for r in rules.RULES if r.id == rule), Severity.ERROR)


# --- writing and pruning -------------------------------------------------------------------------


@dataclass(frozen=True)
class Rewritten:
    """A baseline to write, and what to say of it: cases that were `added`, `changed` or `removed`; `kept`
    though the report says nothing of them; `left_out`: without a verdict."""

    baseline: Baseline
    added: int = 0
    changed: int = 0
    removed: int = 0
    kept: int = 0
    left_out: int = 0


def updated(old: Baseline, report: Report) -> Rewritten:
    """What a report knows, over what was known: cases that it did not run stay as they were."""
    found = compare.recall(report)
    known: dict[Key, Known] = {}
    added = changed = left_out = 0
    for key, new in found.items():
        before = old.known.get(key)
        idle = new.status is Status.UNKNOWN or (before and before.status.ran and not new.status.ran)
        if idle and before is None:
            left_out += 1
        elif idle or (before is not None and _same(before, new)):
            assert before is not None
            known[key] = before
        else:
            added += before is None
            changed += before is not None
            known[key] = _keeping(before, new)
    beside = {key: one for key, one in old.known.items() if key not in found}
    seed = report.environment.get("seed")
    is_seed = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63
    baseline = Baseline(
        {**known, **beside}, compare.facts(report.environment), seed if is_seed else None
    )
    return Rewritten(baseline, added, changed, kept=len(beside), left_out=left_out)


def _same(before: Known, new: Known) -> bool:
    """Whether nothing changed beyond noise: the line then stays as it is."""
    (change,) = compare.compare({_ANY: before}, {_ANY: new})
    return change.kind is ChangeKind.UNCHANGED and set(before.rules) == set(new.rules)


_ANY = Key("", "", "", "", "", "")


def _keeping(before: Known | None, new: Known) -> Known:
    accepted = before.accepted if before is not None else {}
    return replace(new, accepted={r: a for r, a in accepted.items() if r in new.rules})


def pruned(old: Baseline, report: Report) -> Rewritten:
    """Without the entries that a report shows to be stale: findings that are gone, cases that it has not.

    Nothing else changes: what is new or worse is no business of this.
    """
    found = compare.recall(report)
    gone: dict[Key, set[str]] = {}
    for key, rule in compare.stale(old.known, found):
        gone.setdefault(key, set()).add(rule)
    known = dict(old.known)
    for key, gone_rules in gone.items():
        rest = set(known[key].rules) - gone_rules
        if key not in found:
            del known[key]
        elif rest:
            known[key] = replace(
                known[key],
                rules={r: s for r, s in known[key].rules.items() if r in rest},
                accepted={r: a for r, a in known[key].accepted.items() if r in rest},
            )
        else:
            known[key] = _keeping(None, found[key])
    removed = sum(map(len, gone.values()))
    return Rewritten(replace(old, known=known), removed=removed)


# --- the gate ------------------------------------------------------------------------------------

EXIT_PASSED, EXIT_FAILED, EXIT_INCONCLUSIVE = 0, 1, 3


def gate(
    baseline: Baseline,
    report: Report,
    policy: Policy,
    today: datetime.date,
    against: str = DEFAULT_FILE,
    incomplete: str = "",
) -> Comparison:
    """Hold a report against a baseline. A gate that ran nothing never passes, nor one on an `incomplete`
    report: what it lacks, in words."""
    found = compare.recall(report)
    changes = compare.compare(baseline.known, found, policy, today)
    old = len(list(compare.stale(baseline.known, found)))
    # Also of what did not change a report shows why it is accepted.
    shown = tuple(c for c in changes if c.kind is not ChangeKind.UNCHANGED or c.reason or c.until)
    comparison = Comparison(
        against=against,
        environment=compare.differences(baseline.environment, compare.facts(report.environment)),
        changes=shown,
        unchanged=len(changes) - len(shown),
        stale=old,
    )
    ran = any(known.status.ran for known in found.values())
    code, verdict = _verdict(comparison, policy, ran, incomplete)
    return replace(comparison, verdict=verdict, exit_code=code)


def _verdict(comparison: Comparison, policy: Policy, ran: bool, incomplete: str) -> tuple[int, str]:
    """The exit code, and why in words."""
    failing = [change for change in comparison.changes if change.gates]
    idle = sum(change.kind is ChangeKind.NOT_RUN for change in comparison.changes)
    if not ran:
        return EXIT_INCONCLUSIVE, "Nothing ran, so nothing can be said: exit code 3."
    also = f" {count(idle, 'known case')} could not be run." if idle else ""
    if failing:
        counts = ", ".join(_counted(change.kind for change in failing))
        return EXIT_FAILED, f"The gate fails: {counts}. Exit code 1.{also}"
    if incomplete:
        return EXIT_INCONCLUSIVE, f"The report is not whole ({incomplete}): exit code 3."
    if idle:
        return EXIT_INCONCLUSIVE, f"Nothing is worse among what ran, but{also} Exit code 3."
    if policy.strict and comparison.stale:
        entries = "entry is" if comparison.stale == 1 else "entries are"
        return (
            EXIT_FAILED,
            f"The gate fails under --strict: {comparison.stale} {entries} stale. Exit code 1.",
        )
    return EXIT_PASSED, "The gate passes: nothing is worse than the baseline. Exit code 0."


def _counted(found: Iterable[ChangeKind]) -> Iterator[str]:
    every = list(found)
    for kind in ChangeKind:
        if kind in every:
            yield f"{every.count(kind)} {kind.value}"


# --- showing -------------------------------------------------------------------------------------


def summary(baseline: Baseline, today: datetime.date) -> str:
    """What a baseline holds, for a person: counts by rule and status, and what people wrote."""
    from tabulate import tabulate

    counts: dict[tuple[str, str], list[Key]] = {}
    written: dict[tuple[str, str, str], int] = {}
    for key, known in baseline.known.items():
        for rule in known.rules or ("",):
            counts.setdefault((rule or "-", known.status.value), []).append(key)
        for rule, accepted in known.accepted.items():
            until = _until(accepted, today)
            row = (rule, one_line(accepted.reason, 80) or "-", until)
            written[row] = written.get(row, 0) + 1
    environment = ", ".join(f"{name} {text}" for name, text in baseline.environment.items())
    rows = [
        (rule, status, len(keys), listing(sorted({key.operator for key in keys}), 3))
        for (rule, status), keys in sorted(counts.items())
    ]
    parts = [
        f"{count(len(baseline.known), 'case')}, {baseline.entries} entries.",
        f"Written with {environment}." if environment else "",
        tabulate(rows, ("rule", "status", "cases", "operators")) if rows else "",
    ]
    if written:
        lines = [(*row, number) for row, number in sorted(written.items())]
        parts.append(tabulate(lines, ("rule", "reason", "until", "cases"), disable_numparse=True))
    return "\n\n".join(clean(part) for part in parts if part) + "\n"


def _until(accepted: Accepted, today: datetime.date) -> str:
    if accepted.until is None:
        return "-"
    expired = " (expired: counts as new)" if accepted.until < today else ""
    return accepted.until.isoformat() + expired
