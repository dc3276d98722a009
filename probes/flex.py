"""`torch.nn.attention.flex_attention.flex_attention`, as it is and under `torch.compile`.

Called as it is, it still has its own body traced by `torch.compile` and runs PyTorch's dense
implementation; compiled, Inductor makes a kernel of it. On a CPU that takes a C++ compiler and has no
backward, so the compiled operator is probed forward only. `score_mod` and `mask_mod` get positions of the
tensors they are called on: under `local_map` those of a rank's shard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attncheck.probing import (
    BATCH,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    KV_SEQUENCE,
    SEQUENCE,
    Operator,
    Probe,
    Results,
    Setting,
    Tensor,
    Tensors,
    fixed,
)

if TYPE_CHECKING:
    import torch

FUNCTION = "torch.nn.attention.flex_attention.flex_attention"
KERNEL_OPS = ("higher_order.flex_attention", "higher_order.flex_attention_backward")

Q_DIMS = (BATCH, HEADS, SEQUENCE, HEAD_DIM)
KV_DIMS = (BATCH, KV_HEADS, KV_SEQUENCE, HEAD_DIM)

# All sizes differ, and so do their halves: a swapped or wrongly split dim cannot fit by coincidence.
BASE = {"batch": 6, "heads": 4, "kv_heads": 4, "sequence": 18, "kv_sequence": 22, "head_dim": 16}
SQUARE = {**BASE, "kv_sequence": 18}
GQA = {**BASE, "heads": 20}
UNEVEN_HEADS = {**BASE, "batch": 14, "heads": 5, "kv_heads": 5}
DOCUMENTS = (7, 9, 2)  # lengths; they fill the 18 positions of SQUARE

ALL = ("replicate", "batch", "heads", "sequence", "query", "head_dim", "partial")
COMMON = ("replicate", "batch", "heads", "sequence")
CORE = ("replicate", "heads")

SLOPE = 0.1  # of the first head, in `relative`


# --- arguments -----------------------------------------------------------------------------


def tensors(gradients: bool, setting: Setting) -> tuple[Tensor, ...]:
    out = [
        Tensor(name, dims, tuple(setting[r] for r in dims), requires_grad=gradients)
        for name, dims in (("q", Q_DIMS), ("k", KV_DIMS), ("v", KV_DIMS))
    ]
    wrap = {"plain": "plain", "replicated": "replicate", "sharded": "pattern"}.get(
        setting.get("captured")
    )
    if setting.get("score") == "bias":
        # Captured by score_mod, a slope for each query head: with heads sharded, so may it be.
        out.append(
            Tensor(
                "bias",
                (HEADS,),
                (setting["heads"],),
                requires_grad=bool(setting.get("bias_gradient")),
                fill="slopes",
                wrap=wrap or "plain",
            )
        )
    if setting.get("mask") == "document":
        # Captured by mask_mod: which document a position belongs to.
        ids = tuple(at for at, length in enumerate(DOCUMENTS) for _ in range(length))
        out.append(fixed("document", ids, wrap=wrap or "plain", dtype="int64"))
    return tuple(out)


# --- calls ---------------------------------------------------------------------------------


def _score_mod(setting: Setting, t: Tensors) -> Callable[..., torch.Tensor] | None:
    kind = setting.get("score")
    if kind is None:
        return None
    if kind == "relative":  # from positions alone

        def relative(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            return score - SLOPE * (h + 1) * (i - j).abs()

        return relative
    if kind == "bias":
        bias = t["bias"]

        def biased(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            return score - bias[h] * (i - j).abs()

        return biased
    raise ValueError(f"unknown score {kind!r}")


def _mask_mod(setting: Setting, t: Tensors) -> Callable[..., torch.Tensor] | None:
    if setting.get("causal"):
        return lambda b, h, i, j: i >= j
    if "window" in setting.options:
        left, right = setting.options["window"]
        return lambda b, h, i, j: (j - i <= right) & (i - j <= left)
    if setting.get("mask") == "document":
        ids = t["document"]
        return lambda b, h, i, j: ids[i] == ids[j]
    return None


@functools.lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    """One for all calls, as users have it."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled


def call(compiled: bool, setting: Setting, t: Tensors) -> Results:
    from torch.nn.attention import flex_attention as flex

    function: Any = _compiled() if compiled else flex.flex_attention
    mask_mod = _mask_mod(setting, t)
    mask = None
    if mask_mod is not None:
        mask = flex.create_block_mask(
            mask_mod, None, None, setting["sequence"], setting["kv_sequence"], t["q"].device
        )
    arguments: dict[str, Any] = {
        "score_mod": _score_mod(setting, t),
        "block_mask": mask,
        "scale": setting.get("scale"),
        "enable_gqa": setting["heads"] != setting["kv_heads"],
    }
    if not setting.get("lse"):
        whole: torch.Tensor = function(t["q"], t["k"], t["v"], **arguments)
        return whole
    if hasattr(flex, "AuxRequest"):  # `return_lse` is deprecated where there is one
        arguments["return_aux"] = flex.AuxRequest(lse=True)
        out, aux = function(t["q"], t["k"], t["v"], **arguments)
        return {"out": out, "lse": aux.lse}
    out, lse = function(t["q"], t["k"], t["v"], return_lse=True, **arguments)
    return {"out": out, "lse": lse}


def no_compiler() -> str:
    """Why `torch.compile` cannot make kernels here, or ''."""
    import os
    import shutil
    import sys

    import torch

    # What Inductor looks for.
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if torch.cuda.is_available() or shutil.which(name):
        return ""
    return f"torch.compile needs a C++ compiler for kernels on a CPU, and there is no {name}"


# --- references ----------------------------------------------------------------------------


def reference(setting: Setting, t: Tensors) -> Results:
    import torch

    from attncheck.runner.reference import attention_lse

    i = torch.arange(setting["sequence"])[:, None]
    j = torch.arange(setting["kv_sequence"])[None, :]
    slopes = None
    if setting.get("score") == "relative":
        slopes = SLOPE * torch.arange(1, setting["heads"] + 1, dtype=torch.float64)
    elif setting.get("score") == "bias":
        slopes = t["bias"]
    visible = None
    if (mask_mod := _mask_mod(setting, t)) is not None:
        visible = mask_mod(None, None, i, j)
    out, lse = attention_lse(
        t["q"],
        t["k"],
        t["v"],
        scale=setting.get("scale"),
        bool_mask=visible,
        bias=None if slopes is None else -slopes[:, None, None] * (i - j).abs(),
    )
    return {"out": out, "lse": lse} if setting.get("lse") else out


# --- settings ------------------------------------------------------------------------------

CAUSAL = {"causal": True}
WINDOW = {"window": [5, 3]}
RELATIVE = {"score": "relative"}
BIAS = {"score": "bias"}
DOCUMENT = {"mask": "document", "captured": "plain"}

EAGER = (
    Setting("plain", BASE, placements=ALL),
    Setting("causal", SQUARE, options=CAUSAL, placements=COMMON),
    Setting("window", SQUARE, options=WINDOW, placements=("heads",)),
    Setting("score_mod", BASE, options=RELATIVE, placements=CORE),
    Setting("bias_plain", BASE, options={**BIAS, "captured": "plain"}, placements=CORE),
    Setting("bias_replicated", BASE, options={**BIAS, "captured": "replicated"}, placements=CORE),
    Setting("bias_sharded", BASE, options={**BIAS, "captured": "sharded"}, placements=("heads",)),
    Setting("document", SQUARE, options=DOCUMENT, placements=("heads",)),
    Setting("gqa", GQA, placements=("heads",)),
    Setting("lse", BASE, options={"lse": True}, placements=("heads",)),
    Setting("bfloat16", BASE, "bfloat16", placements=("heads",)),
    Setting("uneven_heads", UNEVEN_HEADS, level="full"),
    Setting("scale", BASE, options={"scale": 0.3}, level="full"),
    Setting("float16", BASE, "float16", level="full"),
    Setting("gqa_causal", {**GQA, "kv_sequence": 18}, options=CAUSAL, level="full"),
    Setting("score_mod_causal", SQUARE, options={**RELATIVE, **CAUSAL}, level="full"),
    Setting(
        "document_replicated", SQUARE, options={**DOCUMENT, "captured": "replicated"}, level="full"
    ),
    Setting(
        "bias_gradient",
        BASE,
        options={**BIAS, "captured": "replicated", "bias_gradient": True},
        level="full",
    ),
)

# A first compilation takes Inductor 25 s on a cold cache, the next ones 5 s each: one case by default.
COMPILED = (
    Setting("plain", BASE, placements=("heads",)),
    Setting("causal", SQUARE, options=CAUSAL, level="full"),
    Setting("score_mod", BASE, options=RELATIVE, level="full"),
    Setting("bias_plain", BASE, options={**BIAS, "captured": "plain"}, level="full"),
)

PROBE = Probe(
    name="flex",
    summary="flex_attention, as it is and compiled: score_mod, BlockMask, captured tensors",
    operators=(
        Operator(
            name="flex_attention",
            tensors=functools.partial(tensors, True),
            call=functools.partial(call, False),
            reference=reference,
            settings=EAGER,
            output_dims=Q_DIMS,
            kernel_ops=KERNEL_OPS,
            placements=COMMON,
            standins=("flex_attention",),
            function=FUNCTION,
        ),
        Operator(
            name="flex_attention[compiled]",
            tensors=functools.partial(tensors, False),
            call=functools.partial(call, True),
            reference=reference,
            settings=COMPILED,
            output_dims=Q_DIMS,
            kernel_ops=KERNEL_OPS[:1],
            placements=CORE,
            missing=no_compiler,
            function=FUNCTION,
            slow=True,
        ),
    ),
)
