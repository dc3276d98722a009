"""`torch.nn.attention.varlen`: attention over sequences packed one behind the other (torch 2.10 and later).

On a machine without CUDA PyTorch's own Python runs on attncheck's stand-in for the flash kernels.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

from attncheck.probing import (
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
    fixed,
    refuse_unknown,
)

if TYPE_CHECKING:
    import torch

STANDINS = ("varlen_attn",)

# The dim that holds all tokens is the one to shard over the sequence.
Q_DIMS = (SEQUENCE, HEADS, HEAD_DIM)
KV_DIMS = (KV_SEQUENCE, KV_HEADS, HEAD_DIM)

# Three sequences; a split of the tokens in two goes through the middle one.
Q_LENGTHS = [7, 9, 10]
KV_LENGTHS = [12, 9, 13]
LENGTHS = {"q_lengths": Q_LENGTHS, "kv_lengths": KV_LENGTHS}
# All sizes differ, and so do their halves: a swapped or wrongly split dim cannot fit by chance.
BASE = {
    "batch": 3,
    "heads": 4,
    "kv_heads": 4,
    "sequence": sum(Q_LENGTHS),
    "kv_sequence": sum(KV_LENGTHS),
    "head_dim": 16,
}
GQA = {**BASE, "heads": 20}
GQA_UNEVEN_KV = {**BASE, "heads": 20, "kv_heads": 5}
MQA = {**BASE, "kv_heads": 1}
UNEVEN_HEADS = {**BASE, "heads": 5, "kv_heads": 5}

CORE = ("replicate", "heads")
ALL = (*CORE, "sequence", "query")


# --- arguments -----------------------------------------------------------------------------


def _tensors(setting: Setting, gradients: bool) -> tuple[Tensor, ...]:
    wrap = setting.get("cu_seqlens", "replicate")
    out = [
        Tensor(name, dims, tuple(setting[r] for r in dims), requires_grad=gradients)
        for name, dims in (("q", Q_DIMS), ("k", KV_DIMS), ("v", KV_DIMS))
    ]
    for name, lengths in (("cu_seq_q", "q_lengths"), ("cu_seq_k", "kv_lengths")):
        out.append(cu_seqlens(name, setting.options[lengths], wrap))
    if "seqused_k" in setting.options:
        out.append(fixed("seqused_k", setting.options["seqused_k"], wrap=wrap))
    return tuple(out)


def tensors(setting: Setting) -> tuple[Tensor, ...]:
    # Where only a part of the keys is used, PyTorch has no backward.
    return _tensors(setting, gradients="seqused_k" not in setting.options)


def out_tensors(setting: Setting) -> tuple[Tensor, ...]:
    sizes = tuple(setting[r] for r in Q_DIMS)
    out = Tensor("out", Q_DIMS, sizes, requires_grad=False, fill="zeros", mutable=True)
    return out, *_tensors(setting, gradients=False)


# --- calls ---------------------------------------------------------------------------------


def _flags(function: Any, setting: Setting, t: Tensors) -> dict[str, Any]:
    """The keyword arguments; what a setting leaves out stays out. ValueError for what a version lacks."""
    import inspect

    from torch.nn.attention import varlen

    flags: dict[str, Any] = {}
    if "window" in setting.options:
        flags["window_size"] = tuple(setting.options["window"])
    if setting.get("causal"):
        # The window (-1, 0) is how 2.13 spells it; 2.10 had a flag and no windows.
        flag = "is_causal" in inspect.signature(function).parameters
        flags |= {"is_causal": True} if flag else {"window_size": (-1, 0)}
    if "scale" in setting.options:
        flags["scale"] = setting.options["scale"]
    if setting["heads"] != setting["kv_heads"]:
        flags["enable_gqa"] = True
    if "seqused_k" in t:
        flags["seqused_k"] = t["seqused_k"]
    if setting.get("lse"):
        flags["return_aux"] = varlen.AuxRequest(lse=True)
    refuse_unknown(function, flags)
    return flags


def _arguments(setting: Setting, t: Tensors) -> tuple[Any, ...]:
    lengths = max(setting.options["q_lengths"]), max(setting.options["kv_lengths"])
    return t["q"], t["k"], t["v"], t["cu_seq_q"], t["cu_seq_k"], *lengths


def _results(setting: Setting, returned: Any) -> Results:
    if setting.get("lse"):
        return {"out": returned[0], "lse": returned[1]}
    out: torch.Tensor = returned
    return out


def call(setting: Setting, t: Tensors) -> Results:
    from torch.nn.attention.varlen import varlen_attn

    flags = _flags(varlen_attn, setting, t)
    return _results(setting, varlen_attn(*_arguments(setting, t), **flags))


def call_out(setting: Setting, t: Tensors) -> Results:
    from torch.nn.attention.varlen import varlen_attn_out

    flags = _flags(varlen_attn_out, setting, t)
    return _results(setting, varlen_attn_out(t["out"], *_arguments(setting, t), **flags))


def missing(name: str) -> str:
    """Why this torch lacks the function, or ''."""
    import importlib

    import torch

    try:
        module = importlib.import_module("torch.nn.attention.varlen")
    except ModuleNotFoundError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if not hasattr(module, name):
        return f"torch.nn.attention.varlen of torch {torch.__version__} has no {name}"
    return ""


def varlen_attn_missing() -> str:
    return missing("varlen_attn")


def varlen_attn_out_missing() -> str:
    return missing("varlen_attn_out")


# --- reference -----------------------------------------------------------------------------


def reference(setting: Setting, t: Tensors) -> Results:
    import torch

    from attncheck.runner.reference import attention_lse

    k, v, cu_seq_k = t["k"], t["v"], t["cu_seq_k"]
    if "seqused_k" in t:
        # The first keys of each sequence, packed anew.
        starts = cu_seq_k.tolist()
        used = t["seqused_k"].tolist()
        rows = [i for at, n in zip(starts, used, strict=False) for i in range(at, at + n)]
        k, v = k[rows], v[rows]
        cu_seq_k = torch.tensor([0, *accumulate(used)])
    window = tuple(setting.get("window", (-1, -1)))
    out, lse = attention_lse(
        t["q"],
        k,
        v,
        layout="thd",
        scale=setting.get("scale"),
        causal="bottom_right" if setting.get("causal") else None,
        window=(window[0], window[1]),
        cu_seqlens_q=t["cu_seq_q"],
        cu_seqlens_k=cu_seq_k,
    )
    return {"out": out, "lse": lse} if setting.get("lse") else out


# --- settings ------------------------------------------------------------------------------


def _setting(
    name: str,
    sizes: dict[str, int] = BASE,
    dtype: str = "float32",
    level: str = "default",
    placements: tuple[str, ...] | None = None,
    **options: Any,
) -> Setting:
    return Setting(name, sizes, dtype, {**LENGTHS, **options}, level, placements)


SETTINGS = (
    _setting("plain", placements=ALL),
    _setting("causal", placements=CORE, causal=True),
    _setting("cu_seqlens_plain", placements=CORE, cu_seqlens="plain"),
    _setting("gqa", GQA, placements=("heads",)),
    _setting("gqa_uneven_kv", GQA_UNEVEN_KV, placements=("heads",)),
    _setting("uneven_heads", UNEVEN_HEADS, placements=("heads",)),
    _setting("window", placements=("heads",), window=[5, 3]),
    _setting("lse", placements=("heads",), lse=True),
    _setting("bfloat16", dtype="bfloat16", placements=("heads",)),
    _setting("seqused_k", level="full", seqused_k=[10, 9, 4]),
    _setting("scale", level="full", scale=0.3),
    _setting("window_causal", level="full", window=[5, 0]),
    _setting("mqa", MQA, level="full"),
    _setting("gqa_causal", GQA, level="full", causal=True),
    _setting("float16", dtype="float16", level="full"),
)

OUT_SETTINGS = (
    _setting("plain", placements=CORE),
    _setting("lse", level="full", lse=True),
    _setting("causal", level="full", causal=True),
    _setting("gqa", GQA, level="full"),
)

PROBE = Probe(
    name="varlen",
    summary="torch.nn.attention.varlen: packed sequences, behind PyTorch's own custom ops",
    operators=(
        Operator(
            name="varlen_attn",
            tensors=tensors,
            call=call,
            reference=reference,
            settings=SETTINGS,
            output_dims=Q_DIMS,
            kernel_ops=(
                "torch_attn._varlen_attn.default",
                "torch_attn._varlen_attn_backward.default",
            ),
            placements=CORE,
            missing=varlen_attn_missing,
            standins=STANDINS,
            function="torch.nn.attention.varlen.varlen_attn",
        ),
        Operator(
            name="varlen_attn_out",
            tensors=out_tensors,
            call=call_out,
            reference=reference,
            settings=OUT_SETTINGS,
            output_dims=Q_DIMS,
            kernel_ops=("torch_attn._varlen_attn_out.default",),
            placements=CORE,
            missing=varlen_attn_out_missing,
            standins=STANDINS,
            function="torch.nn.attention.varlen.varlen_attn_out",
        ),
    ),
)
