"""xformers' `memory_efficient_attention`: its dispatch as it is, and each of its pairs of kernels.

On a machine without CUDA xformers has no kernel that it would take: `xformers.memory_efficient_attention`
is then unavailable, for the reasons that xformers gives. The other operators run it on attncheck's stand-ins:
`attncheck scan --with xformers`. Layout: (batch, sequence, heads, head_dim), and (batch, sequence, groups,
heads per group, head_dim) for grouped queries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from attncheck.probing import (
    BATCH,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    KV_SEQUENCE,
    OTHER,
    SEQUENCE,
    Operator,
    Probe,
    Setting,
    Tensor,
    Tensors,
)

if TYPE_CHECKING:
    import torch

FUNCTION = "xformers.ops.memory_efficient_attention"
PACKAGES = ("xformers",)
STANDINS = ("xformers",)
CUTLASS_OPS = (
    "aten._efficient_attention_forward.default",
    "aten._efficient_attention_backward.default",
)
FLASH_OPS = ("xformers_flash.flash_fwd.default", "xformers_flash.flash_bwd.default")
FLASH3_OPS = ("xformers_flash3.flash_fwd.default", "xformers_flash3.flash_bwd.default")

Q_DIMS = (BATCH, SEQUENCE, HEADS, HEAD_DIM)
KV_DIMS = (BATCH, KV_SEQUENCE, KV_HEADS, HEAD_DIM)
# Groups of query heads that share a kv head: the groups are what can be sharded.
GROUPED_Q_DIMS = (BATCH, SEQUENCE, KV_HEADS, OTHER, HEAD_DIM)
GROUPED_KV_DIMS = (BATCH, KV_SEQUENCE, KV_HEADS, OTHER, HEAD_DIM)
BIAS_DIMS = (BATCH, HEADS, SEQUENCE, KV_SEQUENCE)
# Sequences packed behind one another in a batch of one.
PACKED_Q_DIMS = (OTHER, SEQUENCE, HEADS, HEAD_DIM)
PACKED_KV_DIMS = (OTHER, KV_SEQUENCE, KV_HEADS, HEAD_DIM)

# All sizes differ, and so do their halves. flash3 has no backward below a head_dim of 64, and biases must
# lie aligned in memory: the kv sequence is a multiple of 8.
BASE = {"batch": 6, "heads": 4, "kv_heads": 4, "sequence": 18, "kv_sequence": 24, "head_dim": 64}
SQUARE = {**BASE, "kv_sequence": 18}
GROUPED = {**BASE, "heads": 20}
UNEVEN_HEADS = {**BASE, "batch": 14, "heads": 5, "kv_heads": 5}
# Three sequences; a split of the tokens in two goes through the middle one.
Q_LENGTHS = [7, 9, 10]
KV_LENGTHS = [12, 9, 13]
PACKED = {**BASE, "batch": 1, "sequence": sum(Q_LENGTHS), "kv_sequence": sum(KV_LENGTHS)}
PACKED_SQUARE = {**PACKED, "kv_sequence": sum(Q_LENGTHS)}

COMMON = ("replicate", "batch", "heads", "sequence")
CORE = ("replicate", "heads")
HEADS_ONLY = ("heads",)
REPLICATE = ("replicate",)


# --- arguments -----------------------------------------------------------------------------


def tensors(setting: Setting) -> tuple[Tensor, ...]:
    if setting.get("grouped"):
        heads = setting["heads"] // setting["kv_heads"]  # in a group
        return _qkv(setting, GROUPED_Q_DIMS, GROUPED_KV_DIMS, heads)
    if "q_lengths" in setting.options:
        return _qkv(setting, PACKED_Q_DIMS, PACKED_KV_DIMS)
    return (*_qkv(setting, Q_DIMS, KV_DIMS), *_bias_tensor(setting))


def _qkv(
    setting: Setting, q_dims: tuple[str, ...], kv_dims: tuple[str, ...], other: int = 1
) -> tuple[Tensor, ...]:
    """`other`: the size of a dim of q that no role names; in k and v it is 1."""
    differentiable = not setting.get("grouped")  # no backward of xformers takes groups
    tensors = []
    for name, dims, size in (("q", q_dims, other), ("k", kv_dims, 1), ("v", kv_dims, 1)):
        sizes = tuple(size if role == OTHER else setting[role] for role in dims)
        tensors.append(Tensor(name, dims, sizes, differentiable))
    return tuple(tensors)


def _bias_tensor(setting: Setting) -> tuple[Tensor, ...]:
    if "tensor_bias" not in setting.options:
        return ()
    wrap = setting.options["tensor_bias"]
    sizes = tuple(setting[role] for role in BIAS_DIMS)
    differentiable = wrap != "plain"
    return (Tensor("bias", BIAS_DIMS, sizes, differentiable, fill="float_mask", wrap=wrap),)


# --- calls ---------------------------------------------------------------------------------


def _bias(setting: Setting, device: torch.device) -> Any:
    """The object that xformers takes for the mask that the setting names by its class."""
    from xformers.ops.fmha import attn_bias as biases

    def blocks() -> Any:
        lengths = setting.options["q_lengths"], setting.options["kv_lengths"]
        return biases.BlockDiagonalMask.from_seqlens(*lengths, device=device)

    makers: Mapping[str, Callable[[], Any]] = {
        "LowerTriangularMask": biases.LowerTriangularMask,
        "LowerTriangularFromBottomRightMask": biases.LowerTriangularFromBottomRightMask,
        "LocalAttentionFromBottomRightMask": lambda: biases.LocalAttentionFromBottomRightMask(
            *setting.options["window"]
        ),
        "BlockDiagonalMask": blocks,
        "BlockDiagonalCausalMask": lambda: blocks().make_causal(),
        "BlockDiagonalCausalFromBottomRightMask": lambda: blocks().make_causal_from_bottomright(),
    }
    return makers[setting.options["bias"]]()


def call(setting: Setting, t: Tensors, op: Any = None) -> torch.Tensor:
    import xformers.ops

    q, k, v = t["q"], t["k"], t["v"]
    if setting.get("grouped"):  # xformers does not broadcast: one has to expand
        per_group = q.shape[3]
        k, v = (x.expand(-1, -1, -1, per_group, -1) for x in (k, v))
    bias = t.get("bias")
    if "bias" in setting.options:
        bias = _bias(setting, q.device)
    out: torch.Tensor = xformers.ops.memory_efficient_attention(
        q, k, v, attn_bias=bias, scale=setting.get("scale"), op=op
    )
    return out


def on_standins() -> AbstractContextManager[None]:
    """Around a call and its backward: xformers refuses a CPU, whatever kernels are there."""
    from attncheck.standins.xformers_ops import taking_the_cpu

    return taking_the_cpu()


def calling(forward: str, backward: str = "") -> Callable[[Setting, Tensors], torch.Tensor]:
    """The call with `op`: the FwOp and BwOp of these modules of xformers.ops.fmha."""

    def call_pair(setting: Setting, t: Tensors) -> torch.Tensor:
        fw = import_module(f"xformers.ops.fmha.{forward}").FwOp
        bw = import_module(f"xformers.ops.fmha.{backward}").BwOp if backward else None
        return call(setting, t, (fw, bw))

    return call_pair


# --- reference -----------------------------------------------------------------------------

_CAUSAL = {
    "LowerTriangularMask": "top_left",
    "LowerTriangularFromBottomRightMask": "bottom_right",
    "BlockDiagonalCausalMask": "top_left",
    "BlockDiagonalCausalFromBottomRightMask": "bottom_right",
}


def reference(setting: Setting, t: Tensors) -> torch.Tensor:
    import torch

    from attncheck.runner.reference import attention

    q, k, v = t["q"], t["k"], t["v"]
    packed, grouped = "q_lengths" in setting.options, setting.get("grouped")
    starts_q = starts_k = None
    if packed:
        q, k, v = (x.squeeze(0) for x in (q, k, v))
        starts_q = torch.tensor([0, *accumulate(setting.options["q_lengths"])])
        starts_k = torch.tensor([0, *accumulate(setting.options["kv_lengths"])])
    if grouped:
        q, k, v = (x.flatten(2, 3) for x in (q, k, v))
    out = attention(
        q,
        k,
        v,
        layout="thd" if packed else "bshd",
        scale=setting.get("scale"),
        causal=_CAUSAL.get(setting.get("bias", "")),
        window=tuple(setting.get("window", (-1, -1))),
        bias=t.get("bias"),
        cu_seqlens_q=starts_q,
        cu_seqlens_k=starts_k,
    )
    if grouped:
        return out.reshape(t["q"].shape)
    return out.unsqueeze(0) if packed else out


# --- settings ------------------------------------------------------------------------------


def _setting(
    name: str,
    sizes: dict[str, int] = BASE,
    options: dict[str, Any] | None = None,
    placements: tuple[str, ...] = HEADS_ONLY,
    level: str = "default",
    dtype: str = "float32",
) -> Setting:
    return Setting(name, sizes, dtype, options or {}, level, placements)


CAUSAL = {"bias": "LowerTriangularMask"}
FROM_BOTTOM_RIGHT = {"bias": "LowerTriangularFromBottomRightMask"}
LOCAL = {"bias": "LocalAttentionFromBottomRightMask", "window": [5, 3]}
TENSOR_BIAS = {"tensor_bias": "pattern"}
PLAIN_BIAS = {"tensor_bias": "plain"}
LENGTHS = {"q_lengths": Q_LENGTHS, "kv_lengths": KV_LENGTHS}
EQUAL_LENGTHS = {"q_lengths": Q_LENGTHS, "kv_lengths": Q_LENGTHS}
BLOCKS = {"bias": "BlockDiagonalMask", **LENGTHS}
CAUSAL_BLOCKS = {"bias": "BlockDiagonalCausalMask", **EQUAL_LENGTHS}
BLOCKS_FROM_BOTTOM_RIGHT = {"bias": "BlockDiagonalCausalFromBottomRightMask", **LENGTHS}
SCALE = {"scale": 0.3}
GROUPS = {"grouped": True}
HALF = "bfloat16"

# With the real kernels, on a GPU, this is what users call; without one it says why not.
AS_IT_IS = (
    _setting("plain", placements=REPLICATE),
    _setting("bfloat16", placements=COMMON, level="full", dtype=HALF),
    _setting("causal", SQUARE, CAUSAL, COMMON, "full", HALF),
    _setting("from_bottom_right", BASE, FROM_BOTTOM_RIGHT, COMMON, "full", HALF),
    _setting("tensor_bias", BASE, TENSOR_BIAS, COMMON, "full"),
    _setting("block_diagonal", PACKED, BLOCKS, CORE, "full", HALF),
    _setting("grouped", GROUPED, GROUPS, COMMON, "full", HALF),
)
# What dispatch picks: cutlass where only it will do (float32, a tensor as bias), else flash3.
DISPATCH = (
    _setting("plain"),
    _setting("bfloat16", dtype=HALF),
    _setting("tensor_bias", BASE, TENSOR_BIAS, CORE, "full", HALF),
    _setting("causal", SQUARE, CAUSAL, CORE, "full", HALF),
    _setting("causal_unequal", BASE, CAUSAL, CORE, "full", HALF),
    _setting("block_diagonal", PACKED, BLOCKS, CORE, "full", HALF),
    _setting("grouped", GROUPED, GROUPS, CORE, "full", HALF),
)
CUTLASS = (
    _setting("plain", placements=COMMON),
    _setting("causal", BASE, CAUSAL),
    _setting("tensor_bias", BASE, TENSOR_BIAS),
    _setting("tensor_bias_plain", BASE, PLAIN_BIAS),
    _setting("block_diagonal", PACKED, BLOCKS),
    _setting("grouped", GROUPED, GROUPS),
    _setting("from_bottom_right", BASE, FROM_BOTTOM_RIGHT, CORE, "full"),
    _setting("block_diagonal_causal", PACKED_SQUARE, CAUSAL_BLOCKS, CORE, "full"),
    _setting("block_diagonal_from_bottom_right", PACKED, BLOCKS_FROM_BOTTOM_RIGHT, CORE, "full"),
    _setting("uneven_heads", UNEVEN_HEADS, None, CORE, "full"),
    _setting("scale", BASE, SCALE, CORE, "full"),
    _setting("bfloat16", BASE, None, COMMON, "full", HALF),
    _setting("float16", BASE, None, CORE, "full", "float16"),
)
FLASH = (
    _setting("plain", placements=CORE, dtype=HALF),
    _setting("causal", SQUARE, CAUSAL, dtype=HALF),
    _setting("block_diagonal", PACKED, BLOCKS, dtype=HALF),
    _setting("from_bottom_right", BASE, FROM_BOTTOM_RIGHT, CORE, "full", HALF),
    _setting("local", BASE, LOCAL, CORE, "full", HALF),
    _setting("block_diagonal_causal", PACKED_SQUARE, CAUSAL_BLOCKS, CORE, "full", HALF),
    _setting(
        "block_diagonal_from_bottom_right", PACKED, BLOCKS_FROM_BOTTOM_RIGHT, CORE, "full", HALF
    ),
    _setting("grouped", GROUPED, GROUPS, CORE, "full", HALF),
    _setting("uneven_heads", UNEVEN_HEADS, None, CORE, "full", HALF),
    _setting("scale", BASE, SCALE, CORE, "full", HALF),
    _setting("float16", BASE, None, COMMON, "full", "float16"),
)
FLASH3 = (
    _setting("plain", dtype=HALF),
    _setting("from_bottom_right", BASE, FROM_BOTTOM_RIGHT, CORE, "full", HALF),
    _setting("local", BASE, LOCAL, CORE, "full", HALF),
    _setting("block_diagonal", PACKED, BLOCKS, CORE, "full", HALF),
    _setting("grouped", GROUPED, GROUPS, CORE, "full", HALF),
)
REFUSED = (_setting("plain", placements=REPLICATE, dtype=HALF),)


def _operator(
    name: str,
    call: Callable[[Setting, Tensors], torch.Tensor],
    settings: tuple[Setting, ...],
    kernel_ops: tuple[str, ...] = (),
    as_it_is: bool = False,
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> Operator:
    return Operator(
        name=f"xformers.{name}",
        tensors=tensors,
        call=call,
        reference=reference,
        settings=settings,
        output_dims=Q_DIMS,
        kernel_ops=kernel_ops,
        placements=COMMON,
        packages=PACKAGES,
        standins=STANDINS,
        devices=devices,
        function=FUNCTION,
        around=None if as_it_is else on_standins,
    )


PROBE = Probe(
    name="xformers",
    summary="xformers: memory_efficient_attention, dispatched and with each of its pairs of kernels",
    operators=(
        _operator("memory_efficient_attention", call, AS_IT_IS, as_it_is=True),
        # On a GPU that is the one above.
        _operator("cuda_dispatch", call, DISPATCH, devices=("cpu",)),
        _operator("cutlass", calling("cutlass", "cutlass"), CUTLASS, CUTLASS_OPS),
        _operator("flash", calling("flash", "flash"), FLASH, FLASH_OPS),
        _operator("flash3", calling("flash3", "flash3"), FLASH3, FLASH3_OPS),
        _operator(
            "cutlass_flash",
            calling("cutlass", "flash"),
            (_setting("plain", dtype=HALF),),
            (CUTLASS_OPS[0], FLASH_OPS[1]),
        ),
        _operator("cutlass_blackwell", calling("cutlass_blackwell", "cutlass_blackwell"), REFUSED),
        _operator("ck", calling("ck", "ck"), REFUSED),
        # Triton kernels and no dispatcher ops; forward only.
        _operator("triton_splitk", calling("triton_splitk"), REFUSED),
    ),
)
