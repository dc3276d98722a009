"""A hunt from request to report: load, start, search, save and confirm each find, tell."""

from __future__ import annotations

import datetime
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attncheck import environment, plugins, provision, rules
from attncheck.errors import UserError, unknown
from attncheck.hunt import finds, regression
from attncheck.hunt.finds import Find, Tally
from attncheck.hunt.search import Over, Search
from attncheck.hunt.servers import Groups
from attncheck.hunt.strategy import NAME, Space, asking, templates
from attncheck.model import CaseResult, Outcome, Report
from attncheck.plan import Selection, matches, placement_texts
from attncheck.probing import Operator, Setting
from attncheck.rules import wording
from attncheck.runner import launch
from attncheck.runner import scan as scanning
from attncheck.runner.launch import Interrupted
from attncheck.runner.rundir import Asked, RunConfig
from attncheck.saved import read_report

ENGINES = ("processes", "simulated")
# Fewest ranks first: what is drawn shrinks to the first.
MESHES: tuple[Mapping[str, int], ...] = (
    {"tp": 1}, {"tp": 2}, {"tp": 3}, {"tp": 4}, {"dp": 2, "tp": 2},
)  # fmt: skip
SIMULATED_MESHES = (*MESHES, {"tp": 8}, {"dp": 2, "tp": 4})
# An example that takes longer is a hang; a scan, which confirms, waits longer than that.
CASE_SECONDS = 30.0
CONFIRM_SECONDS = 180.0
# The search ends early by what confirming the last find will take: at least so many seconds, as long as
# anything took to confirm so far, and never more than this share of the time.
LEAST_RESERVE = 8.0
MOST_RESERVE_SHARE = 0.4


@dataclass(frozen=True)
class HuntRequest:
    """What to hunt in, and how. `operators`: globs; `minutes`: from the start of the workers to the end;
    `examples`: how many to run at most, None for as many as there is time for; `save`: the folder for what
    is found; `known`: saved reports, the refused ops of which are no finds."""

    operators: tuple[str, ...]
    minutes: float
    with_packages: tuple[str, ...] = ()
    probe_files: tuple[str, ...] = ()
    engine: str = "processes"
    seed: int | None = None
    hash_seed: int = scanning.FIRST_HASH_SEED
    case_timeout: float = CASE_SECONDS
    save: Path = Path("attncheck-hunt")
    command: str = ""
    examples: int | None = None
    known: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Hunted:
    """What a hunt brought home. `unconfirmed`: what a scan of its own did not show again; `absent`: operators
    that are not there, and why; `disagreements`: examples that failed simulated, and not (so) with real
    processes, with both outcomes; `stopped`: by Ctrl-C."""

    report: Report
    finds: tuple[Find, ...]
    disagreements: tuple[tuple[Asked, Outcome, Outcome], ...]
    unconfirmed: tuple[Find, ...]
    tally: Tally
    absent: Mapping[str, str]
    seconds: float
    seed: int
    stopped: bool


Log = Callable[[str], None]


@dataclass
class Clock:
    """When a search must end, so that the hunt does: seconds of `time.monotonic`."""

    started: float
    seconds: float
    reserved: float = LEAST_RESERVE

    @property
    def deadline(self) -> float:
        return self.started + self.seconds - min(self.reserved, MOST_RESERVE_SHARE * self.seconds)

    def reserve(self, seconds: float) -> None:
        """What confirming may take: it took that long once."""
        self.reserved = max(self.reserved, 1.2 * seconds)


@dataclass(frozen=True)
class Loaded:
    """The operators to hunt in, by name: its probe's name, and the user's file where it is not built in."""

    operators: dict[str, tuple[str, Operator]]
    files: dict[str, Path | None]
    probe_files: tuple[str, ...]


def default_engine() -> str:
    """Simulated ranks where this torch has them: one process serves every mesh, and is up at once."""
    return "simulated" if environment.simulates_ranks() else "processes"


def hunt(request: HuntRequest, log: Log, told: Log) -> Hunted:
    """Hunt for the given time. `told` hears of progress. Raises UserError."""
    began = time.monotonic()
    if request.engine not in ENGINES:
        raise unknown("engine", request.engine, ENGINES)
    if request.engine == "simulated" and not environment.simulates_ranks():
        raise UserError("--engine simulated needs torch's LocalTensorMode, which came with 2.10.")
    known = frozenset(kind for file in request.known for kind in _known(file))
    loaded = _load(request, log)
    path = tuple(
        str(provision.ensure(provision.parse(requirement), log=log))
        for requirement in request.with_packages
    )
    seed = request.seed if request.seed is not None else secrets.randbelow(2**31)
    config = RunConfig(
        seed=seed,
        mesh=MESHES[1],
        device="cpu",
        engine=request.engine,
        case_timeout=request.case_timeout,
        hash_seeds=(request.hash_seed,),
        probe_files=loaded.probe_files,
        path=path,
        serve=True,
    )
    folder = Path(tempfile.mkdtemp(prefix="attncheck-hunt-"))
    started = time.monotonic()
    clock = Clock(started, 60 * request.minutes)

    def checkpoint() -> None:
        if time.monotonic() >= clock.deadline:
            raise Over

    groups = Groups(folder, config, checkpoint)
    hunter = _Hunter(request, loaded, seed, path, log)
    search: Search | None = None
    absent: dict[str, str] = {}
    stopped = False
    try:
        with launch.terminable():
            usable = list(_usable(loaded, groups, absent, log, clock))
            if usable:
                space = Space(
                    tuple(usable), SIMULATED_MESHES if request.engine == "simulated" else MESHES
                )
                search = Search(
                    space,
                    groups.run,
                    seed,
                    started,
                    clock.deadline,
                    request.examples,
                    simulated=request.engine == "simulated",
                    known=known,
                    told=told,
                )
                for find in search.run():
                    before = time.monotonic()
                    hunter.take(find)
                    clock.reserve(time.monotonic() - before)
                    search.deadline = clock.deadline
    except Over:
        pass
    except (KeyboardInterrupt, Interrupted):
        stopped = True
        log("stopped; what was found is kept")
    finally:
        groups.stop()
        shutil.rmtree(folder, ignore_errors=True)
    tally = search.tally if search is not None else Tally()
    seconds = time.monotonic() - began
    report = hunter.report(tally, seconds)
    return Hunted(
        report,
        tuple(hunter.finds),
        tuple(groups.disagreements.values()),
        tuple(hunter.unconfirmed),
        tally,
        absent,
        seconds,
        seed,
        stopped,
    )


def _known(file: Path) -> frozenset[finds.Kind]:
    return finds.refusals_in(read_report(file))


def _load(request: HuntRequest, log: Log) -> Loaded:
    for file in request.probe_files:
        if not Path(file).exists():
            raise UserError(f"Probe file {file} does not exist.")
    shelf = plugins.load_probes(
        [Path(p) for p in request.probe_files],
        lambda file: log(f"running the code of {file}, which an installed package ships"),
    )
    for _, sentence in shelf.errors:
        log(sentence)
    builtin = plugins.builtin_dir("probes")
    every = {
        operator.name: (probe.name, operator, None if file.parent == builtin else file)
        for probe, file in zip(shelf.probes, shelf.files, strict=True)
        for operator in probe.operators
    }
    for glob in request.operators:
        if not any(matches(name, (glob,)) for name in every):
            raise unknown("operator", glob, every)
    chosen = {name: found for name, found in every.items() if matches(name, request.operators)}
    return Loaded(
        {name: (probe, operator) for name, (probe, operator, _) in chosen.items()},
        {name: file for name, (_, _, file) in chosen.items()},
        tuple(str(file) for file in shelf.files),
    )


def _usable(
    loaded: Loaded, groups: Groups, absent: dict[str, str], log: Log, clock: Clock
) -> Iterator[tuple[str, Operator]]:
    """The operators that can be called here, with their probes' names; the others go to `absent`."""
    for name, (probe, operator) in loaded.operators.items():
        before = time.monotonic()
        outcome = groups.run(_plainest(probe, operator))
        clock.reserve(time.monotonic() - before)  # the first waits for the workers, as a scan does
        if finds.unusable(outcome):
            absent[name] = finds.line(outcome)
            log(f"{name} is left out: {absent[name]}")
        else:
            yield probe, operator


def _plainest(probe: str, operator: Operator) -> Asked:
    """The operator's plainest setting, everything replicated: works wherever the operator is there."""
    mesh = MESHES[1]
    setting = templates(operator)[0]
    setting = Setting(NAME, setting.sizes, setting.dtype, setting.options, dropout=setting.dropout)
    placements = {
        t.name: placement_texts(t, ("replicate",), first=False) for t in operator.tensors(setting)
    }
    return asking(probe, operator, setting, mesh, "replicate", placements, "forward")


class _Hunter:
    """Saves finds, has each confirmed by a scan of its own, and keeps them."""

    def __init__(
        self, request: HuntRequest, loaded: Loaded, seed: int, path: Sequence[str], log: Log
    ) -> None:
        self.request = request
        self.loaded = loaded
        self.seed = seed
        self.path = path
        self.log = log
        self.finds: list[Find] = []
        self.unconfirmed: list[Find] = []
        self.saved: list[Path] = []
        self.environment: Mapping[str, Any] = {}

    def take(self, find: Find) -> None:
        """Save it, run what was saved, and keep it where that shows the same."""
        operator = self.loaded.operators[find.asked.case.operator][1]
        find = regression.plannable(find, operator)
        self.log(f"found {regression.title(find)}: confirming it")
        result = self._confirmed(find)
        if result is None:
            return
        shown = _kinds_shown(find, result)
        if (
            not _is_shown(find, shown)
            and shown
            and not finds.is_known(shown[0], find.causes, self.finds)
        ):
            # It fails, but otherwise (simulated ranks raise where real ones part): told as it really fails.
            find = replace(find, outcome=result.outcome, kind=shown[0])
            result = self._confirmed(find)
            shown = _kinds_shown(find, result) if result is not None else []
        if result is not None and not _is_shown(find, shown):
            said = f"{result.outcome.status.value} {finds.line(result.outcome)}".strip()
            self.unconfirmed.append(replace(find, note=said))

    def _confirmed(self, find: Find) -> CaseResult | None:
        """What a scan of the saved find shows; the file, and the find, stay where it is the same."""
        name = find.asked.case.operator
        saved = regression.save(
            self.request.save,
            find,
            self.loaded.operators[name][1],
            self.loaded.files[name],
            self.seed,
            _versions(self.path),
            self.request.with_packages,
            self.saved,
        )
        self.saved.append(saved.file)
        kept = False
        try:
            report = self._confirm(find, saved)
            result = report.cases[0]
            kept = _is_shown(find, _kinds_shown(find, result))
        except UserError as error:
            self.unconfirmed.append(replace(find, note=str(error)))
            return None
        finally:
            if not kept:
                saved.file.unlink(missing_ok=True)
        if kept:
            self.environment = report.environment
            done = replace(find, file=saved.file, command=saved.command, confirmed=result)
            self.finds.append(done)
        return result

    def _confirm(self, find: Find, saved: regression.Saved) -> Report:
        case = find.asked.case
        request = scanning.ScanRequest(
            selection=Selection(
                operators=(saved.operator,),
                placements=(case.placement,),
                directions=(case.direction,),
            ),
            meshes=(case.mesh,),
            seed=self.seed,
            hash_seed=self.request.hash_seed,
            case_timeout=CONFIRM_SECONDS,
            with_packages=self.request.with_packages,
            probe_files=(str(saved.file),),
            run_dir=Path(tempfile.mkdtemp(prefix="attncheck-confirm-")) / "run",
        )
        try:
            return scanning.scan(request, lambda line: None, lambda done, total, case: None)
        finally:
            assert request.run_dir is not None
            shutil.rmtree(request.run_dir.parent, ignore_errors=True)

    def report(self, tally: Tally, seconds: float) -> Report:
        """The confirmed cases as any scan's; its environment says that they were hunted."""
        results = tuple(f.confirmed for f in self.finds if f.confirmed is not None)
        described = dict(self.environment) or environment.describe(self.path)
        described |= {
            "seed": self.seed,
            "wall_seconds": round(seconds, 1),
            "command": self.request.command,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "standins": sorted({s for r in results for s in r.outcome.standins}),
            "hunt": {
                "engine": self.request.engine,
                "minutes": self.request.minutes,
                "examples": tally.run,
                "discarded": tally.discarded,
                "unconfirmed": [f.note for f in self.unconfirmed],
            },
        }
        described.pop("phases", None)
        described.pop("restarts", None)
        if results:
            described |= scanning.describe_meshes(result.case for result in results)
        return Report(described, results, rules.judge(results))


def _kinds_shown(find: Find, result: CaseResult) -> list[finds.Kind]:
    """The kinds of failure that the scan of its own shows, told of the operator that was hunted in."""
    shown = finds.kinds_of(replace(find.asked, case=result.case), result.outcome)
    # Where no op stands out the operator is named, and that of the file has a name of its own.
    own = {result.case.operator: find.asked.case.operator}
    return [replace(kind, op=own.get(kind.op, kind.op)) for kind in shown]


def _is_shown(find: Find, shown: Sequence[finds.Kind]) -> bool:
    if find.kind.what == "stuck":  # in which op ranks wait is a matter of who waits first
        return any(kind.what == "stuck" for kind in shown)
    return find.kind in shown


def _versions(path: Sequence[str]) -> str:
    packages = environment.describe(path).get("packages", {})
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def render(hunted: Hunted) -> str:
    """The summary that a hunt ends with."""
    tally = hunted.tally
    counts = (
        f"{tally.run} examples in {hunted.seconds / 60:.1f} minutes (seed {hunted.seed}), "
        f"{tally.discarded} of them discarded: {tally.refused} that the operator refuses on whole "
        f"tensors or that cannot be run here, {tally.disagreeing} where it is not what its reference "
        f"says, {tally.slow} too slow."
    )
    if tally.spared:
        counts += f" {tally.spared} more were not run: like others that end the process."
    found = wording.count(len(hunted.finds), "distinct find")
    said = f"{found}, each seen again by a scan of its own." if hunted.finds else "Nothing found."
    lines = [counts, said]
    for find in hunted.finds:
        lines += ["", *_find_lines(find)]
    if hunted.unconfirmed:
        lines += ["", "Not seen again by a scan of their own, and not counted:"]
        for find in hunted.unconfirmed:
            lines += [f"  {regression.title(find)}", f"    case   {finds.in_words(find.asked)}"]
            lines += [f"    here   {finds.line(find.outcome, 160)}"]
            lines += [f"    there  {find.note[:160]}"]
    if hunted.disagreements:
        lines += [
            "",
            "Failed with simulated ranks, and not so with real ones, which were believed:",
        ]
        for asked, simulated, real in hunted.disagreements:
            lines += [f"  {asked.case.operator}: {finds.in_words(asked)}"]
            for engine, outcome in (("simulated", simulated), ("real", real)):
                told = f"{outcome.status.value} {finds.line(outcome, 160)}".rstrip()
                lines += [f"    {engine:<9}  {told}"]
    if tally.unknown:
        lines += ["", "The check itself failed (a fault of attncheck's):"]
        for text, asked in tally.unknown.items():
            lines += [f"  {' '.join(text.split())[:240]}"]
            lines += [f"    case   {asked.case.operator}: {finds.in_words(asked)}"]
    if tally.disagreement:
        first = " ".join(tally.disagreement.split())[:300]
        lines += ["", f"The first that is not what its reference says: {first}"]
    for name, why in hunted.absent.items():
        lines += ["", f"Left out: {name}: {why}"]
    return "\n".join(lines) + "\n"


def _find_lines(find: Find) -> list[str]:
    shrunk = f"with {wording.count(find.runs, 'example')}"
    return [
        regression.title(find),
        f"  case    {finds.in_words(find.asked)}",
        f"  seen    {finds.seen(find)}",
        f"  shrunk  {shrunk}{'' if find.complete else ', not to the end'}",
        f"  saved   {find.file}",
        f"  run     {find.command}",
    ]
