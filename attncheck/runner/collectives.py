"""Which collective a dispatcher op is, on what, and in which group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attncheck.runner import compat
from attncheck.runner.compat import tree_flatten

# Dispatcher names of the functional and in-place collectives, and what a user calls them.
NAMES = {
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "allreduce_": "all_reduce",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "alltoall_base_": "all_to_all",
    "shard_dim_alltoall": "all_to_all",
    "broadcast": "broadcast",
    "broadcast_": "broadcast",
    "scatter_": "scatter",
}
_NAMESPACES = ("_c10d_functional", "_c10d_functional_autograd", "c10d", "_dtensor")


@dataclass(frozen=True)
class Called:
    """A collective that an op asks for: its inputs and its process group (or the name of it). `name` is empty
    where the op only waits for one that was asked for before."""

    name: str
    operands: tuple[torch.Tensor, ...] = ()
    group: Any = None


def called(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Called | None:
    """The collective that this call is, or None where it is none."""
    if getattr(func, "namespace", "") not in _NAMESPACES:
        return None
    packet = func.overloadpacket.__name__
    name = NAMES.get(packet)
    if name is None:
        return Called("") if packet in compat.WAITS else None
    named = dict(
        zip((a.name for a in compat.schema_of(func).arguments), args, strict=False)
    ) | dict(kwargs)
    group = named.get("group_name", named.get("process_group", named.get("group")))
    source = next(
        named[key]
        for key in ("input", "inputs", "input_tensor", "input_tensors", "self", "tensors", "tensor")
        if key in named
    )
    leaves, _ = tree_flatten(source)
    return Called(name, tuple(t for t in leaves if isinstance(t, torch.Tensor)), group)
