"""Any other op that looks like attention in the running process: what `--import` and packages register.

No operator stands here by name. attncheck looks what the imported modules registered
(`attncheck.runner.inventory`), finds out from an op's schema how it is called, by calling it on small whole
tensors, and this file makes an operator of each that it could call. The others are listed, with whether a
strategy exists; a probe of one's own says how to call them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from attncheck.inventory import RegisteredOp, Signature, operator_name
from attncheck.probing import (
    BATCH,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    KV_SEQUENCE,
    SEQUENCE,
    Operator,
    Probe,
    Setting,
    Tensor,
    Tensors,
)

if TYPE_CHECKING:
    import torch

# Distributions that register attention ops, and the module whose import does it. Hub kernels are loaded
# by their user's own code: --import that.
IMPORTS = {
    "sageattention": "sageattention",
    "natten": "natten",
    "aiter": "aiter",
    "amd-aiter": "aiter",
    "magi-attention": "magi_attention",
    "mslk": "mslk",
    "torch-npu": "torch_npu",
    "flashinfer-python": "flashinfer",
    "vllm-flash-attn": "vllm_flash_attn",
}

ROLES = {
    "bhsd": ((BATCH, HEADS, SEQUENCE, HEAD_DIM), (BATCH, KV_HEADS, KV_SEQUENCE, HEAD_DIM)),
    "bshd": ((BATCH, SEQUENCE, HEADS, HEAD_DIM), (BATCH, KV_SEQUENCE, KV_HEADS, HEAD_DIM)),
}
BASE = {"batch": 6, "heads": 4, "kv_heads": 4, "sequence": 18, "kv_sequence": 22, "head_dim": 16}
SQUARE = {**BASE, "kv_sequence": 18}
PLACEMENTS = ("replicate", "batch", "heads", "sequence")


def tensors(signature: Signature, setting: Setting) -> tuple[Tensor, ...]:
    q_dims, kv_dims = ROLES[signature.layout]
    return tuple(
        Tensor(name, dims, tuple(setting[r] for r in dims), requires_grad=signature.differentiable)
        for name, dims in (("q", q_dims), ("k", kv_dims), ("v", kv_dims))
    )


def call(op: str, signature: Signature, setting: Setting, t: Tensors) -> torch.Tensor:
    from attncheck.runner import signature as by_schema

    causal = bool(setting.get("causal"))
    return by_schema.call(by_schema.overload(op), t, signature.layout, signature.word, causal)


def reference(signature: Signature, setting: Setting, t: Tensors) -> torch.Tensor:
    from attncheck.runner.reference import attention

    # Only square calls are causal here, where both corners are one.
    causal = "top_left" if setting.get("causal") else None
    return attention(t["q"], t["k"], t["v"], layout=signature.layout, causal=causal)


def settings(signature: Signature) -> tuple[Setting, ...]:
    out = [Setting("square", SQUARE, signature.dtype), Setting("plain", BASE, signature.dtype)]
    if signature.causal:
        out.append(Setting("causal", SQUARE, signature.dtype, {"causal": True}))
    if signature.grouped:
        out.append(Setting("gqa", {**SQUARE, "heads": 20}, signature.dtype))
        uneven = {**SQUARE, "batch": 14, "heads": 20, "kv_heads": 5}
        out.append(Setting("gqa_uneven_kv", uneven, signature.dtype, placements=("heads",)))
    if signature.dtype != "bfloat16":
        out.append(Setting("bfloat16", SQUARE, "bfloat16", placements=("replicate", "heads")))
    return tuple(out)


def discover(ops: Sequence[RegisteredOp]) -> tuple[Operator, ...]:
    """An operator for each op that could be called."""
    return tuple(
        Operator(
            name=operator_name(op.op),
            function=f"torch.ops.{op.op.removesuffix('.default')}",
            tensors=partial(tensors, op.signature),
            call=partial(call, op.op, op.signature),
            reference=partial(reference, op.signature),
            settings=settings(op.signature),
            output_dims=ROLES[op.signature.layout][0],
            kernel_ops=(op.op, op.backward) if op.backward else (op.op,),
            placements=PLACEMENTS,
        )
        for op in ops
        if op.signature is not None
    )


PROBE = Probe(
    name="registered",
    summary="ops that imported packages register (--import MODULE), called by their schema",
    imports=IMPORTS,
    discover=discover,
)
