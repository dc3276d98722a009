"""The eye for ranks that can never meet again: what two state files say, and for how long."""

from __future__ import annotations

from pathlib import Path

import pytest

from attncheck.runner.observe import RankDoing, StateFile
from attncheck.runner.rundir import RunDir
from attncheck.runner.watchdog import GRACE_SECONDS, Deadline, Watchdog

LONG = max(GRACE_SECONDS.values())


def doing(what: str, op: str = "op", collectives: int = 1, case: int = 3) -> RankDoing:
    return RankDoing(case, what, collectives, op)


@pytest.mark.parametrize(
    ("mine", "peer", "unmoved", "why"),
    [
        (doing("collective"), doing("done"), GRACE_SECONDS["collective"], "peer_left"),
        (doing("collective"), doing("done"), GRACE_SECONDS["collective"] - 0.1, None),
        # In the second call a rank may be computing: it gets longer, then its peer is looked at.
        (doing("again"), doing("done"), GRACE_SECONDS["collective"], None),
        (doing("again"), doing("done"), GRACE_SECONDS["again"], "peer_left"),
        (doing("again"), doing("again"), LONG, None),
        (doing("again"), doing("collective"), LONG, None),
        (doing("op"), doing("done"), LONG, None),
        (doing("collective", "a"), doing("collective", "b"), LONG, "mismatch"),
        (doing("collective", "a"), doing("collective", "a", 2), LONG, "mismatch"),
        (doing("collective", "a"), doing("collective", "a"), LONG, None),
        (doing("collective"), doing("done", case=2), LONG, None),
    ],
)
def test_when_a_rank_gives_up(
    tmp_path: Path, mine: RankDoing, peer: RankDoing, unmoved: float, why: str | None
) -> None:
    watchdog = Watchdog(RunDir(tmp_path), 0, 2, StateFile(tmp_path / "rank0.state"), timeout=180.0)
    assert watchdog._judge(Deadline(3, 100.0), 150.0, [mine, peer], unmoved) == why


def test_the_deadline_holds_whatever_ranks_do(tmp_path: Path) -> None:
    watchdog = Watchdog(RunDir(tmp_path), 0, 2, StateFile(tmp_path / "rank0.state"), timeout=180.0)
    both = [doing("op"), doing("op")]
    assert watchdog._judge(Deadline(3, 100.0), 281.0, both, 0.0) == "deadline"
    assert watchdog._judge(Deadline(3, 100.0), 279.0, both, 500.0) is None
