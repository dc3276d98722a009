"""Putting together what the ranks hold, and reading it as the unsharded model's tensor.

A DTensor says how its parts belong together, and is taken at its word (by attncheck's own algebra of
placements). A plain tensor says nothing: it may be the whole on each rank, one rank's part of it along a dim,
or, within a model, a partial sum. Every reading that fits the shape is tried, axis by axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attncheck.audit.numeric.captured import Captured
from attncheck.audit.numeric.weights import axis_order, plain_shard
from attncheck.runner.placements import assemble

WHOLE, SUM = "whole", "sum"
# One entry per mesh axis: `whole`, `sum`, or the dim along which its ranks hold parts.
How = tuple[str | int, ...]


@dataclass(frozen=True)
class Together:
    """What each rank holds, as far as a DTensor says it is whole. `fault`: why the ranks contradict each
    other; `unread`: why attncheck cannot put it together; `gap`: the largest difference between ranks that
    call it the same."""

    values: tuple[torch.Tensor, ...] = ()
    fault: str = ""
    unread: str = ""
    gap: float = 0.0


@dataclass(frozen=True)
class Reading:
    """The whole tensor, as often as ranks hold one of their own; float64."""

    how: How
    wholes: tuple[torch.Tensor, ...]


def together(captures: Sequence[Captured | None]) -> Together:
    """`captures`: of every rank, in order; None of one that has no such tensor."""
    held = [each for each in captures if each is not None]
    if len(held) < len(captures):
        missing = [rank for rank, each in enumerate(captures) if each is None]
        return Together(fault=f"{ranks_text(missing)} has none")
    kinds = {each.placements is None for each in held}
    if len(kinds) > 1:
        return Together(fault="it is a DTensor on some ranks and a plain tensor on others")
    if held[0].placements is None:
        return Together(tuple(each.local.to(torch.float64) for each in held))
    values: list[torch.Tensor] = [torch.empty(0)] * len(held)
    gap = 0.0
    for mesh_ranks in dict.fromkeys(each.ranks for each in held):
        members = [held[rank] for rank in mesh_ranks]
        if fault := _contradiction(members, mesh_ranks):
            return Together(fault=fault)
        placements = members[0].placements
        assert placements is not None
        order = axis_order(placements)
        grid = torch.arange(len(members)).reshape(members[0].mesh).permute(order)
        try:
            made = assemble(
                [members[at].local for at in grid.flatten().tolist()],
                members[0].shape,
                [plain_shard(placements[axis]) for axis in order],
                tuple(grid.shape),
            )
        except ValueError as error:
            return Together(unread=str(error))
        if made.whole is None:
            return Together(fault=made.shape_faults[0])
        gap = max(gap, made.replica_gap)
        for rank in mesh_ranks:
            values[rank] = made.whole
    return Together(tuple(values), gap=gap)


def _contradiction(members: Sequence[Captured], ranks: Sequence[int]) -> str:
    first = members[0]
    for rank, other in zip(ranks, members, strict=True):
        if other.shape != first.shape:
            return (
                f"ranks disagree about its global shape: {first.shape} on rank {ranks[0]}, {other.shape} on "
                f"rank {rank}"
            )
        if other.placements != first.placements:
            return (
                f"ranks disagree about its placements: {_text(first)} on rank {ranks[0]}, {_text(other)} on "
                f"rank {rank}"
            )
    return ""


def _text(captured: Captured) -> str:
    return f"[{', '.join(captured.placements or ())}]"


def ranks_text(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def readings(
    values: Sequence[torch.Tensor], shape: Sequence[int], mesh: Sequence[int], sums: bool = False
) -> list[Reading]:
    """Every way in which what the ranks of a mesh hold is a tensor of that shape; the plainest first.

    `sums`: parts that add up count, too.
    """
    shape = tuple(shape)
    dims = [dim for dim in range(len(shape)) if any(_differs(v, shape, dim) for v in values)]
    choices: list[list[str | int]] = [
        [WHOLE, *dims, *([SUM] if sums else [])] if ranks > 1 else [WHOLE] for ranks in mesh
    ]
    found = []
    for how in itertools.product(*choices):
        wholes = _read(values, how, mesh)
        if wholes is not None and all(tuple(whole.shape) == shape for whole in wholes):
            found.append(Reading(how, wholes))
    return sorted(found, key=lambda each: sum(choice == SUM for choice in each.how))


def _differs(value: torch.Tensor, shape: tuple[int, ...], dim: int) -> bool:
    return value.ndim != len(shape) or value.shape[dim] != shape[dim]


def _read(
    values: Sequence[torch.Tensor], how: How, mesh: Sequence[int]
) -> tuple[torch.Tensor, ...] | None:
    """One way for each axis, the last axis first: each step makes one value of those along the axis, or
    leaves them beside each other."""
    groups: list[tuple[torch.Tensor, ...]] = [(value,) for value in values]
    for choice, ranks in zip(reversed(how), reversed(mesh), strict=True):
        joined: list[tuple[torch.Tensor, ...]] = []
        for at in range(0, len(groups), ranks):
            group = groups[at : at + ranks]
            if choice == WHOLE:
                joined.append(tuple(itertools.chain.from_iterable(group)))
                continue
            rows = list(zip(*group, strict=True))
            made = [_joined(row, choice) for row in rows]
            if any(each is None for each in made):
                return None
            joined.append(tuple(each for each in made if each is not None))
        groups = joined
    return _distinct(groups[0])


def _joined(parts: Sequence[torch.Tensor], choice: str | int) -> torch.Tensor | None:
    first = parts[0]
    if choice == SUM:
        same = all(part.shape == first.shape for part in parts)
        return torch.stack([*parts]).sum(0) if same else None
    assert isinstance(choice, int)
    if choice >= first.ndim:
        return None
    others = [tuple(s for d, s in enumerate(part.shape) if d != choice) for part in parts]
    if any(part.ndim != first.ndim for part in parts) or any(o != others[0] for o in others):
        return None
    return torch.cat([*parts], choice)


def _distinct(values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    found: list[torch.Tensor] = []
    for value in values:
        if not any(value is other or torch.equal(value, other) for other in found):
            found.append(value)
    return tuple(found)


def how_text(how: How, axes: Sequence[str]) -> str:
    """In words, of what is no whole: `dim 2 over tp`."""
    said = [
        f"a partial sum over {axis}" if choice == SUM else f"parts along dim {choice} over {axis}"
        for choice, axis in zip(how, axes, strict=True)
        if choice != WHOLE
    ]
    return " and ".join(said) or "the whole"
