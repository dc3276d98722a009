"""xformers' own ops (0.0.35): flash-attn 2 and 3 behind `memory_efficient_attention`. Its cutlass kernels are
`aten._efficient_attention_*`, which torch_kernels describes.

Here no op writes into buffers, so that gradients can be sums.
"""

from __future__ import annotations

from attncheck.fixes.notation import GIVEN, Signature
from attncheck.fixes.packages.reasons import SHARED_MASKS

NO_DROPOUT = {"p": 0.0}
IMPORTS = "xformers.ops.fmha"

DENSE = {"cu_seqlens_q": None, "cu_seqlens_k": None, "seqused_k": None}
PACKED = {"cu_seqlens_q": GIVEN, "cu_seqlens_k": GIVEN}
QKV = {"query": "b sq h d", "key": "b sk g d", "value": "b sk g d"}
PACKED_QKV = {
    "query": "t h d",
    "key": "tk g d | pages rows g d",
    "value": "tk g d | pages rows g d",
}
LENGTHS = {"cu_seqlens_q": "replicated", "cu_seqlens_k": "replicated"}
QUERIES = {"is_causal": False, "window_left": -1, "window_right": -1}
GRADS = {
    "dq": "b sq h d",
    "dk": "b sk g d, summed over h sq",
    "dv": "b sk g d, summed over h sq",
}
PACKED_GRADS = {
    "dq": "t h d",
    "dk": "tk g d, summed over h",
    "dv": "tk g d, summed over h",
}

FLASH_FORWARD = "xformers_flash.flash_fwd.default"
FLASH_BACKWARD = "xformers_flash.flash_bwd.default"
FLASH = (
    Signature(
        FLASH_FORWARD,
        when=DENSE,
        takes=QKV,
        gives={"out": "b sq h d", "lse": "b h sq", "rng_state": "replicated"},
        needs=NO_DROPOUT,
        queries=QUERIES,
        because=SHARED_MASKS,
        imports=IMPORTS,
    ),
    Signature(
        FLASH_FORWARD,
        when=PACKED,
        takes={
            **PACKED_QKV,
            **LENGTHS,
            "seqused_k": "replicated",
            "block_tables": "replicated",
        },
        gives={"out": "t h d", "lse": "h t", "rng_state": "replicated"},
        needs=NO_DROPOUT,
        because=SHARED_MASKS,
        imports=IMPORTS,
    ),
    Signature(
        FLASH_BACKWARD,
        when=DENSE,
        takes={
            "grad": "b sq h d",
            **QKV,
            "out": "b sq h d",
            "lse": "b h sq",
            "rng_state": "replicated",
        },
        gives=GRADS,
        needs=NO_DROPOUT,
        queries=QUERIES,
        because=SHARED_MASKS,
        imports=IMPORTS,
    ),
    Signature(
        FLASH_BACKWARD,
        when=PACKED,
        takes={
            "grad": "t h d",
            **PACKED_QKV,
            "out": "t h d",
            "lse": "h t",
            **LENGTHS,
            "rng_state": "replicated",
        },
        gives=PACKED_GRADS,
        needs=NO_DROPOUT,
        because=SHARED_MASKS,
        imports=IMPORTS,
    ),
)

FLASH3_FORWARD = "xformers_flash3.flash_fwd.default"
FLASH3_BACKWARD = "xformers_flash3.flash_bwd.default"
FLASH3 = (
    Signature(
        FLASH3_FORWARD,
        when=DENSE,
        takes=QKV,
        gives={"out": "b sq h d", "lse": "b h sq"},
        needs=NO_DROPOUT,
        queries=QUERIES,
        because=SHARED_MASKS,
        imports=IMPORTS,
    ),
    Signature(
        FLASH3_FORWARD,
        when=PACKED,
        takes={
            **PACKED_QKV,
            **LENGTHS,
            "seqused_k": "replicated",
            "leftpad_k": "replicated",
            "block_table": "replicated",
        },
        gives={"out": "t h d", "lse": "h t"},
        needs=NO_DROPOUT,
        because=SHARED_MASKS,
        imports=IMPORTS,
    ),
    Signature(
        FLASH3_BACKWARD,
        when=DENSE,
        takes={"dout": "b sq h d", **QKV, "out": "b sq h d", "softmax_lse": "b h sq"},
        gives=GRADS,
        queries=QUERIES,
        imports=IMPORTS,
    ),
    Signature(
        FLASH3_BACKWARD,
        when=PACKED,
        takes={
            "dout": "t h d",
            **PACKED_QKV,
            "out": "t h d",
            "softmax_lse": "one h t | h t",  # it comes in with the batch of one
            **LENGTHS,
        },
        gives=PACKED_GRADS,
        imports=IMPORTS,
    ),
)

SIGNATURES = (*FLASH, *FLASH3)
