"""The linters belong to the one test command: what CI passes is what everybody runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch_here import TORCH

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        pytest.param(
            ["mypy"],
            marks=pytest.mark.skipif(
                str(TORCH) != "2.13.0",
                reason="each torch is typed differently: mypy knows 2.13.0's",
            ),
        ),
        ["lint-imports"],
    ],
    ids=" ".join,
)
def test_linter(command: list[str]) -> None:
    tool = Path(sys.executable).with_name(command[0])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(tool), *command[1:]], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
