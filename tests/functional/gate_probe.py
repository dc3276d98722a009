"""The operators of `gated_ops`: what test_gate.py scans before and after a version bump."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from attncheck.probing import Operator, Probe, Setting, Tensor, Tensors

sys.path.insert(0, str(Path(__file__).parent))  # a probe file is loaded by its path

AFTER = os.environ.get("ATTNCHECK_GATE_DEMO") == "after"
SIZES = {"batch": 2, "heads": 4, "kv_heads": 4, "sequence": 6, "kv_sequence": 6, "head_dim": 8}
Q = ("batch", "heads", "sequence", "head_dim")
KV = ("batch", "kv_heads", "kv_sequence", "head_dim")


def tensors(setting: Setting) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(name, dims, tuple(setting[d] for d in dims), requires_grad=False)
        for name, dims in (("q", Q), ("k", KV), ("v", KV))
    )


def call(name: str, times: int, setting: Setting, t: Tensors) -> Any:
    import gated_ops

    for _ in range(times):
        out = getattr(gated_ops, name)(t["q"], t["k"], t["v"])
    return out


def reference(setting: Setting, t: Tensors) -> Any:
    from attncheck.runner.reference import attention

    return attention(t["q"], t["k"], t["v"], layout="bhsd")


def operator(name: str, placement: str, times: int = 1, missing: str = "") -> Operator:
    return Operator(
        name=f"gated.{name}",
        tensors=tensors,
        call=partial(call, name, times),
        reference=reference,
        settings=(Setting("plain", SIZES, placements=(placement,)),),
        missing=(lambda: missing) if missing else None,
        kernel_ops=(f"gated.{name}.default",),
    )


OPERATORS = [
    operator("same", "heads"),
    operator("unregistered", "heads"),
    operator("made_wrong", "sequence"),
    operator("gathering", "heads", times=2 if AFTER else 1),
    operator("mended", "heads"),
    operator("rounding", "heads"),
    *([operator("unheard_of", "heads")] if AFTER else []),
]
if os.environ.get("ATTNCHECK_GATE_DEMO_GONE"):  # the package of one of them is not there any more
    OPERATORS[0] = operator("same", "heads", missing="its extension is gone")

PROBE = Probe("gated", "ops that a version bump changes", tuple(OPERATORS))
