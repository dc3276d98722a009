"""Where a fix may be written: checked before anything is run, whole or not at all, nothing overwritten."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from attncheck.errors import UserError
from attncheck.fixes import emit, output

OURS = emit.module([])


def test_stdout_is_the_default() -> None:
    assert output.target(None, None, False).put("text\n") == "text\n"


def test_writes_a_new_file_and_its_own(tmp_path: Path) -> None:
    file = tmp_path / "fixes.py"
    for _ in range(2):
        assert output.target(file, None, False).put(OURS) == ""
        assert file.read_text() == OURS
    assert [p.name for p in tmp_path.iterdir()] == ["fixes.py"]


def test_keeps_what_is_not_ours(tmp_path: Path) -> None:
    file = tmp_path / "fixes.py"
    file.write_text("mine = 1\n")
    with pytest.raises(UserError, match=r"fixes\.py exists, and is not as attncheck wrote it"):
        output.target(file, None, False)
    assert file.read_text() == "mine = 1\n"
    output.target(file, None, True).put(OURS)
    assert (tmp_path / "fixes.py.bak").read_text() == "mine = 1\n"
    assert file.read_text() == OURS
    # What was edited since is not ours either, and the first backup is kept.
    file.write_text(OURS + "# edited\n")
    output.target(file, None, True).put(OURS)
    assert (tmp_path / "fixes.py.bak").read_text() == "mine = 1\n"
    assert (tmp_path / "fixes.py.bak1").read_text() == OURS + "# edited\n"


def test_nothing_to_write_writes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "fixes.py"
    assert output.target(file, None, False).put("") == ""
    assert not file.exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no/such/folder/fixes.py", "the folder no/such/folder does not exist"),
        ("fixes.txt", "expected a name like attncheck_fixes.py"),
        ("my-fixes.py", "expected a name like attncheck_fixes.py"),
    ],
)
def test_refuses_names_that_cannot_be(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        output.target(Path(name), None, False)


def test_refuses_a_folder_and_both_ways(tmp_path: Path) -> None:
    (tmp_path / "fixes.py").mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        output.target(tmp_path / "fixes.py", None, True)
    with pytest.raises(UserError, match="expected one of them"):
        output.target(Path("a.py"), Path("b.py"), False)


def test_a_diff_that_patch_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("fixes.py")
    for old in (None, "mine = 1\n"):
        file.unlink(missing_ok=True)
        if old is not None:
            file.write_text(old)
        shown = output.target(None, file, False).put(OURS)
        assert (file.read_text() if file.exists() else None) == old  # it only shows
        done = subprocess.run(
            ["git", "apply", "-"], input=shown, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert file.read_text() == OURS
