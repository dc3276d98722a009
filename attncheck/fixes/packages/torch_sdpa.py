"""The ops of `F.scaled_dot_product_attention` that PyTorch has no strategy for, in either direction (2.6 to
2.15): what it calls on a CPU, and what XPU and out-of-tree devices override."""

from __future__ import annotations

from attncheck.fixes.notation import Signature
from attncheck.fixes.packages.reasons import SHARED_MASKS

NO_DROPOUT = {"dropout_p": 0.0}

QKV = {"query": "b h sq d", "key": "b g sk d", "value": "b g sk d"}
SAVED = {"out": "b h sq d", "logsumexp": "b h sq"}
MASK = "b h sq sk | sq sk"

SIGNATURES = (
    Signature(
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        takes={**QKV, "attn_mask": MASK},
        gives={"output": "b h sq d", "logsumexp": "b h sq"},
        needs=NO_DROPOUT,
        queries={"is_causal": False},
        because=SHARED_MASKS,
    ),
    Signature(
        "aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
        takes={"grad_out": "b h sq d", **QKV, **SAVED, "attn_mask": MASK},
        gives={
            "grad_query": "b h sq d",
            "grad_key": "b g sk d, summed over h sq",
            "grad_value": "b g sk d, summed over h sq",
        },
        needs=NO_DROPOUT,
        queries={"is_causal": False},
        because=SHARED_MASKS,
    ),
    # No queries: the forward returns how many there were on its rank, as a number that the backward gets.
    Signature(
        "aten._scaled_dot_product_fused_attention_overrideable.default",
        takes={**QKV, "attn_bias": MASK},
        gives={
            "output": "b h sq d",
            "logsumexp": "b h sq",
            "cum_seq_q": "none",
            "cum_seq_k": "none",
            "max_q": "none",
            "max_k": "none",
            "philox_seed": "replicated",
            "philox_offset": "replicated",
            "debug_attn_mask": "none",
        },
        needs=NO_DROPOUT,
        because=SHARED_MASKS,
    ),
    Signature(
        "aten._scaled_dot_product_fused_attention_overrideable_backward.default",
        takes={
            "grad_out": "b h sq d",
            **QKV,
            "attn_bias": MASK,
            **SAVED,
            "philox_seed": "replicated",
            "philox_offset": "replicated",
        },
        gives={
            "grad_query": "b h sq d",
            "grad_key": "b g sk d, summed over h",
            "grad_value": "b g sk d, summed over h",
            "grad_attn_bias": "like attn_bias, summed over b h, if grad_input_mask[3]",
        },
        needs=NO_DROPOUT,
        because=SHARED_MASKS,
    ),
)
