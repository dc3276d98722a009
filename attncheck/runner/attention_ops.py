"""Which dispatcher ops are attention."""

from __future__ import annotations

import re
from typing import Any

from attncheck.runner import signature

# What attention ops are called, namespaces included: in a generated one (`_flash_attn_9e27194::fwd`) it
# may be the namespace alone that says it. Their parts (`_transform_bias_rescale_qkv`) belong to them.
NAMES = re.compile(
    r"attention|attn|fmha|sdpa?_|_sdp|multi_?head|(^|::)mha_|_qkv|transformer_encoder"
    r"|^(npu|natten|aiter|mslk\w*)::\w*(na[123]d|fused_infer|fwd|bwd)",
    re.IGNORECASE,
)
ROLES = (signature.QUERY, signature.KEY, signature.VALUE)


def looks_like(name: str, schema: Any) -> bool:
    """`name` as PyTorch writes it; `schema` is None of a higher-order op."""
    if schema is None:
        return bool(NAMES.search(name.partition(".")[2]))
    if not any("Tensor" in str(r.type) for r in schema.returns) and not any(
        a.alias_info is not None for a in schema.arguments
    ):
        return False  # it computes nothing: `_fused_sdp_choice`
    if NAMES.search(schema.name):
        return True
    names = {a.name.strip("_") for a in schema.arguments if str(a.type) == "Tensor"}
    return all(names & set(role) for role in ROLES)
