"""What the planted strategies share: small attention ops with their kernels, and strategies as tables.

A family is one shape of op (dense as flash-attn 2's, in-place gradients, varlen, packed, a KV cache ...).
`Planted` is one registration of it under a name of its own, with the tables that it is given: the healthy
ones below, or those with one mistake in them. Torch-free until an op is called.

A table says which placements an op takes: `{row: (outputs, inputs)}`, tensors by name, a shard dim as an
int (-1 is the last), `"P"` for `P(sum)`, and replicated where nothing is said. An entry may also be a
function of the tensor's spec.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

Entry = Any  # int, "P", "R", or a function of the argument's spec that gives one of these
Row = tuple[Mapping[str, Entry], Mapping[str, Entry]]
Table = Callable[
    [Mapping[str, Any]], dict[str, Row]
]  # of the arguments by name (specs for tensors)


# --- the arithmetic: (batch, sequence, heads, head_dim), float32 -------------------------------------


def group(q: Any, k: Any) -> int:
    """Query heads per kv head; refuses what flash-attn refuses."""
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")
    return int(q.shape[2] // k.shape[2])


def scores_of(
    q: Any, k: Any, scale: float, causal: bool, alibi: Any = None, mask: Any = None
) -> Any:
    """(batch, heads, queries, keys). The mask is read from its start, as a kernel with a bare pointer and
    strides does: it never asks whether it holds more heads or rows than it should."""
    import torch

    k = k.repeat_interleave(group(q, k), dim=2)
    scores = torch.einsum("bshd,bthd->bhst", q, k) * scale
    batch, heads, rows, columns = scores.shape
    offset = torch.arange(columns)[None, :] - torch.arange(rows)[:, None] - (columns - rows)
    if alibi is not None:
        if alibi.shape[-1] < heads:
            raise RuntimeError("alibi_slopes must have shape (nheads,) or (batch_size, nheads)")
        slopes = alibi[..., :heads]
        slopes = slopes[:batch] if slopes.ndim == 2 else slopes
        scores = scores - slopes[..., None, None] * offset.abs()
    if mask is not None:
        scores = scores + mask[:batch, :heads, :rows, :columns]
    return scores.masked_fill(offset > 0, -math.inf) if causal else scores


def attend(
    q: Any, k: Any, v: Any, scale: float, causal: bool = False, alibi: Any = None, mask: Any = None
) -> tuple[Any, Any]:
    """out like q with v's head_dim, and the log-sum-exp (batch, heads, sequence)."""
    import torch

    scores = scores_of(q, k, scale, causal, alibi, mask)
    v = v.repeat_interleave(group(q, v), dim=2)
    return torch.einsum("bhst,bthd->bshd", torch.softmax(scores, -1), v), scores.logsumexp(-1)


def gradients(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    scale: float,
    causal: bool = False,
    alibi: Any = None,
    mask: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """dq, dk, dv and the gradient of the scores, from the log-sum-exp as flash-attention does. By hand: a
    custom op's kernel runs below autograd. `lse` too is read from its start."""
    import torch

    groups = group(q, k)
    scores = scores_of(q, k, scale, causal, alibi, mask)
    if any(have < want for have, want in zip(lse.shape, scores.shape, strict=False)):
        raise RuntimeError(f"softmax_lse has shape {tuple(lse.shape)}")
    lse = lse[: scores.shape[0], : scores.shape[1], : scores.shape[2]]
    p = torch.exp(scores - lse[..., None])
    wide_k, wide_v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
    dp = torch.einsum("bshd,bthd->bhst", dout, wide_v)
    ds = p * (dp - (dout * out).sum(-1).transpose(1, 2)[..., None])
    dq = torch.einsum("bhst,bthd->bshd", ds, wide_k) * scale
    dk = torch.einsum("bhst,bshd->bthd", ds, q) * scale
    dv = torch.einsum("bhst,bshd->bthd", p, dout)
    return dq, dk.unflatten(2, (-1, groups)).sum(3), dv.unflatten(2, (-1, groups)).sum(3), ds


# --- families ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A shape of op. Schemas without the name; `outputs` names what is returned; kernels on whole or local
    plain tensors. `in_place`: the gradients are written into buffers that the caller made."""

    name: str
    forward_schema: str
    outputs: tuple[str, ...]
    forward: Callable[..., Any]
    backward_schema: str = ""
    grads: tuple[str, ...] = ()
    backward: Callable[..., Any] | None = None
    mutates: tuple[str, ...] = ()
    in_place: bool = False


def _dense_forward(
    q: Any, k: Any, v: Any, alibi: Any, mask: Any, window: int, scale: float, causal: bool
) -> Any:
    import torch

    out, lse = attend(q, k, v, scale, causal, alibi, mask)
    return out, lse.contiguous(), torch.zeros(2, dtype=torch.int64)


def _dense_backward(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, alibi: Any, mask: Any, rng: Any,
    window: int, scale: float, causal: bool,
) -> Any:  # fmt: skip
    if rng is None or tuple(rng.shape) != (2,):
        raise RuntimeError("rng_state must be a tensor of 2 numbers, seed and offset")
    return gradients(dout, q, k, v, out, lse, scale, causal, alibi, mask)[:3]


def _buffers_backward(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dq: Any, dk: Any, dv: Any,
    alibi: Any, mask: Any, rng: Any, window: int, scale: float, causal: bool,
) -> Any:  # fmt: skip
    grads = _dense_backward(dout, q, k, v, out, lse, alibi, mask, rng, window, scale, causal)
    for buffer, grad in zip((dq, dk, dv), grads, strict=True):
        buffer.copy_(grad)
    return (dout * out).sum(-1).transpose(1, 2).contiguous()


_FLAGS = "int window, float scale, bool causal"
_SAVED = "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse"
DENSE = Family(
    "dense",
    f"(Tensor q, Tensor k, Tensor v, Tensor? alibi, Tensor? mask, {_FLAGS}) -> (Tensor, Tensor, Tensor)",
    ("out", "lse", "rng"),
    _dense_forward,
    f"({_SAVED}, Tensor? alibi, Tensor? mask, Tensor? rng, {_FLAGS}) -> (Tensor, Tensor, Tensor)",
    ("dq", "dk", "dv"),
    _dense_backward,
)
BUFFERS = Family(
    "buffers",
    DENSE.forward_schema,
    DENSE.outputs,
    _dense_forward,
    f"({_SAVED}, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor? alibi, Tensor? mask, Tensor? rng, "
    f"{_FLAGS}) -> Tensor",
    ("delta",),
    _buffers_backward,
    mutates=("dq", "dk", "dv"),
    in_place=True,
)


# flash-attn's own order has the flags before the first int, which is where `register_sharding` begins to
# look at arguments when it makes the key of its cache.
def _flags_first_forward(q: Any, k: Any, v: Any, scale: float, causal: bool, window: int) -> Any:
    return _dense_forward(q, k, v, None, None, window, scale, causal)


def _flags_first_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    rng: Any,
    scale: float,
    causal: bool,
    window: int,
) -> Any:
    return _dense_backward(dout, q, k, v, out, lse, None, None, rng, window, scale, causal)


FLAGS_FIRST = Family(
    "flags_first",
    "(Tensor q, Tensor k, Tensor v, float scale, bool causal, int window) -> (Tensor, Tensor, Tensor)",
    DENSE.outputs,
    _flags_first_forward,
    f"({_SAVED}, Tensor rng, float scale, bool causal, int window) -> (Tensor, Tensor, Tensor)",
    DENSE.grads,
    _flags_first_backward,
)


def _bias_backward(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, bias: Any, window: int, scale: float
) -> Any:
    *grads, ds = gradients(dout, q, k, v, out, lse, scale, mask=bias)
    return *grads, ds.sum_to_size(bias.shape).contiguous()


BIAS = Family(
    "bias",
    "(Tensor q, Tensor k, Tensor v, Tensor bias, int window, float scale) -> (Tensor, Tensor)",
    ("out", "lse"),
    lambda q, k, v, bias, window, scale: attend(q, k, v, scale, mask=bias),
    f"({_SAVED}, Tensor bias, int window, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    ("dq", "dk", "dv", "dbias"),
    _bias_backward,
)


# The output projection fused in: w is (heads, head_dim, model).
def _projected_forward(q: Any, k: Any, v: Any, w: Any, window: int, scale: float) -> Any:
    import torch

    out, lse = attend(q, k, v, scale)
    return torch.einsum("bshd,hde->bse", out, w), out, lse


def _projected_backward(
    dy: Any, q: Any, k: Any, v: Any, w: Any, out: Any, lse: Any, window: int, scale: float
) -> Any:
    import torch

    dout = torch.einsum("bse,hde->bshd", dy, w)
    dq, dk, dv, _ = gradients(dout, q, k, v, out, lse, scale)
    return dq, dk, dv, torch.einsum("bshd,bse->hde", out, dy)


PROJECTED = Family(
    "projected",
    "(Tensor q, Tensor k, Tensor v, Tensor w, int window, float scale) -> (Tensor, Tensor, Tensor)",
    ("y", "out", "lse"),
    _projected_forward,
    "(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor w, Tensor out, Tensor lse, int window, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    ("dq", "dk", "dv", "dw"),
    _projected_backward,
)


# Packed sequences: q (tokens, heads, head_dim), the log-sum-exp (heads, tokens).
def _sequences(cu_q: Any, cu_k: Any) -> Iterator[tuple[slice, slice]]:
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    for at in range(len(starts_q) - 1):
        yield slice(starts_q[at], starts_q[at + 1]), slice(starts_k[at], starts_k[at + 1])


def _varlen_forward(
    q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, longest: int, scale: float
) -> Any:
    import torch

    out, lse = torch.zeros_like(q), q.new_zeros(q.shape[1], q.shape[0])
    for rows, keys in _sequences(cu_q, cu_k):
        if q[rows].numel() and k[keys].numel():
            part, part_lse = attend(q[None, rows], k[None, keys], v[None, keys], scale)
            out[rows], lse[:, rows] = part[0], part_lse[0]
    return out, lse


def _varlen_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    cu_q: Any,
    cu_k: Any,
    longest: int,
    scale: float,
) -> Any:
    import torch

    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    for rows, keys in _sequences(cu_q, cu_k):
        if q[rows].numel() and k[keys].numel():
            whole = (t[None, rows] for t in (dout, q)), (t[None, keys] for t in (k, v))
            parts = gradients(*whole[0], *whole[1], out[None, rows], lse[None, :, rows], scale)
            dq[rows], dk[keys], dv[keys] = (part[0] for part in parts[:3])
    return dq, dk, dv


VARLEN = Family(
    "varlen",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, int longest, float scale) -> (Tensor, Tensor)",
    ("out", "lse"),
    _varlen_forward,
    f"({_SAVED}, Tensor cu_q, Tensor cu_k, int longest, float scale) -> (Tensor, Tensor, Tensor)",
    ("dq", "dk", "dv"),
    _varlen_backward,
)


# qkv in one tensor, (batch, sequence, 3, heads, head_dim).
def _packed_forward(qkv: Any, window: int, scale: float) -> Any:
    return attend(*qkv.unbind(2), scale)


def _packed_backward(dout: Any, qkv: Any, out: Any, lse: Any, window: int, scale: float) -> Any:
    import torch

    return torch.stack(gradients(dout, *qkv.unbind(2), out, lse, scale)[:3], dim=2)


PACKED = Family(
    "packed",
    "(Tensor qkv, int window, float scale) -> (Tensor, Tensor)",
    ("out", "lse"),
    _packed_forward,
    "(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int window, float scale) -> Tensor",
    ("dqkv",),
    _packed_backward,
)


# The same as the fused linear before it makes it, (batch, sequence, 3 * heads * head_dim).
def _merged_forward(qkv: Any, head_dim: int, scale: float) -> Any:
    out, _ = attend(*qkv.unflatten(-1, (3, -1, head_dim)).unbind(2), scale)
    return out.flatten(2)


MERGED = Family(
    "merged",
    "(Tensor qkv, int head_dim, float scale) -> Tensor",
    ("out",),
    _merged_forward,
)


# A KV cache, written at `at` and then read up to there.
def _cache_forward(
    q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, at: int, scale: float
) -> Any:
    end = at + k.shape[1]
    k_cache[:, at:end], v_cache[:, at:end] = k, v
    return attend(q, k_cache[:, :end], v_cache[:, :end], scale)[0]


CACHE = Family(
    "cache",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, int at, float scale) -> Tensor",
    ("out",),
    _cache_forward,
    mutates=("k_cache", "v_cache"),
)


# --- healthy tables ----------------------------------------------------------------------------------


def unless_1(dim: int) -> Callable[[Any], Entry]:
    """Sharded along `dim`, unless that dim broadcasts."""
    return lambda spec: "R" if spec.shape[dim] == 1 else dim


def slopes_batch(spec: Any) -> Entry:
    return 0 if len(spec.shape) == 2 else "R"


def heads_divide(t: Mapping[str, Any], parts: int = 0) -> bool:
    """`parts`: into how many the mesh splits, where not into all it has."""
    return int(t["k"].shape[2]) % (parts or t["q"].mesh.size()) == 0


dense_heads_forward: Row = (
    {"out": 2, "lse": 1},
    {"q": 2, "k": 2, "v": 2, "alibi": -1, "mask": unless_1(1)},
)
dense_one_kv_head_forward: Row = ({"out": 2, "lse": 1}, {"q": 2, "alibi": -1, "mask": unless_1(1)})


def dense_forward(t: Mapping[str, Any]) -> dict[str, Row]:
    rows: dict[str, Row] = {
        "replicate": ({}, {}),
        "batch": (
            {"out": 0, "lse": 0},
            {"q": 0, "k": 0, "v": 0, "alibi": slopes_batch, "mask": unless_1(0)},
        ),
        "value_dim": ({"out": 3}, {"v": 3}),
    }
    if heads_divide(t):
        rows["heads"] = dense_heads_forward
    if t["k"].shape[2] == 1:
        rows["one_kv_head"] = dense_one_kv_head_forward
    if not t["causal"] and t.get("alibi") is None:
        rows["query"] = ({"out": 1, "lse": 2}, {"q": 1, "mask": unless_1(2)})
    return rows


def dense_backward(t: Mapping[str, Any]) -> dict[str, Row]:
    def saved(out: int, lse: int) -> dict[str, Entry]:
        return {"dout": out, "q": out, "out": out, "lse": lse}

    rows: dict[str, Row] = {
        "replicate": ({}, {}),
        "batch": (
            {"dq": 0, "dk": 0, "dv": 0},
            {**saved(0, 0), "k": 0, "v": 0, "alibi": slopes_batch, "mask": unless_1(0)},
        ),
        # The sum over head_dim in dout * out, and in dout * v, is left to the ranks: ds is partial.
        "value_dim": ({"dq": "P", "dk": "P", "dv": 3}, {"dout": 3, "v": 3, "out": 3}),
        "keys": ({"dq": "P", "dk": 1, "dv": 1}, {"k": 1, "v": 1, "mask": unless_1(3)}),
    }
    if heads_divide(t):
        rows["heads"] = (
            {"dq": 2, "dk": 2, "dv": 2},
            {**saved(2, 1), "k": 2, "v": 2, "alibi": -1, "mask": unless_1(1)},
        )
    if t["k"].shape[2] == 1:
        heads = {**saved(2, 1), "alibi": -1, "mask": unless_1(1)}
        rows["one_kv_head"] = ({"dq": 2, "dk": "P", "dv": "P"}, heads)
    if not t["causal"] and t.get("alibi") is None:
        rows["query"] = ({"dq": 1, "dk": "P", "dv": "P"}, {**saved(1, 2), "mask": unless_1(2)})
    return rows


def buffers_backward(t: Mapping[str, Any]) -> dict[str, Row]:
    """The same; a buffer is an input that is placed as its gradient is."""
    del_keys = {"keys", "value_dim"}  # rows that no wrapper here makes buffers for
    rows = {n: row for n, row in dense_backward(t).items() if n not in del_keys}
    delta = {"batch": 0, "heads": 1, "one_kv_head": 1, "query": 2}
    return {
        name: ({"delta": delta.get(name, "R")}, {**ins, **outs})
        for name, (outs, ins) in rows.items()
    }


def bias_forward(t: Mapping[str, Any]) -> dict[str, Row]:
    return {
        "replicate": ({}, {}),
        "batch": ({"out": 0, "lse": 0}, {"q": 0, "k": 0, "v": 0, "bias": unless_1(0)}),
        "heads": ({"out": 2, "lse": 1}, {"q": 2, "k": 2, "v": 2, "bias": unless_1(1)}),
    }


def bias_backward(t: Mapping[str, Any]) -> dict[str, Row]:
    def along(dim: int, bias_dim: int, lse: int) -> Row:
        placed: dict[str, Entry] = dict.fromkeys(("dout", "q", "k", "v", "out"), dim)
        whole = t["bias"].shape[bias_dim] == 1
        return (
            {"dq": dim, "dk": dim, "dv": dim, "dbias": "P" if whole else bias_dim},
            {**placed, "lse": lse, "bias": unless_1(bias_dim)},
        )

    return {"replicate": ({}, {}), "batch": along(0, 0, 0), "heads": along(2, 1, 1)}


def projected_forward(t: Mapping[str, Any]) -> dict[str, Row]:
    return {
        "replicate": ({}, {}),
        "batch": ({"y": 0, "out": 0, "lse": 0}, {"q": 0, "k": 0, "v": 0}),
        "heads": ({"y": "P", "out": 2, "lse": 1}, {"q": 2, "k": 2, "v": 2, "w": 0}),
    }


def projected_backward(t: Mapping[str, Any]) -> dict[str, Row]:
    qkv = {"q": 0, "k": 0, "v": 0, "out": 0, "lse": 0, "dy": 0}
    heads = {"q": 2, "k": 2, "v": 2, "out": 2, "lse": 1, "w": 0}
    return {
        "replicate": ({}, {}),
        "batch": ({"dq": 0, "dk": 0, "dv": 0, "dw": "P"}, qkv),
        "heads": ({"dq": 2, "dk": 2, "dv": 2, "dw": 0}, heads),
    }


def varlen_forward(t: Mapping[str, Any]) -> dict[str, Row]:
    return {
        "replicate": ({}, {}),
        "heads": ({"out": 1, "lse": 0}, {"q": 1, "k": 1, "v": 1}),
    }


def varlen_backward(t: Mapping[str, Any]) -> dict[str, Row]:
    heads = {"dout": 1, "q": 1, "k": 1, "v": 1, "out": 1, "lse": 0}
    return {"replicate": ({}, {}), "heads": ({"dq": 1, "dk": 1, "dv": 1}, heads)}


def packed_forward(t: Mapping[str, Any]) -> dict[str, Row]:
    return {
        "replicate": ({}, {}),
        "batch": ({"out": 0, "lse": 0}, {"qkv": 0}),
        "heads": ({"out": 2, "lse": 1}, {"qkv": 3}),
    }


def packed_backward(t: Mapping[str, Any]) -> dict[str, Row]:
    return {
        "replicate": ({}, {}),
        "batch": ({"dqkv": 0}, {"dout": 0, "qkv": 0, "out": 0, "lse": 0}),
        "heads": ({"dqkv": 3}, {"dout": 2, "qkv": 3, "out": 2, "lse": 1}),
    }


def merged_forward(t: Mapping[str, Any]) -> dict[str, Row]:
    return {"replicate": ({}, {}), "batch": ({"out": 0}, {"qkv": 0})}


def cache_forward(t: Mapping[str, Any]) -> dict[str, Row]:
    names = ("q", "k", "v", "k_cache", "v_cache")
    return {
        "replicate": ({}, {}),
        "batch": ({"out": 0}, dict.fromkeys(names, 0)),
        "heads": ({"out": 2}, dict.fromkeys(names, 2)),
    }


TABLES: Mapping[str, tuple[Table, Table | None]] = {
    "dense": (dense_forward, dense_backward),
    "flags_first": (dense_forward, dense_backward),
    "buffers": (dense_forward, buffers_backward),
    "bias": (bias_forward, bias_backward),
    "projected": (projected_forward, projected_backward),
    "varlen": (varlen_forward, varlen_backward),
    "packed": (packed_forward, packed_backward),
    "merged": (merged_forward, None),
    "cache": (cache_forward, None),
}


def edited(
    table: Table, row: str, outputs: Mapping[str, Entry] = {}, inputs: Mapping[str, Entry] = {}
) -> Table:
    """The table with some entries of one row put otherwise; a row that is not there is added."""

    def changed(t: Mapping[str, Any]) -> dict[str, Row]:
        rows = table(t)
        outs, ins = rows.get(row, ({}, {}))
        return {**rows, row: ({**outs, **outputs}, {**ins, **inputs})}

    return changed


def only(table: Table, *names: str) -> Table:
    return lambda t: {name: row for name, row in table(t).items() if name in names}


# --- registration ------------------------------------------------------------------------------------


def placement(entry: Entry, spec: Any) -> Any:
    from torch.distributed.tensor import Partial, Replicate, Shard

    if callable(entry):
        entry = entry(spec)
    if isinstance(entry, int):
        return Shard(entry if entry >= 0 else entry + len(spec.shape))
    if entry == "R":
        return Replicate()
    return Partial("sum" if entry == "P" else entry)


def acceptable(op: Any, outputs: Sequence[str], table: Table) -> Callable[..., Any]:
    """The function that `register_sharding` wants, from a table. An output named '' is no tensor."""

    def choose(*args: Any, **kwargs: Any) -> Any:
        names = [a.name for a in op._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        is_tensor = {n: hasattr(value, "placements") for n, value in given.items()}
        return [
            (
                [placement(outs.get(n, "R"), None) if n else None for n in outputs],
                [placement(ins.get(n, "R"), v) if is_tensor[n] else None for n, v in given.items()],
            )
            for outs, ins in table(given).values()
        ]

    return choose


@dataclass(frozen=True)
class Planted:
    """One registration of a family. `static_argnum`: from which argument on the key of the sharding cache
    looks (None: what `register_sharding` makes of it)."""

    name: str
    family: Family
    forward: Table
    backward: Table | None = None
    static_forward: int | None = None
    static_backward: int | None = None
    by_hand: Callable[[Any, Any], None] | None = None  # registers both ops in its own way

    @property
    def kernel_ops(self) -> tuple[str, ...]:
        names = [f"mutants.{self.name}.default"]
        if self.family.backward is not None:
            names.append(f"mutants.{self.name}_backward.default")
        return tuple(names)


@cache
def ops(planted: Planted) -> tuple[Any, Any]:
    """Define and register the ops of `planted`, once per process: (forward, backward or None)."""
    family = planted.family
    forward = _define(planted.name, family, backward=False)
    backward = None
    if family.backward is not None:
        backward = _define(f"{planted.name}_backward", family, backward=True)
    if planted.by_hand is not None:
        planted.by_hand(forward, backward)
        return forward, backward
    register(forward, family.outputs, planted.forward, planted.static_forward)
    if backward is not None and planted.backward is not None:
        register(backward, family.grads, planted.backward, planted.static_backward)
    return forward, backward


def _define(name: str, family: Family, backward: bool) -> Any:
    import torch

    schema = family.backward_schema if backward else family.forward_schema
    kernel: Any = family.backward if backward else family.forward
    mutates = tuple(n for n in family.mutates if f"!) {n}" in schema)

    def run(*args: Any) -> Any:
        out = kernel(*args)
        if isinstance(out, tuple):
            return tuple(t.clone() for t in out)  # a custom op returns no alias of its inputs
        return out.clone()

    # Schemas are given because the kernels' annotations cannot be read: torch is no global here.
    torch.library.custom_op(f"mutants::{name}", run, mutates_args=mutates, schema=schema)
    overload = getattr(torch.ops.mutants, name).default
    torch.library.register_fake(f"mutants::{name}", partial(_fake, family, backward))
    return overload


def _fake(family: Family, backward: bool, *args: Any) -> Any:
    """Shapes only. What a family returns is like one of its arguments, but for the log-sum-exp."""
    names = _argument_names(family.backward_schema if backward else family.forward_schema)
    t = dict(zip(names, args, strict=False))
    made = tuple(_fake_output(n, t) for n in (family.grads if backward else family.outputs))
    return made if len(made) > 1 else made[0]


def _argument_names(schema: str) -> list[str]:
    arguments = schema.partition(" -> ")[0].strip("()")
    return [part.split()[-1] for part in arguments.split(",")]


def _fake_output(name: str, t: Mapping[str, Any]) -> Any:
    import torch

    if name.startswith("d") and name[1:] in t:
        return torch.empty_like(t[name[1:]])
    if name == "rng":
        return t["q"].new_empty(2, dtype=torch.int64)
    if name == "y":
        return t["q"].new_empty(*t["q"].shape[:2], t["w"].shape[2])
    if "qkv" in t:
        qkv = t["qkv"]
        if qkv.ndim == 3:
            return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
        like = qkv.new_empty(*qkv.shape[:2], *qkv.shape[3:])
    else:
        like = t["q"]
    if name in ("lse", "delta"):
        if like.ndim == 3:
            return like.new_empty(like.shape[1], like.shape[0])
        return like.new_empty(like.shape[0], like.shape[2], like.shape[1])
    return torch.empty_like(like)


def register(
    op: Any, outputs: Sequence[str], table: Table, static_argnum: int | None = None
) -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    register_sharding(op)(acceptable(op, outputs, table))
    if static_argnum is not None:
        info = RuntimeSchemaInfo(static_argnum, needs_pytree=True)
        DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[op] = info


def register_whole(op: Any, at: int, rows: Callable[[Any], Any]) -> None:
    """A strategy that names the placements of the whole mesh: `rows` makes one (outputs, inputs) of the
    spec of argument `at`. Private names of 2.13: what a strategy inside PyTorch is made of."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec
    from torch.distributed.tensor._op_schema import OpSchema, OpSpec, OpStrategy, RuntimeSchemaInfo

    def strategy(schema: OpSchema) -> OpStrategy:
        given: Any = [a for a in schema.args_schema if isinstance(a, OpStrategy)]
        of = given[at].strategies[0].output_spec
        outs, ins = rows(of)

        def specs(placements: Any) -> Any:
            return tuple(DTensorSpec(of.mesh, tuple(p)) for p in placements)

        inputs = specs(ins)
        for spec, arg in zip(inputs, given, strict=True):
            spec.tensor_meta = arg.strategies[0].output_spec.tensor_meta
        costs = [[0.0] * len(arg.strategies) for arg in given]
        return OpStrategy([OpSpec(specs(outs), inputs, redistribute_cost=costs)])

    first_int = next(i for i, a in enumerate(op._schema.arguments) if str(a.type) == "int")
    info = RuntimeSchemaInfo(first_int, needs_pytree=True)
    DTensor._op_dispatcher.sharding_propagator.register_op_strategy(op, strategy, info)


TABLE_NAMES = (
    "op_strategy_funcs",
    "op_to_schema_info",
    "op_single_dim_strategy_funcs",
    "op_to_schema_info_for_single_dim_strategy",
    "op_to_rules",
)


@contextlib.contextmanager
def instead(strategies: Mapping[str, tuple[Sequence[str], Table, int]]) -> Iterator[None]:
    """For as long as it holds, ops that others own answer by these strategies; afterwards all is as before.

    `{op: (output names, table, static_argnum)}`. Private names of 2.13 (FACTS.md, "A registration that
    works, and can be undone").
    """
    import torch
    from torch.distributed.tensor import DTensor

    propagator = DTensor._op_dispatcher.sharding_propagator
    tables = [getattr(propagator, n) for n in TABLE_NAMES if hasattr(propagator, n)]
    saved = []
    for name, (outputs, rows, static_argnum) in strategies.items():
        namespace, packet, overload = name.split(".")
        op = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
        saved.append((op, [(table, table.pop(op)) for table in tables if op in table]))
        register(op, outputs, rows, static_argnum)
    _forget()
    try:
        yield
    finally:
        for op, entries in saved:
            for table in tables:
                table.pop(op, None)
            for table, entry in entries:
                table[op] = entry
        _forget()


def _forget() -> None:
    """Both caches of sharding propagation."""
    import torch
    from torch.distributed.tensor import DTensor

    DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear()
    torch._C._clear_DTensor_sharding_propagator_cache()
