"""Ops of `F.scaled_dot_product_attention` on CUDA whose own strategies are wrong, and are replaced.

- Flash and cuDNN shard heads without looking at the groups: 12 query and 3 kv heads on 2 ranks are 6 and 2 on
  one and 6 and 1 on the other, and silently read the wrong keys. Seen on 2.9.1, 2.13.0 and 2.14.1.
- cuDNN fails with every bias (`input_specs(3) != strategies(4)`). Seen on 2.13.0, not on 2.14.1.

(reports/published/bugs has both.) Efficient attention is left alone. Its backward is served stale where a
bias is learned after it was frozen, but works on a rank without rows, which is not offered here. Dropout
stays as PyTorch has it: each rank draws for itself, which is right where ranks have seeds of their own.
"""

from __future__ import annotations

from attncheck.fixes.notation import Signature

# From the oldest version they were seen wrong on to the first that nobody looked at.
GQA_IS_WRONG = ("2.9", "2.15")

QKV = {"query": "b h sq d", "key": "b g sk d", "value": "b g sk d"}
BIAS = "b h sq sk"
NO_NUMBERS = {"cum_seq_q": "none", "cum_seq_k": "none", "max_q": "none", "max_k": "none"}
GRADS = {
    "grad_query": "b h sq d",
    "grad_key": "b g sk d, summed over h sq",
    "grad_value": "b g sk d, summed over h sq",
}
STATE = {"philox_seed": "replicated", "philox_offset": "replicated"}
# The seeds are numbers in a tensor without dims, which DTensor hands on as it is.
PLAIN_STATE = {"philox_seed": "none", "philox_offset": "none"}
NOT_CAUSAL = {"is_causal": False, "dropout_p": 0.0}

FLASH_FORWARD = "aten._scaled_dot_product_flash_attention.default"
FLASH_GIVES = {
    "output": "b h sq d",
    "logsumexp": "b h sq",
    **NO_NUMBERS,
    "rng_state": "replicated",
    "unused": "none",
}

FLASH = (
    Signature(
        FLASH_FORWARD,
        when={"return_debug_mask": False},
        takes=QKV,
        gives={**FLASH_GIVES, "debug_attn_mask": "replicated"},  # empty
        queries=NOT_CAUSAL,
        overrides=GQA_IS_WRONG,
    ),
    Signature(
        FLASH_FORWARD,
        when={"return_debug_mask": True},
        takes=QKV,
        gives={**FLASH_GIVES, "debug_attn_mask": "b h padded padded_k"},
        overrides=GQA_IS_WRONG,
    ),
    Signature(
        "aten._scaled_dot_product_flash_attention_backward.default",
        takes={
            "grad_out": "b h sq d",
            **QKV,
            "out": "b h sq d",
            "logsumexp": "b h sq",
            "cum_seq_q": "replicated",
            "cum_seq_k": "replicated",
            **STATE,
        },
        gives=GRADS,
        queries=NOT_CAUSAL,
        overrides=GQA_IS_WRONG,
    ),
)


# No queries: the backward reads how many there are from an argument, which the forward returned on its rank.
CUDNN_QKV = {"query": "b h sq d", "key": "b g sk d", "value": "b g sk dv"}
CUDNN = (
    Signature(
        "aten._scaled_dot_product_cudnn_attention.default",
        takes={**CUDNN_QKV, "attn_bias": BIAS},
        gives={
            "output": "b h sq dv",
            "logsumexp": "b h sq 1, if compute_log_sumexp",
            **NO_NUMBERS,
            **PLAIN_STATE,
            "debug_attn_mask": "none",
        },
        overrides=GQA_IS_WRONG,
    ),
    Signature(
        "aten._scaled_dot_product_cudnn_attention_backward.default",
        takes={
            "grad_out": "b h sq dv",
            **CUDNN_QKV,
            "out": "b h sq dv",
            "logsumexp": "b h sq 1 | b h sq",
            **STATE,
            "attn_bias": BIAS,
            "cum_seq_q": "replicated",
            "cum_seq_k": "replicated",
        },
        gives={
            "grad_query": "b h sq d",
            "grad_key": "b g sk d, summed over h",
            "grad_value": "b g sk dv, summed over h",
        },
        overrides=GQA_IS_WRONG,
    ),
)

SIGNATURES = (*FLASH, *CUDNN)
