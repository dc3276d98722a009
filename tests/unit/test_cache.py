"""What lies in the cache, and what of it may be removed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from filelock import FileLock

from attncheck import cache, installer

DAY = 86400.0


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNCHECK_CACHE", str(tmp_path))
    return tmp_path


def environment(root: Path, name: str, size: int, days: float) -> Path:
    """An environment that says that it takes so many bytes, and was last used so long ago."""
    folder = root / "environments" / name
    folder.mkdir(parents=True)
    marker = folder / installer.MARKER
    marker.write_text(json.dumps({"bytes": size}))
    for path in (marker, folder):
        os.utime(path, (time.time() - days * DAY,) * 2)
    return folder


def test_every_entry_is_listed_with_its_kind_largest_first(root: Path) -> None:
    environment(root, "torch-2.9.1-x", 10**9, 1)
    (root / "flash-attn-2.8.3-r1").mkdir()
    (root / "flash-attn-2.8.3-r1" / "a.py").write_bytes(b"x" * 100_000)
    (root / "runs" / "20260101-1").mkdir(parents=True)
    (root / "matrix" / "outcomes").mkdir(parents=True)
    (root / "tmp-abc").mkdir()
    cache.lock_of(root / "environments" / "torch-2.9.1-x").touch()
    found = {entry.name: entry for entry in cache.entries()}
    assert {name: entry.kind for name, entry in found.items()} == {
        "environments/torch-2.9.1-x": "environment",
        "flash-attn-2.8.3-r1": "package",
        "runs/20260101-1": "run",
        "matrix/outcomes": "matrix",
        "tmp-abc": "unfinished",
    }
    assert found["environments/torch-2.9.1-x"].bytes == 10**9
    assert found["flash-attn-2.8.3-r1"].bytes >= 100_000
    sizes = [entry.bytes for entry in cache.entries()]
    assert sizes == sorted(sizes, reverse=True)


def test_an_empty_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCHECK_CACHE", str(tmp_path / "none"))
    assert cache.entries() == ()
    assert cache.total_bytes() == 0


def test_links_to_one_file_count_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 200_000)
    alone = cache.disk_bytes(tmp_path)
    os.link(tmp_path / "a", tmp_path / "b")
    os.symlink(tmp_path / "a", tmp_path / "c")
    assert alone <= cache.disk_bytes(tmp_path) < alone + 100_000


def test_what_is_in_use_stays(root: Path) -> None:
    folder = environment(root, "torch-2.9.1-x", 1, 1)
    (entry,) = cache.entries()
    with FileLock(cache.lock_of(folder)):
        assert not cache.remove(entry)
        assert folder.exists()
    assert cache.remove(entry)
    assert not folder.exists()
    assert cache.entries() == ()


def test_a_run_that_may_be_going_on_stays(root: Path) -> None:
    run = root / "runs" / "now"
    run.mkdir(parents=True)
    (run / "journal.jsonl").touch()
    (entry,) = cache.entries()
    assert not cache.remove(entry)
    for path in (run / "journal.jsonl", run):
        os.utime(path, (time.time() - 2 * cache.LIVE_SECONDS,) * 2)
    (entry,) = cache.entries()
    assert cache.remove(entry)


def test_room_is_made_by_what_was_not_used_for_longest(root: Path) -> None:
    old = environment(root, "torch-2.6.0-x", 6 * 10**9, 9)
    wanted = environment(root, "torch-2.7.0-x", 6 * 10**9, 8)
    new = environment(root, "torch-2.9.1-x", 6 * 10**9, 1)
    assert cache.shrink(20 * 10**9, 10**9, keep=()) == []
    removed = cache.shrink(20 * 10**9, 7 * 10**9, keep=(wanted,))
    assert [entry.path for entry in removed] == [old]
    assert wanted.exists()
    assert new.exists()
    assert [e.path for e in cache.shrink(7 * 10**9, 7 * 10**9, keep=(wanted,))] == [new]
    assert [e.path for e in cache.shrink(7 * 10**9, 7 * 10**9, keep=())] == [wanted]
