"""The README is run: every command it shows, with the arguments it shows."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch_here

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


LINES = [line for block in blocks("shell") for line in block.splitlines() if line.strip()]
INSTALLS = [line for line in LINES if line.startswith("python3 -m venv")]
COMMANDS = [line for line in LINES if line.startswith("attncheck ")]
MAIN_JOB = INSTALLS[0].rpartition(".venv/bin/")[2]

# Exit 1 is a finding: the README shows scans that have some.
EXITS = {"scan": {0, 1}, "audit": {0, 1}, "hunt": {0, 1}, "fix": {0}, "matrix": {2, 3}}
# A hunt takes the minutes it is given; what it finds in fewer is not for a README to promise.
# Nor has every operator of a package to be mended to see that the command does it.
# Matrices would install gigabytes: with nothing to install from, each says of every version that it cannot;
# test_matrix.py runs one.
SHORTER = {
    "hunt": ("--minutes", "0.6"),
    "fix": ("--operator", "flash_attn_func"),
    "matrix": ("--no-index", "--find-links", ".", "--operator", "fallback.matmul"),
}
# The second scans with what the first wrote; test_fix.py does both with a smaller op in every run.
# Of scans the default run has the main job above, the one that the commands after it report on, and those
# of test_known_verdicts.py (sdpa), test_gate.py (repeats), test_engines.py (simulated) and test_cli.py, which
# also lists kernel ops.
SLOW = (
    "attncheck scan --level quick",
    "attncheck scan --operator 'sdpa*'",
    "attncheck scan --operator fallback.matmul",
    "attncheck list --kernel-ops",
    "attncheck hunt",
    "attncheck fix",
    "attncheck scan --with flash-attn --operator",
    "attncheck report report.json --format markdown --for",
    "attncheck matrix --torch 2.9.1,2.15.0 --bisect",
)


def run(line: str, folder: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    arguments = [*shlex.split(line)[1:], *extra]
    return subprocess.run(
        [sys.executable, "-m", "attncheck", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "COLUMNS": "100"},
    )


def test_the_two_commands_are_single_lines_and_ci_runs_the_second() -> None:
    assert len(INSTALLS) == 2
    assert MAIN_JOB == "attncheck scan --with flash-attn"
    steps = (ROOT / ".ci" / "run").read_text()
    for step in INSTALLS[1].split(" && ")[1:]:
        words = step.replace("pip install", "pip install --quiet --disable-pip-version-check")
        assert words in steps


def test_the_command_for_another_torch() -> None:
    """`test` is what `dev` has, and pins no torch; the versions are those that were run."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert extras["dev"] == ["torch==2.13.0", "attncheck[test]"]
    assert not [one for one in extras["test"] if one.startswith("torch")]
    *older, newest = torch_here.RUN_WITH
    assert f"pass with torch {', '.join(older)} and {newest}, and know what these do" in README
    assert (
        "other/bin/pip install -e '.[test]' && other/bin/python -m pytest tests/functional"
        in README
    )


def test_main_job(tmp_path: Path) -> None:
    """The first command's arguments, narrowed to flash-attn: the whole default scan takes minutes."""
    narrowed = ["--operator", "flash_attn_func", "--level", "quick", "--output", "json:r.json"]
    done = run(MAIN_JOB, tmp_path, *narrowed)
    assert done.returncode == 1, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["summary"] == {"missing_strategy": 12}
    assert report["environment"]["standins"]
    assert {f["kernel_op"] for f in report["findings"]} == {
        "flash_attn._flash_attn_forward.default",
        "flash_attn._flash_attn_backward.default",
    } | torch_here.FLASH_ATTN_VIEWS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the files that it shows."""
    made = tmp_path_factory.mktemp("readme")
    for block in blocks("python"):
        if name := re.match(r"# (\w+\.py)\n", block):
            (made / name[1]).write_text(block)
    return made


def marks(line: str) -> list[pytest.MarkDecorator]:
    found = [pytest.mark.slow] if line.startswith(SLOW) else []
    if "--engine simulated" in line:
        found += [pytest.mark.skipif(torch_here.before("2.10"), reason=torch_here.NO_SIMULATION)]
    return found


@pytest.mark.parametrize("line", [pytest.param(line, marks=marks(line)) for line in COMMANDS])
def test_command(line: str, folder: Path) -> None:
    """In the order of the README: `report` reads what the scan before it wrote."""
    done = run(line, folder, *SHORTER.get(line.split()[1], ()))
    assert done.returncode in EXITS.get(line.split()[1], {0}), done.stderr
    if line.startswith("attncheck matrix"):
        for version in re.findall(r"2\.\d+\.\d+(?=[ ,])", line.partition("--torch")[2]):
            assert f"Cannot install torch {version}" in done.stderr
    assert done.stdout or "wrote" in done.stderr


def test_what_it_scans_is_there() -> None:
    """A new probe need not touch the README; one that it names must exist."""
    from attncheck import plugins

    section = README.partition("## What it scans")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|", section, re.M)
    assert len(rows) > 10
    assert set(rows) <= {probe.name for probe in plugins.load_probes([]).probes}


def test_configuration(folder: Path) -> None:
    from attncheck import config

    (table,) = blocks("toml")
    (folder / "pyproject.toml").write_text(table)
    assert config.parse(folder / "pyproject.toml")["level"] == "quick"
    (folder / "pyproject.toml").unlink()


def test_counts_are_true() -> None:
    """Lower bounds for what grows with every probe, so that a new one need not touch the README."""
    from attncheck import plugins
    from attncheck.plan import Selection, plan

    probes = plugins.load_probes([]).probes
    promised = re.search(r"`--level quick` has (\d+) cases, `default` more than (\d+)", README)
    assert promised
    quick, default = (
        len(plan(probes, {"tp": 2}, Selection(level=x))) for x in ("quick", "default")
    )
    assert quick == int(promised[1])
    assert default > int(promised[2])
