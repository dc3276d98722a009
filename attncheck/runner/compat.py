"""Every private PyTorch name that attncheck touches, each guarded by capability, in one place.

Public names come from `torch.distributed.tensor` (2.5 on). Each guard says which version changed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import (
    AsyncCollectiveTensor,
)  # private name, 2.1 to 2.15
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

__all__ = [
    "AsyncCollectiveTensor",
    "group_size",
    "local_tensor",
    "placement_from_text",
    "placement_text",
    "quiet_exit",
    "refusal",
    "rendezvous_store",
    "unwatched_propagation",
    "watch_alltoall",
]

# The wording is the same in 2.5 to 2.15.
_NO_STRATEGY = re.compile(r"Operator (\S+) does not have a sharding strategy registered")
# Python says "<op>: got mixed ...", the C++ fast path of 2.10 on "<op> got mixed ...".
_MIXED = re.compile(r"([\w.]+):? got mixed torch\.Tensor and DTensor")
# 2.10 on: whatever propagation raises is rewrapped with this tail; before, the cause came through bare.
_PROPAGATION = re.compile(r"Sharding propagation failed for")
# An op without a Meta kernel fails in propagation for the same want of a strategy (flash-attn 3).
_NO_META_CAUSES = ("UnsupportedOperatorException", "NotImplementedError")


def refusal(error: BaseException) -> tuple[str, str | None] | None:
    """What DTensor refused: (`strategy` | `mixed` | `propagation`, op name in the text if any), or None.

    `propagation` is an op whose strategy could not be asked because it cannot run on Meta tensors.
    """
    text = str(error)
    if match := _NO_STRATEGY.search(text):
        return "strategy", match[1]
    if match := _MIXED.search(text):
        return "mixed", match[1]
    if _PROPAGATION.search(text):
        cause = error.__cause__
        while cause is not None:
            if type(cause).__name__ in _NO_META_CAUSES:
                return "propagation", None
            cause = cause.__cause__
    return None


def placement_text(placement: Placement) -> str:
    """`R`, `S(1)`, `P(sum)`: as PyTorch prints them since 2.5; anything else as its repr."""
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


def group_size(group: Any) -> int:
    """Size of a process group given as a functional collective gets it.

    A name up to 2.12; 2.13 also passes the ProcessGroup itself.
    """
    if isinstance(group, str):
        import torch.distributed.distributed_c10d as c10d

        group = c10d._resolve_process_group(group)  # type: ignore[attr-defined,arg-type]
    return int(group.size())


@contextlib.contextmanager
def watch_alltoall(
    on_call: Callable[[torch.Tensor, int], contextlib.AbstractContextManager[None]],
) -> Iterator[None]:
    """Calls `on_call(local_tensor, group_size)` around DTensor's shard-to-shard all-to-all.

    On gloo PyTorch emulates it by all-gather and chunk, so the dispatcher never sees the collective that
    was asked for. The function is imported by name into `placement_types`, hence the two patches. Where a
    version has neither, the emulation is counted as the all-gather it is.
    """
    import torch.distributed.tensor._collective_utils as utils
    import torch.distributed.tensor.placement_types as placement_types

    original = getattr(utils, "shard_dim_alltoall", None)
    if original is None:
        yield
        return

    def watched(
        input: torch.Tensor, gather_dim: int, shard_dim: int, mesh: Any, mesh_dim: int
    ) -> Any:
        with on_call(input, mesh.size(mesh_dim)):
            return original(input, gather_dim, shard_dim, mesh, mesh_dim)

    owners = [
        m for m in (utils, placement_types) if getattr(m, "shard_dim_alltoall", None) is original
    ]
    for owner in owners:
        setattr(owner, "shard_dim_alltoall", watched)
    try:
        yield
    finally:
        for owner in owners:
            setattr(owner, "shard_dim_alltoall", original)


@contextlib.contextmanager
def unwatched_propagation() -> Iterator[None]:
    """Keeps dispatch modes off while DTensor searches decompositions for a strategy.

    The search (2.11 on) runs tens of thousands of ops on meta tensors: nothing there is communication or
    a kernel, and passing each through a mode of ours made it a quarter slower than it is for users.
    """
    try:
        from torch.distributed.tensor._decompositions import DecompShardingStrategy
        from torch.utils._python_dispatch import _disable_current_modes
    except ImportError:
        yield
        return
    original = DecompShardingStrategy.propagate_strategy

    def unwatched(self: Any, op_schema: Any) -> Any:
        with _disable_current_modes():
            return original(self, op_schema)

    DecompShardingStrategy.propagate_strategy = unwatched  # type: ignore[method-assign]
    try:
        yield
    finally:
        DecompShardingStrategy.propagate_strategy = original  # type: ignore[method-assign]


def rendezvous_store(attempt: str) -> tuple[Any, int, int]:
    """(store, rank, world size) of a torchrun worker, with keys of its own for this `attempt`.

    torchrun keeps one store over restarts, and 2.13 no longer puts a prefix per attempt in front of its
    keys: gloo then reads the addresses of the dead processes and hangs, in about every second restart.
    """
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(rendezvous("env://"))
    prefixed = dist.PrefixStore(f"attncheck/{attempt}", store)  # type: ignore[attr-defined]
    return prefixed, rank, world


def quiet_exit(code: int) -> None:
    """Leave without tearing gloo down: destroying the group aborts in about one run in five (2.13)."""
    import os
    import sys

    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
