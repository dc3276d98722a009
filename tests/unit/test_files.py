"""Files are written whole or not at all."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from attncheck import files
from attncheck.errors import UserError


def only(folder: Path) -> list[str]:
    """Names in the folder: nothing temporary may be left."""
    return sorted(path.name for path in folder.iterdir())


def test_new_file_gets_the_text_and_the_users_mode(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a.json", "caf\u00e9\n")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a.json").read_bytes() == "caf\u00e9\n".encode()
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b").stat().st_mode
    assert only(tmp_path) == ["a.json", "b"]


def test_existing_file_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "a.sh"
    file.write_text("old, and longer than what replaces it")
    file.chmod(0o750)
    files.write_text(file, "new")
    assert file.read_text() == "new"
    assert stat.S_IMODE(file.stat().st_mode) == 0o750


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "report.json"
    target.write_text("old")
    link = tmp_path / "latest.json"
    link.symlink_to(target)
    files.write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert only(tmp_path / "real") == ["report.json"]


@pytest.mark.parametrize("step", ["fsync", "replace", "open"])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    file = tmp_path / "a.json"
    file.write_text("old")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(UserError, match=r"Cannot write .*a\.json: No space left on device\."):
        files.write_text(file, "new")
    monkeypatch.undo()
    assert file.read_text() == "old"
    assert only(tmp_path) == ["a.json"]


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    file.write_text("old")

    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(file, "new")
    assert file.read_text() == "old"
    assert only(tmp_path) == ["a.json"]


def test_text_that_utf8_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(file, "\ud800")
    assert file.read_text() == "old"
    assert only(tmp_path) == ["a.json"]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (tmp_path, tmp_path / "no" / "such.json", loop):
        with pytest.raises(UserError, match=r"Cannot write .+: .+\."):
            files.write_text(path, "new")
    assert only(tmp_path) == ["loop"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anything")
def test_a_read_only_file_is_not_replaced(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("old")
    file.chmod(0o444)
    with pytest.raises(UserError, match="Permission denied"):
        files.write_text(file, "new")
    assert file.read_text() == "old"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    files.write_text(pipe, "through")
    reader.join(timeout=10)
    assert got == ["through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
