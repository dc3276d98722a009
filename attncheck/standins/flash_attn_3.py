"""CPU stand-in for flash-attn 3: both of its op surfaces, and what calls them.

flash-attn 3 is not on the package index, so nothing of it is here: neither its compiled kernels nor
`flash_attn_interface`, its Python. The schemas are those of Dao-AILab/flash-attention, folder hopper:

- raw, version 3.0.0.b1 (with flash-attn 2.8): `flash_attn_3::fwd` and `bwd` from C++, without a Meta kernel.
- custom_op, version 3.0.0: `flash_attn_3::_flash_attn_forward` and `_flash_attn_backward` from
  `torch.library.custom_op`, with a fake kernel and an autograd formula.

`flash_attn_func` and `flash_attn_varlen_func` stand for those of `flash_attn_interface`: an
`autograd.Function` around the ops, which are called with the same arguments in the same places. Those of
3.0.0.b1 are in a module of their own, flash_attn_3_beta.

Shapes: q, out (batch, seqlen_q, heads, head_dim); k, v (batch, seqlen_k, kv_heads, head_dim); packed
ones (total, heads, head_dim) with int32 cu_seqlens (batch + 1,). v and out may have another head_dim.
Log-sum-exp: float32, (batch, heads, seqlen_q) or (heads, total_q), -inf where a query sees no key.

Differences: float32 is accepted besides float16 and bfloat16, fp8 is not; caches, paging, rotary and
`seqused` are refused by name; `num_splits`, `pack_gqa` and `sm_margin` are matters of speed only.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from attncheck.standins import flash_attn_3_kernels as kernels
from attncheck.standins.schemas import registered_schema, schema_difference

SENTENCE = (
    "flash_attn_3: nothing of the package is here, only the schemas of its ops; kernels and the functions "
    "that call them are attncheck's"
)

MODULE = "flash_attn_interface"

Maybe = torch.Tensor | None

RAW_FORWARD = (
    "flash_attn_3::fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, "
    "Tensor(v_new!)? v_new=None, Tensor? q_v=None, Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, "
    "Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, Tensor? page_table=None, "
    "Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, "
    "Tensor? k_descale=None, Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, "
    "int window_size_left=-1, int window_size_right=-1, int attention_chunk=0, float softcap=0.0, "
    "bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int num_splits=0, "
    "bool? pack_gqa=None, int sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
)
RAW_BACKWARD = (
    "flash_attn_3::bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, Tensor? seqused_k=None, "
    "int? max_seqlen_q=None, int? max_seqlen_k=None, float? softmax_scale=None, bool is_causal=False, "
    "int window_size_left=-1, int window_size_right=-1, float softcap=0.0, bool deterministic=False, "
    "int sm_margin=0) -> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)"
)
CUSTOM_FORWARD = (
    "flash_attn_3::_flash_attn_forward(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, "
    "Tensor? v_new=None, Tensor? qv=None, Tensor? out_=None, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, "
    "Tensor? seqused_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, "
    "Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, "
    "Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, "
    "float? softmax_scale=None, bool causal=False, SymInt window_size_left=-1, "
    "SymInt window_size_right=-1, SymInt attention_chunk=0, float softcap=0.0, "
    "bool rotary_interleaved=True, Tensor? scheduler_metadata=None, SymInt num_splits=1, "
    "bool? pack_gqa=None, SymInt sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor)"
)
CUSTOM_BACKWARD = (
    "flash_attn_3::_flash_attn_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor softmax_lse, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? sequed_q=None, "
    "Tensor? sequed_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, "
    "Tensor(a12!)? dq=None, Tensor(a13!)? dk=None, Tensor(a14!)? dv=None, float? softmax_scale=None, "
    "bool is_causal=False, SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0.0, "
    "bool deterministic=False, SymInt sm_margin=0) -> Tensor"
)
# Surface -> its forward and backward.
SURFACES: Mapping[str, tuple[str, str]] = {
    "raw": (RAW_FORWARD, RAW_BACKWARD),
    "custom_op": (CUSTOM_FORWARD, CUSTOM_BACKWARD),
}

# What the surfaces call otherwise than the kernels here (`sequed` is flash-attn's own spelling).
_SPELLINGS = {
    "q_v": "qv",
    "out_": "out",
    "is_causal": "causal",
    "sequed_q": "seqused_q",
    "sequed_k": "seqused_k",
}


def name_of(schema: str) -> str:
    """`flash_attn_3::fwd` of its schema."""
    return schema.partition("(")[0]


def missing(surface: str) -> str:
    """What is wrong with the ops of a surface, in one sentence; '' where both are as expected."""
    differences = (schema_difference(name_of(schema), schema) for schema in SURFACES[surface])
    return "; ".join(difference for difference in differences if difference)


def is_installed() -> bool:
    """Whether the package itself is there; what stands for the beta's module has its own name."""
    spec = importlib.util.find_spec(MODULE)
    return spec is not None and spec.name == MODULE


def import_package() -> Any:
    """The module `flash_attn_interface`, whose import registers the ops of its version.

    Raises ModuleNotFoundError that says where to get it, ImportError where it does not load.
    """
    if not is_installed():
        raise ModuleNotFoundError(
            f"flash-attn 3 (module {MODULE}) is not there: it is on no package index, and is built from the "
            "folder hopper of Dao-AILab/flash-attention"
        )
    return importlib.import_module(MODULE)


# --- the ops -------------------------------------------------------------------------------

# It takes its ops away when it goes.
_library = torch.library.Library("flash_attn_3", "FRAGMENT")  # type: ignore[no-untyped-call]
_provided: set[str] = set()


def provide() -> None:
    """Register the ops that are not there yet, with CPU kernels; twice is harmless.

    An op of that name with another schema is somebody else's: it is left alone, and `missing` says so.
    One with the expected schema, from the package itself, gets a CPU kernel beside its own.
    """
    for surface, schemas in SURFACES.items():
        for schema in schemas:
            name = name_of(schema)
            if name in _provided:
                continue
            if registered_schema(name) is None:
                _define[surface](schema)
            elif not schema_difference(name, schema):
                torch.library.impl(name, "cpu", _KERNELS[schema])
            _provided.add(name)


def _named(schema: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, with defaults: the dispatcher leaves out what equals them."""
    namespace, _, op = name_of(schema).partition("::")
    arguments = getattr(getattr(torch.ops, namespace), op).default._schema.arguments
    named = {a.name: a.default_value for a in arguments if a.has_default_value()}
    named.update(zip((a.name for a in arguments), args, strict=False))
    named.update(kwargs)
    return {_SPELLINGS.get(name, name): value for name, value in named.items()}


def _raw_forward(*args: Any, **kwargs: Any) -> Any:
    return kernels.forward(_named(RAW_FORWARD, args, kwargs))


def _raw_backward(*args: Any, **kwargs: Any) -> Any:
    return kernels.backward(_named(RAW_BACKWARD, args, kwargs))


def _custom_forward(*args: Any, **kwargs: Any) -> Any:
    out, lse, *accumulators = kernels.forward(_named(CUSTOM_FORWARD, args, kwargs))
    return out, lse, *(torch.tensor([]) if a is None else a for a in accumulators)


def _custom_backward(*args: Any, **kwargs: Any) -> Any:
    return kernels.backward(_named(CUSTOM_BACKWARD, args, kwargs))[3]  # softmax_d


_KERNELS: Mapping[str, Callable[..., Any]] = {
    RAW_FORWARD: _raw_forward,
    RAW_BACKWARD: _raw_backward,
    CUSTOM_FORWARD: _custom_forward,
    CUSTOM_BACKWARD: _custom_backward,
}


def _define_raw(schema: str) -> None:
    """As C++ does it: a kernel for one device, none for Meta, none for autograd."""
    _library.define(schema.removeprefix("flash_attn_3::"))  # type: ignore[no-untyped-call]
    _library.impl(  # type: ignore[no-untyped-call]
        name_of(schema).removeprefix("flash_attn_3::"), _KERNELS[schema], "CPU"
    )


def _define_custom(schema: str) -> None:
    """As `flash_attn_interface` of 3.0.0 does it."""
    forward = schema == CUSTOM_FORWARD
    op = torch.library.custom_op(
        name_of(schema),
        _KERNELS[schema],
        mutates_args=() if forward else ("dq", "dk", "dv"),
        device_types="cpu",
        schema=schema.removeprefix(name_of(schema)),
    )
    op.register_fake(_fake_forward if forward else _fake_backward)
    if forward:
        op.register_autograd(_formula, setup_context=_save)


_define = {"raw": _define_raw, "custom_op": _define_custom}


def _fake_forward(*args: Any, **kwargs: Any) -> Any:
    a = _named(CUSTOM_FORWARD, args, kwargs)
    q, head_dim_v, splits = a["q"], a["v"].shape[-1], a["num_splits"]
    if a["out"] is not None:
        raise TypeError(
            "Tracing (torch.compile/torch.export) with pre-allocated output tensor is not supported."
        )
    if splits <= 0:
        raise ValueError(
            "tracing (torch.compile/torch.export) with num_splits <= 0 not supported. "
            f"Got num_splits={splits}"
        )
    lse_shape = kernels.lse_shape(q)
    accumulators = (
        [(splits, *lse_shape, head_dim_v), (splits, *lse_shape)] if splits > 1 else [(0,)] * 2
    )
    return (
        q.new_empty(*q.shape[:-1], head_dim_v),
        *(q.new_empty(shape, dtype=torch.float32) for shape in (lse_shape, *accumulators)),
    )


def _fake_backward(*args: Any, **kwargs: Any) -> Any:
    a = _named(CUSTOM_BACKWARD, args, kwargs)
    return a["q"].new_empty(kernels.softmax_d_shape(a), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output[:2])
    named = _named(CUSTOM_FORWARD, inputs, {})
    flags = ("softmax_scale", "causal", "window_size_left", "window_size_right", "softcap")
    ctx.options = {name: named[name] for name in (*flags, "attention_chunk")}


def _formula(ctx: Any, dout: torch.Tensor, *others: Any) -> tuple[Maybe, ...]:
    """As in 3.0.0: for dense attention alone, and with 24 gradients for the 34 arguments.

    PyTorch counts the arguments up to the last that is not at its default, and so refuses the backward of
    a call that sets `causal` or anything behind it. `flash_attn_func` brings its own formula.
    """
    q, k, v, out, lse = ctx.saved_tensors
    gradients = _gradients("custom_op", dout, q, k, v, out, lse, ctx.options)
    return *gradients, *(None for _ in range(21))


# --- the functions of flash_attn_interface ---------------------------------------------------


class Interface(NamedTuple):
    """What a user holds: `flash_attn_interface`'s two functions."""

    flash_attn_func: Callable[..., Any]
    flash_attn_varlen_func: Callable[..., Any]


def interface(surface: str) -> Interface:
    """The functions of the version that has this surface, `raw` or `custom_op`."""
    return Interface(partial(_flash_attn, surface), partial(_flash_attn_varlen, surface))


def _flash_attn(
    surface: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Maybe = None,
    q_descale: Maybe = None,
    k_descale: Maybe = None,
    v_descale: Maybe = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of q (b, s, h, d); with `return_attn_probs` also the log-sum-exp (b, h, s)."""
    options = {
        "qv": qv,
        "q_descale": q_descale,
        "k_descale": k_descale,
        "v_descale": v_descale,
        "softmax_scale": _scale(q, qv) if softmax_scale is None else softmax_scale,
        "causal": causal,
        "window_size_left": window_size[0],
        "window_size_right": window_size[1],
        "attention_chunk": attention_chunk,
        "softcap": softcap,
        "num_splits": num_splits,
        "pack_gqa": pack_gqa,
        "deterministic": deterministic,
        "sm_margin": sm_margin,
    }
    out, lse = _FlashAttn.apply(q, k, v, None, None, surface, options)  # type: ignore[no-untyped-call]
    return (out, lse) if return_attn_probs else out


def _flash_attn_varlen(
    surface: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Maybe = None,
    seqused_k: Maybe = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Maybe = None,
    q_descale: Maybe = None,
    k_descale: Maybe = None,
    v_descale: Maybe = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of packed sequences, q (total, h, d); the log-sum-exp is (h, total)."""
    options = {
        "qv": qv,
        "seqused_q": seqused_q,
        "seqused_k": seqused_k,
        "q_descale": q_descale,
        "k_descale": k_descale,
        "v_descale": v_descale,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "softmax_scale": _scale(q, qv) if softmax_scale is None else softmax_scale,
        "causal": causal,
        "window_size_left": window_size[0],
        "window_size_right": window_size[1],
        "attention_chunk": attention_chunk,
        "softcap": softcap,
        "num_splits": num_splits,
        "pack_gqa": pack_gqa,
        "deterministic": deterministic,
        "sm_margin": sm_margin,
    }
    out, lse = _FlashAttn.apply(  # type: ignore[no-untyped-call]
        q, k, v, cu_seqlens_q, cu_seqlens_k, surface, options
    )
    return (out, lse) if return_attn_probs else out


def _scale(q: torch.Tensor, qv: Maybe) -> float:
    return float((q.shape[-1] + (0 if qv is None else qv.shape[-1])) ** -0.5)


class _FlashAttn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: Maybe,
        cu_seqlens_k: Maybe,
        surface: str,
        options: Mapping[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        starts = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        out, lse, *_ = _call(SURFACES[surface][0], {"q": q, "k": k, "v": v, **starts, **options})
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
        ctx.surface, ctx.options = surface, options
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor, *others: Any) -> tuple[Maybe, ...]:
        q, k, v, out, lse, *starts = ctx.saved_tensors
        options = {**ctx.options, "cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1]}
        return *_gradients(ctx.surface, dout, q, k, v, out, lse, options), None, None, None, None


def _gradients(
    surface: str,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    options: Mapping[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv from the surface's backward op, which writes them in place."""
    assert options.get("attention_chunk", 0) == 0, "FA3 backward does not support attention_chunk"
    tensors = {"dout": dout, "q": q, "k": k, "v": v, "out": out}
    tensors = {n: t if t.stride(-1) == 1 else t.contiguous() for n, t in tensors.items()}
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    buffers = {"softmax_lse": lse, "dq": dq, "dk": dk, "dv": dv}
    _call(SURFACES[surface][1], {**options, **tensors, **buffers})
    # The package cuts off what it might have padded.
    return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]


def _call(schema: str, named: Mapping[str, Any]) -> Any:
    """Call an op as the package does: tensors by position, None for what is not given, and the flags of
    the second surface's forward by name."""
    namespace, _, name = name_of(schema).partition("::")
    op = getattr(getattr(torch.ops, namespace), name)
    values = {
        a.name: named.get(
            _SPELLINGS.get(a.name, a.name), a.default_value if a.has_default_value() else None
        )
        for a in op.default._schema.arguments
    }
    if schema != CUSTOM_FORWARD:
        return op(*values.values())
    names = list(values)
    first = names.index("causal")
    return op(*(values[n] for n in names[:first]), **{n: values[n] for n in names[first:]})
