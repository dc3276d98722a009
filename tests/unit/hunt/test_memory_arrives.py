"""Real processes and simulated ranks: the operator looks at the strides it is given, whole and local."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from attncheck import environment

PROBE = Path(__file__).with_name("memory_probe.py")
ENGINES = ["processes", *(["simulated"] if environment.simulates_ranks() else [])]


@pytest.mark.parametrize("engine", ENGINES)
def test_strides_arrive(engine: str, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    command = [
        sys.executable, "-m", "attncheck", "scan", "--probe", str(PROBE), "-k", "memory.*", "-q",
        "--engine", engine, "--direction", "backward", "--run-dir", str(tmp_path / "run"),
        "-o", f"json:{output}", "--seed", "1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cases = json.loads(output.read_text())["cases"]
    assert len(cases) == 8
    # A refusal on whole tensors would be `unavailable`, one on DTensors an `error`.
    assert {c["outcome"]["status"] for c in cases} == {"supported"}
    assert {c["setting"].get("memory", "contiguous") for c in cases} == {
        "contiguous", "transposed", "sliced", "expanded",
    }  # fmt: skip
