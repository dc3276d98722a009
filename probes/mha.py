"""`nn.MultiheadAttention`, `nn.TransformerEncoderLayer` and a stack of these, with their weights as DTensors.

Train and eval take different ops. In training a layer projects, splits the heads and calls `bmm` and
`softmax` (or `F.scaled_dot_product_attention`, where no attention weights are wanted). In eval without
gradients it is one fused op, `aten._native_multi_head_attention` or `aten._transformer_encoder_layer_fwd`,
which `torch.backends.mha.set_fastpath_enabled(False)` switches off; a stack packs its padded sequences into
a nested tensor for it.

The weights are arguments of the case, and a placement reads as the parallelism it belongs to: `batch` and
`sequence` shard the input and leave the weights whole, `heads` is tensor parallelism, with the input
whole, `in_proj` and `linear1` split by their outputs (`ColwiseParallel`), `out_proj` and `linear2` by their
inputs (`RowwiseParallel`). `in_proj` holds q, k and v one above the other, so that its shards are not
shards of the heads.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from attncheck.probing import (
    BATCH,
    HEADS,
    KV_SEQUENCE,
    OTHER,
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

X_DIMS = (BATCH, SEQUENCE, OTHER)
MEMORY_DIMS = (BATCH, KV_SEQUENCE, OTHER)

# All sizes differ, and so do their halves: a swapped or wrongly split dim cannot fit by chance. The hidden
# size is 4 * 16, the feed-forward's 40.
BASE = {"batch": 6, "heads": 4, "kv_heads": 4, "sequence": 18, "kv_sequence": 18, "head_dim": 16}
CROSS = {**BASE, "kv_sequence": 22}
ODD_HEADS = {**BASE, "batch": 14, "heads": 5, "kv_heads": 5}
FEED_FORWARD = 40
STACKED = "layers.0."  # what a stack puts before its layer's parameter names
EPS = 1e-5

# How many tokens of each sequence of the batch are padding, at its end.
PADDED = (0, 3, 7, 1, 0, 5)

COMMON = ("replicate", "batch", "sequence", "heads")


# --- arguments -----------------------------------------------------------------------------


def hidden_size(setting: Setting) -> int:
    return setting["heads"] * setting["head_dim"]


def weight(name: str, dims: tuple[str, ...], *sizes: int) -> Tensor:
    return Tensor(name, dims, sizes, fill="weight")


def attention_weights(setting: Setting, prefix: str = "") -> tuple[Tensor, ...]:
    """The parameters of `nn.MultiheadAttention`, under the names of its state dict."""
    hidden = hidden_size(setting)
    return (
        weight(f"{prefix}in_proj_weight", (HEADS, OTHER), 3 * hidden, hidden),
        weight(f"{prefix}in_proj_bias", (HEADS,), 3 * hidden),
        weight(f"{prefix}out_proj.weight", (OTHER, HEADS), hidden, hidden),
        weight(f"{prefix}out_proj.bias", (OTHER,), hidden),
    )


def feed_forward_weights(setting: Setting, prefix: str) -> tuple[Tensor, ...]:
    """Tensor parallelism shards the feed-forward's inner dim where it shards the heads."""
    hidden = hidden_size(setting)
    return (
        weight(f"{prefix}linear1.weight", (HEADS, OTHER), FEED_FORWARD, hidden),
        weight(f"{prefix}linear1.bias", (HEADS,), FEED_FORWARD),
        weight(f"{prefix}linear2.weight", (OTHER, HEADS), hidden, FEED_FORWARD),
        weight(f"{prefix}linear2.bias", (OTHER,), hidden),
        Tensor(f"{prefix}norm1.weight", (OTHER,), (hidden,)),
        Tensor(f"{prefix}norm1.bias", (OTHER,), (hidden,)),
        Tensor(f"{prefix}norm2.weight", (OTHER,), (hidden,)),
        Tensor(f"{prefix}norm2.bias", (OTHER,), (hidden,)),
    )


def inputs(setting: Setting) -> list[Tensor]:
    """`x`, and what the setting asks for beside it: `memory`, `padding` (True is padding), `mask`."""
    hidden, length, kv_length = hidden_size(setting), setting["sequence"], setting["kv_sequence"]
    out = [Tensor("x", X_DIMS, (setting["batch"], length, hidden))]
    if setting.get("cross"):
        out.append(Tensor("memory", MEMORY_DIMS, (setting["batch"], kv_length, hidden)))
    if setting.get("padding"):
        rows = [[int(j >= kv_length - pad) for j in range(kv_length)] for pad in PADDED]
        out.append(fixed("padding", rows, (BATCH, KV_SEQUENCE), "pattern", "bool"))
    if setting.get("causal"):
        rows = [[int(j > i) for j in range(kv_length)] for i in range(length)]
        out.append(fixed("mask", rows, (OTHER, OTHER), setting.options["mask_as"], "bool"))
    return out


def as_called(setting: Setting, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Nothing requires a gradient in eval; the weights are ordinary tensors where the setting says so."""
    if setting.get("mode") == "eval":
        tensors = [replace(t, requires_grad=False) for t in tensors]
    if setting.get("weights") == "plain":
        tensors = [t if t.name in INPUTS else replace(t, wrap="plain") for t in tensors]
    return tuple(tensors)


INPUTS = ("x", "memory", "padding", "mask")


def attention_tensors(setting: Setting) -> tuple[Tensor, ...]:
    return as_called(setting, [*inputs(setting), *attention_weights(setting)])


def layer_tensors(prefix: str, setting: Setting) -> tuple[Tensor, ...]:
    return as_called(
        setting,
        [
            *inputs(setting),
            *attention_weights(setting, f"{prefix}self_attn."),
            *feed_forward_weights(setting, prefix),
        ],
    )


# --- calls ---------------------------------------------------------------------------------


def run(setting: Setting, module: torch.nn.Module, t: Tensors, *args: Any, **kwargs: Any) -> Any:
    """Call `module` with the case's weights as its parameters, in the setting's mode."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    parameters = {name: value for name, value in t.items() if name not in INPUTS}
    training = setting.get("mode") == "train"
    backend = setting.get("backend")
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(setting.get("fast_path") != "off")
    try:
        with (
            contextlib.nullcontext() if training else torch.no_grad(),
            sdpa_kernel(SDPBackend.__members__[backend]) if backend else contextlib.nullcontext(),
        ):
            return torch.func.functional_call(
                module.train(training), parameters, args, kwargs, strict=True
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def call_attention(setting: Setting, t: Tensors) -> Results:
    import torch

    module = torch.nn.MultiheadAttention(
        hidden_size(setting), setting["heads"], batch_first=True, device="meta"
    )
    memory = t.get("memory", t["x"])
    out, weights = run(
        setting,
        module,
        t,
        t["x"],
        memory,
        memory,
        key_padding_mask=t.get("padding"),
        need_weights=bool(setting.get("need_weights")),
        attn_mask=t.get("mask"),
        is_causal=bool(setting.get("causal")),
    )
    return {"out": out} if weights is None else {"out": out, "weights": weights}


def encoder_layer(setting: Setting) -> torch.nn.TransformerEncoderLayer:
    import torch

    return torch.nn.TransformerEncoderLayer(
        hidden_size(setting),
        setting["heads"],
        dim_feedforward=FEED_FORWARD,
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=EPS,
        batch_first=True,
        norm_first=bool(setting.get("norm_first")),
        device="meta",
    )


def call_layer(setting: Setting, t: Tensors) -> Results:
    out: torch.Tensor = run(
        setting,
        encoder_layer(setting),
        t,
        t["x"],
        src_mask=t.get("mask"),
        src_key_padding_mask=t.get("padding"),
        is_causal=bool(setting.get("causal")),
    )
    return out


def call_stack(setting: Setting, t: Tensors) -> Results:
    import torch

    module = torch.nn.TransformerEncoder(encoder_layer(setting), num_layers=1)
    out: torch.Tensor = run(setting, module, t, t["x"], src_key_padding_mask=t.get("padding"))
    return out


# --- reference -----------------------------------------------------------------------------


def self_attention(
    setting: Setting, t: Tensors, x: torch.Tensor, memory: torch.Tensor, prefix: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output (batch, sequence, hidden), the attention weights (batch, heads, sequence, kv_sequence)."""
    import torch

    from attncheck.runner.reference import attention

    projections = zip(
        (x, memory, memory),
        t[f"{prefix}in_proj_weight"].chunk(3),
        t[f"{prefix}in_proj_bias"].chunk(3),
        strict=True,
    )
    q, k, v = (
        (y @ matrix.T + bias)
        .reshape(*y.shape[:2], setting["heads"], setting["head_dim"])
        .transpose(1, 2)
        for y, matrix, bias in projections
    )
    visible = ~t["padding"][:, None, None, :] if "padding" in t else None
    causal = "top_left" if setting.get("causal") else None
    # Attention over the identity is the attention weights themselves.
    identity = torch.eye(k.shape[2], dtype=k.dtype).expand(*k.shape[:2], -1, -1)
    weights = attention(q, k, identity, causal=causal, bool_mask=visible)
    merged = (weights @ v).transpose(1, 2).flatten(2)
    return merged @ t[f"{prefix}out_proj.weight"].T + t[f"{prefix}out_proj.bias"], weights


def attention_reference(setting: Setting, t: Tensors) -> Results:
    out, weights = self_attention(setting, t, t["x"], t.get("memory", t["x"]))
    if not setting.get("need_weights"):
        return {"out": out}
    return {"out": out, "weights": weights.mean(1)}


def layer_reference(prefix: str, setting: Setting, t: Tensors) -> torch.Tensor:
    def attend(y: torch.Tensor) -> torch.Tensor:
        return self_attention(setting, t, y, y, f"{prefix}self_attn.")[0]

    x = t["x"]
    if setting.get("norm_first"):
        x = x + attend(layer_norm(x, t, f"{prefix}norm1"))
        return x + feed_forward(layer_norm(x, t, f"{prefix}norm2"), t, prefix)
    x = layer_norm(x + attend(x), t, f"{prefix}norm1")
    return layer_norm(x + feed_forward(x, t, prefix), t, f"{prefix}norm2")


def stack_reference(setting: Setting, t: Tensors) -> torch.Tensor:
    """What comes out of a nested tensor has zeros where there was padding."""
    return layer_reference(STACKED, setting, t).masked_fill(t["padding"][..., None], 0.0)


def layer_norm(x: torch.Tensor, t: Tensors, name: str) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return centred / deviation * t[f"{name}.weight"] + t[f"{name}.bias"]


def feed_forward(x: torch.Tensor, t: Tensors, prefix: str) -> torch.Tensor:
    import torch

    inner = x @ t[f"{prefix}linear1.weight"].T + t[f"{prefix}linear1.bias"]
    active = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))  # GELU
    return active @ t[f"{prefix}linear2.weight"].T + t[f"{prefix}linear2.bias"]


# --- settings ------------------------------------------------------------------------------

TRAIN = {"mode": "train"}
EVAL = {"mode": "eval"}
WEIGHTS = {"need_weights": True}
# PyTorch wants the mask although `is_causal` says what is in it.
CAUSAL = {"causal": True, "mask_as": "plain"}
MATH = {"backend": "MATH"}
NO_FAST_PATH = {"fast_path": "off"}

# Without weights and not causal, `F.scaled_dot_product_attention` on a CPU sends DTensor into a search over
# decompositions that costs half a minute per shape, unless nothing is sharded: the MATH backend has none.
ATTENTION = (
    Setting("train", BASE, options={**TRAIN, **WEIGHTS}),
    Setting("train_no_weights_math", BASE, options={**TRAIN, **MATH}),
    Setting("train_no_weights_causal", BASE, options={**TRAIN, **CAUSAL}, placements=("batch",)),
    Setting("train_no_weights", BASE, options=TRAIN, placements=("replicate",)),
    Setting(
        "train_padding",
        BASE,
        options={**TRAIN, **WEIGHTS, "padding": True},
        placements=("batch", "sequence"),
    ),
    Setting(
        "train_causal_plain_mask",
        BASE,
        options={**TRAIN, **WEIGHTS, **CAUSAL},
        placements=("batch",),
    ),
    Setting(
        "train_causal_replicated_mask",
        BASE,
        options={**TRAIN, **WEIGHTS, **CAUSAL, "mask_as": "replicate"},
        placements=("batch",),
    ),
    Setting(
        "train_cross",
        CROSS,
        options={**TRAIN, **WEIGHTS, "cross": True},
        placements=("batch", "heads"),
    ),
    Setting(
        "train_plain_weights",
        BASE,
        options={**TRAIN, **WEIGHTS, "weights": "plain"},
        placements=("batch",),
    ),
    Setting("train_odd_heads", ODD_HEADS, options={**TRAIN, **WEIGHTS}, level="full"),
    Setting("train_bfloat16", BASE, "bfloat16", options={**TRAIN, **WEIGHTS}, level="full"),
    Setting("eval", BASE, options={**EVAL, **WEIGHTS}),
    Setting("eval_no_weights", BASE, options=EVAL, placements=("batch",)),
    Setting(
        "eval_padding",
        BASE,
        options={**EVAL, **WEIGHTS, "padding": True},
        placements=("batch",),
    ),
    Setting(
        "eval_no_fast_path",
        BASE,
        options={**EVAL, **WEIGHTS, **NO_FAST_PATH},
        placements=("batch", "heads"),
    ),
    # An odd number of heads has no fast path either.
    Setting("eval_odd_heads", ODD_HEADS, options={**EVAL, **WEIGHTS}, level="full"),
)

LAYER = (
    Setting("train_math", BASE, options={**TRAIN, **MATH}),
    Setting("train_causal", BASE, options={**TRAIN, **CAUSAL}, placements=("batch",)),
    Setting("train", BASE, options=TRAIN, level="full"),
    Setting(
        "train_math_norm_first",
        BASE,
        options={**TRAIN, **MATH, "norm_first": True},
        level="full",
    ),
    Setting("eval", BASE, options=EVAL),
    Setting("eval_norm_first", BASE, options={**EVAL, "norm_first": True}, placements=("batch",)),
    Setting("eval_padding", BASE, options={**EVAL, "padding": True}, placements=("batch",)),
    Setting(
        "eval_no_fast_path_math",
        BASE,
        options={**EVAL, **MATH, **NO_FAST_PATH},
        placements=("batch",),
    ),
)

STACK = (
    Setting(
        "eval_padding",
        BASE,
        options={**EVAL, "padding": True},
        placements=("replicate", "batch"),
    ),
)

operator = partial(Operator, placements=COMMON, output_dims=X_DIMS)

PROBE = Probe(
    name="mha",
    summary="nn.MultiheadAttention, nn.TransformerEncoderLayer and their stack, in training and in eval",
    operators=(
        operator(
            name="nn.MultiheadAttention",
            function="attncheck probes/mha.py:call_attention",
            tensors=attention_tensors,
            call=call_attention,
            reference=attention_reference,
            settings=ATTENTION,
            kernel_ops=("aten._native_multi_head_attention.default",),
        ),
        operator(
            name="nn.TransformerEncoderLayer",
            function="attncheck probes/mha.py:call_layer",
            tensors=partial(layer_tensors, ""),
            call=call_layer,
            reference=partial(layer_reference, ""),
            settings=LAYER,
            kernel_ops=("aten._transformer_encoder_layer_fwd.default",),
        ),
        operator(
            name="nn.TransformerEncoder",
            function="attncheck probes/mha.py:call_stack",
            tensors=partial(layer_tensors, STACKED),
            call=call_stack,
            reference=stack_reference,
            settings=STACK,
            kernel_ops=("aten._transformer_encoder_layer_fwd.default",),
        ),
    ),
)
