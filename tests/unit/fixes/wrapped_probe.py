"""A probe of functions that are no dispatcher ops, and the module (of the same file) that they are in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attncheck.probing import (
    BATCH,
    HEAD_DIM,
    HEADS,
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

Q_DIMS = (BATCH, SEQUENCE, HEADS, HEAD_DIM)
KV_DIMS = (BATCH, KV_SEQUENCE, HEADS, HEAD_DIM)
SIZES = {"batch": 6, "heads": 5, "sequence": 14, "kv_sequence": 22, "head_dim": 16}


def tensors(setting: Setting) -> tuple[Tensor, ...]:
    dims = {"q": Q_DIMS, "k": KV_DIMS, "v": KV_DIMS}
    return tuple(
        Tensor(name, d, tuple(setting[r] for r in d), requires_grad=False)
        for name, d in dims.items()
    )


def call(name: str, setting: Setting, t: Tensors) -> torch.Tensor:
    import behind_numpy

    result: torch.Tensor = getattr(behind_numpy, name)(t["q"], t["k"], t["v"])
    return result


def reference(setting: Setting, t: Tensors) -> torch.Tensor:
    from attncheck.runner.reference import attention

    return attention(t["q"], t["k"], t["v"], layout="bshd", causal="top_left")


def operator(name: str) -> Operator:
    return Operator(
        name=f"behind_numpy.{name}",
        tensors=tensors,
        call=lambda setting, t: call(name, setting, t),
        reference=reference,
        settings=(Setting("plain", SIZES),),
        output_dims=Q_DIMS,
        placements=("heads", "query"),
    )


PROBE = Probe(
    name="behind_numpy",
    summary="attention that no dispatcher op computes",
    operators=(operator("healthy"), operator("planted"), operator("nobodys")),
)
