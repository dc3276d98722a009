"""An op with a strategy nowhere, forward and backward, and WAN 14B's attention: what test_fix.py mends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from attncheck import plugins
from attncheck.probing import Operator, Probe, Setting, Tensor, Tensors

sys.path.insert(0, str(Path(__file__).parent))  # a probe file is loaded by its path

SIZES = {"batch": 6, "heads": 12, "kv_heads": 6, "sequence": 10, "kv_sequence": 14, "head_dim": 8}
DIMS = {
    "q": ("batch", "heads", "sequence", "head_dim"),
    "k": ("batch", "kv_heads", "kv_sequence", "head_dim"),
    "v": ("batch", "kv_heads", "kv_sequence", "head_dim"),
}
FORWARD, BACKWARD = "mended.attention_forward.default", "mended.attention_backward.default"


def ops() -> Any:
    """Registers the two ops, once in a process."""
    import mended_ops

    return mended_ops.forward


def tensors(setting: Setting) -> tuple[Tensor, ...]:
    return tuple(Tensor(n, dims, tuple(setting[d] for d in dims)) for n, dims in DIMS.items())


def call(setting: Setting, t: Tensors) -> Any:
    return ops()(t["q"], t["k"], t["v"], bool(setting.get("causal")))[0]


def reference(setting: Setting, t: Tensors) -> Any:
    from attncheck.runner.reference import attention

    causal = "top_left" if setting.get("causal") else None
    return attention(t["q"], t["k"], t["v"], layout="bhsd", causal=causal)


def without_strategy() -> Operator:
    return Operator(
        name="mended",
        tensors=tensors,
        call=call,
        reference=reference,
        missing=lambda: "" if ops() else "no ops",
        settings=(
            Setting("plain", SIZES, placements=("batch", "heads", "query")),
            Setting("causal", SIZES, options={"causal": True}, placements=("heads", "query")),
            Setting("uneven", {**SIZES, "heads": 9, "kv_heads": 3}, placements=("heads",)),
        ),
        kernel_ops=(FORWARD, BACKWARD),
        placements=("replicate", "heads"),
    )


# WAN 2.1 14B: 40 heads of 128; self-attention over the video, cross-attention to the text.
WAN = {"batch": 1, "heads": 40, "kv_heads": 40, "sequence": 48, "kv_sequence": 48, "head_dim": 128}


def wan() -> Operator:
    return plugins.derived(
        "flash_attn_func",
        Setting("self", WAN, placements=("heads",)),
        Setting("cross", {**WAN, "kv_sequence": 20}, placements=("heads",)),
        name="wan",
    )


PROBE = Probe("mended", "ops that attncheck fix mends", (without_strategy(), wan()))
