"""What became of the case that was running when the workers died: read from what they left behind."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from attncheck.model import Outcome, RankState, Status
from attncheck.runner.observe import read_state
from attncheck.runner.rundir import RunConfig, RunDir

_FATAL = re.compile(r"Fatal Python error: (.+)")
_TIMEOUT = re.compile(r"^Timeout \(", re.MULTILINE)


def outcome_of_dead_case(run: RunDir, config: RunConfig, case: int, attempt: str) -> Outcome:
    """`crash`, `hang` or `diverged`, with each rank's last op. Removes what it has read."""
    stuck = _take_stuck(run, case)
    faults = _take_faults(run, config.workers, attempt)
    if stuck is not None:
        return _stuck_outcome(stuck, config)
    ranks = []
    busy = []
    for rank in range(config.workers):
        doing = read_state(run.state(rank))
        if doing.case == case and doing.doing != "done":
            busy.append(rank)
        last = doing.op if doing.case == case else ""
        ranks.append(
            RankState(rank, config.hash_seeds[rank], last, faults.get(rank, ""), doing.collectives)
        )
    if any(_TIMEOUT.search(text) for text in faults.values()):
        return Outcome(
            Status.HANG,
            f"no answer within {config.case_timeout:g} s, and Python itself was blocked",
            kernel_op=_op_name(_first_op(ranks, busy)),
            ranks=tuple(_brief(r) for r in ranks),
            seed=config.seed,
        )
    dead = [(r.rank, m[1]) for r in ranks if (m := _FATAL.search(r.exception))]
    if dead:
        who = "; ".join(f"rank {rank}: {what}" for rank, what in dead)
        op = ranks[dead[0][0]].last_op
        message = f"the process died inside {op or 'an unknown op'} ({who})"
    else:
        op = _first_op(ranks, busy)
        message = "a worker process died without last words (killed, or out of memory)"
    return Outcome(
        Status.CRASH,
        message,
        kernel_op=_op_name(op),
        ranks=tuple(_brief(r) for r in ranks),
        seed=config.seed,
    )


def _stuck_outcome(stuck: dict[str, Any], config: RunConfig) -> Outcome:
    ranks = tuple(
        RankState(
            rank, config.hash_seeds[rank], entry["op"], f"({entry['doing']})", entry["collectives"]
        )
        for rank, entry in enumerate(stuck["ranks"])
    )
    where = "; ".join(f"rank {r.rank} {r.exception} {r.last_op}" for r in ranks)
    seconds = stuck["seconds"]
    done = [entry["doing"] == "done" for entry in stuck["ranks"]]
    # Who left with an exception is why the others wait; a rank that finished is not.
    raised = [r.rank for r in ranks if done[r.rank] and " in " in r.last_op]
    busy = raised or [r.rank for r in ranks if not done[r.rank]]
    if stuck["why"] == "peer_gone":
        busy = stuck["gone"]
        who = ", ".join(f"rank {rank}" for rank in busy)
        # Any other code, and any signal, would have had torchrun start all ranks afresh.
        text = f"{who} left in the middle of the case with exit code 0: {where}"
        status = Status.CRASH
    elif stuck["why"] == "peer_left":
        status, text = Status.DIVERGED, f"one rank waits for a rank that has left the case: {where}"
    elif stuck["why"] == "mismatch":
        status, text = Status.DIVERGED, f"ranks wait in different collectives: {where}"
    else:
        status, text = Status.HANG, f"no answer within {seconds:g} s: {where}"
    return Outcome(
        status, text, kernel_op=_op_name(_first_op(ranks, busy)), ranks=ranks, seed=config.seed
    )


def _op_name(last: str) -> str:
    """`aten.bmm.default` of `all_gather in aten.bmm.default`."""
    return last.rpartition(" in ")[2]


def _first_op(ranks: Sequence[RankState], busy: Collection[int] = ()) -> str:
    """What the first of the `busy` ranks was doing, or any other: those that the outcome is about."""
    first = sorted(ranks, key=lambda r: r.rank not in busy)
    return next((r.last_op for r in first if r.last_op), "")


def _brief(rank: RankState) -> RankState:
    found = _FATAL.search(rank.exception)
    text = found[1] if found else rank.exception.strip().splitlines()[0] if rank.exception else ""
    return RankState(rank.rank, rank.hash_seed, rank.last_op, text, rank.collectives)


def _take_stuck(run: RunDir, case: int) -> dict[str, Any] | None:
    try:
        record = json.loads(run.stuck.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    run.stuck.unlink(missing_ok=True)
    return record if isinstance(record, dict) and record.get("case") == case else None


def _take_faults(run: RunDir, ranks: int, attempt: str) -> dict[int, str]:
    """Each rank's last words from earlier attempts."""
    out = {}
    for rank in range(ranks):
        for path in sorted(run.path.glob(f"rank{rank}.*.fault")):
            if path == run.fault(rank, attempt):
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                out[rank] = text
            path.unlink(missing_ok=True)
    return out
