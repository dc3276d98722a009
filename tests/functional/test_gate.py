"""A pull request that bumps a version, as a gate sees it: a baseline before, real scans before and after."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from attncheck.cli import main

PROBE = str(Path(__file__).parent / "gate_probe.py")
# Many sets of values: a rounding that grew within its bound is told from noise by medians.
MANY = ("--repeats", "12")
SCAN = ("--probe", PROBE, "--operator", "gated.*", *MANY)


def attncheck(
    *arguments: str, folder: Path, state: str, gone: str = ""
) -> subprocess.CompletedProcess[str]:
    """In a process of its own: what the ops' strategies are is decided when they are imported."""
    environment = {**os.environ, "ATTNCHECK_GATE_DEMO": state, "ATTNCHECK_GATE_DEMO_GONE": gone}
    return subprocess.run(
        [sys.executable, "-m", "attncheck", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that knows what it lives with: one op without a strategy, one that gathers."""
    folder = tmp_path_factory.mktemp("project")
    scanned = attncheck("scan", *SCAN, "-o", "json:before.json", folder=folder, state="before")
    assert scanned.returncode == 1, scanned.stderr
    written = attncheck("baseline", "write", "--from", "before.json", folder=folder, state="before")
    assert written.returncode == 0, written.stderr
    return folder


@pytest.fixture(scope="module")
def bumped(project: Path) -> subprocess.CompletedProcess[str]:
    outputs = [f"--output={form}" for form in ("table", "json:after.json")]
    return attncheck("gate", *SCAN, *outputs, folder=project, state="after")


@pytest.fixture
def run(project: Path, bumped: object, monkeypatch: pytest.MonkeyPatch):
    """A command on what is saved: runs nothing."""
    monkeypatch.chdir(project)

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(main, arguments)

    return call


def changes(project: Path) -> dict[str, str]:
    """Kind of change by operator."""
    comparison = json.loads((project / "after.json").read_text())["comparison"]
    return {change["case"].split("/")[1]: change["kind"] for change in comparison["changes"]}


def test_each_change_is_told_apart(project: Path, bumped: subprocess.CompletedProcess[str]) -> None:
    assert bumped.returncode == 1, bumped.stderr
    assert changes(project) == {
        "gated.unheard_of": "new",
        "gated.unregistered": "worse",
        "gated.made_wrong": "worse",
        "gated.rounding": "drifted",
        "gated.gathering": "costlier",
        "gated.mended": "fixed",
    }  # and gated.same is not there: it did not change


def test_the_screen_says_it_all(bumped: subprocess.CompletedProcess[str]) -> None:
    lines = bumped.stdout.splitlines()
    assert (
        lines[0]
        == lines[-1]
        == ("The gate fails: 1 new, 2 worse, 1 drifted, 1 costlier. Exit code 1.")
    )
    text = " ".join(bumped.stdout.split())
    for said in (
        "gated.unheard_of not there -> missing strategy (ATN101)",
        "gated.unregistered supported -> missing strategy (ATN101)",
        "gated.made_wrong redistributed -> wrong (ATN201)",
        "2304 -> 4608 bytes a rank (2 times)",
        "gated.mended missing strategy -> supported (ATN101)",
        "attncheck fix --from report.json --kernel-op 'gated.unregistered.default'",
    ):
        assert said in text


def test_nothing_changed_passes(project: Path) -> None:
    """The healthy twin, run for real with other values: the same strategies fail no gate."""
    done = attncheck("gate", *SCAN, "--strict", "--seed", "4", folder=project, state="before")
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[0].startswith("The gate passes")


def test_a_case_that_cannot_be_run_is_no_pass(project: Path) -> None:
    only = ("--operator", "gated.same")
    done = attncheck("gate", *SCAN[:2], *only, *MANY, folder=project, state="before", gone="yes")
    assert done.returncode == 3, done.stdout
    assert "Nothing ran" in done.stdout


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ((), 1),
        (("--allow", "new", "--allow", "worse", "--allow", "drifted"), 1),
        (("--allow", "new", "--allow", "worse", "--allow", "costlier"), 1),
        (("--allow", "new", "--allow", "drifted", "--allow", "costlier"), 1),
        (("--allow", "worse", "--allow", "drifted", "--allow", "costlier"), 1),
        ([f"--allow={kind}" for kind in ("new", "worse", "drifted", "costlier")], 0),
        ([f"--allow={kind}" for kind in ("new", "worse", "drifted", "costlier")] + ["--strict"], 1),
        (("--fail-on", "never", "--allow=worse", "--allow=drifted", "--allow=costlier"), 0),
    ],
)
def test_each_kind_can_be_switched_off(run, options: tuple[str, ...], code: int) -> None:
    done = run("gate", "--from", "after.json", *options)
    assert done.exit_code == code, done.output


def test_what_is_written_down_passes(run, tmp_path: Path) -> None:
    """Accepted for now: the same gate passes, and fails again once the date has passed."""
    baseline = tmp_path / "b.json"
    baseline.write_text(Path("attncheck-baseline.json").read_text())
    where = ("--baseline", str(baseline), "--from", "after.json")
    assert run("baseline", "write", *where).exit_code == 0
    assert run("gate", *where, "--strict").exit_code == 0

    lines = baseline.read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if "gated.unregistered" in line)
    for until, code in (("2999-12-31", 0), ("2020-01-01", 1)):
        accepted = f', "reason": "vendor ticket 7", "until": "{until}"}}'
        edited = [*lines[:at], lines[at].replace("}", accepted), *lines[at + 1 :]]
        baseline.write_text("".join(edited))
        done = run("gate", *where)
        assert done.exit_code == code, done.output
        assert "accepted: vendor ticket 7" in done.output
        assert ("which has passed" in done.output) == (code == 1)
        # People's words outlive a rewrite.
        assert run("baseline", "write", *where).exit_code == 0
        assert baseline.read_text() == "".join(edited)


def test_prune_removes_what_is_stale_and_nothing_else(run, tmp_path: Path) -> None:
    baseline = tmp_path / "b.json"
    before = Path("attncheck-baseline.json").read_text()
    baseline.write_text(before)
    assert (
        run("baseline", "prune", "--baseline", str(baseline), "--from", "after.json").exit_code == 0
    )
    old, new = (set(text.splitlines()) for text in (before, baseline.read_text()))
    removed = {json.loads(line.rstrip(","))["operator"] for line in old - new}
    assert removed == {"gated.mended", "gated.made_wrong"}  # the gathering of the latter is gone
    done = run("baseline", "show", "--baseline", str(baseline))
    assert done.exit_code == 0
    assert "6 cases, 6 entries" in done.output


def test_diff_says_the_same_of_two_reports(run) -> None:
    done = run("diff", "before.json", "after.json")
    assert done.exit_code == 0
    counts = "1 new, 2 worse, 1 drifted, 1 costlier, 1 fixed, 1 unchanged"
    assert " ".join(done.output.split()).startswith(f"Against before.json: {counts}.")
    assert run("diff", "before.json", "after.json", "--exit-code").exit_code == 1
    same = run("diff", "before.json", "before.json", "--exit-code")
    assert (same.exit_code, same.output.splitlines()[0]) == (0, "Nothing changed.")
