"""Planted bugs in the sharding strategies of custom ops, and in the wrappers that stand where one is missing.

The ops are small copies of what attention packages register: flash-attn's forward and in-place backward,
varlen, packed qkv, a KV cache, a fused output projection. Each mutant registers the op once more under its
own name, with one entry of its strategy wrong; its twin is the same call on the op with the right one.
Forward mutants need no gradients: the forward finding is the only one there is to make.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # loaded by path, here and in the workers
import planted_ops as po
from catalogue import Mutant, probe
from planted_ops import Planted, edited, only, ops

from attncheck.probing import (
    BATCH,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    KV_SEQUENCE,
    OTHER,
    SEQUENCE,
    Operator,
    Setting,
    Tensor,
    Tensors,
    cu_seqlens,
)

Q_DIMS = (BATCH, SEQUENCE, HEADS, HEAD_DIM)
KV_DIMS = (BATCH, KV_SEQUENCE, KV_HEADS, HEAD_DIM)
MASK_DIMS = (BATCH, HEADS, SEQUENCE, KV_SEQUENCE)
SIZES = {"batch": 6, "heads": 4, "kv_heads": 4, "sequence": 10, "kv_sequence": 14, "head_dim": 8}
Q_LENGTHS, KV_LENGTHS = (3, 5, 2), (6, 4, 4)
MODEL = 12  # what the fused output projection makes
WRONG, GRADIENT, DIFFER, SHAPE = "ATN201", "ATN202", "ATN204", "ATN206"
COST, RAISES = "ATN301", "ATN504"

Call = Callable[[Planted, Setting, Tensors], Any]


def setting(
    pattern: str, name: str = "plain", sizes: Mapping[str, int] = {}, **options: Any
) -> Setting:
    return Setting(name, {**SIZES, **sizes}, options=options, level="quick", placements=(pattern,))


# --- what the ops are called with -------------------------------------------------------------------


def dense_tensors(s: Setting) -> tuple[Tensor, ...]:
    """Options: `grads`; `kv` replicated; `alibi` 1 or 2 dims; `mask`, the dims it broadcasts in; `whole_q`
    and `whole_qk`: no pattern shards the sequence of q, or the head_dim of q and k."""
    grads = bool(s.get("grads"))
    q_dims = (BATCH, OTHER, HEADS, HEAD_DIM) if s.get("whole_q") else Q_DIMS
    k_dims = KV_DIMS
    if s.get("whole_qk"):
        q_dims, k_dims = (*q_dims[:3], OTHER), (*k_dims[:3], OTHER)
    q_sizes, kv_sizes = tuple(s[r] for r in Q_DIMS), tuple(s[r] for r in KV_DIMS)
    wrap = "replicate" if s.get("kv") == "replicated" else "pattern"
    out = [
        Tensor("q", q_dims, q_sizes, requires_grad=grads),
        Tensor("k", k_dims, kv_sizes, requires_grad=grads, wrap=wrap),
        Tensor("v", KV_DIMS, kv_sizes, requires_grad=grads, wrap=wrap),
    ]
    if "alibi" in s.options:
        dims = (BATCH, HEADS)[-s.options["alibi"] :]
        out.append(Tensor("alibi", dims, tuple(s[d] for d in dims), False, fill="slopes"))
    if "mask" in s.options:
        dims = tuple(OTHER if at in s.options["mask"] else r for at, r in enumerate(MASK_DIMS))
        sizes = tuple(1 if r == OTHER else s[r] for r in dims)
        learned = bool(s.get("learned"))
        out.append(Tensor("mask", dims, sizes, requires_grad=learned, fill="float_mask"))
    return tuple(out)


def projected_tensors(s: Setting) -> tuple[Tensor, ...]:
    w = Tensor("w", (HEADS, OTHER, OTHER), (s["heads"], s["head_dim"], MODEL), bool(s.get("grads")))
    return (*dense_tensors(s), w)


def varlen_tensors(s: Setting) -> tuple[Tensor, ...]:
    grads = bool(s.get("grads"))
    tokens = sum(Q_LENGTHS), sum(KV_LENGTHS)
    q = Tensor("q", Q_DIMS[1:], (tokens[0], s["heads"], s["head_dim"]), grads)
    kv = [Tensor(n, KV_DIMS[1:], (tokens[1], s["heads"], s["head_dim"]), grads) for n in "kv"]
    return (q, *kv, cu_seqlens("cu_q", Q_LENGTHS), cu_seqlens("cu_k", KV_LENGTHS))


def packed_tensors(s: Setting) -> tuple[Tensor, ...]:
    dims = (BATCH, SEQUENCE, OTHER, HEADS, HEAD_DIM)
    sizes = (s["batch"], s["sequence"], 3, s["heads"], s["head_dim"])
    return (Tensor("qkv", dims, sizes, bool(s.get("grads"))),)


def merged_tensors(s: Setting) -> tuple[Tensor, ...]:
    sizes = (s["batch"], s["sequence"], 3 * s["heads"] * s["head_dim"])
    return (Tensor("qkv", (BATCH, SEQUENCE, HEADS), sizes, requires_grad=False),)


CACHED, NEW = 9, 3  # keys in the cache before the call, and written by it


def cache_tensors(s: Setting) -> tuple[Tensor, ...]:
    def tensor(name: str, length: int, mutable: bool = False) -> Tensor:
        dims = (BATCH, SEQUENCE if name == "q" else KV_SEQUENCE, HEADS, HEAD_DIM)
        sizes = (s["batch"], length, s["heads"], s["head_dim"])
        return Tensor(name, dims, sizes, requires_grad=False, mutable=mutable)

    new = tensor("q", NEW), tensor("k", NEW), tensor("v", NEW)
    return (*new, tensor("k_cache", 16, True), tensor("v_cache", 16, True))


# --- how they are called ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Ways:
    """`forward(*tensors)` gives (what is returned, what is saved), `backward(saved, dout)` the gradients."""

    forward: Callable[..., tuple[tuple[Any, ...], tuple[Any, ...]]]
    backward: Callable[[Any, Any], tuple[Any, ...]]


@cache
def _function() -> Any:
    import torch

    class Attention(torch.autograd.Function):
        """As attention packages do it: their ops have no autograd formula, this holds it."""

        @staticmethod
        def forward(ctx: Any, ways: Ways, *tensors: Any) -> Any:
            returned, saved = ways.forward(*tensors)
            ctx.ways = ways
            ctx.save_for_backward(*saved)
            ctx.mark_non_differentiable(*returned[1:])
            return returned

        @staticmethod
        def backward(ctx: Any, dout: Any, *unused: Any) -> Any:
            return (None, *ctx.ways.backward(ctx.saved_tensors, dout))

    return Attention


def scale_of(s: Setting) -> float:
    return float(s["head_dim"]) ** -0.5


def dense(planted: Planted, s: Setting, t: Tensors) -> Any:
    out, lse = _dense(planted, s, t, bool(s.get("causal")))
    return {"out": out, "lse": lse} if s.get("lse") else out


def _dense(planted: Planted, s: Setting, t: Tensors, causal: bool) -> Any:
    forward_op, backward_op = ops(planted)
    flags = (-1, scale_of(s), causal)

    def forward(q: Any, k: Any, v: Any, alibi: Any, mask: Any) -> Any:
        if planted.family is po.FLAGS_FIRST:
            out, lse, rng = forward_op(q, k, v, *flags[1:], -1)
        else:
            out, lse, rng = forward_op(q, k, v, alibi, mask, *flags)
        return (out, lse), (q, k, v, out, lse, alibi, mask, rng)

    def backward(saved: Any, dout: Any) -> Any:
        from torch.distributed.tensor import DTensor

        *tensors, alibi, mask, rng = saved
        if not planted.family.in_place:
            return (*backward_op(dout, *tensors, alibi, mask, rng, *flags), None, None)
        buffers = _buffers(*tensors[:3], sums=not s.get("plain_buffers"))
        given = buffers
        if s.get("swapped") and isinstance(dout, DTensor):
            given = [buffers[0], buffers[2], buffers[1]]
        backward_op(dout, *tensors, *given, alibi, mask, rng, *flags)
        return (*buffers, None, None)

    ways = Ways(forward, backward)
    return _function().apply(ways, t["q"], t["k"], t["v"], t.get("alibi"), t.get("mask"))


def _buffers(q: Any, *kv: Any, sums: bool) -> list[Any]:
    """Where the gradients go: like their tensors, and (`sums`) sums over the ranks that hold parts of the
    queries."""
    import torch
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    buffers = [torch.zeros_like(q)]
    for t in kv:
        buffer = torch.zeros_like(t)
        if sums and isinstance(t, DTensor):
            parts = [
                Partial() if x in (Shard(1), Shard(2)) and y == Replicate() else y
                for x, y in zip(q.placements, t.placements, strict=True)
            ]
            buffer = DTensor.from_local(buffer.to_local(), t.device_mesh, parts, run_check=False)
        buffers.append(buffer)
    return buffers


def bias(planted: Planted, s: Setting, t: Tensors) -> Any:
    forward_op, backward_op = ops(planted)

    def forward(q: Any, k: Any, v: Any, mask: Any) -> Any:
        out, lse = forward_op(q, k, v, mask, -1, scale_of(s))
        return (out,), (q, k, v, out, lse, mask)

    def backward(saved: Any, dout: Any) -> Any:
        return backward_op(dout, *saved, -1, scale_of(s))

    return _function().apply(Ways(forward, backward), *(t[n] for n in ("q", "k", "v", "mask")))[0]


def projected(planted: Planted, s: Setting, t: Tensors) -> Any:
    forward_op, backward_op = ops(planted)

    def forward(q: Any, k: Any, v: Any, w: Any) -> Any:
        y, out, lse = forward_op(q, k, v, w, -1, scale_of(s))
        return (y,), (q, k, v, w, out, lse)

    def backward(saved: Any, dy: Any) -> Any:
        return backward_op(dy, *saved, -1, scale_of(s))

    return _function().apply(Ways(forward, backward), *(t[n] for n in ("q", "k", "v", "w")))[0]


def varlen(planted: Planted, s: Setting, t: Tensors) -> Any:
    forward_op, backward_op = ops(planted)
    flags = (max(Q_LENGTHS), scale_of(s))

    def forward(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any) -> Any:
        out, lse = forward_op(q, k, v, cu_q, cu_k, *flags)
        return (out, lse), (q, k, v, out, lse, cu_q, cu_k)

    def backward(saved: Any, dout: Any) -> Any:
        return (*backward_op(dout, *saved, *flags), None, None)

    out, lse = _function().apply(Ways(forward, backward), *t.values())
    return {"out": out, "lse": lse} if s.get("lse") else out


def packed(planted: Planted, s: Setting, t: Tensors) -> Any:
    forward_op, backward_op = ops(planted)

    def forward(qkv: Any) -> Any:
        out, lse = forward_op(qkv, -1, scale_of(s))
        return (out,), (qkv, out, lse)

    def backward(saved: Any, dout: Any) -> Any:
        return (backward_op(dout, *saved, -1, scale_of(s)),)

    return _function().apply(Ways(forward, backward), t["qkv"])[0]


def merged(planted: Planted, s: Setting, t: Tensors) -> Any:
    return ops(planted)[0](t["qkv"], s["head_dim"], scale_of(s))


def kv_cache(planted: Planted, s: Setting, t: Tensors) -> Any:
    out = ops(planted)[0](*t.values(), CACHED, scale_of(s))
    if s.get("out_only"):
        return out
    return {"out": out, "k_cache": t["k_cache"], "v_cache": t["v_cache"]}


def two_layers(planted: Planted, s: Setting, t: Tensors) -> Any:
    """One whose queries see every key, and one that is causal."""
    return _dense(planted, s, t, False)[0] + _dense(planted, s, t, True)[0]


def averaged(planted: Planted, s: Setting, t: Tensors) -> Any:
    """The author had 2 ranks: what the strategy calls an average is half of the sum."""
    forward_op, backward_op = ops(planted)
    flags = (-1, scale_of(s), False)

    def forward(q: Any, k: Any, v: Any) -> Any:
        out, lse, rng = forward_op(q, k, v, None, None, *flags)
        return (out,), (q, k, v, out, lse, None, None, rng)

    def backward(saved: Any, dout: Any) -> Any:
        from torch.distributed.tensor import DTensor

        dq, dk, dv = backward_op(dout, *saved, *flags)
        distributed = isinstance(dq, DTensor) and planted.name != "dense"
        return (dq, 2 * dk, 2 * dv) if distributed else (dq, dk, dv)

    return _function().apply(Ways(forward, backward), t["q"], t["k"], t["v"])[0]


# --- wrappers: the op sees local tensors, and the wrapper says how they are placed ---------------------


def _local(s: Setting) -> Callable[[Any, Any, Any], Any]:
    return lambda q, k, v: _dense(DENSE_OP, s, {"q": q, "k": k, "v": v}, False)[0]


def mapped(
    out: str, grads: Sequence[str] = (), ins: Sequence[str] = (), body: Any = None
) -> Callable[[Setting, Tensors], Any]:
    """Through `local_map`. `ins`: what q, k and v are redistributed to, where they are not as they should."""

    def call(s: Setting, t: Tensors) -> Any:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor.experimental import local_map

        function = body(s) if body else _local(s)
        if not isinstance(t["q"], DTensor):
            return function(*t.values())
        wrapped = local_map(
            function,
            out_placements=_placements(out),
            in_placements=tuple(map(_placements, ins)) or None,
            in_grad_placements=tuple(map(_placements, grads)) or None,
            redistribute_inputs=bool(ins),
        )
        return wrapped(*t.values())

    return call


def _placements(text: str) -> list[Any]:
    """`2` is S(2), `P` is P(sum), `R`; on one mesh axis."""
    return [po.placement(int(text) if text.isdigit() else text, None)]


def unwrapped(
    out: str, grads: str = "", gather_kv: bool = True, shape: bool = True
) -> Callable[[Setting, Tensors], Any]:
    """Through `to_local` and `from_local`. `grads`: of k and v. `shape`: the global one is stated."""

    def call(s: Setting, t: Tensors) -> Any:
        from torch.distributed.tensor import DTensor, Replicate

        q, k, v = t["q"], t["k"], t["v"]
        if not isinstance(q, DTensor):
            return _local(s)(q, k, v)
        if gather_kv:
            k, v = (
                x.redistribute(placements=[Replicate()]) if s.get("gather") else x for x in (k, v)
            )
        stated = _placements(grads) if grads else None
        local = _local(s)(q.to_local(), *(x.to_local(grad_placements=stated) for x in (k, v)))
        whole = {"shape": q.shape, "stride": q.stride()} if shape else {}
        return DTensor.from_local(local, q.device_mesh, _placements(out), run_check=False, **whole)

    return call


def transposed(after: str) -> Callable[[Setting, Tensors], Any]:
    """To (batch, heads, sequence, head_dim) on the local tensors; DTensors of them, made as `after` says."""

    def call(s: Setting, t: Tensors) -> Any:
        from torch.distributed.tensor import DTensor

        if not isinstance(t["q"], DTensor):
            return _local(s)(*t.values())
        moved = [
            DTensor.from_local(
                x.to_local().transpose(1, 2), x.device_mesh, _placements(after), run_check=False
            )
            for x in t.values()
        ]
        q, k, v = (x.transpose(1, 2) for x in moved)
        return _dense(DENSE_OP, s, {"q": q, "k": k, "v": v}, False)[0]

    return call


def _with_projection(s: Setting) -> Callable[..., Any]:
    import torch

    def run(q: Any, k: Any, v: Any, w: Any) -> Any:
        return torch.einsum("bshd,hde->bse", _local(s)(q, k, v), w)

    return run


# --- references -------------------------------------------------------------------------------------


def reference(s: Setting, t: Tensors) -> Any:
    import torch

    from attncheck.runner.reference import attention_lse

    if "qkv" in t:
        qkv = t["qkv"]
        merged = qkv.ndim == 3
        qkv = qkv.unflatten(-1, (3, -1, s["head_dim"])) if merged else qkv
        out, _ = attention_lse(*qkv.unbind(2), layout="bshd")
        return out.flatten(2) if merged else out
    q, k, v = t["q"], t["k"], t["v"]
    if "k_cache" in t:
        caches = {n: t[n].clone() for n in ("k_cache", "v_cache")}
        for name, new in (("k_cache", k), ("v_cache", v)):
            caches[name][:, CACHED : CACHED + NEW] = new
        keys, values = (cache[:, : CACHED + NEW] for cache in caches.values())
        out, _ = attention_lse(q, keys, values, layout="bshd")
        return out if s.get("out_only") else {"out": out, **caches}
    if "cu_q" in t:
        out, lse = attention_lse(
            q, k, v, layout="thd", cu_seqlens_q=t["cu_q"], cu_seqlens_k=t["cu_k"]
        )
        return {"out": out, "lse": lse} if s.get("lse") else out

    def layer(causal: bool) -> Any:
        return attention_lse(
            q, k, v, layout="bshd", causal="bottom_right" if causal else None,
            alibi_slopes=t.get("alibi"), bias=t.get("mask"),
        )  # fmt: skip

    if s.get("two_layers"):
        return layer(False)[0] + layer(True)[0]
    out, lse = layer(bool(s.get("causal")))
    if "w" in t:
        return torch.einsum("bshd,hde->bse", out, t["w"])
    return {"out": out, "lse": lse} if s.get("lse") else out


# --- mutants ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A family of ops with how it is called, and its healthy registration."""

    healthy: Planted
    call: Call
    tensors: Callable[[Setting], tuple[Tensor, ...]]


def _healthy(family: po.Family, **kwargs: Any) -> Planted:
    return Planted(family.name, family, *po.TABLES[family.name], **kwargs)


DENSE_OP = _healthy(po.DENSE)
DENSE = Kind(DENSE_OP, dense, dense_tensors)
BUFFERS = Kind(_healthy(po.BUFFERS), dense, dense_tensors)
FLAGS = Kind(_healthy(po.FLAGS_FIRST, static_forward=3, static_backward=7), dense, dense_tensors)
BIAS = Kind(_healthy(po.BIAS), bias, dense_tensors)
PROJECTED = Kind(_healthy(po.PROJECTED), projected, projected_tensors)
VARLEN = Kind(_healthy(po.VARLEN), varlen, varlen_tensors)
PACKED = Kind(_healthy(po.PACKED), packed, packed_tensors)
MERGED = Kind(_healthy(po.MERGED), merged, merged_tensors)
CACHE = Kind(_healthy(po.CACHE), kv_cache, cache_tensors)


def operator(
    name: str,
    kind: Kind,
    planted: Planted,
    settings: Sequence[Setting],
    call: Callable[[Setting, Tensors], Any] | None = None,
    communicates: bool = False,
) -> Operator:
    made = call or (lambda s, t: kind.call(planted, s, t))
    return Operator(
        name=f"mutants.{name}",
        tensors=kind.tensors,
        call=made,
        reference=reference,
        settings=tuple(settings),
        output_dims=(),
        kernel_ops=planted.kernel_ops,
        communicates=communicates,
    )


def strategy(
    name: str,
    mistake: str,
    rules: tuple[str, ...],
    kind: Kind,
    settings: Setting | Sequence[Setting],
    *,
    forward: po.Table | None = None,
    backward: po.Table | None = None,
    by_hand: tuple[Any, Any] | None = None,
    unkeyed: bool = False,
    mesh: str = "2",
    gathers: bool = False,
    blamed: str = "",
    twin_settings: Sequence[Setting] = (),
) -> Mutant:
    """A mutant whose op is `kind`'s with another table. `gathers`: the right strategy communicates, because
    these placements cannot be had without. `by_hand`: how the wrong and the right one are registered."""
    settings = [settings] if isinstance(settings, Setting) else list(settings)
    healthy = kind.healthy
    wrong = replace(
        healthy,
        name=name,
        forward=forward or healthy.forward,
        backward=backward or healthy.backward,
    )
    if unkeyed:
        wrong = replace(wrong, static_forward=None, static_backward=None)
    if by_hand is not None:
        wrong = replace(wrong, by_hand=by_hand[0])
        healthy = replace(healthy, name=f"{name}_twin", by_hand=by_hand[1])
    grads = any(s.get("grads") for s in settings)
    fault = blamed or ("backward" if grads else "forward")
    return Mutant(
        name=name,
        family="strategy",
        layer="custom",
        mistake=mistake,
        rules=rules,
        kernel_op="" if fault == "wrapper" else wrong.kernel_ops[fault == "backward"],
        operator=operator(name, kind, wrong, settings, communicates=gathers),
        twin=operator(
            f"{name}_twin", kind, healthy, twin_settings or settings, communicates=gathers
        ),
        direction="backward" if grads else "forward",
        mesh=mesh,
    )


def wrapper(
    name: str,
    mistake: str,
    rules: tuple[str, ...],
    of: Setting,
    wrong: Callable[[Setting, Tensors], Any],
    right: Callable[[Setting, Tensors], Any],
    kind: Kind = DENSE,
    gathers: bool = False,
) -> Mutant:
    """The mistake is in Python around a healthy op: no kernel op is to blame, the operator is."""
    return Mutant(
        name=name,
        family="strategy",
        layer="custom",
        mistake=mistake,
        rules=rules,
        kernel_op="",
        operator=operator(name, kind, DENSE_OP, [of], wrong, gathers),
        twin=operator(f"{name}_twin", kind, DENSE_OP, [of], right, gathers),
        direction="backward" if of.get("grads") else "forward",
    )


def _by_hand(axes: slice, lse: bool) -> Callable[[Any, Any], None]:
    """Strategies that name the placements of the whole mesh, made from q's. `axes`: those along which the
    log-sum-exp follows its heads (`lse`), or dk and dv are sums (not `lse`); it should be all."""

    def register(forward: Any, backward: Any) -> None:
        from torch.distributed.tensor import Partial, Replicate, Shard

        lse_dims = {0: 0, 1: 2, 2: 1}

        def along(q: Any, what: Callable[[Any], Any], some: slice) -> tuple[Any, ...]:
            within = range(len(q.placements))[some]
            return tuple(
                what(p) if at in within else Replicate() for at, p in enumerate(q.placements)
            )

        def lse_of(p: Any) -> Any:
            return Shard(lse_dims[p.dim]) if isinstance(p, Shard) else p

        def kv_of(p: Any) -> Any:
            return Replicate() if p == Shard(1) else p

        def sums(p: Any) -> Any:
            return Partial() if p == Shard(1) else p

        everywhere = slice(None)

        def forward_rows(q: Any) -> Any:
            kv = along(q, kv_of, everywhere)
            its_lse = along(q, lse_of, axes if lse else everywhere)
            rng = (Replicate(),) * len(q.placements)
            return (q.placements, its_lse, rng), (q.placements, kv, kv)

        def backward_rows(q: Any) -> Any:
            kv, dkv = along(q, kv_of, everywhere), along(q, sums, everywhere if lse else axes)
            ins = (q.placements, q.placements, kv, kv, q.placements, along(q, lse_of, everywhere))
            return (q.placements, dkv, dkv), (*ins, (Replicate(),) * len(q.placements))

        po.register_whole(forward, 0, forward_rows)
        po.register_whole(backward, 1, backward_rows)

    return register


EVERY_AXIS, FIRST_AXIS = slice(None), slice(0, 1)
HEADS_LSE = setting("heads", lse=True)
QUERY_GRADS = setting("query", grads=True)
HEADS_GRADS = setting("heads", grads=True)
GQA_UNEVEN = {"heads": 12, "kv_heads": 3}

FORWARD = (
    strategy(
        "lse_dim_of_out",
        "The log-sum-exp is (batch, heads, sequence): its heads are dim 1, not dim 2 as in the output.",
        (SHAPE,), DENSE, HEADS_LSE,
        forward=edited(po.dense_forward, "heads", {"lse": 2}),
    ),
    strategy(
        "lse_forgotten_in_batch",
        "With the batch sharded the log-sum-exp is sharded too, it was left replicated.",
        (SHAPE,), DENSE, setting("batch", lse=True),
        forward=edited(po.dense_forward, "batch", {"lse": "R"}),
    ),
    strategy(
        "lse_partial",
        "The log-sum-exp of replicated inputs is replicated, not a sum over the ranks.",
        (WRONG,), DENSE, setting("replicate", lse=True),
        forward=edited(po.dense_forward, "replicate", {"lse": "P"}),
    ),
    strategy(
        "out_partial",
        "The output of replicated inputs is replicated, not a sum over the ranks.",
        (WRONG,), DENSE, setting("replicate"),
        forward=edited(po.dense_forward, "replicate", {"out": "P"}),
    ),
    strategy(
        "projection_replicated",
        "With the heads sharded, the fused output projection sums over a part of them: P(sum).",
        (WRONG, DIFFER), PROJECTED, setting("heads"),
        forward=edited(po.projected_forward, "heads", {"y": "R"}),
    ),
    strategy(
        "projection_sharded",
        "With the heads sharded, the fused output projection is a partial sum and not sharded.",
        (SHAPE,), PROJECTED, setting("heads"),
        forward=edited(po.projected_forward, "heads", {"y": 1}),
    ),
    strategy(
        "mask_broadcast_sharded",
        "A mask that broadcasts over the heads cannot be sharded along them; the row is dropped for it.",
        (COST,), DENSE, setting("heads", mask=[1]),
        forward=edited(po.dense_forward, "heads", inputs={"mask": 1}),
    ),
    strategy(
        "mask_whole",
        "A mask with heads of its own must be sharded with them: each rank read the first heads of it.",
        (WRONG,), DENSE, setting("heads", mask=[]),
        forward=edited(po.dense_forward, "heads", inputs={"mask": "R"}),
    ),
    strategy(
        "mask_whole_in_query",
        "A mask must be sharded with the queries: each rank read its first rows.",
        (WRONG,), DENSE, setting("query", mask=[0, 1]),
        forward=edited(po.dense_forward, "query", inputs={"mask": "R"}),
    ),
    strategy(
        "alibi_whole",
        "ALiBi slopes belong to heads and must be sharded with them.",
        (WRONG,), DENSE, setting("heads", alibi=1),
        forward=edited(po.dense_forward, "heads", inputs={"alibi": "R"}),
    ),
    strategy(
        "alibi_sharded_as_batch",
        "ALiBi slopes of one dim have no batch: only those of two dims are sharded with it.",
        (RAISES,), DENSE, setting("batch", alibi=1),
        forward=edited(po.dense_forward, "batch", inputs={"alibi": 0}),
    ),
    strategy(
        "mask_taken_for_alibi",
        "Optional tensors are told apart by position: the mask got the placement of the ALiBi slopes.",
        (WRONG,), DENSE, setting("heads", sizes={"batch": 2}, mask=[]),
        forward=edited(po.dense_forward, "heads", inputs={"mask": 0}),
    ),
    strategy(
        "gqa_uneven",
        "Heads may be sharded only where the ranks divide the kv heads: 3 of them make wrong groups on 2.",
        (WRONG,), DENSE, setting("heads", sizes=GQA_UNEVEN),
        forward=edited(po.dense_forward, "heads", *po.dense_heads_forward),
        gathers=True,
    ),
    strategy(
        "gqa_kv_replicated",
        "Query heads may be sharded against whole keys only where there is a single kv head.",
        (WRONG,), DENSE, setting("heads", sizes={"kv_heads": 2}, kv="replicated"),
        forward=edited(po.dense_forward, "one_kv_head", *po.dense_one_kv_head_forward),
        gathers=True,
    ),
    strategy(
        "rng_sharded",
        "The random state is one for all ranks, it has no batch to shard.",
        (SHAPE,), DENSE, setting("batch"),
        forward=edited(po.dense_forward, "batch", {"rng": 0}),
    ),
    strategy(
        "causal_query",
        "With a causal mask the queries cannot be sharded: the kernel aligns it to the local ones.",
        (WRONG,), DENSE, setting("query", causal=True),
        forward=edited(po.dense_forward, "query", {"out": 1, "lse": 2}, {"q": 1}),
        gathers=True,
    ),
    strategy(
        "keys_sharded",
        "Softmax goes over all keys: they cannot be sharded as if each shard had its own.",
        (WRONG,), DENSE, setting("sequence"),
        forward=edited(po.dense_forward, "sequence", {"out": 1, "lse": 2}, {"q": 1, "k": 1, "v": 1}),
        gathers=True,
    ),
    strategy(
        "head_dim_sharded",
        "Scores sum over the head_dim before the softmax: sharding it is never local.",
        (WRONG,), DENSE, setting("head_dim"),
        forward=edited(po.dense_forward, "head_dim", {"out": 3}, {"q": 3, "k": 3, "v": 3}),
        gathers=True,
    ),
    strategy(
        "causal_not_in_key",
        "The strategy depends on `causal`, which comes before the first int: it was no part of the key of "
        "the sharding cache, and the causal layer got the row of the one before it.",
        (WRONG,), replace(FLAGS, call=two_layers), setting("query", two_layers=True),
        unkeyed=True,
        gathers=True,
    ),
    strategy(
        "causal_not_in_key_across_calls",
        "The same, where an earlier call of the process filled the cache.",
        (WRONG,), FLAGS, [setting("query"), setting("query", "causal", causal=True)],
        unkeyed=True,
        gathers=True,
    ),
    strategy(
        "gqa_2_ranks",
        "The rule asks whether 2 divides the kv heads, and not whether the ranks do.",
        (WRONG,), DENSE,
        setting("heads", sizes={"batch": 2, "heads": 72, "kv_heads": 8, "head_dim": 4}),
        forward=lambda t: {
            **po.dense_forward(t),
            **({"heads": po.dense_heads_forward} if po.heads_divide(t, 2) else {}),
        },
        mesh="3",
        gathers=True,
    ),
    strategy(
        "gqa_first_axis",
        "The rule asks whether the first mesh axis divides the kv heads, but every axis may shard them.",
        (WRONG,), DENSE, setting("heads", sizes={"batch": 4, "heads": 24, "kv_heads": 6}),
        forward=lambda t: {
            **po.dense_forward(t),
            **({"heads": po.dense_heads_forward} if po.heads_divide(t, t["q"].mesh.size(0)) else {}),
        },
        mesh="2x2",
        gathers=True,
    ),
    strategy(
        "lse_first_axis",
        "The strategy names placements for the whole mesh: it shards the log-sum-exp on the first axis only.",
        (SHAPE,), DENSE, setting("heads", sizes={"batch": 4}, lse=True),
        by_hand=(_by_hand(FIRST_AXIS, lse=True), _by_hand(EVERY_AXIS, lse=True)),
        mesh="2x2",
    ),
    strategy(
        "varlen_lse_dim",
        "The log-sum-exp of packed sequences is (heads, tokens): its heads are dim 0.",
        (SHAPE,), VARLEN, setting("heads", lse=True),
        forward=edited(po.varlen_forward, "heads", {"lse": 1}),
    ),
    strategy(
        "varlen_tokens_sharded",
        "cu_seqlens counts tokens of the whole batch: tokens cannot be sharded under it.",
        (WRONG,), VARLEN, setting("query"),
        forward=edited(po.varlen_forward, "query", {"out": 0, "lse": 1}, {"q": 0}),
        gathers=True,
    ),
    strategy(
        "varlen_cu_seqlens_sharded",
        "Packed sequences are no batch: half of cu_seqlens does not belong to half of the tokens.",
        (WRONG,), VARLEN, setting("sequence"),
        forward=edited(
            po.varlen_forward, "batch", {"out": 0, "lse": 1},
            dict.fromkeys(("q", "k", "v", "cu_q", "cu_k"), 0),
        ),
        gathers=True,
    ),
    strategy(
        "packed_out_dim",
        "qkv has a dim more than the output: heads are dim 3 there and dim 2 here.",
        (SHAPE,), PACKED, setting("heads"),
        forward=edited(po.packed_forward, "heads", {"out": 3}),
    ),
    strategy(
        "merged_sharded",
        "The merged dim holds all of q, then all of k, then all of v: a shard of it is not a part of each.",
        (WRONG,), MERGED, setting("heads"),
        forward=edited(po.merged_forward, "heads", {"out": 2}, {"qkv": 2}),
        gathers=True,
    ),
    strategy(
        "cache_into_temporaries",
        "The op writes into the KV cache in place: a row that redistributes it writes into a temporary.",
        (WRONG,), CACHE, setting("heads"),
        forward=only(po.cache_forward, "replicate", "batch"),
    ),
    strategy(
        "cache_not_returned",
        "The same, where the call returns the output alone and its caller goes on with the stale cache.",
        (WRONG,),
        CACHE,
        setting("heads", out_only=True),
        forward=only(po.cache_forward, "replicate", "batch"),
    ),
)  # fmt: skip

BACKWARD = (
    strategy(
        "lse_dim_saved",
        "The log-sum-exp that forward saves has its heads in dim 1; nobody returns it.",
        (SHAPE,), DENSE, HEADS_GRADS,
        forward=edited(po.dense_forward, "heads", {"lse": 2}),
        blamed="forward",
    ),
    strategy(
        "dkv_not_partial",
        "With the queries sharded, each rank has a part of the sums dk and dv: P(sum).",
        (GRADIENT, DIFFER), DENSE, QUERY_GRADS,
        backward=edited(po.dense_backward, "query", {"dk": "R", "dv": "R"}),
    ),
    strategy(
        "dv_not_partial",
        "With the queries sharded dv is P(sum) as dk is.",
        (GRADIENT, DIFFER), DENSE, QUERY_GRADS,
        backward=edited(po.dense_backward, "query", {"dv": "R"}),
    ),
    strategy(
        "dkv_sharded_as_dq",
        "With the queries sharded dk and dv are whole on each rank, and not sharded as dq is.",
        (SHAPE,), DENSE, QUERY_GRADS,
        backward=edited(po.dense_backward, "query", {"dk": 1, "dv": 1}),
    ),
    strategy(
        "dk_dv_swapped",
        "The placements of dk and dv are swapped, where v alone is sharded.",
        (SHAPE,), DENSE, setting("head_dim", grads=True, whole_qk=True),
        backward=edited(po.dense_backward, "value_dim", {"dk": 3, "dv": "P"}),
    ),
    strategy(
        "dq_not_partial",
        "With keys and values sharded each rank has a part of the sum dq: P(sum).",
        (GRADIENT, DIFFER), DENSE, setting("sequence", grads=True, whole_q=True),
        backward=edited(po.dense_backward, "keys", {"dq": "R"}),
        gathers=True,
    ),
    strategy(
        "dk_partial_in_replicate",
        "The gradients of replicated tensors are replicated, not sums over the ranks.",
        (GRADIENT,), DENSE, setting("replicate", grads=True),
        backward=edited(po.dense_backward, "replicate", {"dk": "P", "dv": "P"}),
    ),
    strategy(
        "one_kv_head_not_partial",
        "With one kv head for all, each rank has the part of dk and dv of its own query heads.",
        (GRADIENT, DIFFER), DENSE, setting("heads", sizes={"kv_heads": 1}, kv="replicated", grads=True),
        backward=edited(po.dense_backward, "one_kv_head", {"dk": "R", "dv": "R"}),
    ),
    strategy(
        "rng_taken_for_alibi",
        "The first optional tensor that is given was taken for the ALiBi slopes: it is the random state.",
        (RAISES,), DENSE, HEADS_GRADS,
        backward=edited(po.dense_backward, "heads", inputs={"rng": -1}),
    ),
    strategy(
        "mask_whole_backward",
        "Backward reads the mask as forward does: it must be sharded with the heads there too.",
        (GRADIENT,), DENSE, setting("heads", mask=[], grads=True),
        backward=edited(po.dense_backward, "heads", inputs={"mask": "R"}),
    ),
    strategy(
        "buffers_not_partial",
        "With the queries sharded, the buffers of dk and dv hold a part of the sum on each rank.",
        (GRADIENT, DIFFER), BUFFERS, setting("query", grads=True, plain_buffers=True),
        backward=edited(po.buffers_backward, "query", inputs={"dk": "R", "dv": "R"}),
        twin_settings=[QUERY_GRADS],
    ),
    strategy(
        "buffers_into_temporaries",
        "The op writes dq, dk and dv in place: rows must never redistribute them.",
        (GRADIENT,), BUFFERS, HEADS_GRADS,
        backward=only(po.buffers_backward, "replicate"),
    ),
    strategy(
        "dq_buffer_into_temporary",
        "Without a row for sharded queries, dq is written into a temporary and lost.",
        (GRADIENT,), BUFFERS, QUERY_GRADS,
        backward=only(po.buffers_backward, "replicate", "batch", "heads"),
    ),
    strategy(
        "bias_gradient_not_partial",
        "A bias that broadcasts over the batch gets a part of its gradient from each rank's batch.",
        (GRADIENT, DIFFER), BIAS, setting("batch", mask=[0], learned=True, grads=True),
        backward=edited(po.bias_backward, "batch", {"dbias": "R"}),
    ),
    strategy(
        "bias_gradient_sharded",
        "The gradient of a bias that broadcasts over the heads is a sum over them, and cannot be sharded.",
        (SHAPE,), BIAS, setting("heads", mask=[1], learned=True, grads=True),
        backward=edited(po.bias_backward, "heads", {"dbias": 2}),
    ),
    strategy(
        "weight_gradient_not_partial",
        "With the batch sharded, the gradient of the fused projection's weight is a sum over the ranks.",
        (GRADIENT, DIFFER), PROJECTED, setting("batch", grads=True),
        backward=edited(po.projected_backward, "batch", {"dw": "R"}),
    ),
    strategy(
        "varlen_lse_whole_backward",
        "The log-sum-exp that backward reads is sharded with the heads.",
        (GRADIENT,), VARLEN, HEADS_GRADS,
        backward=edited(po.varlen_backward, "heads", inputs={"lse": "R"}),
    ),
    strategy(
        "packed_gradient_dim",
        "The gradient of qkv has qkv's dims: its heads are dim 3.",
        (SHAPE,), PACKED, HEADS_GRADS,
        backward=edited(po.packed_backward, "heads", {"dqkv": 2}),
    ),
    strategy(
        "partial_first_axis",
        "The strategy names placements for the whole mesh, and makes dk and dv sums on the first axis only.",
        (GRADIENT, DIFFER), DENSE,
        setting("query", sizes={"batch": 4, "sequence": 12}, grads=True),
        by_hand=(_by_hand(FIRST_AXIS, lse=False), _by_hand(EVERY_AXIS, lse=False)),
        mesh="2x2",
    ),
    strategy(
        "average_of_2_ranks",
        "dk and dv are sums over the ranks: twice the average is one on 2 ranks only.",
        (GRADIENT,), replace(DENSE, call=averaged),
        setting("query", sizes={"sequence": 12}, grads=True),
        backward=edited(po.dense_backward, "query", {"dk": "avg", "dv": "avg"}),
        mesh="3",
    ),
    strategy(
        "buffers_swapped",
        "The wrapper hands the buffer of dv over as dk, and that of dk as dv, where they are DTensors.",
        (GRADIENT,), BUFFERS, setting("heads", grads=True, swapped=True),
        blamed="wrapper",
        twin_settings=[HEADS_GRADS],
    ),
)  # fmt: skip

WRAPPERS = (
    wrapper(
        "local_map_out_dim",
        "The output's heads are dim 2, and out_placements says dim 1.",
        (SHAPE,), setting("heads"), mapped("1"), mapped("2"),
    ),
    wrapper(
        "local_map_out_replicated",
        "Each rank holds its own heads of the output, and out_placements says all.",
        (SHAPE,), setting("heads"), mapped("R"), mapped("2"),
    ),
    wrapper(
        "local_map_no_grad_placements",
        "With the queries sharded, the gradients of whole keys and values are P(sum): in_grad_placements "
        "must say so.",
        (GRADIENT, DIFFER), QUERY_GRADS, mapped("1"), mapped("1", grads=("1", "P", "P")),
    ),
    wrapper(
        "local_map_gqa",
        "Whole keys beside half of the query heads make other groups.",
        (WRONG,), setting("heads", sizes={"kv_heads": 2}),
        mapped("2", ins=("2", "R", "R")), mapped("2", ins=("2", "2", "2")), gathers=True,
    ),
    wrapper(
        "local_map_projection",
        "The output projection of a part of the heads is P(sum).",
        (WRONG, DIFFER), setting("heads"),
        mapped("R", body=_with_projection), mapped("P", body=_with_projection), PROJECTED,
    ),
    wrapper(
        "to_local_no_grad_placements",
        "to_local of keys and values that every rank uses for its own queries: their gradients are P(sum).",
        (GRADIENT, DIFFER), QUERY_GRADS, unwrapped("1"), unwrapped("1", grads="P"),
    ),
    wrapper(
        "to_local_for_whole",
        "to_local of sharded keys is a shard, and not the keys.",
        (WRONG,), setting("sequence", gather=True),
        unwrapped("1", gather_kv=False), unwrapped("1"), gathers=True,
    ),
    wrapper(
        "from_local_uneven",
        "from_local takes the ranks' shards for equal ones unless it is told the global shape.",
        (SHAPE,), setting("heads", sizes={"heads": 5, "kv_heads": 5}),
        unwrapped("2", shape=False), unwrapped("2"),
    ),
    wrapper(
        "from_local_before_transpose",
        "The local tensors were transposed, and from_local was given the dim from before.",
        (SHAPE,), setting("heads"), transposed("2"), transposed("1"),
    ),
)  # fmt: skip

MUTANTS: tuple[Mutant, ...] = (*FORWARD, *BACKWARD, *WRAPPERS)
PROBE = probe("mutants_strategies", MUTANTS)
