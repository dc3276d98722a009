"""Verifying a fix: the cases of the findings and their neighbours, before and after, in fresh workers.

Three scans. The first repeats the report's own cases with the fix registered before anything is used, and
with settings that differ in nothing but `causal`, one after the other (a strategy served from a stale cache
shows). The second takes neighbours: other meshes, uneven shards, GQA. It runs them without the fix, registers
it in the same processes, after first use, and runs them again in the reverse order. The third does so for
operators whose propagation takes PyTorch ten seconds a call without a strategy, with the fix alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attncheck import rules
from attncheck.fixes import packages
from attncheck.fixes.notation import REFUSAL
from attncheck.model import Case, CaseResult, Outcome, Report, Status, worst
from attncheck.probing import (
    HEADS,
    KV_HEADS,
    KV_SEQUENCE,
    LEVELS,
    SEQUENCE,
    Operator,
    Setting,
)
from attncheck.runner import scan
from attncheck.runner.scan import ScanRequest

NEIGHBOUR_MESHES = ({"tp": 3}, {"dp": 2, "tp": 2})
NEIGHBOUR_PLACEMENTS = ("batch", "heads", "batch,heads", "heads,heads")
FLIP_PLACEMENTS = ("replicate", "batch", "heads", "query")
_MASKS = re.compile("mask|bias|alibi")

Progress = Callable[[int, int, Case | None], None]


def verify(
    operators: Sequence[Operator],
    fix: Path,
    known: Mapping[str, Status],
    request: ScanRequest,
    log: Callable[[str], None],
    on_progress: Progress,
) -> Report:
    """Run the cases of these operators with the fix. Each entry of the report knows its status before.

    `known`: statuses without the fix, by case id; `request`: how the findings were made (seed, packages,
    probes, meshes). Raises UserError, or launch.Interrupted.
    """
    flips = {o.name: made for o in operators if (made := flipped(o))}
    near = {o.name: neighbours(o) for o in operators}
    both = {
        name: (*request.settings.get(name, ()), *flips.get(name, ()))
        for name in {*request.settings, *flips}
    }
    base = dataclasses.replace(request, fixes=(str(fix),), settings=both, run_dir=None)
    fast = [o.name for o in operators if not o.slow]
    slow = [o.name for o in operators if o.slow]
    meshes = tuple(m for m in NEIGHBOUR_MESHES if m not in request.meshes)
    runs = [("their cases, with the fix", _selecting(base, [*fast, *slow]))]
    if twins := {name: _names(flips[name]) for name in fast if name in flips}:
        asked = dataclasses.replace(
            _selecting(base, [*twins], level="default"), only=twins, both_ways=True
        )
        runs.append(("causal twins, without and with it", asked))
    for names, both_ways, what in (
        (
            fast,
            True,
            "their neighbours on other meshes, without the fix, and with it after first use",
        ),
        (slow, False, "the neighbours of slow ones, with the fix"),
    ):
        if names and meshes:
            asked = _selecting(base, names, placements=NEIGHBOUR_PLACEMENTS, level="default")
            asked = dataclasses.replace(asked, meshes=meshes, both_ways=both_ways, only=near)
            runs.append((what, asked))
    reports = []
    for what, asked in runs:
        log(f"verifying {len(asked.selection.operators)} operators: {what}")
        reports.append(scan.scan(asked, lambda message: None, on_progress))
    results: dict[str, CaseResult] = {}
    for report in reports:
        for result in report.cases:
            _add(results, result, known)
    return _report(reports, results.values())


def joined(reports: Sequence[Report]) -> Report:
    """One report of several (at least one), with what is `latest`."""
    return _report(reports, latest(reports))


def latest(reports: Iterable[Report]) -> list[CaseResult]:
    """Their entries: of a case that is in more of them, what the last one says."""
    return [*{r.case.id: r for report in reports for r in report.cases}.values()]


def _report(reports: Sequence[Report], results: Iterable[CaseResult]) -> Report:
    cases = tuple(results)
    environment = {
        **reports[0].environment,
        **scan.describe_meshes(result.case for result in cases),
        "standins": sorted({s for result in cases for s in result.outcome.standins}),
        "restarts": sum(r.environment.get("restarts", 0) for r in reports),
        "wall_seconds": round(sum(r.environment["wall_seconds"] for r in reports), 1),
    }
    return Report(environment, cases, rules.judge(cases))


def _names(settings: Iterable[Setting]) -> tuple[str, ...]:
    return tuple(setting.name for setting in settings)


def _selecting(request: ScanRequest, operators: Sequence[str], **parts: Any) -> ScanRequest:
    selection = dataclasses.replace(request.selection, operators=tuple(operators), **parts)
    return dataclasses.replace(request, selection=selection)


def _add(results: dict[str, CaseResult], result: CaseResult, known: Mapping[str, Status]) -> None:
    """A case that was run twice has the worse of what came of it."""
    before = result.before or known.get(result.case.id)
    earlier = results.get(result.case.id)
    if earlier is not None:
        before = earlier.before or before
        if worst((earlier.outcome.status, result.outcome.status)) is earlier.outcome.status:
            result = earlier
    results[result.case.id] = dataclasses.replace(result, before=before)


# --- which settings ------------------------------------------------------------------------------


def flipped(operator: Operator) -> tuple[Setting, ...]:
    """Twins that differ in nothing but `causal`, of the plainest setting and the first with GQA. Empty where
    the operator has no such option."""
    settings = [s for s in operator.settings if _within_default(s)]
    causal = next((s.options["causal"] for s in settings if s.get("causal")), None)
    if causal is None:
        return ()
    plain = [s for s in settings if not s.get("causal")]
    chosen = [*plain[:1], *[s for s in plain if _is_grouped(s)][:1]]
    twins: list[Setting] = []
    for setting in {s.name: s for s in chosen}.values():
        square = _squared(setting)
        turned = dataclasses.replace(
            square,
            name=f"{setting.name}_turned_causal",
            options={**square.options, "causal": causal},
            placements=FLIP_PLACEMENTS,
        )
        straight = dataclasses.replace(
            square, name=f"{setting.name}_turned", placements=FLIP_PLACEMENTS
        )
        twins += [straight, turned] if square is not setting else [turned]
    return tuple(twin for twin in twins if _is_called_so(operator, twin))


def _squared(setting: Setting) -> Setting:
    """The setting with as many keys as queries: elsewhere operators differ in what causal means."""
    sizes = dict(setting.sizes)
    lengths = any("lengths" in option for option in setting.options)
    if lengths or sizes.get(KV_SEQUENCE, sizes.get(SEQUENCE)) == sizes.get(SEQUENCE):
        return setting
    return dataclasses.replace(setting, sizes={**sizes, KV_SEQUENCE: sizes[SEQUENCE]})


def _is_called_so(operator: Operator, setting: Setting) -> bool:
    """Whether the probe takes a setting that its author did not write: `causal` may need other options."""
    try:
        operator.tensors(setting)
    except Exception:
        return False
    return True


def neighbours(operator: Operator) -> tuple[str, ...]:
    """The settings to run on other meshes, by name: the plainest, and the first of each kind in which head
    shards have gone wrong."""
    settings = [s for s in operator.settings if _within_default(s)]
    kinds: tuple[Callable[[Setting], bool], ...] = (
        lambda s: True,
        lambda s: bool(s.get("causal")),
        _is_grouped,
        lambda s: s.sizes.get(HEADS, 2) % 2 == 1,
        lambda s: any(_MASKS.search(key) for key in s.options),
    )
    found = [next((s.name for s in settings if kind(s)), None) for kind in kinds]
    return tuple(dict.fromkeys(name for name in found if name is not None))


def _within_default(setting: Setting) -> bool:
    return LEVELS.index(setting.level) <= LEVELS.index("default") and not setting.explicit


def _is_grouped(setting: Setting) -> bool:
    heads = setting.sizes.get(HEADS, 1)
    return 1 < setting.sizes.get(KV_HEADS, heads) < heads


# --- what they say -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """What the cases say of one op that a fix registers. Counts are of cases that reached it.

    `before` and `after`: cases per status; `refused`: cases in which its strategy said that none is right,
    by what it said; `failed`: id and what went wrong; `elsewhere`: those that fail for what no strategy
    of this op mends, another op or a plain tensor among DTensors;
    `unchanged`: those that fail as they did without the fix (dropout under PyTorch's own strategies);
    `mended`: how many are right and were not. `ratio`: the largest error over its bound in those that are
    right.
    """

    op: str
    before: Mapping[str, int] = field(default_factory=dict)
    after: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)
    failed: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    mended: int = 0
    ratio: float = 0.0

    @property
    def right(self) -> int:
        return sum(n for status, n in self.after.items() if Status(status).usable)

    @property
    def cases(self) -> int:
        return sum(self.after.values())

    @property
    def verified(self) -> bool:
        return self.mended > 0 and not self.failed


def evidence(op: str, ops: Collection[str], results: Iterable[CaseResult]) -> Evidence:
    """What a verification says of `op`; `ops` are all that the fix registers."""
    mine = [r for r in results if reaches(r, op) and r.outcome.status.ran]
    refused: Counter[str] = Counter()
    failed, elsewhere, unchanged = [], [], []
    ratio = 0.0
    for result in mine:
        outcome = result.outcome
        sentence = refusal(outcome)
        if sentence.startswith(op):
            refused[sentence] += 1
        elif why := failure(result, op, ops):
            failed.append(f"{result.case.id}: {why}")
        elif _is_as_before(result):
            unchanged.append(f"{result.case.id}: {_what(outcome)}")
        elif not outcome.status.usable:
            elsewhere.append(f"{result.case.id}: {_what(outcome)}")
        else:
            ratio = max([ratio, *(stat.ratio for stat in outcome.errors.values())])
    before = Counter(r.before.value if r.before else "not run" for r in mine)
    after = Counter(r.outcome.status.value for r in mine)
    return Evidence(
        op,
        dict(before),
        dict(after),
        dict(refused),
        tuple(failed),
        tuple(elsewhere),
        tuple(unchanged),
        sum(_is_mended(r) for r in mine),
        ratio,
    )


def reaches(result: CaseResult, op: str) -> bool:
    """Whether the op met DTensors in this case, or is the function that it calls: in a version that a
    wrapper is for, without the op that makes it needless."""
    outcome = result.outcome
    names = {k.op for k in outcome.kernel_ops} | {m.op for m in outcome.missing_ops}
    if op == result.case.function:
        return not any(f.op == op and f.unless in names for f in packages.functions())
    return op in names or op == outcome.kernel_op


def refused_ops(outcome: Outcome) -> set[str]:
    """The ops that DTensor refused in this case for want of a strategy."""
    return {m.op for m in outcome.missing_ops if m.kind in ("strategy", "propagation")}


def refusal(outcome: Outcome) -> str:
    """What a strategy of ours said that refused the call, or ''."""
    if outcome.status is not Status.ERROR or REFUSAL not in outcome.message:
        return ""
    return outcome.message.partition(REFUSAL)[2].partition("\n")[0].strip()


def failure(result: CaseResult, op: str, ops: Iterable[str]) -> str:
    """What is wrong with a case by the doing of `op`'s strategy, or ''."""
    outcome, before = result.outcome, result.before
    if outcome.status is Status.SUPPORTED:
        return ""
    if before is Status.SUPPORTED:
        return f"was supported, and is {_what(outcome)}"
    if outcome.status.usable or _is_as_before(result) or refusal(outcome):
        return ""
    if outcome.missing_ops:
        # A plain tensor among DTensors is refused before any strategy is asked.
        return _what(outcome) if op in refused_ops(outcome) else ""
    # Where no op stands out, each of ours may be at fault.
    blamed = outcome.kernel_op or op
    return _what(outcome) if blamed == op or blamed not in {*ops} | _ops_of(outcome) else ""


def _is_mended(result: CaseResult) -> bool:
    before = result.before
    return result.outcome.status.usable and before is not None and before.ran and not before.usable


def _is_as_before(result: CaseResult) -> bool:
    """Whether a case failed without the fix in the same way: not for want of a strategy."""
    status = result.outcome.status
    return not status.usable and status is result.before and status is not Status.MISSING_STRATEGY


def _ops_of(outcome: Outcome) -> set[str]:
    return {k.op for k in outcome.kernel_ops}


def _what(outcome: Outcome) -> str:
    line = outcome.message.strip().partition("\n")[0][:200]
    return f"{outcome.status.value}: {line}" if line else outcome.status.value
