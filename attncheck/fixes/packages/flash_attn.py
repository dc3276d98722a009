"""flash-attn 2, from 2.7.0 on, which made its four kernels dispatcher ops (2.8.3.post2 is the last release).

Arguments go by name: the packed forward gained `zero_tensors` in 2.7.4 and gains `num_splits` in what is to
come. `flash_attn_with_kvcache` is no op in any of them, nor is anything before 2.7.

The backwards write into buffers that flash-attn makes like q, k and v, and return softmax_d alone. So a row
whose dk and dv would be sums is impossible there: k and v that are whole get buffers that are whole.
"""

from __future__ import annotations

from attncheck.fixes.notation import Signature
from attncheck.fixes.packages.reasons import SHARED_MASKS

NO_DROPOUT = {"dropout_p": 0.0}
IMPORTS = "flash_attn"

DENSE_QKV = {"q": "b sq h d", "k": "b sk g d", "v": "b sk g d"}
PACKED_QKV = {"q": "t h d", "k": "tk g d | pages rows g d", "v": "tk g d | pages rows g d"}
LENGTHS = {"cu_seqlens_q": "replicated", "cu_seqlens_k": "replicated"}

SIGNATURES = (
    Signature(
        "flash_attn._flash_attn_forward.default",
        takes={**DENSE_QKV, "alibi_slopes": "h | b h"},
        gives={
            "out": "b sq h d",
            "softmax_lse": "b h sq",
            "S_dmask": "replicated",  # empty without dropout
            "rng_state": "replicated",
        },
        needs=NO_DROPOUT,
        queries={
            "causal": False,
            "window_size_left": -1,
            "window_size_right": -1,
            "alibi_slopes": None,
        },
        because=SHARED_MASKS,
        imports=IMPORTS,
    ),
    Signature(
        "flash_attn._flash_attn_backward.default",
        takes={
            "dout": "b sq h d",
            **DENSE_QKV,
            "out": "b sq h d",
            "softmax_lse": "b h sq",
            "dq": "b sq h d, in place",
            "dk": "b sk g d, in place",
            "dv": "b sk g d, in place",
            "alibi_slopes": "h | b h",
            "rng_state": "replicated",
        },
        gives={"softmax_d": "b h padded"},
        needs=NO_DROPOUT,
        because=SHARED_MASKS,
        imports=IMPORTS,
    ),
    Signature(
        "flash_attn._flash_attn_varlen_forward.default",
        takes={
            **PACKED_QKV,
            **LENGTHS,
            "alibi_slopes": "h | sequences h",
            "block_table": "replicated",
            "leftpad_k": "replicated",
            "seqused_k": "replicated",
        },
        gives={
            "out": "t h d",
            "softmax_lse": "h t",
            "S_dmask": "replicated",
            "rng_state": "replicated",
        },
        needs=NO_DROPOUT,
        because=SHARED_MASKS,
        imports=IMPORTS,
    ),
    Signature(
        "flash_attn._flash_attn_varlen_backward.default",
        takes={
            "dout": "t h d",
            **PACKED_QKV,
            "out": "t h d",
            "softmax_lse": "h t",
            "dq": "t h d, in place",
            "dk": "tk g d, in place",
            "dv": "tk g d, in place",
            **LENGTHS,
            "alibi_slopes": "h | sequences h",
            "rng_state": "replicated",
        },
        gives={"softmax_d": "h padded"},
        needs=NO_DROPOUT,
        because=SHARED_MASKS,
        imports=IMPORTS,
    ),
)
