"""Calling an op that no probe describes, from its schema alone.

The names of its arguments say what they are, as far as the field agrees on them; an argument that nobody
knows ends the attempt with a sentence that names it. Whether the guess is right is not believed but
measured: the op is called on small whole tensors, in each layout, and must agree with the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attncheck.inventory import Signature
from attncheck.runner import compat
from attncheck.runner.reference import attention

QUERY, KEY, VALUE = ("q", "query"), ("k", "key"), ("v", "value")
SCALE = ("scale", "softmax_scale", "sm_scale", "scaling", "scale_value")
ZERO = ("dropout_p", "p_dropout", "dropout", "dropout_rate", "softcap", "logits_soft_cap")
ONE = ("keep_prob",)
UNLIMITED = ("window_size_left", "window_size_right", "window_left", "window_right")
HEADS = ("head_num", "num_heads", "num_head", "n_heads")
CAUSAL = ("is_causal", "causal")
OUTPUT = ("out", "output", "o")
LAYOUT = ("layout", "input_layout", "tensor_layout", "qkv_layout")
# What a layout argument wants to be told.
WORDS = {"bhsd": ("BHSD", "BNSD", "HND", "bhsd"), "bshd": ("BSHD", "BSND", "NHD", "bshd")}

# A size for each role, all different; 2 kv heads where the op shall group 4 heads.
BATCH, HEADS_N, SEQUENCE, HEAD_DIM = 3, 4, 10, 16
# Kernels round the inputs of their matrix products to bfloat16 or TF32 at the worst.
AGREES = 0.02
RAISES = "raises"


class Unclear(Exception):
    """The schema does not say how the op is called. The text is one sentence."""


def bind(
    op: Any,
    t: Mapping[str, torch.Tensor],
    layout: str,
    word: str = "",
    causal: bool = False,
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments for `op` from q, k, v in `layout`; raises Unclear naming what is not understood."""
    q = t["q"]
    heads = q.shape[1 if layout == "bhsd" else 2]
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for argument in compat.schema_of(op).arguments:
        value = _value(argument, t, q, heads, word, causal)
        if value is _DEFAULT and argument.kwarg_only:
            continue
        if value is _DEFAULT:
            value = argument.default_value
        if argument.kwarg_only:
            named[argument.name] = value
        else:
            positional.append(value)
    return positional, named


_DEFAULT = object()


def _value(
    argument: Any,
    t: Mapping[str, torch.Tensor],
    q: torch.Tensor,
    heads: int,
    word: str,
    causal: bool,
) -> Any:
    name, kind = argument.name.strip("_"), str(argument.type)
    if kind == "Tensor":
        for role, names in (("q", QUERY), ("k", KEY), ("v", VALUE)):
            if name in names:
                return t[role]
        if name in OUTPUT and _written(argument):
            return torch.empty_like(q)
        raise Unclear(f"nothing says what its tensor {argument.name} is")
    if name in CAUSAL and kind in ("bool", "Optional[bool]"):
        return causal
    if name in LAYOUT and kind == "str":
        return word
    if kind == "float" and name in SCALE:  # a default of 1 is not what attention means
        return q.shape[-1] ** -0.5
    if argument.has_default_value():
        return _DEFAULT
    if kind.startswith("Optional["):
        return None
    if kind == "bool":
        return False
    if kind == "float" and name in (*ZERO, *ONE):
        return float(name in ONE)
    if kind == "int" and name in HEADS:
        return heads
    if kind == "int" and name in UNLIMITED:
        return -1
    raise Unclear(f"nothing says what its argument {argument.name} ({kind}) is")


def _written(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def call(
    op: Any, t: Mapping[str, torch.Tensor], layout: str, word: str = "", causal: bool = False
) -> torch.Tensor:
    """The op's output: its first returned tensor, or the buffer that it writes into."""
    positional, named = bind(op, t, layout, word, causal)
    returned = op(*positional, **named)
    if isinstance(returned, (tuple, list)):
        returned = next((r for r in returned if isinstance(r, torch.Tensor)), None)
    if isinstance(returned, torch.Tensor):
        return returned
    for argument, value in zip(compat.schema_of(op).arguments, positional, strict=False):
        if _written(argument) and argument.name.strip("_") in OUTPUT:
            written: torch.Tensor = value
            return written
    raise Unclear("it returns no tensor, and writes into none that is called out")


def find(op: Any, device: str) -> Signature:
    """How `op` wants to be called. Raises Unclear where no way of calling it agrees with the reference."""
    dtypes = (torch.float32, torch.bfloat16)
    complaints: list[str] = []
    for layout, words in WORDS.items():
        takes_word = any(a.name in LAYOUT for a in compat.schema_of(op).arguments)
        for word in words if takes_word else ("",):
            for dtype in dtypes:
                why = _disagreement(op, layout, word, device, dtype)
                if not why:
                    return _refined(op, layout, word, device, dtype)
                complaints.append(why)
    # That it cannot be called so says less than what came of it where it could.
    raise Unclear(next((c for c in complaints if RAISES not in c), complaints[0]))


def _refined(op: Any, layout: str, word: str, device: str, dtype: torch.dtype) -> Signature:
    flags = [a.name for a in compat.schema_of(op).arguments if a.name.strip("_") in CAUSAL]
    causal = bool(flags) and not _disagreement(op, layout, word, device, dtype, causal=True)
    grouped = not _disagreement(op, layout, word, device, dtype, kv_heads=2)
    return Signature(
        layout=layout,
        word=word,
        dtype=str(dtype).removeprefix("torch."),
        causal=flags[0] if causal else "",
        grouped=grouped,
        differentiable=compat.has_autograd(compat.schema_of(op))
        and _differentiable(op, layout, word, device, dtype),
    )


def _differentiable(op: Any, layout: str, word: str, device: str, dtype: torch.dtype) -> bool:
    t = {name: x.requires_grad_() for name, x in _tensors(layout, device, dtype).items()}
    out = call(op, t, layout, word)
    if not out.requires_grad:
        return False
    try:
        torch.autograd.grad(out.sum(), list(t.values()))
    except (RuntimeError, NotImplementedError):
        return False  # `torch.library.custom_op` without register_autograd says so when it is asked
    return True


def _disagreement(
    op: Any,
    layout: str,
    word: str,
    device: str,
    dtype: torch.dtype,
    causal: bool = False,
    kv_heads: int = HEADS_N,
) -> str:
    """Why this way of calling it is wrong, or ''. Raises Unclear for arguments that nobody knows."""
    t = _tensors(layout, device, dtype, kv_heads)
    try:
        out = call(op, t, layout, word, causal).detach()
    except Unclear:
        raise
    except Exception as error:
        words = str(error).strip().splitlines()
        return f"called on whole tensors it {RAISES} {type(error).__name__}: {words[0] if words else ''}"
    exact = {name: x.detach().cpu().double() for name, x in t.items()}
    want = attention(
        exact["q"], exact["k"], exact["v"], layout=layout, causal="top_left" if causal else None
    )
    if out.shape != want.shape:
        return f"called on whole tensors it returns {tuple(out.shape)}, not {tuple(want.shape)}"
    worst = float((out.cpu().double() - want).abs().max() / want.abs().max())
    if not worst < AGREES:
        return f"called on whole tensors it is off from softmax(q k^T) v by {worst:.2g} of the largest value"
    return ""


def _tensors(
    layout: str, device: str, dtype: torch.dtype, kv_heads: int = HEADS_N
) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(20)
    out = {}
    for name, heads in (("q", HEADS_N), ("k", kv_heads), ("v", kv_heads)):
        shape = (
            (BATCH, heads, SEQUENCE, HEAD_DIM)
            if layout == "bhsd"
            else (BATCH, SEQUENCE, heads, HEAD_DIM)
        )
        out[name] = torch.randn(shape, generator=random).to(device, dtype)
    return out


def overload(name: str) -> Any:
    """The callable op of `mine.attention.default`. Raises Unclear where it is not registered."""
    found = compat.find_overload(name)
    if found is None:
        raise Unclear(f"{name} is not registered in this process")
    return found
