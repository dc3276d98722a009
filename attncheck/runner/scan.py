"""A scan from request to report: plan, run, judge, and say where the time went. Torch-free itself."""

from __future__ import annotations

import datetime
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from packaging.requirements import Requirement

from attncheck import cache, environment, inventory, plugins, provision, rules, sharding
from attncheck.errors import UserError, unknown
from attncheck.inventory import REGISTERED
from attncheck.model import (
    UNPLANNED,
    Case,
    CaseResult,
    Finding,
    Outcome,
    Reason,
    Report,
    Status,
    from_json,
    to_json,
)
from attncheck.plan import Selection, plan_meshes
from attncheck.probing import Operator, Probe, Setting
from attncheck.runner import crosscheck, journal, launch
from attncheck.runner.rundir import RunConfig, RunDir

# Ranks get different hash seeds, recorded, and the same ones in every scan so that verdicts repeat.
# 6 and 7 are the first pair with which PyTorch 2.13 is known to choose differently (set order).
FIRST_HASH_SEED = 6
CASE_TIMEOUT = {"quick": 120.0, "default": 180.0, "full": 1200.0}
KEPT_RUNS = 10


@dataclass(frozen=True)
class ScanRequest:
    """What to scan and how. `meshes`: the cases are run on each; `repeats`: with how many sets of values;
    `engine`: `processes`, `simulated`, or `both` to hold one against the other;
    `with_packages`: requirements to provision; `case_timeout`: seconds or None for the level's own;
    `run_dir`: None for a folder in the user's cache; `fixes`: files to register strategies from before the
    first case or, where `both_ways`, after all of them were run without, and before they are run again
    in the reverse order; `settings`: further ones by operator; `only`: of these operators, the settings of
    these names; `shard`: which of the planned cases, None for all."""

    selection: Selection = field(default_factory=Selection)
    meshes: tuple[Mapping[str, int], ...] = ({"tp": 2},)
    repeats: int = 1
    engine: str = "processes"
    device: str = "cpu"
    seed: int | None = None
    hash_seed: int = FIRST_HASH_SEED
    case_timeout: float | None = None
    with_packages: tuple[str, ...] = ()
    probe_files: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    select_rules: tuple[str, ...] = ()
    ignore_rules: tuple[str, ...] = ()
    run_dir: Path | None = None
    command: str = ""
    fixes: tuple[str, ...] = ()
    both_ways: bool = False
    settings: Mapping[str, tuple[Setting, ...]] = field(default_factory=dict)
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shard: sharding.Shard | None = None


class Judge(Protocol):
    """`rules.judge`, or what says the same."""

    def __call__(
        self, results: Iterable[CaseResult], *, select: Sequence[str], ignore: Sequence[str]
    ) -> tuple[Finding, ...]: ...


Log = Callable[[str], None]
Progress = Callable[[int, int, Case | None], None]


def check_request(request: ScanRequest) -> None:
    """What can be known to be wrong before anything is run: a typo must not cost a whole scan."""
    rules.expand([*request.select_rules, *request.ignore_rules])
    for file in request.probe_files:
        if not Path(file).exists():
            raise UserError(f"Probe file {file} does not exist.")
    for file in request.fixes:
        if not Path(file).is_file():
            raise UserError(
                f"Fix file {file} does not exist; expected one that attncheck fix wrote."
            )
    if request.device == "cuda" and environment.gpu() == "none":
        raise UserError("--device cuda: this machine has no NVIDIA driver; use --device cpu.")
    if request.engine not in crosscheck.ENGINES:
        raise unknown("engine", request.engine, crosscheck.ENGINES)
    if request.engine != "processes" and not environment.simulates_ranks():
        version = environment.packages().get("torch", "none")
        raise UserError(
            f"--engine {request.engine} needs torch's LocalTensorMode, which came with 2.10; this is "
            f"{version}: use --engine processes."
        )


def scan(request: ScanRequest, log: Log, on_progress: Progress) -> Report:
    """Run a new scan. Raises UserError, or launch.Interrupted after a Ctrl-C (the journal is kept)."""
    began = time.time()
    check_request(request)
    shelf = plugins.load_probes(
        [Path(p) for p in request.probe_files],
        lambda file: log(f"running the code of {file}, which an installed package ships"),
    )
    for _, sentence in shelf.errors:
        log(sentence)
    imports = (*request.imports, *_installed_imports(shelf.probes, request))
    if not imports:  # with some, what there is to plan is only known later
        known = [_with_settings(p, request) for p in shelf.probes]
        plan_meshes(known, request.meshes, request.selection)
    started = time.time()
    path = provisioned(request, log)
    phases = {"provision": round(time.time() - started, 2)}
    found = _look(shelf.probes, imports, request, path)
    probes = [plugins.with_discovered(p, found.ops) for p in shelf.probes]
    probes = [_with_settings(p, request) for p in probes]
    cases = plan_meshes(probes, request.meshes, request.selection, _beside_names(found))
    share = _share(cases, request.shard, probes, request.device, path) if request.shard else None
    if share is not None:
        cases = tuple(cases[at] for at in share.positions)
    planned = len(cases)
    if request.both_ways:
        # Another order than before: what was propagated for one setting is there when the next comes.
        cases = (*cases, *reversed(cases))
    base = configuration(request, shelf.files, [sentence for _, sentence in shelf.errors])
    config = replace(
        base,
        path=tuple(path),
        imports=tuple(m for m in imports if m not in {p.module for p in found.problems}),
        registered=found.ops,
        fix_from=planned if request.both_ways else 0,
        notes={
            **base.notes,
            "began": began,
            "phases": phases,
            "problems": to_json(found.problems),
            **({"shard": to_json(share)} if share else {}),
        },
    )
    run = RunDir(request.run_dir or new_run_folder())
    if run.journal.exists():
        raise UserError(
            f"{run.path} already holds a scan: go on with it (--resume --run-dir {run.path}) or name "
            "another folder."
        )
    try:
        run.write(config, cases)
    except OSError as error:
        raise UserError(f"Cannot write the run folder {run.path}: {error.strerror}.") from None
    return _run(run, config, cases, log, on_progress)


def configuration(
    request: ScanRequest, probe_files: Iterable[Path], probe_errors: Sequence[str] = ()
) -> RunConfig:
    """How the workers run that a request asks for, in this environment."""
    ranks = max(math.prod(mesh.values()) for mesh in request.meshes)
    simulated = request.engine == "simulated"
    return RunConfig(
        engine="simulated" if simulated else "processes",
        seed=request.seed if request.seed is not None else secrets.randbelow(2**31),
        mesh=dict(request.meshes[0]),
        repeats=request.repeats,
        device=request.device,
        case_timeout=request.case_timeout or CASE_TIMEOUT[request.selection.level],
        hash_seeds=tuple(request.hash_seed + rank for rank in range(1 if simulated else ranks)),
        probe_files=tuple(str(file) for file in probe_files),
        fixes=tuple(str(Path(file).resolve()) for file in request.fixes),
        settings=request.settings,
        notes={
            "level": request.selection.level,
            "engine": request.engine,
            "command": request.command,
            "with": list(request.with_packages),
            "probe_errors": list(probe_errors),
            "select": list(request.select_rules),
            "ignore": list(request.ignore_rules),
        },
    )


def _share(
    cases: Sequence[Case],
    shard: sharding.Shard,
    probes: Sequence[Probe],
    device: str,
    path: Sequence[str],
) -> sharding.Share:
    """Which of the planned cases are this shard's, by what is known of their operators."""
    operators = [operator for probe in probes for operator in probe.operators]
    absent = {
        operator.name
        for operator in operators
        if device not in operator.devices or not _is_installed(operator, path)
    }
    slow = {operator.name for operator in operators if operator.slow}
    return sharding.share(
        cases, shard, partial(sharding.expected_seconds, slow=slow, absent=absent)
    )


def _is_installed(operator: Operator, path: Sequence[str]) -> bool:
    return all(environment.is_installed(Requirement(p).name, path) for p in operator.packages)


def operators_of(request: ScanRequest) -> list[Operator]:
    """Every operator that a scan of this request could choose from. Raises UserError."""
    probes = plugins.load_probes([Path(p) for p in request.probe_files]).probes
    imports = (*request.imports, *_installed_imports(probes, request))
    found = _look(probes, imports, request, provisioned(request, lambda message: None))
    return [o for p in probes for o in plugins.with_discovered(p, found.ops).operators]


def provisioned(request: ScanRequest, log: Log) -> list[str]:
    """The folders of the packages that are asked for."""
    asked = map(provision.parse, request.with_packages)
    return [str(provision.ensure(package, log=log)) for package in asked]


def _with_settings(probe: Probe, request: ScanRequest) -> Probe:
    operators = []
    for operator in probe.operators:
        settings = (*operator.settings, *request.settings.get(operator.name, ()))
        if operator.name in request.only:
            settings = tuple(s for s in settings if s.name in request.only[operator.name])
        operators.append(replace(operator, settings=settings))
    return replace(probe, operators=tuple(operators))


def _installed_imports(probes: Sequence[Probe], request: ScanRequest) -> list[str]:
    """Modules of installed distributions whose ops no probe describes.

    Their import may take long, so a selection of other operators leaves them alone.
    """
    globs = request.selection.operators
    if globs and not any(glob.startswith((REGISTERED, "*")) for glob in globs):
        return []
    wanted = {name: module for probe in probes for name, module in probe.imports.items()}
    return [module for name, module in wanted.items() if environment.is_installed(name)]


def _look(
    probes: Sequence[Probe], imports: Sequence[str], request: ScanRequest, path: Sequence[str]
) -> inventory.Inventory:
    """The ops that `imports` register, and how to call those that no probe names."""
    if not imports:
        return inventory.Inventory()
    # An op is known by its name only where the package is there that registers it.
    known = {
        op
        for probe in probes
        for operator in probe.operators
        if _is_installed(operator, path)
        for op in operator.kernel_ops
    }
    found = inventory.take(
        inventory.Look(
            device=request.device,
            imports=tuple(imports),
            path=tuple(path),
            only_new=True,
            call=True,
            known=tuple(sorted(known)),
        )
    )
    for problem in found.problems:
        if problem.module in request.imports:
            raise UserError(f"Module {problem.module} does not import: {problem.text}.")
    return found


def _beside_names(found: inventory.Inventory) -> list[str]:
    """The operators that stand in the report without a case: ops uncalled, modules not imported."""
    names = [op.op for op in inventory.uncalled(found.ops)] + [p.module for p in found.problems]
    return [inventory.operator_name(name) for name in names]


def resume(folder: Path | None, log: Log, on_progress: Progress) -> Report:
    """Go on with an interrupted scan: the given run folder, or the newest one. Raises UserError."""
    run = RunDir(folder or _latest_run_folder())
    try:
        config, cases = run.config(), run.cases()
    except OSError:
        raise UserError(
            f"{run.path} is no run folder: run.json or cases.jsonl is missing."
        ) from None
    finished = len(journal.read(run.journal).outcomes)
    log(f"going on with {run.path}: {finished} of {len(cases)} cases are done")
    return _run(run, config, cases, log, on_progress)


def _run(
    run: RunDir, config: RunConfig, cases: Sequence[Case], log: Log, on_progress: Progress
) -> Report:
    launched = time.time()
    try:
        progress = run_cases(run, config, cases, on_progress)
        outcomes = progress.outcomes
        if config.notes.get("engine") == "both":
            outcomes = _crosschecked(run, config, cases, outcomes, on_progress)
    except launch.Interrupted:
        log(f"stopped; go on with: attncheck scan --resume --run-dir {run.path}")
        raise
    return reported(config, cases, outcomes, progress, launched, environment.describe(config.path))


def reported(
    config: RunConfig,
    cases: Sequence[Case],
    outcomes: Mapping[int, Outcome],
    progress: journal.Progress,
    launched: float,
    installed: Mapping[str, Any],
    judge: Judge = rules.judge,
) -> Report:
    """The report of cases and what came of them, by index; judged by the rules.

    `progress` and `launched` (Unix time) are of the workers that ran them, `installed` describes where;
    `judge` is what asks the rules, or knows what they said.
    """
    ended = time.time()
    judged = time.perf_counter()
    notes = config.notes
    results = (
        *_results(config, cases, outcomes),
        *(_unloadable(config, sentence) for sentence in notes.get("probe_errors", ())),
        *(_uncalled(config, op) for op in inventory.uncalled(config.registered)),
        *(
            _unimported(config, from_json(inventory.Problem, problem))
            for problem in notes.get("problems", ())
        ),
    )
    findings = judge(results, select=notes.get("select", ()), ignore=notes.get("ignore", ()))
    phases = dict(notes.get("phases", {}))
    phases |= _phases(progress, results, launched, ended)
    phases["rules"] = round(time.perf_counter() - judged, 2)
    described = {**installed, **_environment(config, progress, results, phases, ended)}
    return Report(described, results, findings)


def _results(
    config: RunConfig, cases: Sequence[Case], outcomes: Mapping[int, Outcome]
) -> Iterator[CaseResult]:
    """One entry a case. Those before `fix_from` are the same cases as those after it, in reverse."""
    for index, case in enumerate(cases[config.fix_from :], config.fix_from):
        outcome = outcomes.get(index) or _not_run()
        if not config.fix_from:
            yield CaseResult(case, outcome)
            continue
        before = outcomes.get(len(cases) - 1 - index) or _not_run()
        yield CaseResult(case, outcome, before.status)


def run_cases(
    run: RunDir, config: RunConfig, cases: Sequence[Case], on_progress: Progress
) -> journal.Progress:
    """Run what the journal does not have yet: mesh after mesh, with workers of its own each.

    Raises UserError where the workers cannot run, and launch.Interrupted; the journal is kept.
    """

    def progressed(tail: journal.Tail) -> None:
        running = cases[tail.open_case] if tail.open_case is not None else None
        on_progress(len(tail.ended), len(cases), running)

    before = journal.read(run.journal)
    if before.open_case is not None:
        journal.Journal(run.journal).note(journal.INTERRUPTED)
    for mesh in _meshes(case for i, case in enumerate(cases) if i not in before.outcomes):
        # Fault files of this launch must be told from those of an earlier one that a restart has to read.
        stamp = f"{int(time.time() * 1000):x}-{os.getpid()}"
        config = replace(config, mesh=mesh, launch=stamp)
        run.write_config(config)
        launch.run_workers(run, config, progressed)
    return journal.read(run.journal)


def _crosschecked(
    run: RunDir,
    config: RunConfig,
    cases: Sequence[Case],
    outcomes: Mapping[int, Outcome],
    on_progress: Progress,
) -> Mapping[int, Outcome]:
    """Run the same cases with simulated ranks, in a run folder of their own, and compare."""
    second = RunDir(run.path / "simulated")
    config = replace(config, engine="simulated", hash_seeds=config.hash_seeds[:1])
    if not second.journal.exists():
        second.write(config, cases)
    progress = run_cases(second, config, cases, on_progress)
    return crosscheck.crosscheck(cases, outcomes, progress.outcomes)


def _meshes(cases: Iterable[Case]) -> list[Mapping[str, int]]:
    """The distinct meshes, in order: each gets its own workers."""
    return list({tuple(case.mesh.items()): case.mesh for case in cases}.values())


def describe_meshes(cases: Iterable[Case]) -> dict[str, Any]:
    """What a report says of the meshes of its cases (at least one): the most ranks, the mesh or the list."""
    meshes = [dict(mesh) for mesh in _meshes(cases)]
    return {
        "ranks": max(math.prod(mesh.values()) for mesh in meshes),
        "mesh": meshes[0] if len(meshes) == 1 else meshes,
    }


def _environment(
    config: RunConfig,
    progress: journal.Progress,
    results: Sequence[CaseResult],
    phases: Mapping[str, float],
    ended: float,
) -> dict[str, Any]:
    peaks = [note["peak_rss_mib"] for note in progress.notes if note["key"] == "finished"]
    ups = sum(1 for note in progress.notes if note["key"] == "worker_up")
    notes = config.notes
    launched = len(_meshes(r.case for r in results))
    return {
        "device": config.device,
        **describe_meshes(r.case for r in results),
        "level": notes.get("level", ""),
        "engine": notes.get("engine", config.engine),
        **_engine_notes(config, results),
        "seed": config.seed,
        "hash_seeds": list(config.hash_seeds),
        "case_timeout_seconds": config.case_timeout,
        "with": list(notes.get("with", ())),
        "select": list(notes.get("select", ())),
        "ignore": list(notes.get("ignore", ())),
        **({"shard": notes["shard"]} if "shard" in notes else {}),
        **_fix_notes(progress),
        "standins": sorted({s for r in results for s in r.outcome.standins}),
        "probe_errors": list(notes.get("probe_errors", ())),
        "repeats": config.repeats,
        "restarts": max(ups - launched, 0),
        "peak_rss_mib": max(peaks, key=max, default=[]),
        "wall_seconds": round(ended - notes.get("began", ended), 1),
        "phases": dict(phases),
        "command": notes.get("command", ""),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _fix_notes(progress: journal.Progress) -> dict[str, Any]:
    """What became of each op in the fix files that the workers loaded."""
    loaded = {n["file"]: n["ops"] for n in progress.notes if n["key"] == "fix"}
    return {"fixes": loaded} if loaded else {}


def _engine_notes(config: RunConfig, results: Sequence[CaseResult]) -> dict[str, Any]:
    """What a reader must know of a scan that simulated its ranks."""
    engine = config.notes.get("engine")
    if engine == "simulated":
        return {"notes": [crosscheck.BLIND]}
    if engine == "both":
        planned = [r.outcome for r in results if r.case.setting_name != UNPLANNED]
        counts = crosscheck.counts(planned)
        return {"crosscheck": counts, "notes": [crosscheck.sentence(counts)]}
    return {}


def _phases(
    progress: journal.Progress, results: Sequence[CaseResult], launched: float, ended: float
) -> dict[str, float]:
    """Seconds by phase. `propagation` is the part of running that went into first calls beyond 1 s."""
    ups = [n["time"] for n in progress.notes if n["key"] == "worker_up" and n["time"] > launched]
    run = progress.seconds.get("run", 0.0)
    searched = sum(
        first / 1e3 for r in results if (first := r.outcome.timings.get("first", 0.0)) > 1000
    )
    known = {
        "start_workers": ups[0] - launched if ups else 0.0,
        "first_outcome_after": max((progress.first_end or launched) - launched, 0.0),
        "propagation": searched,
        "cases": max(run - searched, 0.0),
        "references": progress.seconds.get("prepare", 0.0),
        "wait_for_ranks": progress.seconds.get("wait_for_ranks", 0.0),
        "judge": progress.seconds.get("judge", 0.0),
    }
    counted = sum(v for k, v in known.items() if k != "first_outcome_after")
    known["restarts_and_rest"] = max(ended - launched - counted, 0.0)
    return {k: round(v, 2) for k, v in known.items()}


def _not_run() -> Outcome:
    return Outcome(Status.UNAVAILABLE, "the scan ended before this case", reason=Reason.NOT_RUN)


def _unloadable(config: RunConfig, sentence: str) -> CaseResult:
    """The entry of a probe file that did not load: nothing is silently left out."""
    name = Path(sentence.removeprefix("Probe file ").split(" ", 1)[0]).stem
    return _beside_the_plan(config, name, name, Reason.PROBE_NOT_LOADABLE, sentence)


def _uncalled(config: RunConfig, op: inventory.RegisteredOp) -> CaseResult:
    """The entry of an op that was found registered, and that nobody knows how to call."""
    name = inventory.operator_name(op.op)
    text = f"{inventory.sentence(op)} It is not scanned: {op.uncalled}"
    return _beside_the_plan(config, REGISTERED, name, Reason.SIGNATURE_UNKNOWN, text)


def _unimported(config: RunConfig, problem: inventory.Problem) -> CaseResult:
    """The entry of an installed package whose ops could not be had."""
    reason = {"missing": Reason.PACKAGE_MISSING, "broken": Reason.EXTENSION_NOT_LOADABLE}
    name = inventory.operator_name(problem.module)
    return _beside_the_plan(config, REGISTERED, name, reason[problem.kind], problem.text)


def _beside_the_plan(
    config: RunConfig, probe: str, operator: str, reason: Reason, text: str
) -> CaseResult:
    """The entry of what no case could be made of."""
    case = Case(
        id="/".join([probe, operator, UNPLANNED, "dtensor", *[UNPLANNED] * 3]),
        probe=probe,
        operator=operator,
        route="dtensor",
        setting={"name": UNPLANNED},
        mesh=dict(config.mesh),
        placement=UNPLANNED,
        placements={},
        direction=UNPLANNED,
    )
    return CaseResult(case, Outcome(Status.UNAVAILABLE, text, reason=reason))


def _runs_folder() -> Path:
    return provision.cache_root() / "runs"


def new_run_folder() -> Path:
    """A fresh folder; the oldest ones beyond `KEPT_RUNS` are removed, unless they may be in use."""
    folder = _runs_folder()
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = folder / f"{stamp}-{os.getpid()}"
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"Cannot create the run folder {path}: {error.strerror}.") from None
    for old in sorted(folder.iterdir())[:-KEPT_RUNS]:
        if time.time() - cache.last_used(old) > cache.LIVE_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    return path


def _latest_run_folder() -> Path:
    folder = _runs_folder()
    runs = sorted(folder.iterdir()) if folder.is_dir() else []
    if not runs:
        raise UserError(f"Nothing to resume: there is no run in {folder}.")
    return runs[-1]
