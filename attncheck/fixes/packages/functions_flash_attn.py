"""flash-attn 2's functions that are no dispatcher ops, or whose backward no strategy can mend.

Before 2.7 all of them hand their arguments to a compiled module. From 2.7 on the dense and varlen functions
are ops, whose strategies are in flash_attn.py; of the packed ones the forward is, but their backward writes
into slices of an ordinary tensor that the package makes itself. The cache functions never are ops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attncheck.fixes.notation import GIVEN, Signature
from attncheck.fixes.packages.reasons import SHARED_MASKS

NO_DROPOUT: Mapping[str, Any] = {"dropout_p": 0.0}
# ALiBi and windows go by position.
APART: Mapping[str, Any] = {
    "causal": False,
    "window_size[0]": -1,
    "window_size[1]": -1,
    "alibi_slopes": None,
}
SLOPES = {"alibi_slopes": "h | b h"}
GIVES = {"out": "b sq h d", "softmax_lse": "b h sq", "S_dmask": "replicated"}
# Packed sequences: tokens of all of them in one dim. To 2.5 each sequence had a row of the log-sum-exp.
VARLEN_GIVES = {"out": "t h d", "softmax_lse": "h t | n h longest", "S_dmask": "replicated"}
QUERY_LENGTHS = {"cu_seqlens_q": "replicated"}
LENGTHS = {**QUERY_LENGTHS, "cu_seqlens_k": "replicated"}

CACHED = "flash_attn.flash_attn_with_kvcache"
# What decoding takes besides queries, caches, and new keys and values.
TABLES = {"rotary_cos": "replicated", "rotary_sin": "replicated"}
DECODING = {
    **TABLES,
    "cache_seqlens": "b",
    "cache_leftpad": "b",
    **SLOPES,
}
NEW = {"k": "b new g d", "v": "b new g d"}
DECODED = {"out": "b sq h d", "softmax_lse": "b h sq"}


def _chosen(cache: str, how: str) -> Signature:
    """Sequences (`n`) that choose rows of the caches by number: a rank needs all rows, and all ranks need
    what one appends. So sequences are not sharded."""
    return Signature(
        CACHED,
        takes={
            "q": "n sq h d",
            "k_cache": f"{cache}, in place",
            "v_cache": f"{cache}, in place",
            "k": "n new g d",
            "v": "n new g d",
            **TABLES,
            "cache_seqlens": "n",
            "cache_leftpad": "n",
            "alibi_slopes": "h | n h",
            how: "n pages" if how == "block_table" else "n",
        },
        gives={"out": "n sq h d", "softmax_lse": "n h sq"},
        when={how: GIVEN},
    )


FUNCTIONS = (
    Signature(
        "flash_attn.flash_attn_func",
        takes={"q": "b sq h d", "k": "b sk g d", "v": "b sk g d", **SLOPES},
        gives=GIVES,
        needs=NO_DROPOUT,
        queries=APART,
        because=SHARED_MASKS,
        unless="flash_attn._flash_attn_forward.default",
    ),
    Signature(
        "flash_attn.flash_attn_kvpacked_func",
        takes={"q": "b sq h d", "kv": "b sk two g d", **SLOPES},
        gives=GIVES,
        needs=NO_DROPOUT,
        queries=APART,
        because=SHARED_MASKS,
    ),
    Signature(
        "flash_attn.flash_attn_qkvpacked_func",
        # Queries are keys here: to shard them is to shard the keys.
        takes={"qkv": "b s three h d", **SLOPES},
        gives={**GIVES, "out": "b s h d", "softmax_lse": "b h s"},
        needs=NO_DROPOUT,
        because=SHARED_MASKS,
    ),
    Signature(
        "flash_attn.flash_attn_varlen_func",
        takes={
            "q": "t h d",
            "k": "u g d | pages rows g d",
            "v": "u g d | pages rows g d",
            **LENGTHS,
            "block_table": "replicated",
            "alibi_slopes": "h | n h",
        },
        gives=VARLEN_GIVES,
        needs=NO_DROPOUT,
        because=SHARED_MASKS,
        unless="flash_attn._flash_attn_varlen_forward.default",
    ),
    Signature(
        "flash_attn.flash_attn_varlen_kvpacked_func",
        takes={"q": "t h d", "kv": "u two g d", **LENGTHS, "alibi_slopes": "h | n h"},
        gives=VARLEN_GIVES,
        needs=NO_DROPOUT,
        because=SHARED_MASKS,
    ),
    Signature(
        "flash_attn.flash_attn_varlen_qkvpacked_func",
        takes={"qkv": "t three h d", "cu_seqlens": "replicated", "alibi_slopes": "h | n h"},
        gives=VARLEN_GIVES,
        needs=NO_DROPOUT,
        because=SHARED_MASKS,
    ),
    _chosen("pages rows g d", "block_table"),
    _chosen("rows sk g d", "cache_batch_idx"),
    Signature(
        CACHED,
        takes={
            "q": "b sq h d",
            "k_cache": "b sk g d, in place",
            "v_cache": "b sk g d, in place",
            **NEW,
            **DECODING,
        },
        gives=DECODED,
        when={"k": GIVEN},  # it appends
    ),
    Signature(
        CACHED,
        takes={"q": "b sq h d", "k_cache": "b sk g d", "v_cache": "b sk g d", **DECODING},
        gives=DECODED,
        queries=APART,
    ),
)
