"""What lies in the user's cache, how large it is, and removing it: `attncheck cache`. Torch-free."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from attncheck.installer import MARKER
from attncheck.provision import cache_root

# A run that was written to within this time may be going on: no case of any level is silent for longer.
LIVE_SECONDS = 3600.0
ENVIRONMENTS = "environments"
# Folders of which each entry stands for itself; everything else in the cache is one entry.
_SHELVES = {ENVIRONMENTS: "environment", "runs": "run", "matrix": "matrix"}
_LOCK = ".lock"


@dataclass(frozen=True)
class Entry:
    """Something in the cache. `name` is its path in it; `used`: Unix time of its last use; `bytes` on disk,
    where files that share their blocks (uv links them) count once in each entry."""

    name: str
    kind: str
    path: Path
    bytes: int
    used: float


def entries() -> tuple[Entry, ...]:
    """Everything there is, largest first."""
    found = [_entry(path, kind) for path, kind in _paths(cache_root())]
    return tuple(sorted(found, key=lambda entry: (-entry.bytes, entry.name)))


def _paths(root: Path) -> Iterator[tuple[Path, str]]:
    for path in _children(root):
        if path.name not in _SHELVES:
            yield path, _kind(path, "package")
        for own in _children(path) if path.name in _SHELVES else ():
            yield own, _kind(own, _SHELVES[path.name])


def _kind(path: Path, kind: str) -> str:
    return "unfinished" if path.name.startswith("tmp-") else kind


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.suffix != _LOCK)
    except OSError:
        return []


def _entry(path: Path, kind: str) -> Entry:
    name = path.relative_to(cache_root()).as_posix()
    return Entry(name, kind, path, _known_bytes(path) or disk_bytes(path), last_used(path))


def _known_bytes(path: Path) -> int:
    """What the maker of an environment found that it takes: to ask 20,000 files again takes a second."""
    try:
        return int(json.loads((path / MARKER).read_text(encoding="utf-8"))["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def disk_bytes(path: Path) -> int:
    """What a file, or all in a folder, takes on disk; what is gone meanwhile counts nothing."""
    seen: set[int] = set()
    total = 0
    stack = [path]
    while stack:
        at = stack.pop()
        with contextlib.suppress(OSError):
            info = at.lstat()
            if info.st_ino not in seen:
                seen.add(info.st_ino)
                # Windows does not say how many blocks there are.
                total += getattr(info, "st_blocks", -(-info.st_size // 512)) * 512
            if at.is_dir() and not at.is_symlink():
                stack += [Path(entry.path) for entry in os.scandir(at)]
    return total


def last_used(path: Path) -> float:
    """Unix time of the newest of an entry and what lies in it directly (0 where it is gone)."""
    times = [0.0]
    for file in (path, *_children(path)):
        with contextlib.suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(times)


def lock_of(path: Path) -> Path:
    """The lock file of an entry: whoever holds it uses the entry."""
    return path.with_name(path.name + _LOCK)


def remove(entry: Entry) -> bool:
    """Remove it, unless it is in use; whether it is gone."""
    if entry.kind == "run" and time.time() - entry.used < LIVE_SECONDS:
        return False
    try:
        with FileLock(lock_of(entry.path), timeout=0):
            _delete(entry.path)
    except (Timeout, OSError):
        return False
    return not entry.path.exists()


def _delete(path: Path) -> None:
    if not path.is_dir():
        path.unlink()
        return
    # Renamed first: what is half removed must not be taken for whole.
    doomed = path.with_name(f"tmp-removed-{path.name}")
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def shrink(budget: int, wanted: int, keep: Collection[Path]) -> list[Entry]:
    """Remove environments, those not used for longest first, until `wanted` bytes more fit into the budget
    for all of the cache; what was removed. Those to keep, and those in use, stay."""
    found = entries()
    total = sum(entry.bytes for entry in found) + wanted
    removed = []
    for entry in sorted(found, key=lambda entry: entry.used):
        if total <= budget:
            break
        if entry.kind == "environment" and entry.path not in keep and remove(entry):
            removed.append(entry)
            total -= entry.bytes
    return removed


def total_bytes() -> int:
    return sum(entry.bytes for entry in entries())
