"""Functions without dispatcher ops whose kernels run on NVIDIA GPUs alone: flash-attn 4 and SageAttention.

Read off flash-attn-4 4.0.0b36 and sageattention 1.0.6 as PyPI has them (2.x of it is not there). The wrappers
are tested with stand-ins: functions of the same parameters and other kernels.
"""

from __future__ import annotations

from attncheck.fixes.notation import Signature

# Score functions, blocks and gathered keys go by positions or hold tensors of their own; MLA has other dims.
FA4_NEEDS = dict.fromkeys(
    [
        *("qv", "gather_kv_indices", "score_mod", "score_mod_bwd", "mask_mod", "aux_tensors"),
        *("block_sparse_tensors", "block_sparse_tensors_bwd"),
    ]
)
FA4_BECAUSE = (
    "what it calls or looks up goes by positions in the whole, and a rank has those of its shard"
)

FUNCTIONS = (
    Signature(
        "flash_attn.cute.flash_attn_func",
        takes={"q": "b sq h d", "k": "b sk g d", "v": "b sk g dv", "learnable_sink": "h"},
        gives={"out": "b sq h dv", "lse": "b h sq"},
        needs=FA4_NEEDS,
        queries={"causal": False, "window_size[0]": None, "window_size[1]": None},
        because=FA4_BECAUSE,
    ),
    Signature(
        "flash_attn.cute.flash_attn_varlen_func",
        takes={
            "q": "t h d",
            "k": "u g d | pages rows g d",
            "v": "u g dv | pages rows g dv",
            "cu_seqlens_q": "replicated",
            "cu_seqlens_k": "replicated",
            "seqused_q": "replicated",
            "seqused_k": "replicated",
            "page_table": "replicated",
            "learnable_sink": "h",
        },
        gives={"out": "t h dv", "lse": "h t"},
        needs={
            name: wanted for name, wanted in FA4_NEEDS.items() if name != "block_sparse_tensors_bwd"
        }
        | {"scheduler_metadata": None},
        because=FA4_BECAUSE,
    ),
    # Sage takes the mean of all keys off them, and quantises queries in blocks: rows are not sharded.
    Signature(
        "sageattention.sageattn",
        takes={"q": "b h s d", "k": "b g sk d", "v": "b g sk d"},
        gives={"out": "b h s d"},
        when={"tensor_layout": "HND"},
    ),
    Signature(
        "sageattention.sageattn",
        takes={"q": "b s h d", "k": "b sk g d", "v": "b sk g d"},
        gives={"out": "b s h d"},
        when={"tensor_layout": "NHD"},
    ),
    Signature(
        "sageattention.sageattn_varlen",
        takes={
            "q": "t h d",
            "k": "u g d",
            "v": "u g d",
            "cu_seqlens_q": "replicated",
            "cu_seqlens_k": "replicated",
        },
        gives={"out": "t h d"},
    ),
)
