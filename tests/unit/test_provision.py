"""Parsing of --with, the cache's promises (atomic, idempotent, offline), and one real
installation."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from attncheck import provision
from attncheck.errors import UserError
from attncheck.provision import Provision

ONE = Provision("flash-attn", "2.8.3.post2")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ATTNCHECK_CACHE", str(folder))
    return folder


def fake_install(
    arguments: Sequence[str], target: Path, environment: object, what: str, shown: object = None
) -> None:
    """What an installer leaves behind."""
    for name in ("flash_attn", "einops"):
        (target / name).mkdir(exist_ok=True)
        (target / name / "__init__.py").write_text("")


@pytest.fixture
def build_tools_present(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has: no second folder for build requirements."""
    monkeypatch.setattr(provision, "_build_requirements", lambda log: None)


def silent(sentence: str) -> None:
    """A log that nobody reads."""


@pytest.mark.parametrize(
    ("requirement", "version"),
    [
        ("flash-attn", "2.8.3.post2"),
        ("flash_attn", "2.8.3.post2"),
        ("Flash.Attn == 2.7.4.post1", "2.7.4.post1"),
        ("flash-attn==2.9.1", "2.9.1"),  # newer than the table: taken at its word
        ("flash-attn>=2.7,<2.8", "2.7.4.post1"),
        ("flash-attn==2.8.0.*", "2.8.0.post2"),
        ("flash-attn<=2.8.1", "2.8.1"),
        ("flash-attn~=2.7.1", "2.7.4.post1"),
        ("flash-attn!=2.8.3.post2", "2.8.3.post1"),
    ],
)
def test_parse(requirement: str, version: str) -> None:
    assert provision.parse(requirement) == Provision("flash-attn", version)


@pytest.mark.parametrize(
    ("requirement", "text"),
    [
        ("flash-attn==2.6.3", "from 2.7.0 on"),
        ("flash-attn<2.7", "from 2.7.0 on"),
        ("flash-attn==2.5.*", "from 2.7.0 on"),
        ("flash-attn>=3", "No version that attncheck knows fits flash-attn>=3"),
        ("flash-attn>2.7,<2.7.1,!=2.7.0.post2", "No version that attncheck knows"),
        ("flash-atn", "Unknown package to provision 'flash-atn'.*flash-attn"),
        ("xformers", "Unknown package to provision 'xformers'.*flash-attn"),
        ("flash-attn=2.8", "is not a requirement"),
        ("", "is not a requirement"),
        ("flash-attn[extra]==2.8.3", "extras, a URL or a marker"),
        ("flash-attn @ https://example.invalid/x.whl", "extras, a URL or a marker"),
    ],
)
def test_parse_refuses(requirement: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        provision.parse(requirement)


def test_the_default_is_the_newest_of_the_table() -> None:
    assert provision.FLASH_ATTN_VERSIONS[-1] == provision.FLASH_ATTN_DEFAULT


def test_the_second_time_installs_nothing_and_takes_milliseconds(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provision, "_install", fake_install)
    logged: list[str] = []
    folder = provision.ensure(ONE, log=logged.append)
    assert folder.parent == cache
    assert (folder / "flash_attn" / "__init__.py").is_file()
    assert any("flash-attn==2.8.3.post2" in sentence for sentence in logged)
    logged.clear()
    monkeypatch.delattr(provision, "_install")  # would raise NameError
    began = time.perf_counter()
    assert provision.ensure(ONE, log=logged.append) == folder
    assert time.perf_counter() - began < 0.1
    assert logged == []


def test_an_interrupted_installation_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(arguments: object, target: Path, *rest: object) -> None:
        (target / "flash_attn").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(provision, "_install", interrupted)
    with pytest.raises(KeyboardInterrupt):
        provision.ensure(ONE, log=silent)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("marker", [None, "not json", '{"recipe": 0}'])
def test_a_damaged_folder_is_replaced(
    cache: Path, monkeypatch: pytest.MonkeyPatch, build_tools_present: None, marker: str | None
) -> None:
    monkeypatch.setattr(provision, "_install", fake_install)
    folder = provision.ensure(ONE, log=silent)
    (folder / "flash_attn" / "__init__.py").unlink()
    (folder / provision.MARKER).unlink()
    if marker is not None:
        (folder / provision.MARKER).write_text(marker)
    assert provision.ensure(ONE, log=silent) == folder
    assert (folder / "flash_attn" / "__init__.py").is_file()
    assert [p.name for p in cache.iterdir()] == [folder.name]


def test_two_at_once_do_not_clash(
    cache: Path, monkeypatch: pytest.MonkeyPatch, build_tools_present: None
) -> None:
    meet = threading.Barrier(2, timeout=20)

    def slow(arguments: Sequence[str], target: Path, *rest: object) -> None:
        if "einops" in arguments:
            meet.wait()  # both have filled their own folder before either moves it into place
        fake_install(arguments, target, None, "")

    monkeypatch.setattr(provision, "_install", slow)
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(provision.ensure(ONE, log=silent)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 2
    assert len(set(folders)) == 1
    assert [p.name for p in cache.iterdir()] == [folders[0].name]


def test_leftovers_of_killed_processes_go_after_a_day(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provision, "_install", fake_install)
    old, fresh = cache / "tmp-old", cache / "tmp-fresh"
    for folder in (old, fresh):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    provision.ensure(ONE, log=silent)
    assert not old.exists()
    assert fresh.exists()


def test_a_cache_that_cannot_be_written_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNCHECK_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        UserError, match=r"Cannot store flash-attn==2.8.3.post2 in .*ATTNCHECK_CACHE"
    ):
        provision.ensure(ONE, log=silent)


def test_a_failed_installation_is_one_sentence(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real pip, an index that nobody listens on."""
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setattr(provision, "_build_requirements", lambda log: None)
    with pytest.raises(UserError) as caught:
        provision.ensure(Provision("flash-attn", "2.7.3"), log=silent)
    text = str(caught.value)
    assert text.startswith("Cannot install flash-attn==2.7.3: ")
    assert "refused" in text
    assert "FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE" in text
    assert "--no-build-isolation" in text
    assert "\n" not in text
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (
            "Traceback (most recent call last):\n  ModuleNotFoundError: No module named 'torch'\n"
            "ERROR: metadata-generation-failed\nnote: not pip's fault",
            "ModuleNotFoundError: No module named 'torch'.",
        ),
        (
            "WARNING: Retrying: Failed to establish a new connection: [Errno 111]\n"
            "ERROR: No matching distribution found for flash-attn==2.7.3",
            "WARNING: Retrying: Failed to establish a new connection: [Errno 111].",
        ),
        (
            "ERROR: Could not install: [Errno 28] No space left on device\nnote: see above",
            "ERROR: Could not install: [Errno 28] No space left on device.",
        ),
        (
            "ERROR: No matching distribution found for flash-attn==2.9.9\n",
            "ERROR: No matching distribution found for flash-attn==2.9.9.",
        ),
        ("", "the installer failed and said nothing."),
    ],
)
def test_the_relevant_line(output: str, line: str) -> None:
    assert provision._relevant_line(output) == line


def test_without_pip_uv_is_used_and_without_both_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(provision.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(provision.shutil, "which", lambda name: "/usr/bin/uv")
    assert provision._installer()[:3] == ["uv", "pip", "install"]
    monkeypatch.setattr(provision.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="has no pip and there is no uv on PATH"):
        provision._install(["x"], tmp_path, {}, "flash-attn==2.8.3")


def test_the_hollow_wheel_is_never_left_in_the_installers_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[Sequence[str]] = []

    def record(arguments: Sequence[str], *rest: object) -> None:
        calls.append(arguments)

    monkeypatch.setattr(provision, "_install", record)
    monkeypatch.setattr(provision, "_build_requirements", lambda log: None)
    provision._install_flash_attn(ONE, tmp_path, silent)
    assert {"--no-cache-dir", "--no-cache"} & set(calls[0])
    assert "--no-binary=flash-attn" in calls[0]


def test_real_installation_in_an_environment_without_build_tools(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = provision.importlib.util.find_spec
    monkeypatch.setattr(
        provision.importlib.util, "find_spec", lambda name: None if name == "ninja" else found(name)
    )
    logged: list[str] = []
    folder = provision.ensure(Provision("flash-attn", "2.7.4.post1"), log=logged.append)
    assert len(logged) == 2
    assert re.search(r"\(.*ninja.* missing here\)", logged[1])
    assert json.loads((folder / provision.MARKER).read_text())["version"] == "2.7.4.post1"
    assert list(folder.rglob("*.so")) == []
    code = "import importlib.metadata as m, einops; print(m.version('flash-attn'))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "2.7.4.post1"
    shutil.rmtree(cache)


def test_provisioning_never_loads_torch() -> None:
    code = "import sys, attncheck.provision; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
