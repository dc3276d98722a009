"""What a matrix does around its cells: which there are, what is kept, what is removed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from attncheck import cache, installer
from attncheck.commands import matrix as command
from attncheck.errors import UserError
from attncheck.matrix import environments, running
from attncheck.matrix.environments import Environment, Source
from attncheck.matrix.outcomes import Store
from attncheck.matrix.running import MatrixRequest, Session, combinations, harvest
from attncheck.model import Outcome, Status
from attncheck.plan import Selection
from attncheck.runner.journal import Journal
from attncheck.runner.rundir import RunDir
from attncheck.runner.scan import ScanRequest

SCAN = ScanRequest(selection=Selection(operators=("fallback.matmul",), level="quick"), seed=0)
FLASH = {"flash-attn": ("2.7.4.post1", "2.8.3")}


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNCHECK_CACHE", str(tmp_path))
    return tmp_path


def test_every_combination_once_those_of_one_torch_together() -> None:
    request = MatrixRequest(SCAN, ("2.9.1", " 2.13.0", "2.9.1"), FLASH)
    assert [c.versions for c in combinations(request)] == [
        {"torch": torch, "flash-attn": flash}
        for torch in ("2.9.1", "2.13.0")
        for flash in FLASH["flash-attn"]
    ]


def environment(root: Path, torch: str, size: int) -> Environment:
    folder = environments.folder_of(torch, Source())
    folder.mkdir(parents=True)
    (folder / installer.MARKER).write_text(json.dumps({"bytes": size}))
    python = folder / "bin" / "python"
    by = installer.Installer(str(python), False)
    return Environment(folder, python, "3.12.1", torch, "", folder, "abc", by)


def test_a_budget_is_kept_by_removing_what_no_later_cell_wants(root: Path) -> None:
    told: list[str] = []
    request = MatrixRequest(SCAN, ("2.6.0",), max_disk=10 * 10**9)
    session = Session(request, told.append, lambda *_: None)
    later = environment(root, "2.9.1", 3 * 10**9)
    unwanted = environment(root, "2.5.1", 4 * 10**9)
    session._make_room(5 * 10**9, ["2.9.1"])
    assert later.folder.exists()
    assert not unwanted.folder.exists()
    assert len(told) == 1
    assert "for --max-disk" in told[0]
    # What is wanted later can be made again; the budget cannot be stretched.
    session._make_room(9 * 10**9, ["2.9.1"])
    assert not later.folder.exists()


def test_a_build_that_is_larger_than_the_budget_is_removed_and_said(root: Path) -> None:
    request = MatrixRequest(SCAN, ("2.6.0",), max_disk=10**9)
    session = Session(request, lambda _: None, lambda *_: None)
    found = environment(root, "2.6.0", 5 * 10**9)
    # Locked as in a cell: it is in use here.
    too_large = pytest.raises(UserError, match=r"torch 2.6.0 takes the cache to 4.\d+ GiB")
    with environments.locked(found.folder, print), too_large:
        session._check_size(found, [])
    assert not found.folder.exists()
    assert cache.total_bytes() < 10**8


def test_without_a_budget_nothing_is_removed(root: Path) -> None:
    session = Session(MatrixRequest(SCAN, ("2.6.0",)), print, lambda *_: None)
    found = environment(root, "2.6.0", 10**13)
    session._make_room(10**13, [])
    session._check_size(found, [])
    assert found.folder.exists()


def test_a_password_of_an_index_goes_to_the_installer_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = "https://me:secret@mirror.example/simple"
    monkeypatch.setattr(
        sys, "argv", ["attncheck", "matrix", "--torch", "2.6.0", "--index-url", url]
    )
    given = command.matrix.make_context("matrix", sys.argv[2:]).params
    request = command._request(given)
    assert request.source.options == ("--index-url", url)
    session = Session(request, print, lambda *_: None)
    told = running.described(request, session.cases, 0.0)["command"]
    # Every cell's report tells it, too.
    assert told == session.base.notes["command"]
    assert told.endswith("--index-url https://***@mirror.example/simple")


def test_what_a_killed_run_measured_is_kept(root: Path) -> None:
    folder = root / "matrix" / "run-x"
    folder.mkdir(parents=True)
    right = Outcome(Status.SUPPORTED)
    log = Journal(RunDir(folder).journal)
    log.end(1, right)
    log.start(0)
    store = Store(root / "outcomes")
    harvest(folder, store)  # killed before it said which cases these are: nothing can be kept
    (folder / running.KEYS).write_text(json.dumps([["scope", "a"], ["scope", "b"]]))
    harvest(folder, store)
    assert store.get("scope", "b") == right
    assert store.get("scope", "a") is None
    assert Store(root / "outcomes").get("scope", "b") == right


def test_only_what_a_package_can_affect_depends_on_it(root: Path) -> None:
    asked = ScanRequest(
        selection=Selection(operators=("fallback.matmul", "flash_attn_func"), level="quick"), seed=0
    )
    request = MatrixRequest(asked, ("2.6.0",), FLASH)
    session = Session(request, print, lambda *_: None)
    found = environment(root, "2.6.0", 1)
    one, other = (session._keys(each, found) for each in combinations(request))
    for case, mine, theirs in zip(session.cases, one, other, strict=True):
        assert (mine == theirs) == (case.operator == "fallback.matmul"), case.id
    assert {case.operator for case in session.cases} == {"fallback.matmul", "flash_attn_func"}
