"""flash-attn 3: its two op surfaces, and the functions of `flash_attn_interface` over each.

Version 3.0.0.b1 (released with flash-attn 2.8) calls `flash_attn_3::fwd` and `bwd`, 3.0.0 the custom ops
`flash_attn_3::_flash_attn_forward` and `_flash_attn_backward`. The package is on no index and needs a
Hopper GPU: on a CPU its ops and functions are attncheck's own, with its schemas. An operator is known by
the schemas of its ops, not by their names: of the two versions only one can be installed.
"""

from __future__ import annotations

from functools import partial
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
    cu_seqlens,
)

if TYPE_CHECKING:
    import torch

STANDINS = {"raw": ("flash_attn_3_beta",), "custom_op": ("flash_attn_3",)}
RAW_OPS = ("flash_attn_3.fwd.default", "flash_attn_3.bwd.default")
CUSTOM_OPS = (
    "flash_attn_3._flash_attn_forward.default",
    "flash_attn_3._flash_attn_backward.default",
)

Q_DIMS = (BATCH, SEQUENCE, HEADS, HEAD_DIM)
KV_DIMS = (BATCH, KV_SEQUENCE, KV_HEADS, HEAD_DIM)
# Packed sequences: the dim that holds all tokens is the one to shard over the sequence.
VARLEN_Q_DIMS = (SEQUENCE, HEADS, HEAD_DIM)
VARLEN_KV_DIMS = (KV_SEQUENCE, KV_HEADS, HEAD_DIM)

# All sizes differ, and so do their halves: a swapped or wrongly split dim cannot fit by chance.
BASE = {"batch": 6, "heads": 4, "kv_heads": 4, "sequence": 18, "kv_sequence": 22, "head_dim": 16}
GQA = {**BASE, "heads": 20}
MQA = {**BASE, "kv_heads": 1}
GQA_UNEVEN_KV = {**BASE, "batch": 14, "heads": 20, "kv_heads": 5}
UNEVEN_HEADS = {**BASE, "batch": 14, "heads": 5, "kv_heads": 5}
UNEVEN_SEQUENCE = {**BASE, "sequence": 19, "kv_sequence": 25}
BATCH_1 = {**BASE, "batch": 1}

# Three sequences; a split of the tokens in two goes through the middle one.
Q_LENGTHS = [7, 9, 10]
KV_LENGTHS = [12, 9, 13]
VARLEN = {**BASE, "batch": 3, "sequence": sum(Q_LENGTHS), "kv_sequence": sum(KV_LENGTHS)}

INDEPENDENT = ("replicate", "batch", "heads")  # dims that attention never mixes
CORE = ("replicate", "heads")
ONE = ("heads",)


# --- arguments -----------------------------------------------------------------------------


def dense_tensors(setting: Setting) -> tuple[Tensor, ...]:
    dims = {"q": Q_DIMS, "k": KV_DIMS, "v": KV_DIMS}
    return tuple(Tensor(n, d, tuple(setting[role] for role in d)) for n, d in dims.items())


def varlen_tensors(setting: Setting) -> tuple[Tensor, ...]:
    dims = {"q": VARLEN_Q_DIMS, "k": VARLEN_KV_DIMS, "v": VARLEN_KV_DIMS}
    wrap = setting.get("cu_seqlens", "replicate")
    return (
        *(Tensor(n, d, tuple(setting[role] for role in d)) for n, d in dims.items()),
        cu_seqlens("cu_seqlens_q", setting.options["q_lengths"], wrap),
        cu_seqlens("cu_seqlens_k", setting.options["kv_lengths"], wrap),
    )


# --- calls ---------------------------------------------------------------------------------


def missing(surface: str) -> str:
    """Why the ops of a surface are not the expected ones here, or ''.

    Raises ModuleNotFoundError where nothing provides them: on a GPU without the package.
    """
    from attncheck.standins import flash_attn_3
    from attncheck.standins.schemas import registered_schema

    forward, _ = flash_attn_3.SURFACES[surface]
    if registered_schema(flash_attn_3.name_of(forward)) is None:
        flash_attn_3.import_package()
    return flash_attn_3.missing(surface)


def interface(surface: str, q: torch.Tensor) -> Any:
    """`flash_attn_interface` itself on a GPU, and what stands for it on a CPU."""
    from attncheck.standins import flash_attn_3, flash_attn_3_beta

    if q.device.type == "cpu":
        return flash_attn_3_beta if surface == "raw" else flash_attn_3.interface(surface)
    return flash_attn_3.import_package()


def _flags(setting: Setting) -> dict[str, Any]:
    """The keyword arguments that both functions take; what a setting leaves out stays out."""
    flags: dict[str, Any] = {"causal": bool(setting.get("causal", False))}
    if "window" in setting.options:
        flags["window_size"] = tuple(setting.options["window"])
    for option, keyword in (
        ("softcap", "softcap"),
        ("scale", "softmax_scale"),
        ("deterministic", "deterministic"),
    ):
        if option in setting.options:
            flags[keyword] = setting.options[option]
    return flags


def call_dense(surface: str, setting: Setting, t: Tensors) -> Results:
    function = interface(surface, t["q"]).flash_attn_func
    flags = _flags(setting)
    if not setting.get("lse"):
        out: torch.Tensor = function(t["q"], t["k"], t["v"], **flags)
        return out
    out, lse = function(t["q"], t["k"], t["v"], return_attn_probs=True, **flags)
    return {"out": out, "lse": lse}


def call_varlen(surface: str, setting: Setting, t: Tensors) -> torch.Tensor:
    function = interface(surface, t["q"]).flash_attn_varlen_func
    out: torch.Tensor = function(
        t["q"],
        t["k"],
        t["v"],
        t["cu_seqlens_q"],
        t["cu_seqlens_k"],
        max(setting.options["q_lengths"]),
        max(setting.options["kv_lengths"]),
        **_flags(setting),
    )
    return out


def call_op(setting: Setting, t: Tensors) -> torch.Tensor:
    """The custom op by itself: its own autograd formula, no `autograd.Function` around it."""
    import torch

    op = torch.ops.flash_attn_3._flash_attn_forward
    out: torch.Tensor = op(t["q"], t["k"], t["v"], **_flags(setting))[0]
    return out


# --- reference -----------------------------------------------------------------------------


def reference(setting: Setting, t: Tensors) -> Results:
    from attncheck.runner.reference import attention_lse

    left, right = setting.get("window", (-1, -1))
    out, lse = attention_lse(
        t["q"],
        t["k"],
        t["v"],
        layout="thd" if "cu_seqlens_q" in t else "bshd",
        scale=setting.get("scale"),
        causal="bottom_right" if setting.get("causal") else None,
        window=(left, right),
        softcap=setting.get("softcap", 0.0),
        cu_seqlens_q=t.get("cu_seqlens_q"),
        cu_seqlens_k=t.get("cu_seqlens_k"),
    )
    return {"out": out, "lse": lse} if setting.get("lse") else out


# --- settings ------------------------------------------------------------------------------

CAUSAL = {"causal": True}
WINDOW = {"window": [5, 3]}
SOFTCAP = {"softcap": 1.5}

DENSE = (
    Setting("plain", BASE, placements=INDEPENDENT),
    Setting("causal", BASE, options=CAUSAL, placements=("batch", "heads")),
    Setting("gqa", GQA, placements=ONE),
    Setting("gqa_uneven_kv", GQA_UNEVEN_KV, placements=ONE),
    Setting("mqa", MQA, placements=ONE),
    Setting("window", BASE, options=WINDOW, placements=ONE),
    Setting("softcap", BASE, options=SOFTCAP, placements=ONE),
    Setting("uneven_heads", UNEVEN_HEADS, placements=ONE),
    Setting("batch_1", BATCH_1, placements=("batch",)),
    Setting("bfloat16", BASE, "bfloat16", placements=ONE),
    Setting("bfloat16_causal", BASE, "bfloat16", CAUSAL, "full"),
    Setting("float16", BASE, "float16", level="full"),
    Setting("gqa_causal", GQA, options=CAUSAL, level="full"),
    Setting("window_causal", BASE, options={**WINDOW, **CAUSAL}, level="full"),
    Setting("scale", BASE, options={"scale": 0.3}, level="full"),
    Setting("deterministic", BASE, options={"deterministic": True}, level="full"),
    Setting("uneven_sequence", UNEVEN_SEQUENCE, level="full"),
)
# 3.0.0 can return the log-sum-exp too; the beta's function cannot.
DENSE_WITH_LSE = (*DENSE, Setting("lse", BASE, options={"lse": True}, placements=ONE))
# What is set from `causal` on takes an argument more than the op's own formula has gradients for.
OP = (
    Setting("plain", BASE, placements=CORE),
    Setting("causal", BASE, options=CAUSAL, placements=("replicate",)),
    Setting("gqa", GQA, level="full"),
    Setting("bfloat16", BASE, "bfloat16", level="full"),
)


def _varlen(
    name: str,
    dtype: str = "float32",
    level: str = "default",
    placements: tuple[str, ...] | None = None,
    **options: Any,
) -> Setting:
    lengths = {"q_lengths": Q_LENGTHS, "kv_lengths": KV_LENGTHS}
    return Setting(name, VARLEN, dtype, {**lengths, **options}, level, placements)


VARLEN_SETTINGS = (
    _varlen("plain", placements=CORE),
    _varlen("cu_seqlens_plain", placements=ONE, cu_seqlens="plain"),
    _varlen("causal", level="full", causal=True),
    _varlen("bfloat16", "bfloat16", level="full"),
)


def _operator(name: str, surface: str, **parts: Any) -> Operator:
    return Operator(
        name=name,
        reference=reference,
        kernel_ops=RAW_OPS if surface == "raw" else CUSTOM_OPS,
        missing=partial(missing, surface),
        standins=STANDINS[surface],
        **parts,
    )


def _dense(name: str, surface: str, settings: tuple[Setting, ...]) -> Operator:
    return _operator(
        name,
        surface,
        tensors=dense_tensors,
        call=partial(call_dense, surface),
        settings=settings,
        output_dims=Q_DIMS,
        placements=(*INDEPENDENT, "sequence"),
        function="flash_attn_interface.flash_attn_func",
    )


def _packed(name: str, surface: str) -> Operator:
    return _operator(
        name,
        surface,
        tensors=varlen_tensors,
        call=partial(call_varlen, surface),
        settings=VARLEN_SETTINGS,
        output_dims=VARLEN_Q_DIMS,
        placements=CORE,
        function="flash_attn_interface.flash_attn_varlen_func",
    )


PROBE = Probe(
    name="flash_attn_3",
    summary="flash-attn 3: raw ops (3.0.0.b1) and custom ops (3.0.0), dense and variable-length",
    operators=(
        _dense("flash_attn_3.raw", "raw", DENSE),
        _packed("flash_attn_3.raw_varlen", "raw"),
        _dense("flash_attn_3.custom_op", "custom_op", DENSE_WITH_LSE),
        _packed("flash_attn_3.custom_op_varlen", "custom_op"),
        _operator(
            "flash_attn_3.custom_op_direct",
            "custom_op",
            tensors=dense_tensors,
            call=call_op,
            settings=OP,
            output_dims=Q_DIMS,
            placements=(*INDEPENDENT, "sequence"),
            function="torch.ops.flash_attn_3._flash_attn_forward",
        ),
    ),
)
