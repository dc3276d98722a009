"""The folder of one scan: what the parent tells the workers, and what they leave behind. Torch-free.

run.json        what to run it with (RunConfig)
cases.jsonl     the planned cases, one a line
queue.jsonl     instead of them: what workers that serve are asked to run, one a line, growing
journal.jsonl   starts and outcomes
rank0.state     what a rank is doing, one line, overwritten in place
*.fault         faulthandler's last words of a rank that died
stuck.json      who gave up waiting, and why
logs/           the workers' stdout and stderr, as torchrun keeps them
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attncheck.inventory import RegisteredOp
from attncheck.model import Case, from_json, to_json
from attncheck.probing import Setting
from attncheck.runner.growing import Growing


@dataclass(frozen=True)
class RunConfig:
    """How workers run. `mesh` is that of this launch, which runs the cases on that mesh; `repeats` is with
    how many sets of values each is run. `path` is put in front of sys.path; `imports` are modules to
    import, `registered` the ops of theirs that probes make operators of; `hash_seeds` has one
    PYTHONHASHSEED a rank (of the largest mesh); `case_timeout` is in seconds; `launch` names this start
    of the workers; `environment` is added to theirs; `python` is the interpreter that they run under, ''
    for this one; `notes` is what the parent wants to remember when it resumes; `serve`: the workers wait
    for cases in the queue; `fixes`: files whose `register()` is called before case `fix_from`; `settings`:
    further ones by operator, beside those it has."""

    seed: int
    mesh: Mapping[str, int]
    device: str
    case_timeout: float
    hash_seeds: tuple[int, ...]
    probe_files: tuple[str, ...]
    path: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    registered: tuple[RegisteredOp, ...] = ()
    launch: str = ""
    python: str = ""
    engine: str = "processes"
    repeats: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    serve: bool = False
    fixes: tuple[str, ...] = ()
    fix_from: int = 0
    settings: Mapping[str, tuple[Setting, ...]] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def workers(self) -> int:
        """How many processes run them: one a rank, or one that simulates all."""
        return 1 if self.engine == "simulated" else self.ranks


@dataclass(frozen=True)
class Asked:
    """A case that workers are asked to run, and its setting, which its operator need not have."""

    case: Case
    setting: Setting


class Queue:
    """A file that grows by one case a line; `null` says that there will be no more."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = Growing(path)
        self._lines: list[str] = []

    def ask(self, asked: Asked | None) -> None:
        with self._path.open("a", encoding="utf-8") as queue:
            queue.write(json.dumps(to_json(asked)) + "\n")

    def line(self, index: int) -> str | None:
        """The line of this index, or None where it is not there yet."""
        if index >= len(self._lines):
            self._lines += [line.decode() for line in self._file.added()]
        return self._lines[index] if index < len(self._lines) else None


class RunDir:
    """Paths of a run folder, and its two input files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = path / "journal.jsonl"
        self.queue = path / "queue.jsonl"
        self.stuck = path / "stuck.json"
        self.logs = path / "logs"

    def state(self, rank: int) -> Path:
        return self.path / f"rank{rank}.state"

    def fault(self, rank: int, attempt: str) -> Path:
        return self.path / f"rank{rank}.{attempt}.fault"

    def write(self, config: RunConfig, cases: Sequence[Case]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(to_json(case)) + "\n" for case in cases)
        (self.path / "cases.jsonl").write_text(lines, encoding="utf-8")
        self.write_config(config)

    def write_config(self, config: RunConfig) -> None:
        text = json.dumps(to_json(config), indent=1)
        (self.path / "run.json").write_text(text, encoding="utf-8")

    def config(self) -> RunConfig:
        text = (self.path / "run.json").read_text(encoding="utf-8")
        return from_json(RunConfig, json.loads(text), "run.json")

    def cases(self) -> tuple[Case, ...]:
        lines = (self.path / "cases.jsonl").read_text(encoding="utf-8").splitlines()
        return tuple(from_json(Case, json.loads(line), "cases.jsonl") for line in lines)
