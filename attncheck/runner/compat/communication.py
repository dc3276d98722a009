"""Collectives: whose group they are of, what DTensor puts in the place of some, and keeping them out."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor

__all__ = [
    "WAITS",
    "AsyncCollectiveTensor",
    "Communicates",
    "group_size",
    "no_communication",
    "rendezvous_store",
    "unsent_weights",
    "watch_alltoall",
]

# Functional collectives are asynchronous: ranks block in these (`wait_tensors` is new in 2.15).
WAITS = ("wait_tensor", "wait_tensors")


def group_size(group: Any) -> int:
    """Size of a process group given as a functional collective gets it.

    A name up to 2.11; from 2.12 on the ProcessGroup itself, too. An in-place one (`c10d.scatter_`) gets it
    boxed.
    """
    if isinstance(group, torch.ScriptObject):
        group = dist.ProcessGroup.unbox(group)
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
def unsent_weights() -> Iterator[None]:
    """In here `distribute_tensor` and its like send nothing: of fake tensors there is nothing to send.

    Up to 2.9 the ops under it (`c10d.scatter_`) have no fake implementation. The two functions are imported
    by name into the modules that call them.
    """
    import importlib

    names = ("_collective_utils", "placement_types", "_api")
    modules = [importlib.import_module(f"torch.distributed.tensor.{name}") for name in names]
    patched = [
        (module, name, getattr(module, name))
        for module in modules
        for name in ("mesh_scatter", "mesh_broadcast")
        if hasattr(module, name)
    ]
    for module, name, _ in patched:
        setattr(module, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for module, name, original in patched:
            setattr(module, name, original)


class Communicates(Exception):
    """What was called under `no_communication` wanted its peers."""


# What waits for peers, of a process group (what `torch.distributed` calls) and in `_c10d_functional`.
_GROUP_METHODS = re.compile(
    r"(_?all_?|_?reduce|broadcast|gather|scatter|send|recv|barrier|monitored)"
)
_FUNCTIONAL = (
    "all_reduce",
    "all_reduce_",
    "all_reduce_coalesced",
    "all_reduce_coalesced_",
    "all_gather_into_tensor",
    "all_gather_into_tensor_out",
    "all_gather_into_tensor_coalesced",
    "reduce_scatter_tensor",
    "reduce_scatter_tensor_out",
    "reduce_scatter_tensor_coalesced",
    "all_to_all_single",
    "broadcast",
    "broadcast_",
    "isend",
    "irecv",
    "batch_p2p_ops",
)


@contextlib.contextmanager
def no_communication() -> Iterator[None]:
    """In here a collective that Python asks for raises `Communicates`: a rank that calls an op by itself
    would wait for its peers for ever. (An op whose compiled kernel communicates is not seen.)"""

    def refuse(*unused: Any, **unused_too: Any) -> Any:
        raise Communicates("it communicates, and cannot be asked by one rank")

    group: Any = dist.ProcessGroup
    methods = {n: f for n, f in vars(group).items() if _GROUP_METHODS.match(n)}
    ops = torch.ops._c10d_functional
    functions = {n: getattr(ops, n) for n in _FUNCTIONAL if hasattr(ops, n)}
    try:
        for name in methods:
            setattr(group, name, refuse)
        for name in functions:
            setattr(ops, name, refuse)
        yield
    finally:
        for name, method in methods.items():
            setattr(group, name, method)
        for name, function in functions.items():
            setattr(ops, name, function)


def rendezvous_store(attempt: str) -> tuple[Any, int, int]:
    """(store, rank, world size) of a torchrun worker, with keys of its own for this `attempt`.

    torchrun keeps one store over restarts, and puts no prefix per attempt in front of its keys (2.6 to 2.15):
    gloo then reads the addresses of the dead processes and hangs, in about every second restart.
    """
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(rendezvous("env://"))
    prefixed = dist.PrefixStore(f"attncheck/{attempt}", store)  # type: ignore[attr-defined]
    return prefixed, rank, world
