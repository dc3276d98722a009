"""`torch.nn.attention.varlen` (torch 2.10 on): sequences packed one behind the other, so that only heads can
be sharded. With `block_table` (2.13) keys and values lie in pages."""

from __future__ import annotations

from attncheck.fixes.notation import Signature

QKV = {"query": "t h d", "key": "tk g d | pages rows g d", "value": "tk g d | pages rows g d"}
LENGTHS = {"cu_seq_q": "replicated", "cu_seq_k": "replicated"}
PAGES = {"seqused_k": "replicated", "block_table": "replicated"}
IMPORTS = "torch.nn.attention.varlen"

SIGNATURES = (
    Signature(
        "torch_attn._varlen_attn.default",
        takes={**QKV, **LENGTHS, **PAGES},
        gives={"out": "t h d", "lse": "h t", "rng_state": "replicated"},
        imports=IMPORTS,
    ),
    Signature(
        "torch_attn._varlen_attn_backward.default",
        takes={
            "grad_out": "t h d",
            **QKV,
            "out": "t h d",
            "lse": "h t",
            **LENGTHS,
            "rng_state": "replicated",
        },
        gives={
            "grad_query": "t h d",
            "grad_key": "tk g d, summed over h",
            "grad_value": "tk g d, summed over h",
        },
        imports=IMPORTS,
    ),
    Signature(
        "torch_attn._varlen_attn_out.default",
        takes={"out": "t h d, in place", **QKV, **LENGTHS, **PAGES},
        gives={"lse": "h t"},
        imports=IMPORTS,
    ),
)
