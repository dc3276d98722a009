"""The per-case deadline, and a faster eye for ranks that can never meet again.

A thread in every rank. It ends the process (torchrun then restarts all ranks, and the journal says where
to go on) when
  - the case has run longer than its deadline;
  - this rank waits in a collective that a peer will never join, because the peer has left the case;
    in the second call, which nothing watches from inside, it may also be computing: it gets longer;
  - all ranks wait, unmoved, in different collectives;
  - a peer's process has ended in the middle of the case, and torchrun took it for a success (exit code 0).
A stuck process that holds the GIL is ended by faulthandler instead (see worker).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from dataclasses import dataclass

from attncheck.runner.observe import RankDoing, StateFile, is_gone, read_state
from attncheck.runner.rundir import RunDir

# How long a rank may stand still, by what it is doing, before its peers are looked at.
GRACE_SECONDS = {"collective": 4.0, "again": 8.0}
# How long a peer may be gone before this rank speaks: torchrun itself ends all of them for any other death.
GONE_SECONDS = 2.0
TICK_SECONDS = 0.5
EXIT_STUCK = 75  # EX_TEMPFAIL: "try again", which is what torchrun does


@dataclass
class Deadline:
    """The running case and when it began (monotonic seconds); -1 between cases."""

    case: int = -1
    began: float = 0.0


class Watchdog(threading.Thread):
    def __init__(
        self, run: RunDir, rank: int, ranks: int, state: StateFile, timeout: float
    ) -> None:
        super().__init__(name="attncheck-watchdog", daemon=True)
        self.run_dir = run
        self.rank = rank
        self.ranks = ranks
        self.state = state
        self.timeout = timeout
        self.deadline = Deadline()
        self.parent = os.getppid()
        self.main_thread = threading.main_thread().ident

    def begin(self, case: int) -> None:
        self.deadline = Deadline(case, time.monotonic())

    def end(self) -> None:
        self.deadline = Deadline()

    def run(self) -> None:
        unmoved_since = time.monotonic()
        last: list[RankDoing] = []
        gone_since: dict[int, float] = {}
        while True:
            time.sleep(TICK_SECONDS)
            if os.getppid() != self.parent:
                os._exit(1)  # torchrun is gone: nobody would ever collect this process
            deadline, now = self.deadline, time.monotonic()
            if deadline.case < 0:
                continue
            doing = [read_state(self.run_dir.state(r)) for r in range(self.ranks)]
            if doing != last:
                unmoved_since, last = now, doing
            why = self._judge(deadline, now, doing, now - unmoved_since)
            gone_since = {r: gone_since.get(r, now) for r in self._gone(deadline, doing)}
            gone = [r for r, since in gone_since.items() if now - since > GONE_SECONDS]
            if gone:
                why = "peer_gone"
            if why:
                self._give_up(why, deadline, doing, gone)

    def _gone(self, deadline: Deadline, doing: list[RankDoing]) -> list[int]:
        """Peers that came to this case, have not finished it, and are no more."""
        return [
            rank
            for rank, peer in enumerate(doing)
            if rank != self.rank
            and peer.case == deadline.case
            and peer.doing != "done"
            and is_gone(self.run_dir.state(rank))
        ]

    def _judge(
        self, deadline: Deadline, now: float, doing: list[RankDoing], unmoved: float
    ) -> str | None:
        if now - deadline.began > self.timeout:
            return "deadline"
        mine = doing[self.rank]
        grace = GRACE_SECONDS.get(mine.doing)
        if grace is None or mine.case != deadline.case or unmoved < grace:
            return None
        peers = [d for r, d in enumerate(doing) if r != self.rank]
        if any(p.case == mine.case and p.doing == "done" for p in peers):
            return "peer_left"
        together = (mine, *peers)
        waiting = all(p.case == mine.case and p.doing == "collective" for p in together)
        if waiting and any((p.op, p.collectives) != (mine.op, mine.collectives) for p in peers):
            return "mismatch"
        return None

    def _give_up(
        self, why: str, deadline: Deadline, doing: list[RankDoing], gone: list[int]
    ) -> None:
        frame = sys._current_frames().get(self.main_thread or 0)
        stack = traceback.format_stack(frame)[-6:] if frame else []
        record = {
            "case": deadline.case,
            "why": why,
            "rank": self.rank,
            "gone": gone,
            "seconds": round(time.monotonic() - deadline.began, 1),
            "ranks": [{"doing": d.doing, "op": d.op, "collectives": d.collectives} for d in doing],
            "stack": stack,
        }
        # Every rank may give up at once; the first to create the file tells the story.
        try:
            fd = os.open(self.run_dir.stuck, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            os.write(fd, json.dumps(record).encode())
            os.fsync(fd)
        except OSError:
            pass
        os._exit(EXIT_STUCK)
