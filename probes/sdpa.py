"""`torch.nn.functional.scaled_dot_product_attention`, per backend that runs on this device."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

from attncheck.probing import (
    BATCH,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    KV_SEQUENCE,
    OTHER,
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
MASK_DIMS = (BATCH, HEADS, SEQUENCE, KV_SEQUENCE)

# All sizes differ, and so do their halves: a swapped or wrongly split dim cannot fit by coincidence.
BASE = {"batch": 6, "heads": 4, "kv_heads": 4, "sequence": 18, "kv_sequence": 22, "head_dim": 16}
SQUARE = {**BASE, "kv_sequence": 18}
GQA = {**BASE, "heads": 20}
GQA_UNEVEN_KV = {**BASE, "batch": 14, "heads": 20, "kv_heads": 5}
UNEVEN_HEADS = {**BASE, "batch": 14, "heads": 5, "kv_heads": 5}
UNEVEN_SEQUENCE = {**BASE, "sequence": 19, "kv_sequence": 25}
BATCH_1 = {**BASE, "batch": 1}
# q = 0 and v = identity make the dropout mask readable: see runner.oracle.judge_dropout.
DROPOUT = {**BASE, "kv_sequence": 16}

ALL = ("replicate", "batch", "heads", "sequence", "query", "head_dim", "partial")
COMMON = ("replicate", "batch", "heads", "sequence")
CORE = ("replicate", "heads")

MASK_BROADCASTS = {"full": (), "batch": (0,), "heads": (1,), "both": (0, 1)}


def tensors(setting: Setting) -> tuple[Tensor, ...]:
    q = Tensor("q", Q_DIMS, tuple(setting[r] for r in Q_DIMS))
    k = Tensor("k", KV_DIMS, tuple(setting[r] for r in KV_DIMS))
    v = Tensor("v", KV_DIMS, tuple(setting[r] for r in KV_DIMS))
    if setting.dropout:
        # Gradients of q = 0 would be differences of equal numbers: only v's says anything.
        q = Tensor("q", Q_DIMS, q.sizes, requires_grad=False, fill="zeros")
        k = Tensor("k", KV_DIMS, k.sizes, requires_grad=False)
        v = Tensor("v", KV_DIMS, v.sizes, fill="eye")
    kind = setting.get("mask")
    if kind is None:
        return q, k, v
    broadcast = MASK_BROADCASTS[setting.get("mask_broadcast", "full")]
    dims = tuple(OTHER if i in broadcast else role for i, role in enumerate(MASK_DIMS))
    sizes = tuple(1 if i in broadcast else setting[role] for i, role in enumerate(MASK_DIMS))
    mask = Tensor(
        "mask",
        dims,
        sizes,
        requires_grad=False,
        fill=f"{kind}_mask",
        wrap={"plain": "plain", "replicated": "replicate", "sharded": "pattern"}[
            setting.get("mask_as")
        ],
        dtype="bool" if kind == "bool" else None,
    )
    return q, k, v, mask


def call(backend: str | None, setting: Setting, t: Tensors) -> torch.Tensor:
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    choice = sdpa_kernel(SDPBackend.__members__[backend]) if backend else contextlib.nullcontext()
    with choice:
        return F.scaled_dot_product_attention(
            t["q"],
            t["k"],
            t["v"],
            attn_mask=t.get("mask"),
            dropout_p=setting.dropout,
            is_causal=bool(setting.get("causal", False)),
            scale=setting.get("scale"),
            enable_gqa=setting["heads"] != setting["kv_heads"],
        )


def reference(setting: Setting, t: Tensors) -> torch.Tensor:
    from attncheck.runner.reference import attention

    mask = t.get("mask")
    return attention(
        t["q"],
        t["k"],
        t["v"],
        scale=setting.get("scale"),
        causal="top_left" if setting.get("causal") else None,
        bool_mask=mask if setting.get("mask") == "bool" else None,
        bias=mask if setting.get("mask") == "float" else None,
    )


def mask_settings(level_of_sharded_dispatch: str) -> list[Setting]:
    """Bool and float masks: full and broadcast, as a plain tensor and as replicated or sharded DTensors.

    `level_of_sharded_dispatch`: where a mask that is a DTensor is too dear for the default level.
    """
    out = []
    for kind in ("bool", "float"):
        for broadcast in MASK_BROADCASTS:
            for mask_as in ("plain", "replicated", "sharded"):
                if kind == "bool" and broadcast in ("batch", "heads"):
                    continue  # the float mask covers these; a bool one takes the same path
                suffix = "" if broadcast == "full" else f"_bcast_{broadcast}"
                level = "default" if mask_as == "plain" else level_of_sharded_dispatch
                out.append(
                    Setting(
                        f"{kind}_mask_{mask_as}{suffix}",
                        BASE,
                        options={"mask": kind, "mask_as": mask_as, "mask_broadcast": broadcast},
                        level=level,
                        placements=COMMON if broadcast == "full" else CORE,
                    )
                )
    return out


# On CPU a non-causal call through the flash kernel sends PyTorch into a search over decompositions that
# costs 20 to 30 s per new shape, dtype or scale (and minutes with a mask that is a DTensor). The default
# level therefore gives these operators few such settings; `full` has them all.
DISPATCHED = (
    Setting("plain", BASE, level="quick", placements=ALL),
    Setting("causal", SQUARE, options={"causal": True}, level="quick", placements=ALL),
    Setting("gqa", GQA, placements=("replicate", "batch", "heads", "query")),
    Setting("gqa_causal", {**GQA, "kv_sequence": 18}, options={"causal": True}, placements=COMMON),
    Setting(
        "gqa_uneven_kv_causal",
        {**GQA_UNEVEN_KV, "kv_sequence": 18},
        options={"causal": True},
        placements=CORE,
    ),
    Setting("causal_cross", BASE, options={"causal": True}, placements=("replicate", "heads")),
    Setting("causal_scale", SQUARE, options={"causal": True, "scale": 0.3}, placements=CORE),
    Setting("bfloat16_causal", SQUARE, "bfloat16", options={"causal": True}, placements=COMMON),
    Setting("float16_causal", SQUARE, "float16", options={"causal": True}, placements=COMMON),
    Setting("dropout", DROPOUT, dropout=0.25, placements=COMMON),
    Setting("batch_1", BATCH_1, placements=("batch",)),
    Setting("scale", BASE, options={"scale": 0.3}, level="full"),
    Setting("bfloat16", BASE, "bfloat16", level="full"),
    Setting("float16", BASE, "float16", level="full"),
    Setting("uneven_heads", UNEVEN_HEADS, level="full"),
    Setting("uneven_sequence", UNEVEN_SEQUENCE, level="full"),
    Setting("gqa_uneven_kv", GQA_UNEVEN_KV, level="full"),
    # The one DTensor mask that is cheap here: nothing is sharded, so there is nothing to search.
    Setting(
        "float_mask_all_replicated",
        BASE,
        options={"mask": "float", "mask_as": "replicated"},
        placements=("replicate",),
    ),
    *mask_settings("full"),
)

MATH = (
    Setting("plain", BASE, level="quick", placements=ALL),
    Setting("causal", SQUARE, options={"causal": True}, level="quick", placements=ALL),
    Setting("scale", BASE, options={"scale": 0.3}, placements=CORE),
    Setting("bfloat16", BASE, "bfloat16", placements=COMMON),
    Setting("float16", BASE, "float16", placements=COMMON),
    Setting("gqa", GQA, placements=ALL),
    Setting("gqa_uneven_kv", GQA_UNEVEN_KV, placements=COMMON),
    Setting("uneven_heads", UNEVEN_HEADS, placements=COMMON),
    Setting("uneven_sequence", UNEVEN_SEQUENCE, placements=("sequence", "query")),
    Setting("batch_1", BATCH_1, placements=("replicate", "batch", "heads")),
    Setting("dropout", DROPOUT, dropout=0.25, placements=COMMON),
    *mask_settings("default"),
)


def operator(
    name: str,
    backend: str | None,
    settings: tuple[Setting, ...],
    kernel_ops: tuple[str, ...],
    slow: bool,
) -> Operator:
    return Operator(
        name=name,
        function="torch.nn.functional.scaled_dot_product_attention",
        tensors=tensors,
        call=partial(call, backend),
        reference=reference,
        settings=settings,
        output_dims=Q_DIMS,
        kernel_ops=kernel_ops,
        placements=COMMON,
        slow=slow,
    )


FLASH_CPU_OPS = (
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
)

PROBE = Probe(
    name="sdpa",
    summary="F.scaled_dot_product_attention: default dispatch, MATH, FLASH_ATTENTION",
    operators=(
        operator(
            "sdpa[MATH]", "MATH", MATH, ("aten.bmm.default", "aten._safe_softmax.default"), False
        ),
        operator("sdpa", None, DISPATCHED, FLASH_CPU_OPS, True),
        operator("sdpa[FLASH_ATTENTION]", "FLASH_ATTENTION", DISPATCHED, FLASH_CPU_OPS, True),
    ),
)
