"""A tensor as one rank holds it, in memory of its own: what travels from the ranks to the judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from attncheck.runner import compat

GIVEN, TAKEN, OUTPUT = "given", "taken", "output"


class Key(NamedTuple):
    """Which tensor of a call: the `leaf`-th floating one that the `nth` call of the module at `path` was
    `given` by its caller, has `taken` after its own hooks, or gives as `output`."""

    path: str
    nth: int
    kind: str
    leaf: int


@dataclass(frozen=True)
class Captured:
    """`local`: this rank's values, on the CPU. Of a DTensor also its `placements`, the global `shape` that
    this rank takes it for, and the ranks of its mesh, in row-major order of `mesh`."""

    local: torch.Tensor
    shape: tuple[int, ...]
    placements: tuple[str, ...] | None = None
    mesh: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()


def capture(tensor: torch.Tensor) -> Captured:
    """Complex numbers become pairs of real ones, in a last dim of 2."""
    pairs = (2,) if tensor.is_complex() else ()
    shape = (*(int(size) for size in tensor.shape), *pairs)
    if not isinstance(tensor, DTensor):
        return Captured(own_values(tensor), shape)
    mesh = tensor.device_mesh.mesh
    return Captured(
        own_values(compat.local_tensor(tensor)),
        shape,
        tuple(compat.placement_text(p) for p in tensor.placements),
        tuple(mesh.shape),
        tuple(int(rank) for rank in mesh.flatten()),
    )


def is_floating(value: object) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def own_values(tensor: torch.Tensor) -> torch.Tensor:
    """A plain tensor's values on the CPU, in memory of their own."""
    with torch.no_grad():
        own = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return torch.view_as_real(own.resolve_conj()) if own.is_complex() else own
