"""What is ignored by configuration, and shards, as a gate sees them: on saved reports, nothing is run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import sample_report
from click.testing import CliRunner

from attncheck import rules
from attncheck.cli import main
from attncheck.model import Outcome, Status, dump_report

CONFIG = """
[tool.attncheck]
ignore = [{{ rule = "ATN504", operator = "fallback.*", reason = "ticket 12", until = {until} }}]
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a project whose baseline knows everything but that an einsum raises now."""
    report = sample_report.sample()
    ran = [r for r in report.cases if r.outcome.status is not Status.UNKNOWN]
    was = [
        replace(r, outcome=Outcome(Status.SUPPORTED)) if r.outcome.status is Status.ERROR else r
        for r in ran
    ]
    for name, cases in (("before.json", was), ("after.json", ran)):
        judged = replace(report, cases=tuple(cases), findings=rules.judge(cases))
        (tmp_path / name).write_text(dump_report(judged))
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str):
        return CliRunner().invoke(main, arguments)

    assert call("baseline", "write", "--from", "before.json").exit_code == 0
    return call


def configure(until: str) -> None:
    Path("pyproject.toml").write_text(CONFIG.format(until=until))


def test_nothing_is_ignored_unasked(run) -> None:
    done = run("gate", "--from", "after.json")
    assert done.exit_code == 1
    assert "ATN504" in done.output


def test_what_is_ignored_fails_no_gate(run) -> None:
    configure("2999-01-01")
    done = run("gate", "--from", "after.json", "--output", "json:gated.json", "--output", "table")
    assert done.exit_code == 0, done.output
    assert "ignored (2 cases)" in done.output
    environment = json.loads(Path("gated.json").read_text())["environment"]
    (waiver,) = environment["ignored"]
    assert (waiver["reason"], waiver["cases"], waiver["state"]) == ("ticket 12", 2, "applied")


def test_after_its_day_it_counts_again(run) -> None:
    configure("2020-01-01")
    done = run("gate", "--from", "after.json")
    assert done.exit_code == 1
    # Also where the scan itself ignored it, in time: today's date decides.
    configure("2999-01-01")
    assert run("gate", "--from", "after.json", "--output", "json:then.json").exit_code == 0
    assert run("gate", "--from", "then.json").exit_code == 0
    configure("2020-01-01")
    assert run("gate", "--from", "then.json").exit_code == 1


def test_a_shard_alone_passes_no_gate(run) -> None:
    document = json.loads(Path("before.json").read_text())
    assert run("gate", "--from", "before.json").exit_code == 0
    document["environment"]["shard"] = {"index": 1, "of": 2}
    Path("part.json").write_text(json.dumps(document))
    done = run("gate", "--from", "part.json")
    assert done.exit_code == 3
    assert "one shard of a scan" in done.output
    # Nor does it prune what the other shards have.
    before = Path("attncheck-baseline.json").read_bytes()
    done = run("baseline", "prune", "--from", "part.json")
    assert done.exit_code == 2
    assert "one shard of a scan" in done.output
    assert Path("attncheck-baseline.json").read_bytes() == before
