"""flash-attn 3 (on no package index): the raw ops of 3.0.0.b1 and the custom ops of 3.0.0.

The raw ops have no Meta kernel. The forward gets one made of what stands here. The backward (`bwd`) returns
its work space too, whose sizes follow from blocks that the kernel chooses by head_dim, mask and GPU: nobody
can say them from outside, so it has no strategy. Its functions are wrapped instead (functions_flash_attn_3).

Not described, so that calls with them are refused: caches and pages (`k_new`, `page_table`, `kv_batch_idx`,
`leftpad_k`, rotary), `seqused_*` and fp8 (`*_descale`): there is nothing to check a description against.
"""

from __future__ import annotations

from attncheck.fixes.notation import GIVEN, Signature

# With 0 the kernel chooses, and with more than 1 it returns its partial results too.
ONE_SPLIT = {"num_splits": 1}
BECAUSE = "what it returns then depends on how the kernel splits the keys"
IMPORTS = "flash_attn_interface"

DENSE = {"cu_seqlens_q": None, "cu_seqlens_k": None}
PACKED = {"cu_seqlens_q": GIVEN, "cu_seqlens_k": GIVEN}
QKV = {"q": "b sq h d", "k": "b sk g d", "v": "b sk g dv"}
PACKED_QKV = {"q": "t h d", "k": "tk g d", "v": "tk g dv"}
LENGTHS = {"cu_seqlens_q": "replicated", "cu_seqlens_k": "replicated"}
BUFFERS = {
    "dq": "b sq h d, in place",
    "dk": "b sk g d, in place",
    "dv": "b sk g dv, in place",
}
PACKED_BUFFERS = {"dq": "t h d, in place", "dk": "tk g d, in place", "dv": "tk g dv, in place"}
NO_WINDOW = {"window_size_left": -1, "window_size_right": -1, "attention_chunk": 0}

RAW_FORWARD = "flash_attn_3.fwd.default"
RAW = (
    Signature(
        RAW_FORWARD,
        when=DENSE,
        takes={**QKV, "q_v": "b sq h dv", "out": "b sq h dv, in place"},
        gives={
            "out": "b sq h dv",
            "softmax_lse": "b h sq, float32",
            "out_accum": "none",
            "softmax_lse_accum": "none",
        },
        needs=ONE_SPLIT,
        queries={"is_causal": False, **NO_WINDOW},
        because=BECAUSE,
        imports=IMPORTS,
        fake=True,
    ),
    Signature(
        RAW_FORWARD,
        when=PACKED,
        takes={**PACKED_QKV, "q_v": "t h dv", "out": "t h dv, in place", **LENGTHS},
        gives={
            "out": "t h dv",
            "softmax_lse": "h t, float32",
            "out_accum": "none",
            "softmax_lse_accum": "none",
        },
        needs=ONE_SPLIT,
        because=BECAUSE,
        imports=IMPORTS,
        fake=True,
    ),
)

CUSTOM_FORWARD = "flash_attn_3._flash_attn_forward.default"
CUSTOM_BACKWARD = "flash_attn_3._flash_attn_backward.default"
CUSTOM = (
    Signature(
        CUSTOM_FORWARD,
        when=DENSE,
        takes={**QKV, "qv": "b sq h dv", "out_": "b sq h dv, in place"},
        gives={
            "out": "b sq h dv",
            "softmax_lse": "b h sq",
            "out_accum": "replicated",  # empty
            "softmax_lse_accum": "replicated",
        },
        needs=ONE_SPLIT,
        queries={"causal": False, **NO_WINDOW},
        because=BECAUSE,
        imports=IMPORTS,
    ),
    Signature(
        CUSTOM_FORWARD,
        when=PACKED,
        takes={**PACKED_QKV, "qv": "t h dv", "out_": "t h dv, in place", **LENGTHS},
        gives={
            "out": "t h dv",
            "softmax_lse": "h t",
            "out_accum": "replicated",
            "softmax_lse_accum": "replicated",
        },
        needs=ONE_SPLIT,
        because=BECAUSE,
        imports=IMPORTS,
    ),
    Signature(
        CUSTOM_BACKWARD,
        when=DENSE,
        takes={
            "dout": "b sq h dv",
            **QKV,
            "out": "b sq h dv",
            "softmax_lse": "b h sq",
            **BUFFERS,
        },
        gives={"softmax_d": "b h padded"},
        imports=IMPORTS,
    ),
    Signature(
        CUSTOM_BACKWARD,
        when=PACKED,
        takes={
            "dout": "t h dv",
            **PACKED_QKV,
            "out": "t h dv",
            "softmax_lse": "h t",
            **PACKED_BUFFERS,
            **LENGTHS,
        },
        gives={"softmax_d": "h padded"},
        imports=IMPORTS,
    ),
)

SIGNATURES = (*RAW, *CUSTOM)
