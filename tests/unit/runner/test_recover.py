"""What is said of a case whose workers died, from each kind of remains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attncheck.model import Status
from attncheck.runner.observe import StateFile
from attncheck.runner.recover import outcome_of_dead_case
from attncheck.runner.rundir import RunConfig, RunDir

CONFIG = RunConfig(
    seed=1, mesh={"tp": 2}, device="cpu", case_timeout=30, hash_seeds=(6, 7), probe_files=()
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    for rank, op in enumerate(("all_gather in aten.bmm.default", "flash_attn.fwd.default")):
        state = StateFile(run.state(rank))
        state.case = 4
        state.set("op", op)
    return run


def dead(run: RunDir, case: int = 4):  # type: ignore[no-untyped-def]
    return outcome_of_dead_case(run, CONFIG, case, "now")


def test_a_segfault_names_rank_signal_and_op(run: RunDir) -> None:
    run.fault(1, "before").write_text("Fatal Python error: Segmentation fault\n\nStack ...\n")
    outcome = dead(run)
    assert outcome.status is Status.CRASH
    assert "rank 1: Segmentation fault" in outcome.message
    assert outcome.kernel_op == "flash_attn.fwd.default"
    assert [r.last_op for r in outcome.ranks] == [
        "all_gather in aten.bmm.default",
        "flash_attn.fwd.default",
    ]
    assert not list(run.path.glob("*.fault"))


def test_no_last_words(run: RunDir) -> None:
    outcome = dead(run)
    assert outcome.status is Status.CRASH
    assert "without last words" in outcome.message
    assert outcome.kernel_op == "aten.bmm.default"


def test_faulthandlers_deadline_is_a_hang(run: RunDir) -> None:
    run.fault(0, "before").write_text("Timeout (0:00:45)!\nThread 0x1 (most recent call first):\n")
    assert dead(run).status is Status.HANG


def test_remains_of_this_attempt_are_left_alone(run: RunDir) -> None:
    run.fault(0, "now").write_text("Fatal Python error: Aborted\n")
    assert "without last words" in dead(run).message
    assert run.fault(0, "now").exists()


@pytest.mark.parametrize(
    ("why", "status"),
    [("deadline", Status.HANG), ("peer_left", Status.DIVERGED), ("mismatch", Status.DIVERGED)],
)
def test_who_gave_up_and_why(run: RunDir, why: str, status: Status) -> None:
    ranks = [
        {"doing": "collective", "op": "all_gather in aten.bmm.default", "collectives": 2},
        {"doing": "done", "op": "aten.view.default", "collectives": 1},
    ]
    record = {"case": 4, "why": why, "rank": 0, "seconds": 5.0, "ranks": ranks, "stack": []}
    run.stuck.write_text(json.dumps(record))
    outcome = dead(run)
    assert outcome.status is status
    assert "all_gather" in outcome.message
    assert outcome.kernel_op == "aten.bmm.default"
    assert not run.stuck.exists()


def test_a_rank_that_left_with_exit_code_0_is_a_crash_in_what_it_was_doing(run: RunDir) -> None:
    ranks = [
        {"doing": "done", "op": "aten.view.default", "collectives": 1},
        {"doing": "op", "op": "flash_attn.fwd.default", "collectives": 1},
    ]
    record = {"case": 4, "why": "peer_gone", "rank": 0, "gone": [1], "seconds": 5.0, "ranks": ranks}
    run.stuck.write_text(json.dumps(record))
    outcome = dead(run)
    assert outcome.status is Status.CRASH
    assert "rank 1 left in the middle of the case with exit code 0" in outcome.message
    assert outcome.kernel_op == "flash_attn.fwd.default"


def test_a_hang_names_what_the_rank_does_that_is_still_in_the_case(run: RunDir) -> None:
    ranks = [
        {"doing": "done", "op": "aten.view.default", "collectives": 1},
        {"doing": "op", "op": "flash_attn.fwd.default", "collectives": 1},
    ]
    record = {"case": 4, "why": "deadline", "rank": 0, "seconds": 5.0, "ranks": ranks}
    run.stuck.write_text(json.dumps(record))
    assert dead(run).kernel_op == "flash_attn.fwd.default"


def test_what_the_rank_that_left_had_raised(run: RunDir) -> None:
    ranks = [
        {
            "doing": "done",
            "op": "RuntimeError: no 3 in 2 heads in aten.view.default",
            "collectives": 1,
        },
        {"doing": "collective", "op": "all_gather in aten.bmm.default", "collectives": 2},
    ]
    record = {"case": 4, "why": "peer_left", "rank": 1, "seconds": 5.0, "ranks": ranks, "stack": []}
    run.stuck.write_text(json.dumps(record))
    outcome = dead(run)
    assert "rank 0 (done) RuntimeError: no 3 in 2 heads in aten.view.default" in outcome.message
    assert outcome.kernel_op == "aten.view.default"


def test_a_story_about_another_case_is_not_told(run: RunDir) -> None:
    record = {"case": 3, "why": "deadline", "rank": 0, "seconds": 5.0, "ranks": [], "stack": []}
    run.stuck.write_text(json.dumps(record))
    assert dead(run).status is Status.CRASH
