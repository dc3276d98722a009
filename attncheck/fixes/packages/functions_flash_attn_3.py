"""flash-attn 3's functions in 3.0.0.b1: of the raw ops they call, the backward can have no strategy.

3.0.0 has custom ops with strategies, and its functions need no wrapper. The parameters are the same in both,
but for `return_attn_probs`, which the beta lacks; the first betas return the log-sum-exp always.

Not described, so that calls with them are refused, as those of the ops: `seqused_*` and fp8 (`*_descale`).
`qv` gets no gradient, with a wrapper as without: the package has none for it.
"""

from __future__ import annotations

from attncheck.fixes.notation import Signature

CUSTOM_FORWARD = "flash_attn_3._flash_attn_forward.default"

FUNCTIONS = (
    Signature(
        "flash_attn_interface.flash_attn_func",
        takes={"q": "b sq h d", "k": "b sk g d", "v": "b sk g dv", "qv": "b sq h dv"},
        gives={"out": "b sq h dv", "softmax_lse": "b h sq"},
        # Chunks and windows go by position.
        queries={
            "causal": False,
            "window_size[0]": -1,
            "window_size[1]": -1,
            "attention_chunk": 0,
        },
        unless=CUSTOM_FORWARD,
    ),
    Signature(
        "flash_attn_interface.flash_attn_varlen_func",
        takes={
            "q": "t h d",
            "k": "u g d",
            "v": "u g dv",
            "qv": "t h dv",
            "cu_seqlens_q": "replicated",
            "cu_seqlens_k": "replicated",
        },
        gives={"out": "t h dv", "softmax_lse": "h t"},
        unless=CUSTOM_FORWARD,
    ),
)
