"""flash-attn 2.7 and later: the dense, packed and variable-length functions behind four kernel ops.

On a machine without CUDA the package's own Python runs on attncheck's stand-in for its compiled
module: `attncheck scan --with flash-attn`.
"""

from __future__ import annotations

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

PACKAGES = ("flash-attn>=2.7",)
STANDINS = ("flash_attn_2_cuda",)
DENSE_OPS = (
    "flash_attn._flash_attn_forward.default",
    "flash_attn._flash_attn_backward.default",
)
VARLEN_OPS = (
    "flash_attn._flash_attn_varlen_forward.default",
    "flash_attn._flash_attn_varlen_backward.default",
)

Q_DIMS = (BATCH, SEQUENCE, HEADS, HEAD_DIM)
KV_DIMS = (BATCH, KV_SEQUENCE, KV_HEADS, HEAD_DIM)
QKV_PACKED_DIMS = (BATCH, SEQUENCE, OTHER, HEADS, HEAD_DIM)
KV_PACKED_DIMS = (BATCH, KV_SEQUENCE, OTHER, KV_HEADS, HEAD_DIM)
# Packed sequences: the dim that holds all tokens is the one to shard over the sequence.
VARLEN_Q_DIMS = (SEQUENCE, HEADS, HEAD_DIM)
VARLEN_KV_DIMS = (KV_SEQUENCE, KV_HEADS, HEAD_DIM)

# All sizes differ, and so do their halves: a swapped or wrongly split dim cannot fit by chance.
BASE = {"batch": 6, "heads": 4, "kv_heads": 4, "sequence": 18, "kv_sequence": 22, "head_dim": 16}
SQUARE = {**BASE, "kv_sequence": 18}
GQA = {**BASE, "heads": 20}
MQA = {**BASE, "kv_heads": 1}
# 14 rows: 5 heads leave 3 on the first of 2 ranks, as 6 rows would.
GQA_UNEVEN_KV = {**BASE, "batch": 14, "heads": 20, "kv_heads": 5}
UNEVEN_HEADS = {**BASE, "batch": 14, "heads": 5, "kv_heads": 5}
UNEVEN_SEQUENCE = {**BASE, "sequence": 19, "kv_sequence": 25}
BATCH_1 = {**BASE, "batch": 1}
HEAD_DIM_20 = {**BASE, "head_dim": 20}  # no multiple of 8: flash_attn pads it in Python

# Three sequences; a split of the tokens in two goes through the middle one.
Q_LENGTHS = [7, 9, 10]
KV_LENGTHS = [12, 9, 13]
VARLEN = {**BASE, "batch": 3, "sequence": sum(Q_LENGTHS), "kv_sequence": sum(KV_LENGTHS)}

ALL = ("replicate", "batch", "heads", "sequence", "query", "head_dim", "partial")
COMMON = ("replicate", "batch", "heads", "sequence")
INDEPENDENT = ("replicate", "batch", "heads")  # dims that attention never mixes
CORE = ("replicate", "heads")
POSITIONS = ("sequence", "query")


# --- arguments -----------------------------------------------------------------------------


def _tensor(name: str, dims: tuple[str, ...], setting: Setting, packed: int = 0) -> Tensor:
    """`packed`: the size of the dim that stacks q, k, v or k, v."""
    return Tensor(name, dims, tuple(packed if r == OTHER else setting[r] for r in dims))


def _slopes(setting: Setting) -> tuple[Tensor, ...]:
    kind = setting.get("alibi")
    if kind is None:
        return ()
    dims = {"heads": (HEADS,), "batch_and_heads": (BATCH, HEADS)}[kind]
    sizes = tuple(setting[role] for role in dims)
    slopes = Tensor(
        "alibi_slopes", dims, sizes, requires_grad=False, fill="slopes", dtype="float32"
    )
    return (slopes,)


def dense_tensors(setting: Setting) -> tuple[Tensor, ...]:
    return (
        _tensor("q", Q_DIMS, setting),
        _tensor("k", KV_DIMS, setting),
        _tensor("v", KV_DIMS, setting),
        *_slopes(setting),
    )


def qkvpacked_tensors(setting: Setting) -> tuple[Tensor, ...]:
    return _tensor("qkv", QKV_PACKED_DIMS, setting, packed=3), *_slopes(setting)


def kvpacked_tensors(setting: Setting) -> tuple[Tensor, ...]:
    return (
        _tensor("q", Q_DIMS, setting),
        _tensor("kv", KV_PACKED_DIMS, setting, packed=2),
        *_slopes(setting),
    )


def varlen_tensors(setting: Setting) -> tuple[Tensor, ...]:
    return (
        _tensor("q", VARLEN_Q_DIMS, setting),
        _tensor("k", VARLEN_KV_DIMS, setting),
        _tensor("v", VARLEN_KV_DIMS, setting),
        _cu_seqlens("cu_seqlens_q", setting.get("q_lengths"), setting),
        _cu_seqlens("cu_seqlens_k", setting.get("kv_lengths"), setting),
        *_slopes(setting),
    )


def _cu_seqlens(name: str, lengths: list[int], setting: Setting) -> Tensor:
    starts = (0, *accumulate(lengths))
    return Tensor(
        name,
        (OTHER,),
        (len(starts),),
        requires_grad=False,
        fill="values",
        values=starts,
        dtype="int32",
        wrap=setting.get("cu_seqlens", "replicate"),
    )


# --- calls ---------------------------------------------------------------------------------


def _flags(setting: Setting, t: Tensors) -> dict[str, Any]:
    """The keyword arguments that all four functions take; what a setting leaves out stays out."""
    flags: dict[str, Any] = {"causal": bool(setting.get("causal", False))}
    if "window" in setting.options:
        flags["window_size"] = tuple(setting.options["window"])
    if "softcap" in setting.options:
        flags["softcap"] = setting.options["softcap"]
    if "scale" in setting.options:
        flags["softmax_scale"] = setting.options["scale"]
    if setting.get("deterministic"):
        flags["deterministic"] = True
    if "alibi_slopes" in t:
        flags["alibi_slopes"] = t["alibi_slopes"]
    return flags


def call_dense(setting: Setting, t: Tensors) -> torch.Tensor:
    from flash_attn import flash_attn_func

    out: torch.Tensor = flash_attn_func(t["q"], t["k"], t["v"], **_flags(setting, t))
    return out


def call_qkvpacked(setting: Setting, t: Tensors) -> torch.Tensor:
    from flash_attn import flash_attn_qkvpacked_func

    out: torch.Tensor = flash_attn_qkvpacked_func(t["qkv"], **_flags(setting, t))
    return out


def call_kvpacked(setting: Setting, t: Tensors) -> torch.Tensor:
    from flash_attn import flash_attn_kvpacked_func

    out: torch.Tensor = flash_attn_kvpacked_func(t["q"], t["kv"], **_flags(setting, t))
    return out


def call_varlen(setting: Setting, t: Tensors) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    out: torch.Tensor = flash_attn_varlen_func(
        t["q"],
        t["k"],
        t["v"],
        t["cu_seqlens_q"],
        t["cu_seqlens_k"],
        max(setting.options["q_lengths"]),
        max(setting.options["kv_lengths"]),
        **_flags(setting, t),
    )
    return out


# --- references ----------------------------------------------------------------------------


def _reference(
    setting: Setting,
    t: Tensors,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: str = "bshd",
) -> torch.Tensor:
    from attncheck.runner.reference import attention

    left, right = setting.get("window", (-1, -1))
    return attention(
        q,
        k,
        v,
        layout=layout,
        scale=setting.get("scale"),
        causal="bottom_right" if setting.get("causal") else None,
        window=(left, right),
        softcap=setting.get("softcap", 0.0),
        alibi_slopes=t.get("alibi_slopes"),
        cu_seqlens_q=t.get("cu_seqlens_q"),
        cu_seqlens_k=t.get("cu_seqlens_k"),
    )


def dense_reference(setting: Setting, t: Tensors) -> torch.Tensor:
    return _reference(setting, t, t["q"], t["k"], t["v"])


def qkvpacked_reference(setting: Setting, t: Tensors) -> torch.Tensor:
    q, k, v = t["qkv"].unbind(2)
    return _reference(setting, t, q, k, v)


def kvpacked_reference(setting: Setting, t: Tensors) -> torch.Tensor:
    k, v = t["kv"].unbind(2)
    return _reference(setting, t, t["q"], k, v)


def varlen_reference(setting: Setting, t: Tensors) -> torch.Tensor:
    return _reference(setting, t, t["q"], t["k"], t["v"], layout="thd")


# --- settings ------------------------------------------------------------------------------

CAUSAL = {"causal": True}
WINDOW = {"window": [5, 3]}
SOFTCAP = {"softcap": 1.5}
SCALE = {"scale": 0.3}
ALIBI = {"alibi": "heads"}

DENSE = (
    Setting("plain", BASE, level="quick", placements=(*INDEPENDENT, "head_dim", "partial")),
    Setting("causal", BASE, options=CAUSAL, level="quick", placements=INDEPENDENT),
    Setting("square", SQUARE, placements=POSITIONS),
    Setting("square_causal", SQUARE, options=CAUSAL, placements=("heads", *POSITIONS)),
    Setting("uneven_sequence", UNEVEN_SEQUENCE, placements=POSITIONS),
    Setting("uneven_heads", UNEVEN_HEADS, placements=CORE),
    Setting("batch_1", BATCH_1, placements=("replicate", "batch")),
    Setting("gqa", GQA, placements=(*INDEPENDENT, "query")),
    Setting("mqa", MQA, placements=INDEPENDENT),
    Setting("gqa_uneven_kv", GQA_UNEVEN_KV, placements=CORE),
    Setting("window", BASE, options=WINDOW, placements=COMMON),
    Setting("softcap", BASE, options=SOFTCAP, placements=CORE),
    Setting("scale", BASE, options=SCALE, placements=CORE),
    Setting("alibi", BASE, options=ALIBI, placements=INDEPENDENT),
    Setting("head_dim_20", HEAD_DIM_20, placements=INDEPENDENT),
    Setting("bfloat16", BASE, "bfloat16", placements=COMMON),
    Setting("float16", BASE, "float16", placements=CORE),
    Setting("bfloat16_causal", BASE, "bfloat16", CAUSAL, "full"),
    Setting("gqa_causal", GQA, options=CAUSAL, level="full"),
    Setting("mqa_causal", MQA, options=CAUSAL, level="full"),
    Setting("gqa_uneven_kv_causal", GQA_UNEVEN_KV, options=CAUSAL, level="full"),
    Setting("window_causal", BASE, options={**WINDOW, **CAUSAL}, level="full"),
    Setting("window_left", BASE, options={"window": [5, -1]}, level="full"),
    Setting("softcap_causal", BASE, options={**SOFTCAP, **CAUSAL}, level="full"),
    Setting("alibi_causal", BASE, options={**ALIBI, **CAUSAL}, level="full"),
    Setting("alibi_batch", BASE, options={"alibi": "batch_and_heads"}, level="full"),
    Setting("deterministic", BASE, options={"deterministic": True}, level="full"),
)

QKVPACKED = (
    Setting("plain", SQUARE, placements=COMMON),
    Setting("causal", SQUARE, options=CAUSAL, placements=CORE),
    Setting("uneven_heads", {**UNEVEN_HEADS, "kv_sequence": 18}, placements=CORE),
    Setting("bfloat16", SQUARE, "bfloat16", placements=CORE),
    Setting("window", SQUARE, options=WINDOW, level="full"),
    Setting("softcap", SQUARE, options=SOFTCAP, level="full"),
    Setting("scale", SQUARE, options=SCALE, level="full"),
    Setting("alibi", SQUARE, options=ALIBI, level="full"),
    Setting("head_dim_20", {**HEAD_DIM_20, "kv_sequence": 18}, level="full"),
    Setting("batch_1", {**BATCH_1, "kv_sequence": 18}, level="full"),
    Setting("float16", SQUARE, "float16", level="full"),
)

KVPACKED = (
    Setting("plain", BASE, placements=COMMON),
    Setting("causal", BASE, options=CAUSAL, placements=CORE),
    Setting("gqa", GQA, placements=INDEPENDENT),
    Setting("gqa_uneven_kv", GQA_UNEVEN_KV, placements=CORE),
    Setting("bfloat16", BASE, "bfloat16", placements=CORE),
    Setting("mqa", MQA, level="full"),
    Setting("uneven_heads", UNEVEN_HEADS, level="full"),
    Setting("window", BASE, options=WINDOW, level="full"),
    Setting("softcap", BASE, options=SOFTCAP, level="full"),
    Setting("scale", BASE, options=SCALE, level="full"),
    Setting("alibi", BASE, options=ALIBI, level="full"),
    Setting("head_dim_20", HEAD_DIM_20, level="full"),
    Setting("batch_1", BATCH_1, level="full"),
    Setting("float16", BASE, "float16", level="full"),
)


def _varlen(
    name: str,
    sizes: dict[str, int] | None = None,
    dtype: str = "float32",
    options: dict[str, Any] | None = None,
    level: str = "default",
    placements: tuple[str, ...] | None = None,
) -> Setting:
    """A setting on the packed sequences; `sizes` other than those of VARLEN."""
    lengths = {"q_lengths": Q_LENGTHS, "kv_lengths": KV_LENGTHS}
    return Setting(
        name, {**VARLEN, **(sizes or {})}, dtype, {**lengths, **(options or {})}, level, placements
    )


VARLEN_SETTINGS = (
    _varlen("plain", placements=(*CORE, *POSITIONS)),
    _varlen("causal", options=CAUSAL, placements=CORE),
    _varlen("cu_seqlens_plain", options={"cu_seqlens": "plain"}, placements=CORE),
    _varlen("gqa", {"heads": 20}, placements=CORE),
    _varlen("gqa_uneven_kv", {"heads": 20, "kv_heads": 5}, placements=CORE),
    _varlen("bfloat16", dtype="bfloat16", placements=CORE),
    _varlen("mqa", {"kv_heads": 1}, level="full"),
    _varlen("uneven_heads", {"heads": 5, "kv_heads": 5}, level="full"),
    _varlen("window", options=WINDOW, level="full"),
    _varlen("softcap", options=SOFTCAP, level="full"),
    _varlen("scale", options=SCALE, level="full"),
    _varlen("alibi", options=ALIBI, level="full"),
    _varlen("head_dim_20", {"head_dim": 20}, level="full"),
    _varlen("float16", dtype="float16", level="full"),
)


PROBE = Probe(
    name="flash_attn",
    summary="flash-attn 2.7+: dense, packed and variable-length attention",
    operators=(
        Operator(
            name="flash_attn_func",
            tensors=dense_tensors,
            call=call_dense,
            reference=dense_reference,
            settings=DENSE,
            output_dims=Q_DIMS,
            kernel_ops=DENSE_OPS,
            placements=ALL,
            packages=PACKAGES,
            standins=STANDINS,
            function="flash_attn.flash_attn_func",
        ),
        Operator(
            name="flash_attn_qkvpacked_func",
            tensors=qkvpacked_tensors,
            call=call_qkvpacked,
            reference=qkvpacked_reference,
            settings=QKVPACKED,
            output_dims=Q_DIMS,
            kernel_ops=DENSE_OPS,
            placements=COMMON,
            packages=PACKAGES,
            standins=STANDINS,
            function="flash_attn.flash_attn_qkvpacked_func",
        ),
        Operator(
            name="flash_attn_kvpacked_func",
            tensors=kvpacked_tensors,
            call=call_kvpacked,
            reference=kvpacked_reference,
            settings=KVPACKED,
            output_dims=Q_DIMS,
            kernel_ops=DENSE_OPS,
            placements=COMMON,
            packages=PACKAGES,
            standins=STANDINS,
            function="flash_attn.flash_attn_kvpacked_func",
        ),
        Operator(
            name="flash_attn_varlen_func",
            tensors=varlen_tensors,
            call=call_varlen,
            reference=varlen_reference,
            settings=VARLEN_SETTINGS,
            output_dims=VARLEN_Q_DIMS,
            kernel_ops=VARLEN_OPS,
            placements=(*CORE, *POSITIONS),
            packages=PACKAGES,
            standins=STANDINS,
            function="flash_attn.flash_attn_varlen_func",
        ),
    ),
)
