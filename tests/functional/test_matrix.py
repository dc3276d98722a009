"""A matrix as its users run it: real installers, real environments, real workers.

The environments are made of wheels in a folder, without a network; their torch is the one of the tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import stub_wheels

from attncheck import cells, saved

# Two operators with no package above torch, right wherever they run (heads sharded, 2.9 to 2.11 refuse one).
CASES = (
    "-k",
    "fallback.matmul",
    "-k",
    "fallback.einsum",
    "--level",
    "quick",
    "--placement",
    "batch",
)
TORCH = stub_wheels.torch_here()


def attncheck(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "attncheck", *arguments],
        cwd=cache,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        # No uv, which the environment of the tests has: venv and pip. Nothing from outside.
        env={
            **os.environ,
            "ATTNCHECK_CACHE": str(cache / "cache"),
            "PATH": "/usr/bin:/bin",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_FIND_LINKS": "",
        },
    )


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stub_wheels.wheelhouse(tmp_path_factory.mktemp("wheels") / "house")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def command(wheels: Path) -> tuple[str, ...]:
    """One version that is there, and one that no index has."""
    source = ("--no-index", "--find-links", str(wheels))
    return ("matrix", "--torch", f"{TORCH},2.99.0", *source, *CASES, "-o", "json:matrix.json")


@pytest.fixture(scope="module")
def first(home: Path, command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    return attncheck(*command, "-o", "table", cache=home)


def document(home: Path) -> cells.Matrix:
    read: Any = saved.read(home / "matrix.json")
    assert isinstance(read, cells.Matrix)
    return read


def test_a_cell_that_cannot_be_made_costs_no_other(
    home: Path, first: subprocess.CompletedProcess[str]
) -> None:
    assert first.returncode == 3, first.stderr  # nothing wrong, and not everything known
    good, bad = document(home).cells
    assert good.report is not None
    assert good.report.summary == {"supported": 4}
    assert bad.report is None
    assert bad.problem.startswith("Cannot install torch 2.99.0: ")
    assert "torch==2.99.0" in bad.problem
    assert "2.99.0" in first.stdout
    assert "Traceback" not in first.stderr


def test_a_cell_says_what_it_ran_in(home: Path, first: object) -> None:
    good = document(home).cells[0]
    assert good.report is not None
    environment = good.report.environment
    assert environment["packages"]["torch"] == TORCH
    assert environment["fingerprint"]
    assert good.versions == {"torch": TORCH}


@pytest.fixture(scope="module")
def second(home: Path, first: object, command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    return attncheck(*command, cache=home)


def test_what_was_measured_is_not_run_again(
    home: Path, second: subprocess.CompletedProcess[str]
) -> None:
    assert second.returncode == 3, second.stderr
    assert "0 cases to run, 4 known before" in second.stderr
    good = document(home).cells[0]
    assert good.reused == 4
    assert good.report is not None
    # No worker was started.
    assert good.report.environment["phases"]["start_workers"] == 0
    assert not list((home / "cache" / "matrix").glob("run-*"))


def test_more_cases_run_only_themselves(
    home: Path, second: object, command: tuple[str, ...]
) -> None:
    done = attncheck(*command, "--placement", "replicate", cache=home)
    assert "4 cases to run, 4 known before" in done.stderr
    good = document(home).cells[0]
    assert good.report is not None
    assert good.report.summary == {"supported": 8}


def test_the_cache_can_be_looked_at_and_cleared(home: Path, second: object) -> None:
    listed = attncheck("cache", "list", cache=home)
    assert listed.returncode == 0
    assert f"environments/torch-{TORCH}-" in listed.stdout
    assert "torch-2.99.0" not in listed.stdout  # nothing is left of what could not be made
    refused = attncheck("cache", "clear", "environment", cache=home)
    assert refused.returncode == 2
    assert "environments/torch-" in refused.stderr
    cleared = attncheck("cache", "clear", "environments/*", cache=home)
    assert cleared.returncode == 0
    assert cleared.stdout.startswith("Freed ")
    assert not list((home / "cache" / "environments").glob("torch-*[!k]"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--torch is missing"),
        (("--torch", "2.x"), "'2.x' is no version of torch"),
        (("--torch", TORCH, "--flash-attn", "1.0"), "the oldest flash-attn"),
        (("--torch", TORCH, "-k", "nothing"), "nothing"),
        (("--torch", TORCH, "--max-disk", "much"), "--max-disk 'much' is no size"),
        (("--torch", TORCH, "--constraint", "no.txt"), "--constraint no.txt does not exist"),
        (("--torch", TORCH, "--python", "9.99"), "--python 9.99"),
        (("--torch", TORCH, "--bisect", "operator=sdpa"), "versions of one package"),
        (("--torch", TORCH, "-o", "sarif"), "shows no matrix"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    done = attncheck("matrix", *arguments, *CASES[4:], cache=tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_release_is_found_in_which_a_status_changes(
    home: Path, wheels: Path, first: object
) -> None:
    """flash-attn's functions are dispatcher ops since 2.7.0: DTensor refuses them then, in other words."""
    versions = "2.5.9.post1,2.6.3,2.7.0.post2,2.7.3,2.8.0.post2,2.8.3.post2"
    selection = "operator=flash_attn_func, placement=heads, direction=forward, setting=causal"
    # flash-attn itself comes from the index.
    done = attncheck(
        "matrix", "--torch", TORCH, "--flash-attn", versions, "--find-links", str(wheels),
        "--bisect", selection, "-o", "json:matrix.json", cache=home,
    )  # fmt: skip
    made = document(home)
    assert made.bisection is not None, done.stderr
    assert (made.bisection.before, made.bisection.after) == ("2.6.3", "2.7.0.post2")
    assert len(made.bisection.tried) <= 5
    assert {turn.after.value for turn in made.bisection.turns} == {"missing_strategy"}
