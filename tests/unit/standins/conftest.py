"""The real flash-attn's Python part, provisioned into the user's cache as `scan --with` does it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from attncheck import provision

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def run_with_flash_attn() -> Callable[[str, Path], str]:
    """`run(version, script)`: the script's stdout, in a process of its own with that flash-attn."""

    def run(version: str, script: Path) -> str:
        folder = provision.ensure(provision.parse(f"flash-attn=={version}"), log=print)
        result = subprocess.run(
            [sys.executable, str(script)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)])},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-4000:]
        return result.stdout

    return run
