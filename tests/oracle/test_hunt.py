"""Does a hunt find what is planted in corners, at its smallest, and nothing in the healthy twin?"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attncheck import environment

PROBE = Path(__file__).with_name("hunt_probe.py")
ENGINE = "simulated" if environment.simulates_ranks() else "processes"


SMALLEST = {
    "batch": 1, "heads": 1, "kv_heads": 1, "sequence": 1, "kv_sequence": 2, "head_dim": 8,
}  # fmt: skip


def attncheck(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "attncheck", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=folder)


def hunt(
    folder: Path, names: list[str], examples: int, engine: str = ENGINE
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """What it printed, and the report of what it found."""
    done = attncheck(
        folder, "hunt", "--probe", str(PROBE), "--minutes", "12", "--examples", str(examples),
        "--engine", engine, "--seed", "7", "--save", "found", "-q", "-v", "-o", "json:report.json",
        *(word for name in names for word in ("-k", f"corner.{name}")),
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    document: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return done, document


def test_finds_it_at_its_smallest_and_nothing_in_the_twin(tmp_path: Path) -> None:
    done, report = hunt(tmp_path, ["scattered_keys", "nowhere"], 50)
    assert done.returncode == 1
    assert "1 distinct find," in done.stdout
    (case,) = report["cases"]  # and none of the healthy twin
    assert case["operator"].startswith("hunted.corner.scattered_keys.wrong")
    assert case["outcome"]["status"] == "wrong"
    # In a dim of 1 any stride is contiguous, and `transposed` needs two others above that.
    assert case["setting"] == {"name": "hunted", "dtype": "float32", "memory": "sliced", **SMALLEST}
    assert (case["mesh"], case["placement"]) == ({"tp": 1}, "replicate")
    assert case["direction"] == "forward"

    # The report of the finds is one like any other.
    rendered = attncheck(tmp_path, "report", "report.json")
    assert rendered.returncode == 0
    assert "ATN201" in rendered.stdout


@pytest.mark.slow
def test_finds_two_corners_and_saves_what_shows_them_again(tmp_path: Path) -> None:
    names = ["odd_keys_on_three_ranks", "scattered_keys", "nowhere"]
    done, report = hunt(tmp_path, names, 800)
    assert "2 distinct finds," in done.stdout
    by_name = {c["operator"].split(".")[2]: c for c in report["cases"]}
    assert by_name.keys() == {"odd_keys_on_three_ranks", "scattered_keys"}
    odd = by_name["odd_keys_on_three_ranks"]
    assert odd["outcome"]["status"] == "wrong"
    assert odd["setting"]["sequence"] == odd["setting"]["kv_sequence"] == 3
    assert odd["setting"]["batch"] == odd["setting"]["heads"] == 1
    assert (odd["mesh"], odd["placement"], odd["direction"]) == ({"tp": 3}, "replicate", "forward")

    # The line that the hunt prints runs the saved file, with the same verdict.
    line = next(x for x in done.stdout.splitlines() if "run  " in x and "odd_keys" in x)
    words = shlex.split(line.strip().removeprefix("run "))
    again = attncheck(tmp_path, *words[1:], "-q", "-o", "json:again.json")
    assert again.returncode == 1
    (same,) = json.loads((tmp_path / "again.json").read_text())["cases"]
    assert same["id"] == odd["id"]
    assert same["outcome"]["status"] == "wrong"


@pytest.mark.slow
@pytest.mark.parametrize("engine", sorted({"processes", ENGINE}))
def test_survives_what_ends_the_process_and_shrinks_it(tmp_path: Path, engine: str) -> None:
    done, report = hunt(tmp_path, ["dies_on_an_empty_shard", "nowhere"], 150, engine)
    assert done.returncode == 1
    (case,) = report["cases"]
    assert case["outcome"]["status"] == "crash"
    assert "Segmentation fault" in case["outcome"]["message"]
    assert case["mesh"] == {"tp": 2}
    assert case["setting"]["batch"] == 1
    assert case["placement"] == "batch"


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    for arguments, words in (
        (["-k", "sdpq"], "Unknown operator 'sdpq'"),
        (["--minutes", "0"], "--minutes is 0"),
        (["--engine", "quantum"], "Unknown engine 'quantum'"),
        (["--probe", "no.py"], "Probe file no.py does not exist"),
        (["-o", "jsn:x"], "Unknown format 'jsn'"),
    ):
        done = attncheck(tmp_path, "hunt", *arguments)
        assert done.returncode == 2, arguments
        assert words.lower() in done.stderr.lower()
        told = [x for x in done.stderr.splitlines() if "running the code of" not in x]
        assert len(told) == 1


@pytest.mark.slow
def test_interrupted_it_keeps_what_it_found_and_leaves_nothing_running(tmp_path: Path) -> None:
    import os
    import signal
    import time

    command = [
        sys.executable, "-m", "attncheck", "hunt", "--probe", str(PROBE), "--minutes", "10",
        "-k", "corner.scattered_keys", "--engine", ENGINE, "--seed", "7", "--save", "found",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    ended_by = time.monotonic() + 300
    while not list(tmp_path.glob("found/*.py")) and time.monotonic() < ended_by:
        time.sleep(0.2)
    children = _children(process.pid)
    assert children
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "examples in" in out
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def _children(pid: int) -> list[int]:
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
    )
    return [int(word) for word in listed.stdout.split()]
