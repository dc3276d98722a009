"""Joins reports: the shards of one scan, or scans of different cases in one environment. Torch-free.

What comes out is what one scan of all the cases would have said: its cases are in the order of the plan, and
its findings are judged anew over all of them.
"""

from __future__ import annotations

import datetime
import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from attncheck import rules, waivers
from attncheck.errors import UserError
from attncheck.model import UNPLANNED, CaseResult, Report, from_json, to_json
from attncheck.runner import crosscheck
from attncheck.runner.scan import describe_meshes
from attncheck.sharding import Share
from attncheck.surroundings import in_words
from attncheck.text import count, listing


@dataclass(frozen=True)
class Part:
    """A report to join, by the name of its file. `share`: of which plan it is which shard, if it is one."""

    name: str
    report: Report
    share: Share | None


def merge(
    reports: Sequence[tuple[str, Report]], today: datetime.date, allow_mixed: bool = False
) -> Report:
    """The reports (by the name of their file; at least one) as one.

    Raises UserError where they were made in different environments (unless `allow_mixed`: the report then
    says in which), where a case has two outcomes, and where a report was itself joined from some shards
    of a plan and not from all.
    """
    parts: list[Part] = []
    for name, report in reports:
        if all(report != part.report for part in parts):  # a file given twice is spent once
            parts.append(_part(name, report))
    differences = _differences(parts)
    if differences and not allow_mixed:
        name, values = next(iter(differences.items()))
        (first, said), (second, other) = list(values.items())[:2]
        raise UserError(
            f"{listing(said)} has {name} {first or 'none'} and {listing(other)} {second or 'none'}: "
            "expected reports of one environment, or --allow-mixed."
        )
    cases = _cases(parts)
    applied = [w for part in parts for w in waivers.recorded(part.report.environment, part.name)]
    environment = _environment(parts, cases)
    if notes := _notes(parts, environment, differences):
        environment["notes"] = notes
    joined = judged_again(Report(environment, cases, ()), "these reports")
    return waivers.apply(joined, tuple(dict.fromkeys(applied)), today)


def judged_again(report: Report, where: str) -> Report:
    """The report with what the rules find in its cases, and as if no waiver had been applied to it.

    Rules are chosen as its scan chose them. Raises UserError where its cases are not what scans make.
    """
    environment = {k: v for k, v in report.environment.items() if k != "ignored"}
    select, ignore = (_texts(environment.get(key)) for key in ("select", "ignore"))
    try:
        findings = rules.judge(report.cases, select=select, ignore=ignore)
    except UserError:
        raise
    # Rules trust what scans make; a report from elsewhere holds anything.
    except Exception as error:
        raise UserError(
            f"The cases of {where} cannot be judged ({type(error).__name__}): expected reports that "
            "attncheck scan wrote."
        ) from None
    return replace(report, environment=environment, findings=findings)


def missing_shards(environment: Mapping[str, Any]) -> tuple[str, ...]:
    """`2/3` for each shard whose cases this joined report lacks."""
    plans = environment.get("shards")
    return tuple(
        f"{index}/{plan.get('of')}"
        for plan in (plans if isinstance(plans, (list, tuple)) else ())
        if isinstance(plan, Mapping) and isinstance(plan.get("missing"), (list, tuple))
        for index in plan["missing"]
    )


# --- cases ---------------------------------------------------------------------------------------


def _part(name: str, report: Report) -> Part:
    if lacking := missing_shards(report.environment):
        raise UserError(
            f"{name} was joined without shard {listing(lacking)}: merge the reports of all shards in one "
            "call instead."
        )
    if "shard" not in report.environment:
        return Part(name, report, None)
    where = f"{name}: environment.shard"
    share = from_json(Share, report.environment["shard"], where)
    planned = sum(1 for result in report.cases if _is_planned(result))
    sound = len(share.positions) == planned <= share.planned and 1 <= share.index <= share.of
    if not sound:
        raise UserError(f"{where} does not fit its {count(planned, 'case')}.")
    return Part(name, report, share)


def _is_planned(result: CaseResult) -> bool:
    return result.case.placement != UNPLANNED


def _cases(parts: Sequence[Part]) -> tuple[CaseResult, ...]:
    """Every case once: plan by plan in the order of each, and after them what no plan could be made of."""
    plans: dict[str, int] = {}
    found: dict[str, tuple[Part, CaseResult]] = {}
    order: dict[str, tuple[int, int]] = {}
    for at, part in enumerate(parts):
        plan = plans.setdefault(part.share.plan if part.share else f"report {at}", len(plans))
        planned = [result for result in part.report.cases if _is_planned(result)]
        positions = part.share.positions if part.share else range(len(planned))
        for result, position in zip(planned, positions, strict=True):
            order.setdefault(result.case.id, (plan, position))
        for result in part.report.cases:
            other, same = found.setdefault(result.case.id, (part, result))
            if _contradict(result, same):
                raise UserError(
                    f"Case {result.case.id!r} is in {other.name} and in {part.name}, with two outcomes: "
                    "expected reports of different cases (attncheck diff compares two of the same)."
                )
    results = [result for _, result in found.values()]
    planned = sorted(filter(_is_planned, results), key=lambda result: order[result.case.id])
    return (*planned, *(result for result in results if not _is_planned(result)))


def _contradict(one: CaseResult, other: CaseResult) -> bool:
    """What could not be planned is in every shard, in words that may name a folder."""
    if not _is_planned(one) and not _is_planned(other):
        return (one.outcome.status, one.outcome.reason) != (
            other.outcome.status,
            other.outcome.reason,
        )
    # As JSON: NaN is equal to itself there.
    return one is not other and bool(to_json(one) != to_json(other))


# --- environments --------------------------------------------------------------------------------

# What decides verdicts, and what is found in them. Not the machine, and not the values of one scan.
_DECIDING: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "attncheck": lambda env: env.get("attncheck"),
    "Python": lambda env: ".".join(in_words(env.get("python")).split(".")[:2]),
    "device": lambda env: env.get("device"),
    "GPU": lambda env: env.get("gpu"),
    "engine": lambda env: env.get("engine"),
    "hash seeds": lambda env: env.get("hash_seeds"),
    "repeats": lambda env: env.get("repeats"),
    "fixes": lambda env: sorted(PurePath(file).name for file in _mapping(env.get("fixes"))),
    "--with": lambda env: env.get("with"),
    "level": lambda env: env.get("level"),
    "--select": lambda env: env.get("select"),
    "--ignore": lambda env: env.get("ignore"),
}

# Of a command line, what belongs to one of several jobs. Those in `_ALONE` take no value.
_OF_ONE_JOB = ("--shard", "--output", "-o", "--run-dir", "--seed")
_ALONE = ("--resume", "--quiet", "-q", "--verbose", "-v")


def _differences(parts: Sequence[Part]) -> dict[str, dict[str, list[str]]]:
    """Where the environments differ: by name, the values in words and which reports have each."""
    said: dict[str, dict[str, list[str]]] = {}
    packages = sorted(
        {p for part in parts for p in _mapping(part.report.environment.get("packages"))}
    )
    for part in parts:
        env = part.report.environment
        own = {name: value(env) for name, value in _DECIDING.items()}
        own |= {name: _mapping(env.get("packages")).get(name) for name in packages}
        for name, value in own.items():
            said.setdefault(name, {}).setdefault(in_words(value), []).append(part.name)
    return {name: values for name, values in said.items() if len(values) > 1}


def _mixed(differences: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
    told = (
        f"{name} "
        + ", ".join(f"{value or 'none'} in {listing(names)}" for value, names in values.items())
        for name, values in differences.items()
    )
    return f"Joined from different environments: {'; '.join(told)}."


def _environment(parts: Sequence[Part], cases: Sequence[CaseResult]) -> dict[str, Any]:
    """What the reports have in common; sums and maxima of what they spent; and which shards they are."""
    envs = [part.report.environment for part in parts]
    own = ("shard", "ignored")
    keys = [key for key in dict.fromkeys(key for env in envs for key in env) if key not in own]
    out = {key: _common([env[key] for env in envs if key in env]) for key in keys}
    for key, join in _JOINS.items():
        if key in out:
            out[key] = join([env[key] for env in envs if key in env])
    if cases:
        out |= describe_meshes(result.case for result in cases)
    seeds = _distinct(env["seed"] for env in envs if "seed" in env)
    if len(seeds) > 1:
        out["seeds"] = seeds
    if shards := _shards(parts):
        out["shards"] = [*_list(out.get("shards")), *shards]
    return out


def _notes(
    parts: Sequence[Part],
    joined: Mapping[str, Any],
    differences: Mapping[str, Mapping[str, Sequence[str]]],
) -> list[str]:
    """The notes of the reports, with the counts of all of them, and what is to be said of the joining."""
    told = [_counts(part.report.environment.get("crosscheck")) for part in parts]
    replaced = {crosscheck.sentence(counts) for counts in told if counts}
    notes = [note for note in _texts(joined.get("notes")) if note not in replaced]
    if counts := _counts(joined.get("crosscheck")):
        notes.append(crosscheck.sentence(counts))
    if "seeds" in joined:
        notes.append(f"The reports drew their values from seeds {in_words(joined['seeds'])}.")
    if missing := missing_shards(joined):
        notes.append(f"Incomplete: no report was given of shard {listing(missing, 10)}.")
    if differences:
        notes.append(_mixed(differences))
    return notes


def _shards(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Of each plan, how many shards it has, which are here, and which are not.

    Raises UserError where all are here, and were not cut from the plan in the same way.
    """
    plans: dict[tuple[str, int], list[Share]] = {}
    for part in parts:
        if part.share:
            plans.setdefault((part.share.plan, part.share.of), []).append(part.share)
    out = []
    for (_, of), shares in plans.items():
        joined = {share.index for share in shares}
        missing = {*range(1, of + 1)} - joined
        lost = shares[0].planned - len({at for share in shares for at in share.positions})
        if lost and not missing:
            raise UserError(
                f"All {of} shards are given, but {count(lost, 'case')} of the plan are in none: expected "
                "shards that were scanned with the same packages."
            )
        out.append({"of": of, "joined": sorted(joined), "missing": sorted(missing)})
    return out


# --- values from anywhere: an environment is free-form JSON ------------------------------------------


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _texts(value: Any) -> list[str]:
    return [item for item in _list(value) if isinstance(item, str)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list({json.dumps(value): value for value in values}.values())


def _common(values: Sequence[Any]) -> Any:
    """The value where all have the same; else the texts beside each other, or a list."""
    distinct = _distinct(values)
    if len(distinct) == 1:
        return distinct[0]
    if all(isinstance(value, str) for value in distinct):
        return " / ".join(distinct)
    if all(isinstance(value, Mapping) for value in distinct):
        keys = dict.fromkeys(key for value in distinct for key in value)
        return {key: _common([value[key] for value in distinct if key in value]) for key in keys}
    return distinct


def _first(values: Sequence[Any]) -> Any:
    return values[0]


def _union(values: Sequence[Any]) -> list[Any]:
    return _distinct(item for value in values for item in _list(value))


def _sum(values: Sequence[Any]) -> Any:
    total = sum(value for value in values if _is_number(value))
    return round(total, 2) if isinstance(total, float) else total


def _sums(values: Sequence[Any]) -> dict[str, Any]:
    keys = dict.fromkeys(key for value in values for key in _mapping(value))
    return {key: _sum([_mapping(value).get(key) for value in values]) for key in keys}


def _peak(values: Sequence[Any]) -> list[Any]:
    peaks = [value for value in map(_list, values) if all(map(_is_number, value))]
    return max(peaks, key=lambda peak: max(peak, default=0), default=[])


def _latest(values: Sequence[Any]) -> Any:
    return max(values, key=in_words)


def _fixes(values: Sequence[Any]) -> dict[str, Any]:
    """By file, what became of each op; where it was there in some scans, what became of it there."""
    files: dict[str, dict[str, Any]] = {}
    for value in values:
        for file, ops in _mapping(value).items():
            became = files.setdefault(file, {})
            for op, state in _mapping(ops).items():
                if became.get(op, "absent") == "absent":
                    became[op] = state
    return files


def _counts(value: Any) -> dict[str, int]:
    """The counts of a cross-check; {} for anything else."""
    counts = {key: _mapping(value).get(key) for key in ("agree", "disagree", "not_compared")}
    known = {key: number for key, number in counts.items() if isinstance(number, int)}
    return known if len(known) == len(counts) else {}


def _command(values: Sequence[Any]) -> str:
    """The first, without what belongs to one job."""
    try:
        words = shlex.split(in_words(values[0]))
    except ValueError:
        return in_words(values[0])
    kept: list[str] = []
    skip = False
    for word in words:
        option = word.partition("=")[0]
        if not skip and option not in (*_OF_ONE_JOB, *_ALONE):
            kept.append(shlex.quote(word))
        skip = not skip and word in _OF_ONE_JOB
    return " ".join(kept)


_JOINS: Mapping[str, Callable[[Sequence[Any]], Any]] = {
    "seed": _first,
    "date": _latest,
    "command": _command,
    "standins": lambda values: sorted(_union(values), key=in_words),
    "probe_errors": _union,
    "notes": _union,
    "fixes": _fixes,
    "crosscheck": _sums,
    "wall_seconds": _sum,
    "phases": _sums,
    "restarts": _sum,
    "peak_rss_mib": _peak,
    "select": _first,
    "ignore": _first,
    "shards": _union,
}
