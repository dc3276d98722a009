"""The attention ops under `F.scaled_dot_product_attention` on CUDA, each called by itself.

`aten._scaled_dot_product_{flash,efficient,cudnn}_attention` and the one that XPU and out-of-tree devices
override take (batch, heads, sequence, head_dim); the raw kernels behind them have layouts of their own
and packed sequences. Without a GPU they run on attncheck's CPU stand-ins, under PyTorch's own sharding
rules. On a GPU the same calls run the real kernels; flash and cuDNN refuse float32 there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
    cu_seqlens,
)

if TYPE_CHECKING:
    import torch

Dims = tuple[str, ...]
Call = Callable[..., "dict[str, torch.Tensor]"]

BHSD = (BATCH, HEADS, SEQUENCE, HEAD_DIM)
BSHD = (BATCH, SEQUENCE, HEADS, HEAD_DIM)
PACKED = (SEQUENCE, HEADS, HEAD_DIM)
PACKED_AS_BATCH = (OTHER, SEQUENCE, HEADS, HEAD_DIM)  # a batch of one that holds all tokens
KV_ROLES = {HEADS: KV_HEADS, SEQUENCE: KV_SEQUENCE}
BIAS_DIMS = (BATCH, HEADS, SEQUENCE, KV_SEQUENCE)
BIAS_BROADCASTS = {"none": (), "batch": (0,), "heads": (1,)}
WRAPS = {"plain": "plain", "replicated": "replicate", "sharded": "pattern"}

# All sizes differ, and so do their halves: a swapped or wrongly split dim cannot fit by coincidence.
# Keys and head_dim are multiples of 8, as the kernels on CUDA want them.
BASE = {"batch": 6, "heads": 4, "kv_heads": 4, "sequence": 18, "kv_sequence": 24, "head_dim": 16}
# Three sequences; a split of the tokens in two goes through the middle one.
Q_LENGTHS = [7, 9, 10]
KV_LENGTHS = [12, 9, 13]
PACKING = {"q_lengths": Q_LENGTHS, "kv_lengths": KV_LENGTHS}
PACKED_SIZES = {**BASE, "batch": 3, "sequence": sum(Q_LENGTHS), "kv_sequence": sum(KV_LENGTHS)}

ALL = ("replicate", "batch", "heads", "sequence", "query", "head_dim", "partial")
COMMON = ("replicate", "batch", "heads", "sequence")
INDEPENDENT = ("replicate", "batch", "heads")  # dims that attention never mixes
CORE = ("replicate", "heads")
ONLY_HEADS = ("heads",)

# The efficient kernel pads its log-sum-exp to a multiple of this many queries.
ALIGN_LSE = 32
# The efficient kernel's custom_mask_type, by alignment.
MASK_TYPES = {None: 0, "top_left": 1, "bottom_right": 2}


# --- arguments -----------------------------------------------------------------------------


def tensors(dense: Dims, packed: Dims, setting: Setting) -> tuple[Tensor, ...]:
    """`dense` and `packed`: the roles of q's dims, without and with packed sequences."""
    lengths = setting.get("q_lengths")
    dims = dense if lengths is None else packed
    kv_dims = tuple(KV_ROLES.get(role, role) for role in dims)
    kv_wrap = WRAPS[setting.get("kv", "sharded")]
    # With dropout, gradients of q = 0 would be differences of equal numbers: only v's says anything.
    drop = setting.dropout > 0
    q, k, v = _sizes(dims, setting), _sizes(kv_dims, setting), _sizes(kv_dims, setting)
    out = [
        Tensor("q", dims, q, requires_grad=not drop, fill="zeros" if drop else "normal"),
        Tensor("k", kv_dims, k, requires_grad=not drop, wrap=kv_wrap),
        Tensor("v", kv_dims, v, fill="eye" if drop else "normal", wrap=kv_wrap),
    ]
    if lengths is not None:
        out += [cu_seqlens("cu_q", lengths), cu_seqlens("cu_k", setting.options["kv_lengths"])]
    if "bias" in setting.options:
        out.append(_bias(setting))
    return tuple(out)


def _sizes(dims: tuple[str, ...], setting: Setting) -> tuple[int, ...]:
    return tuple(1 if role == OTHER else setting[role] for role in dims)


def _bias(setting: Setting) -> Tensor:
    broadcast = BIAS_BROADCASTS[setting.get("bias_broadcast", "none")]
    dims = tuple(OTHER if at in broadcast else role for at, role in enumerate(BIAS_DIMS))
    return Tensor(
        "bias",
        dims,
        _sizes(dims, setting),
        requires_grad=bool(setting.get("bias_grad")),
        fill="float_mask",
        wrap=WRAPS[setting.get("bias")],
    )


# --- calls ---------------------------------------------------------------------------------


def _aten(name: str) -> Any:
    import torch

    return getattr(torch.ops.aten, name).default


def _missing(name: str) -> str:
    import torch

    return "" if hasattr(torch.ops.aten, name) else f"this PyTorch has no aten::{name}"


def _named(op: str, returned: Any) -> dict[str, torch.Tensor]:
    out, lse = returned[:2]
    if "cudnn" in op and lse.ndim != out.ndim:
        # Some versions give it without its last dim on CUDA, whatever their Meta kernel says.
        return {"out": out}
    return {"out": out, "lse": lse}


def _bias_argument(setting: Setting, t: Tensors) -> torch.Tensor | None:
    """The bias as it is, or as F.scaled_dot_product_attention hands it on: expanded."""
    bias = t.get("bias")
    if bias is None or not setting.get("bias_expanded"):
        return bias
    return bias.expand(_sizes(BIAS_DIMS, setting))


def sdpa(takes: tuple[str, ...], op: str, setting: Setting, t: Tensors) -> dict[str, torch.Tensor]:
    """`takes`: what the op wants between v and the dropout rate."""
    if setting.get("two_layers"):
        # The bias learned in one layer and frozen in one above it, whose backward comes first.
        alone = replace(setting, options={**setting.options, "two_layers": False})
        below = sdpa(takes, op, alone, t)["out"]
        above = sdpa(takes, op, alone, {**t, "bias": t["bias"].detach()})["out"]
        return {"out": below + above}
    between = {"bias": _bias_argument(setting, t), "compute_log_sumexp": True}
    returned = _aten(op)(
        *_qkv(t),
        *(between[name] for name in takes),
        setting.dropout,
        setting.get("causal") is not None,
        scale=setting.get("scale"),
    )
    return _named(op, returned)


def _qkv(t: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return t["q"], t["k"], t["v"]


def _longest(setting: Setting) -> tuple[int, int]:
    if "q_lengths" not in setting.options:
        return setting["sequence"], setting["kv_sequence"]
    return max(setting.options["q_lengths"]), max(setting.options["kv_lengths"])


def raw_flash(op: str, setting: Setting, t: Tensors) -> dict[str, torch.Tensor]:
    left, right = setting.get("window", (None, None))
    returned = _aten(op)(
        *_qkv(t),
        t.get("cu_q"),
        t.get("cu_k"),
        *_longest(setting),
        setting.dropout,
        setting.get("causal") is not None,
        False,  # return_debug_mask
        scale=setting.get("scale"),
        window_size_left=left,
        window_size_right=right,
    )
    return _named(op, returned)


def raw_efficient(op: str, setting: Setting, t: Tensors) -> dict[str, torch.Tensor]:
    returned = _aten(op)(
        *_qkv(t),
        _bias_argument(setting, t),
        t.get("cu_q"),
        t.get("cu_k"),
        *_longest(setting),
        setting.dropout,
        MASK_TYPES[setting.get("causal")],
        True,  # compute_log_sumexp
        scale=setting.get("scale"),
    )
    return _named(op, returned)


def raw_cudnn(op: str, setting: Setting, t: Tensors) -> dict[str, torch.Tensor]:
    returned = _aten(op)(
        *_qkv(t),
        _bias_argument(setting, t),
        t.get("cu_q"),
        t.get("cu_k"),
        *_longest(setting),
        True,  # compute_log_sumexp
        setting.dropout,
        setting.get("causal") is not None,
        scale=setting.get("scale"),
    )
    return _named(op, returned)


# --- references ----------------------------------------------------------------------------


def reference(kernel: str, layout: str, setting: Setting, t: Tensors) -> dict[str, torch.Tensor]:
    """`kernel`: whose log-sum-exp layout; `layout`: of q without packed sequences."""
    from attncheck.runner.reference import attention_lse

    if setting.get("two_layers"):
        alone = replace(setting, options={**setting.options, "two_layers": False})
        parts = [
            reference(kernel, layout, alone, {**t, "bias": bias})["out"]
            for bias in (t["bias"], t["bias"].detach())
        ]
        return {"out": parts[0] + parts[1]}
    q, k, v = _qkv(t)
    packed = "cu_q" in t
    one_batch = packed and q.ndim == 4
    if one_batch:
        q, k, v = q.squeeze(0), k.squeeze(0), v.squeeze(0)
    out, lse = attention_lse(
        q,
        k,
        v,
        layout="thd" if packed else layout,
        scale=setting.get("scale"),
        causal=setting.get("causal"),
        window=tuple(setting.get("window", (-1, -1))),
        bias=t.get("bias"),
        cu_seqlens_q=t.get("cu_q"),
        cu_seqlens_k=t.get("cu_k"),
    )
    lse = {"flash": _flash_lse, "efficient": _efficient_lse, "cudnn": _cudnn_lse}[kernel](
        setting, lse
    )
    return {"out": out.unsqueeze(0) if one_batch else out, "lse": lse}


def _flash_lse(setting: Setting, lse: torch.Tensor) -> torch.Tensor:
    return lse


def _efficient_lse(setting: Setting, lse: torch.Tensor) -> torch.Tensor:
    """(sequences, heads, longest rounded up), padded with +inf; ROCm's kernels pad nothing."""
    import torch

    longest, _ = _longest(setting)
    parts = torch.split(lse, setting.options["q_lengths"], 1) if lse.ndim == 2 else lse.unbind(0)
    columns = longest if torch.version.hip else -(-longest // ALIGN_LSE) * ALIGN_LSE
    padded = lse.new_full((len(parts), parts[0].shape[0], columns), torch.inf)
    for at, part in enumerate(parts):
        padded[at, :, : part.shape[1]] = part
    return padded


def _cudnn_lse(setting: Setting, lse: torch.Tensor) -> torch.Tensor:
    return (lse.transpose(0, 1) if lse.ndim == 2 else lse).unsqueeze(-1)


# --- settings ------------------------------------------------------------------------------


def _only(placements: tuple[str, ...], *settings: Setting) -> tuple[Setting, ...]:
    """The same settings with fewer placements."""
    return tuple(replace(setting, placements=placements) for setting in settings)


def _with_bias(name: str, placements: tuple[str, ...], **options: Any) -> Setting:
    return Setting(name, BASE, options=options, placements=placements)


PLAIN = Setting("plain", BASE, placements=COMMON)
# F.scaled_dot_product_attention lets only equal lengths through to flash and cuDNN with `is_causal`.
SQUARE = {**BASE, "kv_sequence": 18}
CAUSAL = Setting("causal", SQUARE, options={"causal": "top_left"}, placements=CORE)
BOTTOM_RIGHT = Setting(
    "causal_bottom_right", BASE, options={"causal": "bottom_right"}, placements=ONLY_HEADS
)
GQA = Setting("gqa", {**BASE, "heads": 20}, placements=INDEPENDENT)
# 2 ranks get 6 query heads each, and 2 and 1 kv heads: all divides, but the groups are wrong.
GQA_12_3 = Setting(
    "gqa_12_3",
    {**BASE, "batch": 14, "heads": 12, "kv_heads": 3, "kv_sequence": 40},
    placements=CORE,
)
# 3 query heads each: they do not divide by 2 kv heads, on the first rank alone. With `query` PyTorch
# moves q to heads first, and the rank that goes on waits for the one that cannot.
GQA_6_3 = Setting(
    "gqa_6_3", {**BASE, "batch": 14, "heads": 6, "kv_heads": 3}, placements=("heads", "query")
)
MQA = Setting("mqa", {**BASE, "kv_heads": 1}, placements=CORE)
# Keys and values whole on every rank: what a user does who has fewer kv heads than ranks.
KV_REPLICATED = tuple(
    replace(
        setting,
        name=f"{setting.name}_kv_replicated",
        options={"kv": "replicated"},
        placements=ONLY_HEADS,
    )
    for setting in (GQA, GQA_12_3, MQA)
)
SCALE = Setting("scale", BASE, options={"scale": 0.3}, placements=ONLY_HEADS)
UNEVEN_HEADS = Setting(
    "uneven_heads", {**BASE, "batch": 14, "heads": 5, "kv_heads": 5}, placements=ONLY_HEADS
)
UNEVEN_SEQUENCE = Setting(
    "uneven_sequence", {**BASE, "sequence": 19, "kv_sequence": 25}, placements=("sequence",)
)
BATCH_1 = Setting("batch_1", {**BASE, "batch": 1}, placements=("batch",))
# q = 0 and v = identity make the dropout mask readable: see runner.oracle.judge_dropout.
DROPOUT = Setting("dropout", {**BASE, "kv_sequence": 16}, dropout=0.25, placements=INDEPENDENT)
BFLOAT16 = Setting("bfloat16", BASE, "bfloat16", placements=CORE)
FLOAT16 = Setting("float16", BASE, "float16", placements=ONLY_HEADS)
WINDOW = Setting("window", BASE, options={"window": [5, 2]}, placements=ONLY_HEADS)
VARLEN = (
    Setting("varlen", PACKED_SIZES, options=PACKING, placements=CORE),
    Setting("varlen_bfloat16", PACKED_SIZES, "bfloat16", PACKING, placements=ONLY_HEADS),
)
BIAS = _with_bias("bias_sharded", INDEPENDENT, bias="sharded")
BIASES = (
    _with_bias("bias_replicated", ("batch", "heads"), bias="replicated"),
    _with_bias("bias_plain", ONLY_HEADS, bias="plain"),
    _with_bias("bias_bcast_heads", INDEPENDENT, bias="sharded", bias_broadcast="heads"),
    _with_bias("bias_bcast_batch", INDEPENDENT, bias="sharded", bias_broadcast="batch"),
)
# CUDA's efficient kernel refuses a bias that broadcasts: F.scaled_dot_product_attention expands it first.
BIAS_EXPANDED = _with_bias(
    "bias_expanded", ONLY_HEADS, bias="sharded", bias_broadcast="heads", bias_expanded=True
)
# Learned biases have shapes of their own: what DTensor answers for a shape depends on what came before.
BIAS_GRAD = replace(
    _with_bias("bias_grad", INDEPENDENT, bias="sharded", bias_grad=True),
    sizes={**BASE, "kv_sequence": 56},
)
BIAS_GRAD_AND_FROZEN = replace(
    _with_bias("bias_grad_and_frozen", ONLY_HEADS, bias="sharded", bias_grad=True, two_layers=True),
    sizes={**BASE, "kv_sequence": 40},
)

FLASH = (
    *_only(ALL, PLAIN), *_only(COMMON, CAUSAL), BOTTOM_RIGHT, GQA, GQA_12_3, GQA_6_3, MQA,
    *KV_REPLICATED, SCALE, UNEVEN_HEADS, UNEVEN_SEQUENCE, BATCH_1, DROPOUT,
    *_only(INDEPENDENT, BFLOAT16), FLOAT16,
)  # fmt: skip
# No grouped queries: the kernel refuses them.
EFFICIENT = (
    *_only((*COMMON, "query"), PLAIN), CAUSAL, BIAS, *BIASES, BIAS_EXPANDED, BIAS_GRAD,
    BIAS_GRAD_AND_FROZEN, SCALE, UNEVEN_HEADS, BATCH_1, DROPOUT, BFLOAT16, FLOAT16,
)  # fmt: skip
CUDNN = (
    *_only((*COMMON, "query"), PLAIN), CAUSAL, BIAS, UNEVEN_HEADS, BATCH_1, BFLOAT16, FLOAT16,
    *_only(ONLY_HEADS, GQA, GQA_12_3, GQA_6_3, MQA, *BIASES, DROPOUT),
)  # fmt: skip
OVERRIDEABLE = (
    *_only(INDEPENDENT, PLAIN),
    *_only(ONLY_HEADS, CAUSAL, GQA, BIAS, BIAS_GRAD, DROPOUT, BFLOAT16),
)
RAW_FLASH = (
    *_only(INDEPENDENT, PLAIN), *_only(ONLY_HEADS, BOTTOM_RIGHT, GQA, BFLOAT16), WINDOW, *VARLEN,
)  # fmt: skip
RAW_EFFICIENT = (
    *_only(INDEPENDENT, PLAIN), *_only(ONLY_HEADS, CAUSAL, BOTTOM_RIGHT, BIAS_GRAD, BFLOAT16), VARLEN[0],
)  # fmt: skip
RAW_CUDNN = (
    *_only(INDEPENDENT, PLAIN), *_only(ONLY_HEADS, CAUSAL, GQA, BIAS, BFLOAT16), *VARLEN,
)  # fmt: skip


def _operator(
    name: str,
    forward: str,
    backward: str,
    call: Call,
    lse: str,
    settings: tuple[Setting, ...],
    dense: Dims = BHSD,
    packed: Dims = PACKED,
) -> Operator:
    """`lse`: in which kernel's layout the log-sum-exp is; `dense`, `packed`: see `tensors`."""
    return Operator(
        name=f"sdpa_cuda.{name}",
        function=f"torch.ops.aten.{forward}",
        tensors=partial(tensors, dense, packed),
        call=partial(call, forward),
        reference=partial(reference, lse, "bhsd" if dense == BHSD else "bshd"),
        settings=settings,
        output_dims=dense,
        kernel_ops=(f"aten.{forward}.default", f"aten.{backward}.default"),
        missing=partial(_missing, forward),
        standins=("aten_attention",),
    )


def _sdpa_operator(
    name: str, takes: tuple[str, ...], lse: str, settings: tuple[Setting, ...], op: str = ""
) -> Operator:
    forward = f"_scaled_dot_product_{op or name + '_attention'}"
    return _operator(name, forward, f"{forward}_backward", partial(sdpa, takes), lse, settings)


def _raw_operator(
    kernel: str, call: Call, settings: tuple[Setting, ...], dense: Dims, packed: Dims = PACKED
) -> Operator:
    names = f"_{kernel}_attention_forward", f"_{kernel}_attention_backward"
    return _operator(f"raw_{kernel}", *names, call, kernel, settings, dense, packed)


WITH_BIAS = ("bias", "compute_log_sumexp")
OUT_OF_TREE = _sdpa_operator(
    "overrideable", ("bias",), "flash", OVERRIDEABLE, "fused_attention_overrideable"
)

PROBE = Probe(
    name="sdpa_cuda",
    summary="the attention ops of PyTorch's CUDA and out-of-tree backends, each called by itself",
    operators=(
        _sdpa_operator("flash", (), "flash", FLASH),
        _sdpa_operator("efficient", WITH_BIAS, "efficient", EFFICIENT),
        _sdpa_operator("cudnn", WITH_BIAS, "cudnn", CUDNN),
        replace(OUT_OF_TREE, devices=("cpu",)),  # CUDA has no kernel for it
        _raw_operator("flash", raw_flash, RAW_FLASH, BSHD),
        _raw_operator("efficient", raw_efficient, RAW_EFFICIENT, BSHD, PACKED_AS_BATCH),
        _raw_operator("cudnn", raw_cudnn, RAW_CUDNN, BHSD),
    ),
)
