"""The probe of my_attention: how it is called, and what it should give.

Run it:   attncheck scan --probe FILE --operator 'my_attention*'
Keep it:  in pyproject.toml, [tool.attncheck] probes = ["FILE"]; or in a package of yours, under the
          entry point group attncheck.probes.

It runs as it is, on PyTorch's own attention. Change what is marked with CHANGE. This file must import
without torch (`attncheck list` reads it): import torch, and your kernel, inside the functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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

# CHANGE: the layout of your operator's arguments, by the role of each dim. A placement is asked for by
# role: `heads` shards dim 1 here, and would shard dim 2 of (batch, sequence, heads, head_dim).
Q_DIMS = (BATCH, HEADS, SEQUENCE, HEAD_DIM)
KV_DIMS = (BATCH, KV_HEADS, KV_SEQUENCE, HEAD_DIM)

# All sizes differ, and so do their halves: a swapped or wrongly split dim cannot fit by chance.
SIZES = {"batch": 6, "heads": 4, "kv_heads": 4, "sequence": 18, "kv_sequence": 22, "head_dim": 16}


def tensors(setting: Setting) -> tuple[Tensor, ...]:
    """The tensor arguments. Others: `wrap="plain"` for one that stays an ordinary tensor,
    `requires_grad=False`, `dtype="int32"`, `mutable=True` for one that the operator writes into."""
    return (
        Tensor("q", Q_DIMS, tuple(setting[role] for role in Q_DIMS)),
        Tensor("k", KV_DIMS, tuple(setting[role] for role in KV_DIMS)),
        Tensor("v", KV_DIMS, tuple(setting[role] for role in KV_DIMS)),
    )


def call(setting: Setting, t: Tensors) -> torch.Tensor:
    """Call the operator, as its users do; on plain tensors and on DTensors alike."""
    import torch.nn.functional as F  # CHANGE: your kernel

    return F.scaled_dot_product_attention(
        t["q"],
        t["k"],
        t["v"],
        is_causal=bool(setting.get("causal")),
        enable_gqa=setting["heads"] != setting["kv_heads"],
    )


def reference(setting: Setting, t: Tensors) -> torch.Tensor:
    """The same from the formula, in float64 on whole tensors; its gradients are compared as well."""
    from attncheck.runner.reference import attention

    # CHANGE: layout="bshd" and causal="bottom_right" are flash-attn's conventions; it also takes
    # scale, window, softcap, bool_mask, bias, alibi_slopes.
    causal = "top_left" if setting.get("causal") else None
    return attention(t["q"], t["k"], t["v"], layout="bhsd", causal=causal)


PROBE = Probe(
    name="my_attention",
    summary="my_attention: a probe of my own",
    operators=(
        Operator(
            name="my_attention",
            tensors=tensors,
            call=call,
            reference=reference,
            output_dims=Q_DIMS,
            settings=(
                # CHANGE: what your users do. `level` is the lowest scan level that includes it.
                Setting("causal", {**SIZES, "kv_sequence": 18}, options={"causal": True}),
                Setting("gqa", {**SIZES, "heads": 20}, options={"causal": True}),
                Setting("bfloat16", SIZES, "bfloat16", {"causal": True}),
                # On CPU a call without causal costs PyTorch's search for a strategy 10 to 30 s.
                Setting("plain", SIZES, level="full"),
            ),
            placements=("replicate", "batch", "heads", "sequence"),
            # packages=("my-kernels>=1.2",),  # distributions it needs; unavailable without them
            # kernel_ops=("mine.attention_forward.default",),  # what it is expected to reach
            # bypasses=("my_kernels._C",),  # functions that are no dispatcher ops: kept from DTensors
            # devices=("cuda",),
        ),
    ),
)
