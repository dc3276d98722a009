"""`F.scaled_dot_product_attention` on a CPU: PyTorch has no strategy for either direction (2.6 to 2.15)."""

from __future__ import annotations

from attncheck.fixes.notation import Signature

NO_DROPOUT = {"dropout_p": 0.0}
BECAUSE = "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"

SIGNATURES = (
    Signature(
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        takes={
            "query": "b h sq d",
            "key": "b g sk d",
            "value": "b g sk d",
            "attn_mask": "b h sq sk | sq sk",
        },
        gives={"output": "b h sq d", "logsumexp": "b h sq"},
        needs=NO_DROPOUT,
        queries={"is_causal": False},
        because=BECAUSE,
    ),
    Signature(
        "aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
        takes={
            "grad_out": "b h sq d",
            "query": "b h sq d",
            "key": "b g sk d",
            "value": "b g sk d",
            "out": "b h sq d",
            "logsumexp": "b h sq",
            "attn_mask": "b h sq sk | sq sk",
        },
        gives={
            "grad_query": "b h sq d",
            "grad_key": "b g sk d, summed over h sq",
            "grad_value": "b g sk d, summed over h sq",
        },
        needs=NO_DROPOUT,
        queries={"is_causal": False},
        because=BECAUSE,
    ),
)
