"""The real command in a process of its own, and what its JSON report holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

# By operator, setting, placement and direction.
Outcomes = dict[tuple[str, str, str, str], dict[str, Any]]


def scan(
    folder: Path, *arguments: str, codes: Collection[int] = (1,), **environment: str
) -> dict[str, Any]:
    """The report of `attncheck scan` in this folder, which has to exit with one of these codes."""
    return scan_and_stderr(folder, *arguments, codes=codes, **environment)[0]


def scan_and_stderr(
    folder: Path, *arguments: str, codes: Collection[int] = (1,), **environment: str
) -> tuple[dict[str, Any], str]:
    """As `scan`, with what the command said on stderr."""
    target = folder / "r.json"
    command = [sys.executable, "-m", "attncheck", "scan", "--seed", "4", *arguments]
    done = subprocess.run(
        [*command, "--output", f"json:{target}"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode in codes, done.stderr
    return json.loads(target.read_text()), done.stderr


def outcomes(report: dict[str, Any], prefix: str = "") -> Outcomes:
    """By operator (without the prefix), setting, placement and direction."""
    return {
        (
            case["operator"].removeprefix(prefix),
            case["setting"]["name"],
            case["placement"],
            case["direction"],
        ): case["outcome"]
        for case in report["cases"]
    }
