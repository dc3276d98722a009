"""Environments are whole or not there, nobody shares one by accident, and bad input is one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import stub_wheels

from attncheck import installer
from attncheck.errors import UserError
from attncheck.matrix import environments, releases
from attncheck.matrix.environments import Source

SITE = "lib/python3.12/site-packages"
TOLD = {"python": "3.12.1", "torch": "2.9.1", "cuda": "12.8", "distributed": True}


def silent(sentence: str) -> None:
    """A log that nobody reads."""


class Steps:
    """What would be installed: takes the place of running pip and uv, which functional tests do."""

    def __init__(self) -> None:
        self.told: dict[str, object] = dict(TOLD)
        self.commands: list[Sequence[str]] = []
        self.fails_at = ""

    def run(self, command: Sequence[str], what: str, *rest: object, **named: object) -> str:
        self.commands.append(command)
        if self.fails_at and self.fails_at in command:
            raise KeyboardInterrupt
        if "venv" in command:
            folder = Path(command[-1])
            info = folder / SITE / "torch-2.9.1.dist-info"
            info.mkdir(parents=True)
            (info / "RECORD").write_text("torch/__init__.py,sha256=abc,1\n")
            (folder / "bin").mkdir()
            (folder / "bin" / "python").touch()
        return json.dumps({**self.told, "site": str(Path(command[0]).parents[1] / SITE)})


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Steps:
    monkeypatch.setenv("ATTNCHECK_CACHE", str(tmp_path / "cache"))
    made = Steps()
    monkeypatch.setattr(installer, "run", made.run)
    return made


def test_it_is_made_once(steps: Steps) -> None:
    with environments.environment("2.9.1", Source(), silent) as first:
        assert (first.torch, first.version, first.cuda) == ("2.9.1", "3.12.1", "12.8")
    done = len(steps.commands)
    with environments.environment("2.9.1", Source(), silent) as second:
        assert second == first
    assert len(steps.commands) == done


@pytest.mark.parametrize("step", ["venv", "torch==2.9.1", "-I"])
def test_an_interrupted_installation_is_never_taken_for_a_whole_one(
    steps: Steps, step: str
) -> None:
    steps.fails_at = step
    with (
        pytest.raises(KeyboardInterrupt),
        environments.environment("2.9.1", Source(), silent),
    ):
        pass
    folder = environments.folder_of("2.9.1", Source())
    assert not folder.exists()
    steps.fails_at = ""
    with environments.environment("2.9.1", Source(), silent) as made:
        assert made.folder == folder


def test_one_that_was_killed_is_made_anew(steps: Steps) -> None:
    """Before it was moved to its place, or after that; nothing of it stays."""
    folder = environments.folder_of("2.9.1", Source())
    for place in (folder, folder.with_name(f"tmp-{folder.name}-abc")):
        (place / SITE / "torch").mkdir(parents=True)
        (place / SITE / "torch" / "half.py").touch()
    with environments.environment("2.9.1", Source(), silent):
        assert not list(folder.parent.rglob("half.py"))
        assert [p for p in folder.parent.iterdir() if p.is_dir()] == [folder]
    assert any("torch==2.9.1" in command for command in steps.commands)


@pytest.mark.parametrize("damage", ["not json", "{}", '{"recipe": 0}'])
def test_a_damaged_marker_is_no_marker(steps: Steps, damage: str) -> None:
    with environments.environment("2.9.1", Source(), silent) as made:
        pass
    (made.folder / installer.MARKER).write_text(damage)
    done = len(steps.commands)
    with environments.environment("2.9.1", Source(), silent):
        assert len(steps.commands) > done


def test_an_interpreter_that_is_gone_is_noticed(steps: Steps) -> None:
    with environments.environment("2.9.1", Source(), silent) as made:
        pass
    made.python.unlink()
    done = len(steps.commands)
    with environments.environment("2.9.1", Source(), silent):
        assert len(steps.commands) > done


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({**TOLD, "torch": "2.13.0+cpu"}, "asked for torch 2.9.1 and got 2.13.0"),
        ({**TOLD, "distributed": False}, "without torch.distributed"),
    ],
)
def test_a_torch_that_is_not_what_was_asked_for(
    steps: Steps, told: dict[str, object], said: str
) -> None:
    steps.told = told
    with (
        pytest.raises(UserError, match=said),
        environments.environment("2.9.1", Source(), silent),
    ):
        pass
    assert not environments.folder_of("2.9.1", Source()).exists()


def test_a_local_version_is_what_was_asked_for(steps: Steps) -> None:
    steps.told = {**TOLD, "torch": "2.9.1+cu128"}
    with environments.environment("2.9.1", Source(), silent) as made:
        assert made.torch == "2.9.1+cu128"


def test_the_fingerprint_changes_with_any_package(steps: Steps) -> None:
    with environments.environment("2.9.1", Source(), silent) as made:
        before = made.fingerprint
    (made.site / "torch-2.9.1.dist-info" / "RECORD").write_text("torch/__init__.py,sha256=abd,1\n")
    with environments.environment("2.9.1", Source(), silent) as again:
        assert again.fingerprint != before
    (made.site / "numpy-2.0.dist-info").mkdir()
    with environments.environment("2.9.1", Source(), silent) as third:
        assert third.fingerprint not in (before, again.fingerprint)


def test_another_source_is_another_environment(tmp_path: Path) -> None:
    constraints = tmp_path / "c.txt"
    constraints.write_text("numpy<2\n")
    sources = [
        Source(),
        Source("3.12"),
        Source(options=("--index-url", "https://mirror.example/simple")),
        Source(options=("--constraint", str(constraints))),
    ]
    keys = {source.key() for source in sources}
    constraints.write_text("numpy<3\n")
    keys.add(sources[-1].key())
    assert len(keys) == 5


def test_who_comes_second_waits_and_is_told(steps: Steps) -> None:
    told: list[str] = []
    entered = threading.Event()

    def second() -> None:
        with environments.environment("2.9.1", Source(), told.append):
            entered.set()

    with environments.environment("2.9.1", Source(), silent) as made:
        thread = threading.Thread(target=second)
        thread.start()
        deadline = time.time() + 30
        while not told and time.time() < deadline:
            time.sleep(0.01)
        assert not entered.is_set()
        assert told == [f"waiting for another attncheck that uses {made.folder}"]
    thread.join(30)
    assert entered.is_set()


def test_a_process_that_died_holds_no_environment(steps: Steps) -> None:
    folder = environments.folder_of("2.9.1", Source())
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from attncheck.matrix import environments\n"
        "with environments.locked(Path(sys.argv[1]), print):\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    died = subprocess.run([sys.executable, "-c", code, str(folder)], check=False)
    assert died.returncode == -9
    told: list[str] = []
    with environments.locked(folder, told.append):
        assert told == []


def test_a_cache_that_cannot_be_written_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ATTNCHECK_CACHE", str(tmp_path / "file" / "cache"))
    with (
        pytest.raises(UserError, match="ATTNCHECK_CACHE"),
        environments.environment("2.9.1", Source(), silent),
    ):
        pass


def test_python_is_a_version_or_a_path() -> None:
    assert environments.interpreter("") == sys.executable
    assert environments.interpreter(sys.executable) == sys.executable
    with pytest.raises(UserError, match=r"--python 9.99: there is no python9.99 on PATH"):
        environments.interpreter("9.99")
    with pytest.raises(UserError, match="no such interpreter"):
        environments.interpreter("/nowhere/python")


def test_uv_makes_a_real_one_where_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From wheels in a folder; tests/functional/test_matrix.py does it with venv and pip."""
    import uv

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "uv").symlink_to(uv.find_uv_bin())
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("ATTNCHECK_CACHE", str(tmp_path / "cache"))
    wheels = stub_wheels.wheelhouse(tmp_path / "wheels")
    source = Source(options=("--no-index", "--find-links", str(wheels)))
    with environments.environment(stub_wheels.torch_here(), source, silent) as made:
        assert "uv = " in (made.folder / "pyvenv.cfg").read_text()
        assert made.torch == stub_wheels.torch_here()
        assert made.installer.uv
    with (
        pytest.raises(UserError, match=r"Because .*torch==2\.99\.0"),
        environments.environment("2.99.0", source, silent),
    ):
        pass


def test_credentials_of_an_index_are_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    by = installer.Installer(
        sys.executable, False, ("--index-url", "https://me:secret@127.0.0.1:9/simple")
    )
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(UserError) as caught:
        installer.install(["nothing-of-this-name", "--retries", "0"], None, "it", by=by)
    assert "secret" not in str(caught.value)
    assert "https://***@127.0.0.1:9/simple" in str(caught.value)


def test_releases_between_are_final_ones_of_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[str]] = []

    def answer(command: Sequence[str], *rest: object) -> str:
        asked.append(command)
        return (
            "torch (2.13.0)\nAvailable versions: 2.13.0, 2.10.0, 2.10.0rc1, 2.9.1, 2.6.0, 1.13.1\n"
        )

    monkeypatch.setattr(installer, "run", answer)
    options = ("--no-index", "--find-links", "/wheels", "--constraint", "/c.txt")
    found = releases.between("torch", "2.13.0", "2.6.0", options, (), silent)
    assert found == ("2.6.0", "2.9.1", "2.10.0", "2.13.0")
    assert list(asked[0][-3:]) == ["--no-index", "--find-links", "/wheels"]


def test_without_an_index_the_known_releases_are_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*rest: object) -> str:
        raise UserError("Cannot install the list: no network.")

    monkeypatch.setattr(installer, "run", refuse)
    told: list[str] = []
    known = ("2.5.1", "2.6.0", "2.7.0", "2.8.0")
    assert releases.between("torch", "2.6.0", "2.8.0", (), known, told.append) == known[1:]
    assert "no network" in told[0]
    assert "that attncheck knows" in told[0]
