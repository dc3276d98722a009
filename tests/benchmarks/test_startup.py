"""What `attncheck --help` costs beside its floor: Python with click and nothing else, in the same run."""

from __future__ import annotations

import subprocess
import sys
import time


def best_of(command: list[str], runs: int = 7) -> float:
    """Seconds of the fastest run: noise only ever adds."""
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    return min(times)


def test_help_beside_bare_click() -> None:
    bare = best_of([sys.executable, "-c", "import click"])
    ours = best_of([sys.executable, "-m", "attncheck", "--help"])
    print(f"attncheck --help {ours / bare:.2f} times `python -c 'import click'`")
    assert ours < 2.5 * bare  # torch alone would be 40 times
