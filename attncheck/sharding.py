"""Which cases of a scan each of several CI jobs runs (`--shard i/n`): the same answer on every machine.

Cases that pay for something together stay together, and each shard gets as much expected time as the next.
No randomness, and nothing of the machine at hand: every job must come to the same division.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from attncheck.errors import UserError
from attncheck.model import Case

# Seconds, from the journal of a default scan of 1390 cases (torch 2.13.0, CPU, 2 ranks): all but the first
# calls of slow operators took 0.06 s on average, those 25 to 60 s; what is not installed was over in 2 ms.
CASE_SECONDS = 0.07
SEARCH_SECONDS = 35.0
IDLE_SECONDS = 0.002


@dataclass(frozen=True)
class Shard:
    """`index` counts from 1."""

    index: int
    of: int

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"


@dataclass(frozen=True)
class Share:
    """What a report says of the shard it is (`shard` in its environment), so that `attncheck merge` can put
    the plan together again. `plan` is the same for shards of one plan, which has `planned` cases;
    `positions` are those of the report's own among them, in order."""

    index: int
    of: int
    plan: str
    planned: int
    positions: tuple[int, ...]


def parse(text: str) -> Shard:
    """`2/3`: the second of three. Raises UserError.

    >>> parse("2/3")
    Shard(index=2, of=3)
    """
    match = re.fullmatch(r"([0-9]{1,4})/0*([1-9][0-9]{0,3})", text.strip())
    if match is None:
        raise UserError(f"Shard {text!r} is no shard: expected one like 2/3, the second of three.")
    shard = Shard(int(match[1]), int(match[2]))
    if not 1 <= shard.index <= shard.of:
        raise UserError(
            f"Shard {text!r} does not exist: expected 1/{shard.of} to {shard.of}/{shard.of}."
        )
    return shard


def share(cases: Sequence[Case], shard: Shard, cost: Callable[[Sequence[Case]], float]) -> Share:
    """The share of a shard in a plan: see `split`."""
    digest = hashlib.sha256("\n".join(case.id for case in cases).encode()).hexdigest()
    positions = split(cases, shard, cost)
    return Share(shard.index, shard.of, digest[:16], len(cases), positions)


def split(
    cases: Sequence[Case], shard: Shard, cost: Callable[[Sequence[Case]], float]
) -> tuple[int, ...]:
    """The positions in `cases` of those that this shard runs, in their order.

    `cost`: the expected seconds of cases that are run together. What shares a setting shares what is dear
    once (`plan` runs it together for the same reason), and stays in one shard unless there are fewer such
    units than shards. Longest first, each to the shard with least so far: no shard gets more than the mean
    and the largest unit. Raises UserError where there are fewer cases than shards.
    """
    if shard.of > len(cases):
        raise UserError(
            f"Shard {shard}: there are only {len(cases)} cases to share out; expected at most "
            f"{len(cases)} shards."
        )
    units = _units(cases)
    if len(units) < shard.of:
        units = {(case.id,): [at] for at, case in enumerate(cases)}
    costs = {name: cost([cases[at] for at in members]) for name, members in units.items()}
    loads = [0.0] * shard.of
    shares: list[list[int]] = [[] for _ in loads]
    for name in sorted(units, key=lambda name: (-costs[name], name)):
        # Where the loads are equal, to the one with fewer cases: nobody's share is empty.
        least = min(range(shard.of), key=lambda at: (loads[at], len(shares[at]), at))
        loads[least] += costs[name]
        shares[least] += units[name]
    return tuple(sorted(shares[shard.index - 1]))


def _units(cases: Sequence[Case]) -> dict[tuple[str, ...], list[int]]:
    """Positions by mesh, probe and setting."""
    units: dict[tuple[str, ...], list[int]] = {}
    for at, case in enumerate(cases):
        mesh = ",".join(f"{axis}={size}" for axis, size in case.mesh.items())
        units.setdefault((mesh, case.probe, case.setting_name), []).append(at)
    return units


def expected_seconds(
    cases: Sequence[Case], slow: Collection[str] = (), absent: Collection[str] = ()
) -> float:
    """What cases that are run together are expected to take.

    `slow`: operators that are dear to propagate, once for all cases of a unit; `absent`: those that cannot
    run here. Hangs and crashes, and the restarts that they cost, cannot be foreseen.
    """
    run = [case for case in cases if case.operator not in absent]
    idle = IDLE_SECONDS * (len(cases) - len(run))
    once = max((_search_seconds(case) for case in run if case.operator in slow), default=0.0)
    return idle + once + CASE_SECONDS * sum(_scale(case) for case in run)


def _scale(case: Case) -> float:
    """Ranks share the cores of one machine."""
    return math.prod(case.mesh.values()) / 2


def _search_seconds(case: Case) -> float:
    """0 where a slow operator is known not to search: nothing is sharded, or it is refused before that."""
    setting = case.setting
    refused = setting.get("causal") or setting.get("mask_as") == "plain" or setting.get("dropout")
    if refused or set(case.placement.split(",")) == {"replicate"}:
        return 0.0
    return SEARCH_SECONDS * _scale(case)
