"""What a matrix costs whose environments are there: beside a scan of the same cases, and beside bare Python.

It starts its first case hardly later than a scan does, and no worker at all where nothing has changed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stub_wheels

CASES = ("-k", "fallback.matmul", "-k", "fallback.einsum", "--level", "quick", "--seed", "0")
# Of an idle machine's 12 ms for `python -c pass`, 3 seconds.
REUSED = 250
# A scan imports torch once in each rank; so does a cell.
LATER = 3


def run(folder: Path, *arguments: str) -> tuple[float, float, str]:
    """Wall seconds, CPU seconds and what was said on stderr."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "ATTNCHECK_CACHE": str(folder / "cache"),
            "PATH": "/usr/bin:/bin",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_FIND_LINKS": "",
        },
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode in (0, 1), said
    return time.perf_counter() - began, used.ru_utime + used.ru_stime, said


@pytest.mark.slow
def test_a_second_run_starts_no_worker_and_the_first_starts_like_a_scan(tmp_path: Path) -> None:
    wheels = stub_wheels.wheelhouse(tmp_path / "wheels")
    torch = stub_wheels.torch_here()
    matrix = (
        "-m", "attncheck", "matrix", "--torch", torch, "--no-index", "--find-links", str(wheels),
    )  # fmt: skip
    run(tmp_path, *matrix, *CASES, "--placement", "replicate")  # makes the environment
    out = ("-o", "json:out.json")
    scanned, _, _ = run(tmp_path, "-m", "attncheck", "scan", *CASES, *out)
    scan = json.loads((tmp_path / "out.json").read_text())["environment"]["phases"]
    _, _, said = run(tmp_path, *matrix, *CASES, "--placement", "heads", *out)
    (cell,) = json.loads((tmp_path / "out.json").read_text())["cells"]
    first = cell["environment"]["phases"]["first_outcome_after"] / scan["first_outcome_after"]
    assert "known before" in said
    _, bare, _ = min(run(tmp_path, "-c", "pass") for _ in range(5))
    _, again, said = run(tmp_path, *matrix, *CASES, "--placement", "heads", *out)
    assert "0 cases to run" in said
    print(
        f"first outcome {first:.2f} times as late as a scan's; nothing changed: {again * 1e3:.0f} ms of CPU, "
        f"{again / bare:.0f} times python -c pass (a scan took {scanned:.1f} s)"
    )
    assert first < LATER
    assert again < REUSED * bare
