"""The torch that is installed is, of each guard, on the side that its version says."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_history import GUARDS, LASTING, RELEASES, Exists, Guard, Lasting, Source, minor

ENTRIES = [*GUARDS, *LASTING]


def name_of(entry: Guard | Lasting) -> str:
    what = entry.changed if isinstance(entry, Guard) else entry.what
    return f"{entry.where.rpartition('.')[2]}: {what}"


@pytest.fixture(scope="module")
def installed() -> Source:
    return Source(Path(torch.__file__).parent)


@pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
def test_it_is_as_assumed(entry: Guard | Lasting, installed: Source) -> None:
    assert entry.holds(installed, torch.__version__)


@pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
def test_what_leans_on_it_is_there(entry: Guard | Lasting) -> None:
    parts = ["attncheck", *entry.where.split(".")]
    found: Any = None
    for at in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:at]))
        except ModuleNotFoundError:
            continue
        for part in parts[at:]:
            found = getattr(found, part)
        break
    assert found is not None


def test_a_guard_lies_between_two_releases_that_follow_each_other() -> None:
    minors = list(RELEASES)
    for guard in GUARDS:
        assert minors.index(guard.since) == minors.index(guard.before) + 1, guard


def test_a_wrong_boundary_is_seen(tmp_path: Path) -> None:
    """Sources with the change, and sources without it, each taken for the other side."""
    guard = Guard("x", "x", "2.9", "2.10", new=Exists("new.py"))
    before, after = Source(tmp_path / "before"), Source(tmp_path / "after")
    after.folder.mkdir()
    (after.folder / "new.py").touch()
    assert guard.holds(before, "2.9.1")
    assert guard.holds(after, "2.10.0")
    assert not guard.holds(before, "2.10.0")
    assert not guard.holds(after, "2.9.1")
    both = Guard("x", "x", "2.9", "2.10", new=Exists("new.py"), old=Exists("."))
    assert not both.holds(after, "2.10.0")  # the old way is still there
    lasting = Lasting("x", "x", Exists("new.py"), since="2.10")
    assert lasting.holds(before, "2.9.1")
    assert not lasting.holds(before, "2.11.0")


def test_versions_are_compared_as_numbers() -> None:
    assert minor("2.10.0+cu128") == (2, 10)
    assert minor("2.9.1") < minor("2.10.0a0")
