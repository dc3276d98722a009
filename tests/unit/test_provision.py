"""Parsing of --with, the cache's promises (atomic, idempotent, offline), and one real
installation."""

from __future__ import annotations

import importlib.metadata
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
from packaging.version import Version

from attncheck import installer, provision
from attncheck.errors import UserError
from attncheck.provision import Provision

ONE = Provision("flash-attn", "2.8.3.post2")
XFORMERS = Provision("xformers", "0.0.35")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ATTNCHECK_CACHE", str(folder))
    return folder


def fake_install(arguments: Sequence[str], target: Path, *rest: object, **named: object) -> None:
    """What an installer leaves behind."""
    for name in ("flash_attn", "einops", "xformers"):
        (target / name).mkdir(exist_ok=True)
        (target / name / "__init__.py").write_text("")


@pytest.fixture
def build_tools_present(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has: no second folder for build requirements."""
    monkeypatch.setattr(provision, "_build_requirements", lambda log: None)


def silent(sentence: str) -> None:
    """A log that nobody reads."""


@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        ("flash-attn", "2.8.3.post2"),
        ("flash_attn", "2.8.3.post2"),
        ("Flash.Attn == 2.7.4.post1", "2.7.4.post1"),
        ("flash-attn==2.9.1", "2.9.1"),  # newer than the table: taken at its word
        ("flash-attn>=2.7,<2.8", "2.7.4.post1"),
        ("flash-attn==2.8.0.*", "2.8.0.post2"),
        ("flash-attn<=2.8.1", "2.8.1"),
        ("flash-attn==2.6.3", "2.6.3"),
        ("flash-attn<2.7", "2.6.3"),
        ("flash-attn==2.5.*", "2.5.9.post1"),
        ("flash-attn~=2.7.1", "2.7.4.post1"),
        ("flash-attn!=2.8.3.post2", "2.8.3.post1"),
        ("xformers", "0.0.35"),
        ("xFormers == 0.0.36", "0.0.36"),
        ("xformers<0.1", "0.0.35"),
    ],
)
def test_parse(requirement: str, expected: str) -> None:
    package = "xformers" if requirement.lower().startswith("xformers") else "flash-attn"
    assert provision.parse(requirement) == Provision(package, expected)


@pytest.mark.parametrize(
    ("requirement", "text"),
    [
        ("flash-attn==2.5.8", "2.5.9.post1 is the oldest"),
        ("flash-attn<2.5", "2.5.9.post1 is the oldest"),
        ("flash-attn==2.4.*", "2.5.9.post1 is the oldest"),
        ("flash-attn>=3", "No version that attncheck knows fits flash-attn>=3"),
        ("flash-attn>2.7,<2.7.1,!=2.7.0.post2", "No version that attncheck knows"),
        ("flash-atn", "Unknown package to provision 'flash-atn'.*flash-attn"),
        ("sageattention", "Unknown package to provision 'sageattention'.*flash-attn, xformers"),
        ("xformers==0.0.34", "0.0.35 is the oldest xformers .* expected 0.0.35"),
        ("xformers<0.0.35", "0.0.35 is the oldest xformers"),
        ("xformers>0.0.35", "fits xformers>0.0.35: expected 0.0.35, or an exact newer one"),
        ("flash-attn=2.8", "is not a requirement"),
        ("", "is not a requirement"),
        ("flash-attn[extra]==2.8.3", "extras, a URL or a marker"),
        ("flash-attn @ https://example.invalid/x.whl", "extras, a URL or a marker"),
    ],
)
def test_parse_refuses(requirement: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        provision.parse(requirement)


@pytest.mark.parametrize("recipe", provision.RECIPES.values(), ids=provision.PROVISIONABLE)
def test_versions_stand_oldest_first(recipe: provision.Recipe) -> None:
    assert list(recipe.versions) == sorted(recipe.versions, key=Version)
    assert Version(recipe.default) >= recipe.oldest


@pytest.mark.parametrize("installed", ["2.9.1", "2.9.1+cu128"])
def test_a_torch_that_does_not_fit_is_said_before_anything_is_downloaded(
    installed: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(installer, "install")  # would raise AttributeError
    monkeypatch.setattr(provision.importlib.metadata, "version", lambda name: installed)
    with pytest.raises(UserError) as caught:
        provision.ensure(XFORMERS, log=silent)
    assert str(caught.value).startswith(
        f"xformers==0.0.35 needs torch>=2.10, and torch {installed} is installed"
    )
    assert not cache.exists()


@pytest.mark.parametrize("installed", ["2.10.0", "2.13.0+cpu", "2.14.0a0+git1"])
def test_a_torch_that_fits(installed: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installer, "install", fake_install)
    monkeypatch.setattr(provision.importlib.metadata, "version", lambda name: installed)
    assert provision.ensure(XFORMERS, log=silent) == cache / "xformers-0.0.35-r1"


def test_the_second_time_installs_nothing_and_takes_milliseconds(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer, "install", fake_install)
    logged: list[str] = []
    folder = provision.ensure(ONE, log=logged.append)
    assert folder.parent == cache
    assert (folder / "flash_attn" / "__init__.py").is_file()
    assert any("flash-attn==2.8.3.post2" in sentence for sentence in logged)
    logged.clear()
    monkeypatch.delattr(installer, "install")  # would raise AttributeError
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

    monkeypatch.setattr(installer, "install", interrupted)
    with pytest.raises(KeyboardInterrupt):
        provision.ensure(ONE, log=silent)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("marker", [None, "not json", '{"recipe": 0}'])
def test_a_damaged_folder_is_replaced(
    cache: Path, monkeypatch: pytest.MonkeyPatch, build_tools_present: None, marker: str | None
) -> None:
    monkeypatch.setattr(installer, "install", fake_install)
    folder = provision.ensure(ONE, log=silent)
    (folder / "flash_attn" / "__init__.py").unlink()
    (folder / installer.MARKER).unlink()
    if marker is not None:
        (folder / installer.MARKER).write_text(marker)
    assert provision.ensure(ONE, log=silent) == folder
    assert (folder / "flash_attn" / "__init__.py").is_file()
    assert [p.name for p in cache.iterdir()] == [folder.name]


def test_two_at_once_do_not_clash(
    cache: Path, monkeypatch: pytest.MonkeyPatch, build_tools_present: None
) -> None:
    meet = threading.Barrier(2, timeout=20)

    def slow(arguments: Sequence[str], target: Path, *rest: object, **named: object) -> None:
        if "einops" in arguments:
            meet.wait()  # both have filled their own folder before either moves it into place
        fake_install(arguments, target)

    monkeypatch.setattr(installer, "install", slow)
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
    monkeypatch.setattr(installer, "install", fake_install)
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
        (
            "Collecting torch\nThe conflict is caused by:\n    The user requested torch==2.13.0\n"
            "    xformers 0.0.34 depends on torch==2.10.0\n\nTo fix this you could try to:\n"
            "ERROR: ResolutionImpossible: for help visit https://pip.pypa.io\n",
            "The user requested torch==2.13.0; xformers 0.0.34 depends on torch==2.10.0.",
        ),
        (
            "error: No solution found when resolving dependencies\n  cause: Because there is no version "
            "of torch==9.9.9 and you require torch==9.9.9, your requirements are unsatisfiable.\n",
            "Because there is no version of torch==9.9.9 and you require torch==9.9.9, your requirements "
            "are unsatisfiable.",
        ),
        ("", "the installer failed and said nothing."),
    ],
)
def test_the_relevant_line(output: str, line: str) -> None:
    assert installer._relevant_line(output) == line


def test_without_pip_uv_is_used_and_without_both_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(installer.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(installer.shutil, "which", lambda name: "/usr/bin/uv")
    assert installer.here().command()[:3] == ["uv", "pip", "install"]
    monkeypatch.setattr(installer.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="has no pip and there is no uv on PATH"):
        installer.install(["x"], tmp_path, "flash-attn==2.8.3")


def test_the_hollow_wheel_is_never_left_in_the_installers_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[Sequence[str]] = []

    def record(arguments: Sequence[str], *rest: object, **named: object) -> None:
        calls.append(arguments)

    monkeypatch.setattr(installer, "install", record)
    monkeypatch.setattr(provision, "_build_requirements", lambda log: None)
    provision._fill_flash_attn(ONE, tmp_path, silent, None)
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
    assert json.loads((folder / installer.MARKER).read_text())["version"] == "2.7.4.post1"
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


def test_real_installation_of_xformers_is_a_wheel_and_brings_nothing_else(cache: Path) -> None:
    folder = provision.ensure(XFORMERS, log=silent)
    distributions = {d.name for d in importlib.metadata.distributions(path=[str(folder)])}
    assert distributions == {"xformers"}  # not torch, not numpy
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert 5e6 < size < 50e6
    shutil.rmtree(cache)


def test_provisioning_never_loads_torch() -> None:
    code = "import sys, attncheck.provision; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
