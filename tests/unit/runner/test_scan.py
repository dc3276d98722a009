"""What a scan makes of its request; and the folders of runs: old ones go, never one still in use."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from attncheck import cache
from attncheck.probing import Operator, Probe, Setting
from attncheck.runner import scan


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNCHECK_CACHE", str(tmp_path))
    folder = tmp_path / "runs"
    for day in range(10, 10 + scan.KEPT_RUNS + 3):
        run = folder / f"202601{day}-000000-1"
        run.mkdir(parents=True)
        (run / "journal.jsonl").write_text("")
        for file in (run / "journal.jsonl", run):
            os.utime(file, (time.time() - 2 * cache.LIVE_SECONDS,) * 2)
    return folder


def test_the_oldest_runs_are_removed(runs: Path) -> None:
    new = scan.new_run_folder()
    assert len(list(runs.iterdir())) == scan.KEPT_RUNS
    assert new.is_dir()
    assert not (runs / "20260110-000000-1").exists()


def test_a_run_that_still_writes_is_kept(runs: Path) -> None:
    """Ten scans started since do not take the folder away from under it."""
    os.utime(runs / "20260110-000000-1" / "journal.jsonl")
    scan.new_run_folder()
    assert (runs / "20260110-000000-1" / "journal.jsonl").exists()
    assert len(list(runs.iterdir())) == scan.KEPT_RUNS + 1


def test_settings_are_added_and_chosen_operator_by_operator() -> None:
    own, other, added = (Setting(name, {"batch": 2}) for name in ("own", "other", "added"))

    def nothing(*_: object) -> tuple[()]:
        return ()

    operators = tuple(Operator(n, nothing, nothing, nothing, (own, other)) for n in ("a", "b"))
    request = scan.ScanRequest(settings={"a": (added,)}, only={"a": ("other", "added")})
    a, b = scan._with_settings(Probe("p", "", operators), request).operators
    assert a.settings == (other, added)
    assert b.settings == (own, other)
