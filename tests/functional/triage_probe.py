"""Small attentions with one mistake each, which shows on shards only, and a healthy twin.

Written so that a script can be made of them: each call stands alone with what it uses from this file.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from attncheck.probing import (
    BATCH,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    KV_SEQUENCE,
    SEQUENCE,
    Operator,
    Probe,
    Setting,
    Tensor,
    Tensors,
)

if TYPE_CHECKING:
    import torch

Q_DIMS = (BATCH, HEADS, SEQUENCE, HEAD_DIM)
KV_DIMS = (BATCH, KV_HEADS, KV_SEQUENCE, HEAD_DIM)
SIZES = {"batch": 3, "heads": 4, "kv_heads": 4, "sequence": 6, "kv_sequence": 10, "head_dim": 8}
PLAIN = Setting("plain", SIZES, level="quick", placements=("heads",))


def tensors(setting: Setting) -> tuple[Tensor, ...]:
    return (
        Tensor("q", Q_DIMS, tuple(setting[r] for r in Q_DIMS)),
        Tensor("k", KV_DIMS, tuple(setting[r] for r in KV_DIMS)),
        Tensor("v", KV_DIMS, tuple(setting[r] for r in KV_DIMS)),
    )


def attend(q: Any, k: Any, v: Any) -> Any:
    import torch

    return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1) @ v


def on_shards(q: torch.Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(q, DTensor)


def again(out: Any, change: Any) -> Any:
    """The same DTensor with another local tensor."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        change(out.to_local()),
        out.device_mesh,
        out.placements,
        shape=out.shape,
        stride=out.stride(),
    )


CALLS = [0]


def call(mistake: str, setting: Setting, t: Tensors) -> Any:
    import os
    import signal
    import time

    q, k, v = t["q"], t["k"], t["v"]
    out = attend(q, k, v)
    if not on_shards(q):
        return out
    rank = int(os.environ["RANK"])
    if mistake == "wrong":
        return again(out, lambda x: x * (1 + rank))
    if mistake == "drift":
        return again(out, lambda x: x * (1 + 6e-6))
    if mistake == "plain":
        return out.full_tensor()
    if mistake == "stale":
        CALLS[0] += 1
        return again(out, lambda x: x * (1.5 if CALLS[0] % 2 == 0 else 1))
    if mistake == "communicates":
        return out.redistribute(placements=[type(p)(2) for p in out.placements])
    if mistake == "crash" and rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if mistake == "raises":
        raise LookupError("heads must be whole")
    if mistake == "one_raises" and rank == 1:
        raise LookupError("only rank 1 refuses")
    if mistake == "slow":
        CALLS[0] += 1
        time.sleep(5.5 if CALLS[0] == 1 else 0)
    return out


def replicas(setting: Setting, t: Tensors) -> Any:
    import os

    from torch.distributed.tensor import Replicate

    out = attend(t["q"], t["k"], t["v"])
    if not on_shards(out):
        return out
    whole = out.redistribute(placements=[Replicate()] * out.device_mesh.ndim)
    noise = 1e-9 * int(os.environ["RANK"])
    return again(whole, lambda x: x + noise)


def mixed(setting: Setting, t: Tensors) -> Any:
    import torch

    return attend(t["q"] + torch.zeros(t["q"].shape[-1]), t["k"], t["v"])


def wrong_gradient(setting: Setting, t: Tensors) -> Any:
    q, k, v = t["q"], t["k"], t["v"]
    if on_shards(q):
        k = again(k, lambda x: x + 0.5 * (x - x.detach()))
    return attend(q, k, v)


def reference(setting: Setting, t: Tensors) -> torch.Tensor:
    out: torch.Tensor = attend(t["q"], t["k"], t["v"])
    return out


def operator(name: str, function: Any, communicates: bool = False) -> Operator:
    return Operator(
        name=f"triage.{name}",
        tensors=tensors,
        call=function,
        reference=reference,
        settings=(PLAIN,),
        output_dims=Q_DIMS,
        communicates=communicates,
    )


MISTAKES = (
    "healthy",
    "wrong",
    "drift",
    "plain",
    "stale",
    "communicates",
    "crash",
    "raises",
    "one_raises",
    "slow",
)

PROBE = Probe(
    name="triage",
    summary="attention with one mistake each",
    operators=(
        *(operator(name, partial(call, name), name == "plain") for name in MISTAKES),
        operator("replicas", replicas, communicates=True),
        operator("mixed", mixed),
        operator("wrong_gradient", wrong_gradient),
    ),
)
