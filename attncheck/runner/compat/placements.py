"""A DTensor's placements as text, and what it holds."""

from __future__ import annotations

import re
from operator import attrgetter

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

# Mesh, placements, shape, stride and dtype of a DTensor, as one hashable value.
spec_of = attrgetter("_spec")


def placement_text(placement: Placement) -> str:
    """`R`, `S(1)`, `P(sum)`: as PyTorch prints them from 2.10 on (before, a Partial was `P`); anything else
    as its repr."""
    if isinstance(placement, Replicate):
        return "R"
    if type(placement) is Shard:
        return f"S({placement.dim})"
    if isinstance(placement, Partial):
        return f"P({placement.reduce_op})"
    return str(placement)


def placement_from_text(text: str) -> Placement:
    """The inverse of `placement_text` for the three kinds a case may ask for."""
    if text == "R":
        return Replicate()
    if match := re.fullmatch(r"S\((\d+)\)", text):
        return Shard(int(match[1]))
    if match := re.fullmatch(r"P\((\w+)\)", text):
        return Partial(match[1])
    raise AssertionError(f"not a placement: {text}")


def local_tensor(tensor: DTensor) -> torch.Tensor:
    """The rank's own shard, without autograd and without waiting for a collective."""
    return tensor._local_tensor


def storage_id(tensor: torch.Tensor) -> int:
    """Which memory a tensor lies in: the same for its views, and of its own where it is empty."""
    return int(tensor.untyped_storage()._cdata)
