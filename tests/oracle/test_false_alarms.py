"""The command that counts false alarms: a sample of what it scans, and that it can fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import false_alarms
from false_alarms import Part

HERE = Path(__file__).parent
FALLBACK = ("deep.fallback.matmul", "deep.fallback.chunked_lse")
# Hand-written strategies: one for PyTorch's own op, one that reaches attncheck's stand-in.
STRATEGIES = ("deep.sdpa", "deep.sdpa_cuda.raw_flash")


def scan(part: Part, work: Path) -> dict[str, Any]:
    kept = false_alarms.run(part, work, resume=False, log=print)
    summary: dict[str, Any] = json.loads(kept.read_text())
    return summary


def sample(mesh: str, repeats: int, operators: tuple[str, ...]) -> Part:
    probe = (HERE / "verified_probe.py",)
    return Part("deep", mesh, probe, operators, repeats, 1, ("--direction", "backward"))


@pytest.mark.slow  # the healthy twins of test_mutants.py are the sample of every run
@pytest.mark.parametrize("mesh", ["2", "3"])
def test_no_alarm_on_a_sample(tmp_path: Path, mesh: str) -> None:
    summary = scan(sample(mesh, 3, FALLBACK + STRATEGIES), tmp_path)
    assert not summary["alarms"]
    assert sum(summary["statuses"].values()) == 3 * len(FALLBACK + STRATEGIES)  # dtypes
    found = false_alarms.merge([summary])
    assert [row["dtype"] for row in found["by_dtype_and_ranks"]] == list(false_alarms.DTYPES)
    assert all(row["largest"][-1] > 0 for row in found["by_dtype_and_ranks"])
    assert false_alarms.exit_code(found) == 0
    assert f" {3 * summary['repeats'] * 4} judgements" in false_alarms.headline(found)


def test_a_wrong_strategy_is_counted(tmp_path: Path) -> None:
    """What is planted in the place of a healthy operator is an alarm, and the command fails."""
    probe = (HERE / "planted_probe.py",)
    part = Part("twins", "2", probe, ("planted.healthy", "planted.wrong_result"), 2, 1)
    summary = scan(part, tmp_path)
    assert {alarm["status"] for alarm in summary["alarms"]} == {"wrong"}
    assert all("planted.wrong_result/" in alarm["case"] for alarm in summary["alarms"])
    found = false_alarms.merge([summary])
    assert false_alarms.exit_code(found) == 1
    assert "## Alarms" in false_alarms.markdown(found)


@pytest.mark.parametrize(
    ("mesh", "status", "message", "true"),
    [
        ("dp=2xtp=2", "error", "Cannot unflatten tensor with _StridedShard placement: ...", True),
        ("tp=2", "error", "Cannot unflatten tensor with _StridedShard placement: ...", False),
        ("dp=2xtp=2", "wrong", "Cannot unflatten tensor with _StridedShard placement: ...", False),
        ("dp=2xtp=2", "error", "something else", False),
    ],
)
def test_only_what_dtensor_refuses_in_words_is_no_alarm(
    mesh: str, status: str, message: str, true: bool
) -> None:
    case = f"verified/deep.x/plain/dtensor/{mesh}/heads,heads/backward"
    alarm = {"case": case, "status": status, "message": message}
    assert false_alarms.is_true(alarm) is true


def test_a_scan_that_judges_nothing_is_a_failure() -> None:
    empty = {"parts": [{"alarms": []}], "by_dtype_and_ranks": []}
    assert false_alarms.exit_code(empty) == 1


@pytest.mark.parametrize(
    ("status", "alarm"),
    [
        ("supported", False), ("redistributed", False), ("drift", False), ("wrong", True),
        ("missing_strategy", True), ("unknown", True), ("unavailable", True), ("crash", True),
    ],
)  # fmt: skip
def test_what_is_an_alarm(status: str, alarm: bool) -> None:
    assert false_alarms.is_alarm(status) is alarm


def test_every_operator_dtype_and_mesh_gets_all_seeds() -> None:
    parts = false_alarms.parts(50)
    for mesh in false_alarms.MESHES:
        deep = [p for p in parts if p.name == "deep" and p.mesh == mesh]
        # Three placements share the seeds on a mesh of two axes.
        assert sum(p.repeats for p in deep) >= (17 if "x" in mesh else 50)
        seeds = [seed for p in deep for seed in range(p.first, p.first + p.repeats)]
        assert len(seeds) == len(set(seeds))
        assert sum(p.repeats for p in parts if p.name == "wide" and p.mesh == mesh) == 5


def test_twins_run_where_they_say_they_are_right() -> None:
    _, on_two = false_alarms.twins("2")
    _, on_three = false_alarms.twins("3")
    assert "planted.healthy" in on_two
    assert "planted.healthy" not in on_three
    assert set(on_three) <= set(on_two)  # what is right on 3 ranks is right on 2


def test_quantiles_and_histogram() -> None:
    values = [n / 100 for n in range(100)]
    assert false_alarms.quantile(values, 0.5) == 0.49
    assert false_alarms.quantile(values, 1.0) == 0.99
    assert false_alarms.quantile([0.3], 0.5) == 0.3
    counts = false_alarms.histogram([0.0, 0.049, 0.05, 0.999, 1.0, 20.0])
    assert (counts[0], counts[1], counts[19], counts[20]) == (2, 1, 1, 2)


def test_write_block_replaces_what_is_between_the_markers(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"a\n{false_alarms.BEGIN}\nold\n{false_alarms.END}\nb\n")
    assert false_alarms.write_block(file, "new\\1")
    assert file.read_text() == f"a\n{false_alarms.BEGIN}\nnew\\1\n{false_alarms.END}\nb\n"
    file.write_text("nothing")
    assert not false_alarms.write_block(file, "new")


@pytest.mark.slow
def test_no_alarm_anywhere(tmp_path: Path) -> None:
    kept = [
        false_alarms.run(part, tmp_path, resume=False, log=print)
        for part in false_alarms.parts(10)
        if part.name != "wide" or part.mesh == "2"
    ]
    summaries: list[Mapping[str, Any]] = [json.loads(file.read_text()) for file in kept]
    found = false_alarms.merge(summaries)
    assert false_alarms.exit_code(found) == 0, false_alarms.markdown(found)
