"""Planted for the hunt: each operator is right but in one corner that no setting of its own reaches."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

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

Q_DIMS = (BATCH, HEADS, SEQUENCE, HEAD_DIM)
KV_DIMS = (BATCH, KV_HEADS, KV_SEQUENCE, HEAD_DIM)
SIZES = {"batch": 6, "heads": 4, "kv_heads": 4, "sequence": 10, "kv_sequence": 14, "head_dim": 8}


def tensors(setting: Setting) -> tuple[Tensor, ...]:
    return (
        Tensor("q", Q_DIMS, tuple(setting[r] for r in Q_DIMS)),
        Tensor("k", KV_DIMS, tuple(setting[r] for r in KV_DIMS)),
        Tensor("v", KV_DIMS, tuple(setting[r] for r in KV_DIMS)),
    )


def shards(tensor: Any) -> list[Any]:
    """The local tensors of a DTensor that this process holds: one, or those of all simulated ranks."""
    local = tensor._local_tensor
    return list(getattr(local, "_local_tensors", {0: local}).values())


def call(corner: Callable[[Any, Any], bool], setting: Setting, t: Tensors) -> Any:
    """Attention; once and a half of it where `corner(q, k)`, asked of DTensors only.

    On whole tensors in every rank, whatever the placements: DTensor's own `matmul` fails in corners, too.
    """
    from torch.distributed.tensor import DTensor, Replicate

    if setting["heads"] != setting["kv_heads"]:
        raise ValueError("this operator knows no grouped queries")
    q, k, v = t["q"], t["k"], t["v"]
    if not isinstance(q, DTensor):
        return attend(q, k, v)
    wrong = corner(q, k)
    mesh = q.device_mesh
    replicated = [Replicate()] * mesh.ndim
    q, k, v = (x.redistribute(placements=replicated).to_local() for x in (q, k, v))
    out = attend(q, k, v)
    return DTensor.from_local(out * 1.5 if wrong else out, mesh, replicated, run_check=False)


def attend(q: Any, k: Any, v: Any) -> Any:
    import torch

    scores = torch.matmul(q, k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return torch.matmul(torch.softmax(scores, dim=-1), v)


def reference(setting: Setting, t: Tensors) -> Any:
    from attncheck.runner.reference import attention

    return attention(t["q"], t["k"], t["v"])


def odd_keys_on_three_ranks(q: Any, k: Any) -> bool:
    return k.shape[2] % 2 == 1 and q.device_mesh.size() == 3


def scattered_keys(q: Any, k: Any) -> bool:
    return any(not shard.is_contiguous() for shard in shards(k))


def dies_on_an_empty_shard(q: Any, k: Any) -> bool:
    if any(shard.numel() == 0 for shard in shards(q)):
        os.kill(os.getpid(), signal.SIGSEGV)
    return False


def nowhere(q: Any, k: Any) -> bool:
    return False


PROBE = Probe(
    name="corners",
    summary="planted bugs in corners that no setting reaches, and a healthy twin",
    operators=tuple(
        Operator(
            name=f"corner.{corner.__name__}",
            tensors=tensors,
            call=partial(call, corner),
            reference=reference,
            settings=(Setting("plain", SIZES, level="quick"),),
            output_dims=Q_DIMS,
        )
        for corner in (odd_keys_on_three_ranks, scattered_keys, dies_on_an_empty_shard, nowhere)
    ),
)
