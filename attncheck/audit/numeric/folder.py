"""What the processes of one comparison leave each other: the files, and one line per rank of what it does.
Torch-free."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attncheck.model import from_json, to_json

STATE_BYTES = 256


@dataclass(frozen=True)
class Raised:
    """Why a rank did not come to the end of a call. `call`: in which, -1 before the first; `module`: what was
    running then; `users`: it is what `build` or `inputs` did, before there was anything to compare; `when`:
    seconds since the epoch."""

    rank: int
    call: int
    module: str
    text: str
    users: bool = False
    when: float = 0.0


@dataclass(frozen=True)
class Doing:
    """What a rank was doing: in which call, and in which module, forward or backward."""

    call: int = -1
    doing: str = "starting"
    module: str = ""


@dataclass(frozen=True)
class Folder:
    path: Path

    @property
    def asked(self) -> Path:
        return self.path / "asked.json"

    @property
    def answer(self) -> Path:
        return self.path / "answer.json"

    @property
    def unsharded(self) -> Path:
        """What the ranks need of the unsharded model: its weights, the calls, its outputs."""
        return self.path / "unsharded.pt"

    @property
    def unsharded_log(self) -> Path:
        return self.path / "unsharded.log"

    @property
    def torchrun_log(self) -> Path:
        return self.path / "torchrun.log"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def record(self, rank: int, call: int) -> Path:
        return self.path / f"rank{rank}.call{call}.pt"

    def state(self, rank: int) -> Path:
        return self.path / f"rank{rank}.state"

    def raised(self, rank: int, call: int) -> Path:
        return self.path / f"rank{rank}.call{call}.raised"

    def all_raised(self) -> list[Raised]:
        """In the order in which they raised."""
        found = [
            from_json(Raised, json.loads(file.read_text(encoding="utf-8")), "raised")
            for file in self.path.glob("rank*.raised")
        ]
        return sorted(found, key=lambda each: each.when)


def put(path: Path, value: Any) -> None:
    """Writes a dataclass as JSON; whoever sees the file sees all of it."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(to_json(value)), encoding="utf-8")
    beside.replace(path)


class State:
    """A rank's line, overwritten in place: it outlives the process, and costs microseconds."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        self.call = -1

    def set(self, doing: str, module: str = "") -> None:
        line = f"{self.call}\t{doing}\t{module}".encode()[: STATE_BYTES - 1]
        os.pwrite(self._file, line.ljust(STATE_BYTES), 0)


def read_state(path: Path) -> Doing:
    """What a rank last wrote; that it is starting, where it wrote nothing yet."""
    try:
        words = path.read_bytes().decode(errors="replace").rstrip(" \0").split("\t")
        return Doing(int(words[0]), words[1], words[2] if len(words) > 2 else "")
    except (OSError, ValueError, IndexError):
        return Doing()
