"""A matrix from request to document: plan once; then, cell by cell, run what is not known yet.

Torch-free itself.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from attncheck import (
    __version__,
    cache,
    envcheck,
    environment,
    plugins,
    provision,
)
from attncheck.cells import Cell, Matrix
from attncheck.errors import UserError
from attncheck.matrix import engine, environments
from attncheck.matrix.environments import Environment, Source
from attncheck.matrix.outcomes import (
    Store,
    Verdicts,
    digest_of,
    key,
    outcomes_folder,
    scope,
    verdicts_folder,
)
from attncheck.model import Case, CaseResult, Finding, Report
from attncheck.plan import plan_meshes
from attncheck.probing import Operator, Probe
from attncheck.provision import Provision
from attncheck.runner import journal, scan
from attncheck.runner.rundir import RunConfig, RunDir
from attncheck.runner.scan import ScanRequest
from attncheck.text import count, size

Log = Callable[[str], None]
# As for a scan: cases done, cases in all, the one that is running.
Progress = Callable[[int, int, Case | None], None]

# In the folder of a run: for each of its cases, where its outcome is kept.
KEYS = "keys.json"


@dataclass(frozen=True)
class MatrixRequest:
    """What to run in which cells. `scan`: the cases, and how they are run; `torch`: versions, `packages`:
    those of the packages above it, by name; `source`: where they come from; `max_disk`: bytes that the cache
    may take, None for no limit."""

    scan: ScanRequest
    torch: tuple[str, ...]
    packages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    source: Source = field(default_factory=Source)
    max_disk: int | None = None


@dataclass(frozen=True)
class Combination:
    """The versions of one cell: of torch, and what is provisioned above it."""

    torch: str
    packages: tuple[Provision, ...] = ()

    @property
    def versions(self) -> dict[str, str]:
        return {"torch": self.torch, **{p.package: p.version for p in self.packages}}


def run(request: MatrixRequest, log: Log, on_progress: Progress) -> Matrix:
    """Every combination of the versions asked for. Raises UserError, or launch.Interrupted after a Ctrl-C:
    what was measured until then is kept."""
    began = time.time()
    session = Session(request, log, on_progress)
    combined = combinations(request)
    cells = []
    for at, combination in enumerate(combined, 1):
        later = [each.torch for each in combined[at:]]
        cells.append(session.cell(combination, f"[{at}/{len(combined)}] ", later))
    return Matrix(described(request, session.cases, began), tuple(cells))


def combinations(request: MatrixRequest) -> list[Combination]:
    """In the order of the versions, those of one torch together. Raises UserError for what is no version."""
    torches = [version_of("torch", text) for text in request.torch]
    packages = [
        [provision.parse(f"{package}=={version_of(package, text)}") for text in versions]
        for package, versions in request.packages.items()
    ]
    return [
        Combination(torch, tuple(own))
        for torch, *own in itertools.product(dict.fromkeys(torches), *packages)
    ]


def version_of(package: str, text: str) -> str:
    """
    >>> version_of("torch", " 2.9.1")
    '2.9.1'
    """
    try:
        return str(Version(text))
    except InvalidVersion:
        example = "2.9.1" if package == "torch" else provision.RECIPES[package].default
        raise UserError(
            f"{text.strip()!r} is no version of {package}: expected one like {example}."
        ) from None


def described(request: MatrixRequest, cases: Sequence[Case], began: float) -> dict[str, Any]:
    """What all cells share."""
    asked = request.scan
    return {
        "attncheck": __version__,
        "platform": platform.platform(),
        "cpus": os.cpu_count() or 0,
        "gpu": environment.gpu(),
        "device": asked.device,
        **scan.describe_meshes(cases),
        "level": asked.selection.level,
        "seed": asked.seed,
        "wall_seconds": round(time.time() - began, 1),
        "command": asked.command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


class Session:
    """What the cells of one matrix share: the plan, the copy of attncheck, and what was measured before."""

    def __init__(self, request: MatrixRequest, log: Log, on_progress: Progress) -> None:
        asked = request.scan
        scan.check_request(asked)
        environments.interpreter(request.source.python)
        self.request, self.log, self.on_progress = request, log, on_progress
        shelf = plugins.load_probes([Path(file) for file in asked.probe_files])
        for _, sentence in shelf.errors:
            log(sentence)
        self.cases = plan_meshes(shelf.probes, asked.meshes, asked.selection)
        self.copy = engine.copy()
        files = [engine.placed(file, self.copy) for file in shelf.files]
        base = scan.configuration(asked, files, [sentence for _, sentence in shelf.errors])
        self.base = replace(
            base,
            # Nothing of this environment is to be seen in another.
            environment={"PYTHONPATH": str(self.copy), "PYTHONNOUSERSITE": "1"},
        )
        self.store = Store(outcomes_folder())
        self.verdicts = Verdicts(verdicts_folder())
        self.fixes = [_digest(file) for file in asked.fixes]
        self.needs = {
            operator.name: _needs(probe, file, operator)
            for probe, file in zip(shelf.probes, shelf.files, strict=True)
            for operator in probe.operators
        }

    def cell(self, combination: Combination, number: str = "", later: Sequence[str] = ()) -> Cell:
        """The cell of these versions; `later`: the torch versions of which environments are still wanted."""
        cell = Cell(combination.versions)
        try:
            with environments.environment(
                combination.torch,
                self.request.source,
                self.log,
                lambda wanted: self._make_room(wanted, later),
            ) as found:
                self._check_size(found, later)
                report, reused = self._report(combination, found, cell.name, number)
                return replace(cell, report=report, reused=reused)
        except UserError as error:
            self.log(f"{number}{cell.name}: {error}")
            return replace(cell, problem=str(error))

    # --- disk

    def _make_room(self, wanted: int, later: Sequence[str]) -> None:
        if self.request.max_disk is None:
            return
        keep = {environments.folder_of(torch, self.request.source) for torch in later}
        removed = cache.shrink(self.request.max_disk, wanted, keep)
        # Those that are wanted later come back; the budget does not.
        removed += cache.shrink(self.request.max_disk, wanted, ())
        for entry in removed:
            self.log(f"removed {entry.path} ({size(entry.bytes)}) for --max-disk")

    def _check_size(self, found: Environment, later: Sequence[str]) -> None:
        if self.request.max_disk is None:
            return
        self._make_room(0, later)
        if (total := cache.total_bytes()) > self.request.max_disk:
            environments.discard(found)
            raise UserError(
                f"torch {found.torch} takes the cache to {size(total)}, and --max-disk is "
                f"{size(self.request.max_disk)}: expected a larger budget, or a build without CUDA "
                "(--index-url)."
            )

    # --- one cell

    def _report(
        self, combination: Combination, found: Environment, name: str, number: str
    ) -> tuple[Report, int]:
        """What a scan of the cell says, and how many of its outcomes were known before."""
        began = time.time()
        path = [
            str(provision.ensure(p, log=self.log, by=found.installer, torch=found.torch))
            for p in combination.packages
        ]
        folder = running_folder(found)
        harvest(folder, self.store)
        shutil.rmtree(folder, ignore_errors=True)
        keys = self._keys(combination, found)
        outcomes = {at: o for at, key in enumerate(keys) if (o := self.store.get(*key)) is not None}
        reused = len(outcomes)
        missing = [at for at in range(len(keys)) if at not in outcomes]
        self.log(f"{number}{name}: {count(len(missing), 'case')} to run, {reused} known before")
        config = replace(
            self.base,
            path=tuple(path),
            python=str(found.python),
            notes={**self.base.notes, "began": began},
        )
        launched, progress = time.time(), journal.NOTHING
        if missing:
            progress = self._run(folder, config, missing, [keys[at] for at in missing])
            outcomes |= {missing[at]: outcome for at, outcome in progress.outcomes.items()}
        installed = {
            **environment.describe([*path, str(found.site)], found.version),
            "cuda_of_torch": found.cuda,
            "fingerprint": found.fingerprint,
        }
        if notes := self._known_of(combination, found):
            installed["notes"] = notes

        def judge(
            results: Iterable[CaseResult], *, select: Sequence[str], ignore: Sequence[str]
        ) -> tuple[Finding, ...]:
            return self.verdicts.judge(keys, tuple(results), select, ignore)

        report = scan.reported(config, self.cases, outcomes, progress, launched, installed, judge)
        return report, reused

    def _known_of(self, combination: Combination, found: Environment) -> list[str]:
        """What is known of these versions together, beside what a run on stand-ins can show: which have no
        compiled package for each other."""
        versions = {**combination.versions, "torch": found.torch}
        checked = envcheck.check_planned(versions, found.version)
        return [f"{finding.title} ({finding.rule})." for finding in checked.findings]

    def _keys(self, combination: Combination, found: Environment) -> list[tuple[str, str]]:
        """For each case, where its outcome is kept: the name of what can affect it, and its own."""
        device = f"{self.base.device} {environment.gpu()}"
        above = {p.package: f"{p} r{provision.RECIPE}" for p in combination.packages}
        scopes = {}
        for name, (probe, packages) in self.needs.items():
            own = [above[p] for p in above if packages is None or p in packages]
            scopes[name] = scope(found.fingerprint, own, probe, self.fixes, device)
        return [(scopes[case.operator], key(case, self.base)) for case in self.cases]

    def _run(
        self,
        folder: Path,
        config: RunConfig,
        missing: Sequence[int],
        keys: Sequence[tuple[str, str]],
    ) -> journal.Progress:
        """Run the cases at these positions; keeps what was measured, however it ends."""
        cases = [self.cases[at] for at in missing]
        run = RunDir(folder)
        try:
            run.write(config, cases)
            (folder / KEYS).write_text(json.dumps(keys), encoding="utf-8")
        except OSError as error:
            raise UserError(f"Cannot write the run folder {folder}: {error.strerror}.") from None
        try:
            progress = scan.run_cases(run, config, cases, self.on_progress)
        finally:
            # Where the workers could not run, their logs stay: the message names them.
            harvest(folder, self.store)
        shutil.rmtree(folder, ignore_errors=True)
        return progress


def harvest(folder: Path, store: Store) -> None:
    """Keep what a run measured: the one that ends here, or an earlier one that was killed."""
    with contextlib.suppress(OSError, ValueError, UserError):
        keys = json.loads((folder / KEYS).read_text(encoding="utf-8"))
        measured = journal.read(RunDir(folder).journal).outcomes
        store.add((*keys[at], outcome) for at, outcome in measured.items())


def running_folder(found: Environment) -> Path:
    """Of the run in an environment: there is one at a time, and a killed one is found again."""
    return provision.cache_root() / "matrix" / f"run-{found.folder.name}"


def _needs(probe: Probe, file: Path, operator: Operator) -> tuple[str, frozenset[str] | None]:
    """A digest of the operator's probe, and the packages that it needs; None where that is not known."""
    built_in = file.parent == plugins.builtin_dir("probes")
    names = frozenset(canonicalize_name(Requirement(text).name) for text in operator.packages)
    return _digest(str(file)), names if built_in else None


def _digest(file: str) -> str:
    return digest_of({Path(file).name: Path(file)})
