"""The journal: the only state of a scan. Append-only JSON lines, fsynced; torch-free.

    {"event": "start", "index": 3}                        before a case
    {"event": "end", "index": 3, "outcome": {...}}        after it
    {"event": "note", "key": "worker_up", ...}            phase marks

A worker that comes up after a crash reads which cases ended and which one was started and did not.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attncheck.model import Outcome, from_json, to_json
from attncheck.runner.growing import Growing

# The note that the run was stopped from outside: the case it was at did not die, and is run again.
INTERRUPTED = "interrupted"


class Journal:
    """Appends events; every one is on disk when `write` returns."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)

    def start(self, index: int) -> None:
        self._write({"event": "start", "index": index})

    def end(self, index: int, outcome: Outcome, seconds: Mapping[str, float] | None = None) -> None:
        """`seconds`: where rank 0's time went on this case."""
        event = {"event": "end", "index": index, "outcome": to_json(outcome)}
        self._write({**event, "seconds": dict(seconds or {})})

    def note(self, key: str, **values: Any) -> None:
        self._write({"event": "note", "key": key, **values})

    def _write(self, event: Mapping[str, Any]) -> None:
        # One write call a line: a reader never sees half of one unless the disk is full.
        line = json.dumps({**event, "time": round(time.time(), 3)}, allow_nan=False)
        os.write(self._fd, (line + "\n").encode())
        os.fsync(self._fd)


@dataclass(frozen=True)
class Progress:
    """What a journal says: outcomes by case index, the case that was started and never ended, notes,
    where rank 0's time went (seconds by phase), when the first case ended (Unix time)."""

    outcomes: Mapping[int, Outcome]
    open_case: int | None
    notes: tuple[Mapping[str, Any], ...]
    seconds: Mapping[str, float]
    first_end: float | None


NOTHING = Progress({}, None, (), {}, None)


def events(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole event; a torn last line (disk full, power cut) is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(event, dict):
                yield event


class Tail:
    """Follows a journal that is being written, without building outcomes: cheap enough to poll."""

    def __init__(self, path: Path) -> None:
        self._file = Growing(path)
        self.ended: set[int] = set()
        self.open_case: int | None = None

    def update(self) -> bool:
        """Take in what was added; whether there was anything."""
        lines = self._file.added()
        for line in lines:
            event = json.loads(line)
            if event["event"] == "start":
                self.open_case = event["index"]
            elif event["event"] == "end":
                self.ended.add(event["index"])
        return bool(lines)


def read(path: Path) -> Progress:
    outcomes: dict[int, Outcome] = {}
    open_case: int | None = None
    notes: list[Mapping[str, Any]] = []
    seconds: dict[str, float] = {}
    first_end: float | None = None
    for event in events(path):
        if event["event"] == "start":
            open_case = event["index"]
        elif event["event"] == "end":
            outcomes[event["index"]] = from_json(Outcome, event["outcome"], "journal")
            if open_case == event["index"]:
                open_case = None
            first_end = first_end or event["time"]
            for phase, value in event["seconds"].items():
                seconds[phase] = seconds.get(phase, 0.0) + value
        elif event["event"] == "note":
            notes.append(event)
            if event["key"] == INTERRUPTED:
                open_case = None
    return Progress(outcomes, open_case, tuple(notes), seconds, first_end)
