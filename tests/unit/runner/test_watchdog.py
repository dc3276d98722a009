"""The eye for ranks that can never meet again: what two state files say, and for how long."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from attncheck.runner.observe import RankDoing, StateFile, is_gone
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


def test_a_peer_that_ended_in_the_middle_of_the_case_is_gone(tmp_path: Path) -> None:
    """Its state file was locked as long as it lived, whatever it died of."""
    code = (
        "import sys; from pathlib import Path; from attncheck.runner.observe import StateFile\n"
        "state = StateFile(Path(sys.argv[1])); state.case = 3; state.set('op', 'aten.bmm.default')\n"
        "print('up', flush=True); sys.stdin.read()"
    )
    path = tmp_path / "rank1.state"
    peer = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    watchdog = Watchdog(RunDir(tmp_path), 0, 2, StateFile(tmp_path / "rank0.state"), timeout=180.0)
    both = [doing("done"), doing("op")]
    with peer:
        assert peer.stdout is not None
        assert peer.stdout.readline() == b"up\n"
        assert not is_gone(path)
        assert watchdog._gone(Deadline(3), both) == []
        peer.communicate(b"")
    assert is_gone(path)
    assert watchdog._gone(Deadline(3), both) == [1]
    assert watchdog._gone(Deadline(3), [doing("done"), doing("done")]) == []
    assert watchdog._gone(Deadline(4), both) == []
