"""A scan from request to report: plan, run, judge, and say where the time went. Torch-free itself."""

from __future__ import annotations

import datetime
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from attncheck import environment, plugins, provision, rules
from attncheck.errors import UserError
from attncheck.model import Case, CaseResult, Outcome, Reason, Report, Status
from attncheck.plan import Selection, plan
from attncheck.runner import journal, launch
from attncheck.runner.rundir import RunConfig, RunDir

# Ranks get different hash seeds, recorded, and the same ones in every scan so that verdicts repeat.
# 6 and 7 are the first pair with which PyTorch 2.13 is known to choose differently (set order).
FIRST_HASH_SEED = 6
CASE_TIMEOUT = {"quick": 120.0, "default": 180.0, "full": 1200.0}
KEPT_RUNS = 10


@dataclass(frozen=True)
class ScanRequest:
    """What to scan and how. `with_packages`: requirements to provision; `case_timeout`: seconds or None
    for the level's own; `run_dir`: None for a folder in the user's cache."""

    selection: Selection = field(default_factory=Selection)
    mesh: Mapping[str, int] = field(default_factory=lambda: {"tp": 2})
    device: str = "cpu"
    seed: int | None = None
    hash_seed: int = FIRST_HASH_SEED
    case_timeout: float | None = None
    with_packages: tuple[str, ...] = ()
    probe_files: tuple[str, ...] = ()
    select_rules: tuple[str, ...] = ()
    ignore_rules: tuple[str, ...] = ()
    run_dir: Path | None = None
    command: str = ""


Log = Callable[[str], None]
Progress = Callable[[int, int, Case | None], None]


def _check_request(request: ScanRequest) -> None:
    """What can be known to be wrong before anything is run: a typo must not cost a whole scan."""
    rules.expand([*request.select_rules, *request.ignore_rules])
    for file in request.probe_files:
        if not Path(file).exists():
            raise UserError(f"Probe file {file} does not exist.")
    if request.device == "cuda" and environment.gpu() == "none":
        raise UserError("--device cuda: this machine has no NVIDIA driver; use --device cpu.")


def scan(request: ScanRequest, log: Log, on_progress: Progress) -> Report:
    """Run a new scan. Raises UserError, or launch.Interrupted after a Ctrl-C (the journal is kept)."""
    began = time.time()
    _check_request(request)
    shelf = plugins.load_probes([Path(p) for p in request.probe_files])
    for _, sentence in shelf.errors:
        log(sentence)
    cases = plan(shelf.probes, request.mesh, request.selection)
    path: list[str] = []
    provisioned = time.time()
    for requirement in request.with_packages:
        path.append(str(provision.ensure(provision.parse(requirement), log=log)))
    phases = {"provision": round(time.time() - provisioned, 2)}
    timeout = request.case_timeout or CASE_TIMEOUT[request.selection.level]
    ranks = math.prod(request.mesh.values())
    config = RunConfig(
        seed=request.seed if request.seed is not None else secrets.randbelow(2**31),
        mesh=dict(request.mesh),
        device=request.device,
        case_timeout=timeout,
        hash_seeds=tuple(request.hash_seed + rank for rank in range(ranks)),
        probe_files=tuple(str(p) for p in shelf.files),
        path=tuple(path),
        notes={
            "began": began,
            "phases": phases,
            "level": request.selection.level,
            "command": request.command,
            "probe_errors": [sentence for _, sentence in shelf.errors],
            "select": list(request.select_rules),
            "ignore": list(request.ignore_rules),
        },
    )
    run = RunDir(request.run_dir or _new_run_folder())
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
    # Fault files of this launch must be told from those of an earlier one that a restart has to read.
    config = replace(config, launch=f"{int(launched * 1000):x}-{os.getpid()}")
    run.write_config(config)

    def progressed(tail: journal.Tail) -> None:
        running = cases[tail.open_case] if tail.open_case is not None else None
        on_progress(len(tail.ended), len(cases), running)

    before = journal.read(run.journal)
    if before.open_case is not None:
        journal.Journal(run.journal).note(journal.INTERRUPTED)
    if len(before.outcomes) < len(cases):
        try:
            launch.run_workers(run, config, progressed)
        except launch.Interrupted:
            log(f"stopped; go on with: attncheck scan --resume --run-dir {run.path}")
            raise
    progress = journal.read(run.journal)
    ended = time.time()
    judged = time.perf_counter()
    notes = config.notes
    results = (
        *(
            CaseResult(case, progress.outcomes.get(index) or _not_run())
            for index, case in enumerate(cases)
        ),
        *(_unloadable(config, sentence) for sentence in notes.get("probe_errors", ())),
    )
    findings = rules.judge(results, select=notes.get("select", ()), ignore=notes.get("ignore", ()))
    phases = dict(notes.get("phases", {}))
    phases |= _phases(progress, results, launched, ended)
    phases["rules"] = round(time.perf_counter() - judged, 2)
    return Report(_environment(config, progress, results, phases, ended), results, findings)


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
    return {
        **environment.describe(config.path),
        "device": config.device,
        "ranks": config.ranks,
        "mesh": dict(config.mesh),
        "level": notes.get("level", ""),
        "seed": config.seed,
        "hash_seeds": list(config.hash_seeds),
        "case_timeout_seconds": config.case_timeout,
        "standins": sorted({s for r in results for s in r.outcome.standins}),
        "probe_errors": list(notes.get("probe_errors", ())),
        "restarts": max(ups - 1, 0),
        "peak_rss_mib": peaks[-1] if peaks else [],
        "wall_seconds": round(ended - notes.get("began", ended), 1),
        "phases": dict(phases),
        "command": notes.get("command", ""),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


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
    case = Case(
        id=f"{name}/-/-/dtensor/-/-/-",
        probe=name,
        operator=name,
        route="dtensor",
        setting={"name": "-"},
        mesh=dict(config.mesh),
        placement="-",
        placements={},
        direction="-",
    )
    return CaseResult(case, Outcome(Status.UNAVAILABLE, sentence, reason=Reason.PROBE_NOT_LOADABLE))


def _runs_folder() -> Path:
    return provision.cache_root() / "runs"


def _new_run_folder() -> Path:
    """A fresh folder; the oldest ones beyond `KEPT_RUNS` are removed."""
    folder = _runs_folder()
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = folder / f"{stamp}-{os.getpid()}"
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"Cannot create the run folder {path}: {error.strerror}.") from None
    for old in sorted(folder.iterdir())[:-KEPT_RUNS]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def _latest_run_folder() -> Path:
    folder = _runs_folder()
    runs = sorted(folder.iterdir()) if folder.is_dir() else []
    if not runs:
        raise UserError(f"Nothing to resume: there is no run in {folder}.")
    return runs[-1]
