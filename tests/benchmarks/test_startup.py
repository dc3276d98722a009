"""What commands that run nothing cost, beside `python -c pass` in the same run.

They answer while somebody waits: at once, whatever torch costs to import. The bounds are ratios: on an idle
machine of two cores `--help` is 6 to 12 times `python -c pass`, the others 12 to 26; torch alone is over 100.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sample_report

from attncheck.model import dump_report

HELP, OTHERS, CHECK = 20, 40, 60


def best_of(command: list[str], folder: Path, runs: int = 7) -> float:
    """Seconds of CPU of the cheapest run: what runs beside it costs time, and noise only ever adds."""
    times = []
    for _ in range(runs):
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        times.append(used.ru_utime + used.ru_stime)
    return min(times)


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        (["--help"], HELP),
        (["explain", "ATN101"], OTHERS),
        (["report", "old.json"], OTHERS),
        (["diff", "old.json", "new.json"], OTHERS),
        # Reads the lists of files of every package that matters: 60 are 0.7 s.
        (["env", "--check"], CHECK),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_beside_bare_python(arguments: list[str], limit: float, tmp_path: Path) -> None:
    for name in ("old.json", "new.json"):
        (tmp_path / name).write_text(dump_report(sample_report.sample()))
    bare = best_of([sys.executable, "-c", "pass"], tmp_path)
    ours = best_of([sys.executable, "-m", "attncheck", *arguments], tmp_path)
    print(
        f"attncheck {' '.join(arguments)}: {ours * 1e3:.0f} ms, {ours / bare:.1f} times python -c pass"
    )
    assert ours < limit * bare
