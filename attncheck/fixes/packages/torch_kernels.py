"""The raw attention kernels of PyTorch, which nested tensors, `varlen` and xformers (cutlass) call.

None has a strategy (2.6 to 2.15). Each has a dense form and a packed one, with `cu_seqlens`, where only heads
can be sharded.

Efficient attention takes no groups of heads. Its log-sum-exp is padded to a multiple of 32 queries, so that a
part of the queries does not give a part of it; cuDNN's backward reads the number of queries from an argument.
Neither has a row for queries.
"""

from __future__ import annotations

from attncheck.fixes.notation import GIVEN, Signature
from attncheck.fixes.packages.reasons import SHARED_MASKS

NO_DROPOUT = {"dropout_p": 0.0}

# Flash: (batch, sequence, heads, head_dim), packed (tokens, heads, head_dim).
FLASH_FORWARD = "aten._flash_attention_forward.default"
FLASH_BACKWARD = "aten._flash_attention_backward.default"
FLASH_QKV = {"query": "b sq h d", "key": "b sk g d", "value": "b sk g d"}
FLASH_PACKED_QKV = {
    "query": "t h d",
    "key": "tk g d | pages rows g d",
    "value": "tk g d | pages rows g d",
}
FLASH_LENGTHS = {"cum_seq_q": "replicated", "cum_seq_k": "replicated"}
FLASH_STATE = {"rng_state": "replicated", "unused": "replicated"}
FLASH_QUERIES = {
    "is_causal": False,
    "window_size_left": (None, -1),
    "window_size_right": (None, -1),
}

FLASH = (
    Signature(
        FLASH_FORWARD,
        when={"cum_seq_q": None, "cum_seq_k": None},
        takes={**FLASH_QKV, "alibi_slopes": "h | b h"},
        gives={
            "output": "b sq h d",
            "softmax_logsumexp": "b h sq",
            **FLASH_STATE,
            "debug_attn_mask": "replicated",  # empty without dropout
        },
        needs=NO_DROPOUT,
        queries={**FLASH_QUERIES, "alibi_slopes": None},
        because=SHARED_MASKS,
    ),
    Signature(
        FLASH_FORWARD,
        when={"cum_seq_q": GIVEN, "cum_seq_k": GIVEN},
        takes={
            **FLASH_PACKED_QKV,
            **FLASH_LENGTHS,
            "seqused_k": "replicated",
            "alibi_slopes": "h | sequences h",
            "block_table": "replicated",
        },
        gives={
            "output": "t h d",
            "softmax_logsumexp": "h t",
            **FLASH_STATE,
            "debug_attn_mask": "replicated",
        },
        needs=NO_DROPOUT,
        because=SHARED_MASKS,
    ),
    Signature(
        FLASH_BACKWARD,
        when={"cum_seq_q": None, "cum_seq_k": None},
        takes={
            "grad_out": "b sq h d",
            **FLASH_QKV,
            "out": "b sq h d",
            "logsumexp": "b h sq",
            **FLASH_STATE,
        },
        gives={
            "grad_query": "b sq h d",
            "grad_key": "b sk g d, summed over h sq",
            "grad_value": "b sk g d, summed over h sq",
        },
        needs=NO_DROPOUT,
        queries=FLASH_QUERIES,
        because=SHARED_MASKS,
    ),
    Signature(
        FLASH_BACKWARD,
        when={"cum_seq_q": GIVEN, "cum_seq_k": GIVEN},
        takes={
            "grad_out": "t h d",
            **FLASH_PACKED_QKV,
            "out": "t h d",
            "logsumexp": "h t",
            **FLASH_LENGTHS,
            **FLASH_STATE,
        },
        gives={
            "grad_query": "t h d",
            "grad_key": "tk g d, summed over h",
            "grad_value": "tk g d, summed over h",
        },
        needs=NO_DROPOUT,
        because=SHARED_MASKS,
    ),
)

# Efficient: (batch, sequence, heads, head_dim); packed, the batch is one, and the log-sum-exp counts
# sequences.
EFFICIENT_FORWARD = "aten._efficient_attention_forward.default"
EFFICIENT_BACKWARD = "aten._efficient_attention_backward.default"
EFFICIENT_QKV = {"query": "b sq h d", "key": "b sk h d", "value": "b sk h dv"}
EFFICIENT_PACKED_QKV = {"query": "one t h d", "key": "one tk h d", "value": "one tk h dv"}
EFFICIENT_LENGTHS = {"cu_seqlens_q": "replicated", "cu_seqlens_k": "replicated"}
STATE = {"philox_seed": "replicated", "philox_offset": "replicated"}
LONGEST = {"max_seqlen_batch_q": "none", "max_seqlen_batch_k": "none"}

EFFICIENT = (
    Signature(
        EFFICIENT_FORWARD,
        when={"cu_seqlens_q": None, "cu_seqlens_k": None},
        takes={**EFFICIENT_QKV, "bias": "b h sq sk", "seqlen_k": "b"},
        gives={"output": "b sq h dv", "logsumexp": "b h padded", **STATE, **LONGEST},
        needs=NO_DROPOUT,
        because=SHARED_MASKS,
    ),
    Signature(
        EFFICIENT_FORWARD,
        when={"cu_seqlens_q": GIVEN, "cu_seqlens_k": GIVEN},
        takes={**EFFICIENT_PACKED_QKV, **EFFICIENT_LENGTHS, "seqlen_k": "replicated"},
        gives={"output": "one t h dv", "logsumexp": "sequences h padded", **STATE, **LONGEST},
        needs=NO_DROPOUT,
        because=SHARED_MASKS,
    ),
    Signature(
        EFFICIENT_BACKWARD,
        when={"cu_seqlens_q": None, "cu_seqlens_k": None},
        takes={
            "grad_out_": "b sq h dv",
            **EFFICIENT_QKV,
            "bias": "b h sq sk",
            "out": "b sq h dv",
            "logsumexp": "b h padded",
            **STATE,
        },
        gives={
            "grad_query": "b sq h d",
            "grad_key": "b sk h d",
            "grad_value": "b sk h dv",
            "grad_bias": "like bias, summed over b h, if bias_requires_grad",
        },
        needs=NO_DROPOUT,
        because=SHARED_MASKS,
    ),
    Signature(
        EFFICIENT_BACKWARD,
        when={"cu_seqlens_q": GIVEN, "cu_seqlens_k": GIVEN},
        takes={
            "grad_out_": "one t h dv",
            **EFFICIENT_PACKED_QKV,
            "out": "one t h dv",
            **EFFICIENT_LENGTHS,
            "logsumexp": "sequences h padded",
            **STATE,
        },
        gives={
            "grad_query": "one t h d",
            "grad_key": "one tk h d",
            "grad_value": "one tk h dv",
            "grad_bias": "none",
        },
        needs=NO_DROPOUT,
        because=SHARED_MASKS,
    ),
)

# cuDNN: (batch, heads, sequence, head_dim), packed (tokens, heads, head_dim). No Meta kernel (2.13). Its
# log-sum-exp has a last dim of 1, and some versions give it without. A bias gets no gradient.
CUDNN_FORWARD = "aten._cudnn_attention_forward.default"
CUDNN_BACKWARD = "aten._cudnn_attention_backward.default"
CUDNN_QKV = {"query": "b h sq d", "key": "b g sk d", "value": "b g sk dv"}
CUDNN_PACKED_QKV = {"query": "t h d", "key": "tk g d", "value": "tk g dv"}
CUDNN_LENGTHS = {"cum_seq_q": "replicated", "cum_seq_k": "replicated"}
CUDNN_BIAS = "b h sq sk"
CUDNN_REST = {
    "max_q": "none",
    "max_k": "none",
    "philox_seed": "replicated, int64",
    "philox_offset": "replicated, int64",
    "debug_attn_mask": "none",
}

CUDNN = (
    Signature(
        CUDNN_FORWARD,
        when={"cum_seq_q": None, "cum_seq_k": None},
        takes={**CUDNN_QKV, "attn_bias": CUDNN_BIAS},
        gives={
            "output": "b h sq dv",
            "logsumexp": "b h sq 1, if compute_log_sumexp, float32",
            "cum_seq_q": "none",
            "cum_seq_k": "none",
            **CUDNN_REST,
        },
        needs=NO_DROPOUT,
        because=SHARED_MASKS,
        fake=True,
    ),
    Signature(
        CUDNN_FORWARD,
        when={"cum_seq_q": GIVEN, "cum_seq_k": GIVEN},
        takes={**CUDNN_PACKED_QKV, **CUDNN_LENGTHS},
        gives={
            "output": "t h dv",
            "logsumexp": "t h 1, if compute_log_sumexp, float32",
            "cum_seq_q": "like cum_seq_q, int32",
            "cum_seq_k": "like cum_seq_k, int32",
            **CUDNN_REST,
        },
        needs=NO_DROPOUT,
        because=SHARED_MASKS,
        fake=True,
    ),
    Signature(
        CUDNN_BACKWARD,
        when={"cum_seq_q": None, "cum_seq_k": None},
        takes={
            "grad_out": "b h sq dv",
            **CUDNN_QKV,
            "out": "b h sq dv",
            "logsumexp": "b h sq 1 | b h sq",
            **STATE,
            "attn_bias": CUDNN_BIAS,
        },
        gives={
            "grad_query": "b h sq d",
            "grad_key": "b g sk d, summed over h",
            "grad_value": "b g sk dv, summed over h",
        },
        needs=NO_DROPOUT,
        because=SHARED_MASKS,
        fake=True,
    ),
    Signature(
        CUDNN_BACKWARD,
        when={"cum_seq_q": GIVEN, "cum_seq_k": GIVEN},
        takes={
            "grad_out": "t h dv",
            **CUDNN_PACKED_QKV,
            "out": "t h dv",
            "logsumexp": "t h 1 | t h",
            **STATE,
            **CUDNN_LENGTHS,
        },
        gives={
            "grad_query": "t h d",
            "grad_key": "tk g d, summed over h",
            "grad_value": "tk g dv, summed over h",
        },
        needs=NO_DROPOUT,
        because=SHARED_MASKS,
        fake=True,
    ),
)

SIGNATURES = (*FLASH, *EFFICIENT, *CUDNN)
