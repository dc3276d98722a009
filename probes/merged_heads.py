"""Attention as a model's layer calls it: heads merged into the hidden dim, as its projections leave them.

Tensor parallelism shards (batch, sequence, heads * head_dim) on its last dim. The layer then splits the
heads off with `view`, and DTensor must see through that before any attention operator is reached. WAN's
`flash_attention` in DiffSynth-Studio is such a function, and so are the attention layers of diffusers and
transformers.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from attncheck.probing import (
    BATCH,
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

# A shard of the merged dim is a shard of the heads, if it does not cut one.
Q_DIMS = (BATCH, SEQUENCE, HEADS)
KV_DIMS = (BATCH, KV_SEQUENCE, KV_HEADS)

BASE = {"batch": 6, "heads": 4, "kv_heads": 4, "sequence": 18, "kv_sequence": 22, "head_dim": 16}
SQUARE = {**BASE, "kv_sequence": 18}
GQA = {**BASE, "heads": 20}
# 2 ranks get two and a half heads each: the merged dim divides evenly, the heads do not.
CUT_HEADS = {**BASE, "batch": 14, "heads": 5, "kv_heads": 5}

PLACEMENTS = ("replicate", "batch", "heads", "sequence")
CORE = ("replicate", "heads")


def separate(setting: Setting) -> tuple[Tensor, ...]:
    """q, k and v from three projections."""
    return tuple(
        Tensor(
            name, dims, (setting[dims[0]], setting[dims[1]], setting[dims[2]] * setting["head_dim"])
        )
        for name, dims in (("q", Q_DIMS), ("k", KV_DIMS), ("v", KV_DIMS))
    )


def fused(setting: Setting) -> tuple[Tensor, ...]:
    """q, k and v beside each other in the last dim, from one projection."""
    hidden = 3 * setting["heads"] * setting["head_dim"]
    return (Tensor("qkv", Q_DIMS, (setting["batch"], setting["sequence"], hidden)),)


def split_heads(setting: Setting, t: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(batch, sequence, heads * head_dim) to (batch, sequence, heads, head_dim), each of q, k and v."""
    q, k, v = t["qkv"].chunk(3, dim=-1) if "qkv" in t else (t["q"], t["k"], t["v"])
    heads, kv_heads, head_dim = setting["heads"], setting["kv_heads"], setting["head_dim"]
    return (
        q.view(*q.shape[:2], heads, head_dim),
        k.view(*k.shape[:2], kv_heads, head_dim),
        v.view(*v.shape[:2], kv_heads, head_dim),
    )


def sdpa(backend: str | None, setting: Setting, t: Tensors) -> torch.Tensor:
    import contextlib

    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.transpose(1, 2) for x in split_heads(setting, t))
    with sdpa_kernel(SDPBackend.__members__[backend]) if backend else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=bool(setting.get("causal")),
            enable_gqa=setting["heads"] != setting["kv_heads"],
        )
    return out.transpose(1, 2).flatten(2)


def flash_attn(setting: Setting, t: Tensors) -> torch.Tensor:
    from flash_attn import flash_attn_func

    out: torch.Tensor = flash_attn_func(
        *split_heads(setting, t), causal=bool(setting.get("causal"))
    )
    return out.flatten(2)


def reference(causal: str, setting: Setting, t: Tensors) -> torch.Tensor:
    """`causal`: to which corner the operator aligns its causal mask."""
    from attncheck.runner.reference import attention

    q, k, v = split_heads(setting, t)
    masked = causal if setting.get("causal") else None
    return attention(q, k, v, layout="bshd", causal=masked).flatten(2)


PLAIN = Setting("plain", BASE, placements=PLACEMENTS)
CAUSAL = Setting("causal", SQUARE, options={"causal": True}, placements=PLACEMENTS)

# The default dispatch gets causal calls alone: without, its decomposition search takes PyTorch 20 s.
DISPATCHED = (CAUSAL, Setting("plain", BASE, level="full"))
MATH = (
    PLAIN,
    Setting("causal", SQUARE, options={"causal": True}, level="full"),
    Setting("gqa", GQA, placements=CORE),
    Setting("cut_heads", CUT_HEADS, placements=CORE),
    Setting("bfloat16", BASE, "bfloat16", level="full"),
)
FLASH = (
    PLAIN,
    Setting("causal", SQUARE, options={"causal": True}, level="full"),
    Setting("cut_heads", CUT_HEADS, placements=CORE),
)
FUSED = (
    Setting("plain", SQUARE, placements=CORE),
    Setting("cut_heads", {**CUT_HEADS, "kv_sequence": 18}, level="full"),
)

PROBE = Probe(
    name="merged_heads",
    summary="attention as a model's layer calls it: heads merged into the hidden dim, split by view",
    operators=(
        Operator(
            name="merged_heads.sdpa",
            function="attncheck probes/merged_heads.py:sdpa",
            tensors=separate,
            call=partial(sdpa, None),
            reference=partial(reference, "top_left"),
            settings=DISPATCHED,
            output_dims=Q_DIMS,
        ),
        Operator(
            name="merged_heads.sdpa[MATH]",
            function="attncheck probes/merged_heads.py:sdpa",
            tensors=separate,
            call=partial(sdpa, "MATH"),
            reference=partial(reference, "top_left"),
            settings=MATH,
            output_dims=Q_DIMS,
        ),
        Operator(
            name="merged_heads.fused_qkv",
            function="attncheck probes/merged_heads.py:sdpa",
            tensors=fused,
            call=partial(sdpa, "MATH"),
            reference=partial(reference, "top_left"),
            settings=FUSED,
            output_dims=Q_DIMS,
        ),
        Operator(
            name="merged_heads.flash_attn_func",
            function="attncheck probes/merged_heads.py:flash_attn",
            tensors=separate,
            call=flash_attn,
            reference=partial(reference, "bottom_right"),
            settings=FLASH,
            output_dims=Q_DIMS,
            packages=("flash-attn>=2.7",),
            standins=("flash_attn_2_cuda",),
        ),
    ),
)
