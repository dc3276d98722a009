"""Kernels with one mistake each, on custom ops with right strategies and in the place of ATen's kernels.

Every kernel is right on whole tensors, as its maintainer tested it, and wrong on a shard.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from catalogue import Mutant, probe
from planted_kernels import (
    Alibi,
    Call,
    HeadDimSharded,
    Kernel,
    builtin_probe,
    kernels_replaced,
    op_names,
    operator,
    rank,
    setting,
    splits_keys,
)

from attncheck.probing import Operator, Setting

# --- forward ---------------------------------------------------------------------------------------


class ScaleFromLocalHeadDim(HeadDimSharded):
    def scale(self, q: Any, v: Any, c: Call, backward: bool = False) -> float:
        return float(q.shape[-1] ** -0.5)


class ScaleFromValues(Kernel):
    def scale(self, q: Any, v: Any, c: Call, backward: bool = False) -> float:
        return float(v.shape[-1] ** -0.5)


class LocalRows(Kernel):
    def rows(self, q: Any, c: Call, backward: bool = False) -> Any:
        import torch

        return torch.arange(q.shape[2])


class WindowOffByOne(Kernel):
    def visible(self, i: Any, j: Any, q: Any, c: Call, backward: bool) -> Any:
        first = (i[:1] > 0).long()  # a shard's first row, counted from 1
        return super().visible(i + first, j, q, c, backward)


class SoftcapIgnored(Kernel):
    def softcap(self, value: Any, q: Any, c: Call, backward: bool) -> tuple[Any, Any]:
        return (value, 1.0) if splits_keys(q) else super().softcap(value, q, c, backward)


def accumulated(a: Any, b: Any, dtype: Any, block: int) -> Any:
    """a @ b with an accumulator of `dtype`, a block of the inner dim at a time."""
    import torch

    total = torch.zeros(*a.shape[:-1], b.shape[-1], dtype=dtype)
    for at in range(0, a.shape[-1], block):
        total = total + (a[..., at : at + block] @ b[..., at : at + block, :]).to(dtype)
    return total.float()


class Float16Accumulator(Kernel):
    def weighted_sum(self, p: Any, v: Any, q: Any) -> Any:
        import torch

        if not splits_keys(q):
            return super().weighted_sum(p, v, q)
        return accumulated(p, v, torch.float16, 1)


class SameSeedEverywhere(Kernel):
    def seed(self, c: Call, phase: str) -> int:
        import torch

        return torch.initial_seed()


class NotRescaled(Kernel):
    """Kept probabilities are scaled up only where the call drops on one device."""

    def rescale(self, p: Any, c: Call) -> Any:
        return p if c.group else super().rescale(p, c)


class RateInBytes(Kernel):
    """Random bytes are compared with the rate in quarters, off by one."""

    def drop(self, p: Any, c: Call, phase: str) -> Any:
        if c.group and c.dropout:
            c = replace(c, dropout=c.dropout + 0.25)
        return super().drop(p, c, phase)


class LayoutGuessed(Kernel):
    """Takes the larger of dims 1 and 2 for the heads; with as many heads as queries it guesses wrong."""

    def forward(self, q: Any, k: Any, v: Any, c: Call) -> tuple[Any, Any]:
        if q.shape[1] > q.shape[2]:
            return super().forward(q, k, v, c)
        swapped = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = super().forward(*swapped, c)
        return out.transpose(1, 2), lse.transpose(1, 2)


class EmptyRowsNan(Kernel):
    def store(self, out: Any, some: Any, q: Any) -> Any:
        if splits_keys(q):
            out = out.masked_fill(~some[..., None], float("nan"))  # 0 / 0, unguarded
        return super().store(out, some, q)


class EmptyRowsHaveLseZero(Kernel):
    def store_lse(self, lse: Any, some: Any, q: Any) -> Any:
        return lse.masked_fill(~some, 0.0) if splits_keys(q) else lse


class LseInLog2(Kernel):
    def store_lse(self, lse: Any, some: Any, q: Any) -> Any:
        return lse * 1.4426950408889634 if splits_keys(q) else lse


class OrderByRank(Kernel):
    """Each rank starts the sum over keys at another place."""

    def weighted_sum(self, p: Any, v: Any, q: Any) -> Any:
        if rank() % 2 == 0:
            return super().weighted_sum(p, v, q)
        return p.flip(-1) @ v.flip(-2)


def never_written(like: Any) -> Any:
    """Memory as the allocator hands it out."""
    import torch

    return torch.empty(like.shape, dtype=like.dtype)


class OutputNeverWritten(Kernel):
    def store(self, out: Any, some: Any, q: Any) -> Any:
        return never_written(q) if splits_keys(q) else super().store(out, some, q)


BLOCK = 4


class TailRowsSkipped(Kernel):
    def store(self, out: Any, some: Any, q: Any) -> Any:
        import torch

        written = torch.zeros(out.shape, dtype=q.dtype)
        done = q.shape[2] // BLOCK * BLOCK
        written[:, :, :done] = out[:, :, :done]
        return written


class TailRowsNeverWritten(Kernel):
    def store(self, out: Any, some: Any, q: Any) -> Any:
        written = never_written(out.to(q.dtype))
        done = q.shape[2] // BLOCK * BLOCK
        written[:, :, :done] = out[:, :, :done]
        return written


class LocalSlopes(Alibi):
    def heads(self, q: Any, c: Call, backward: bool = False) -> Any:
        import torch

        return torch.arange(q.shape[1])


class SlopesByWorldRank(Alibi):
    def heads(self, q: Any, c: Call, backward: bool = False) -> Any:
        return _from(rank() if c.group else 0, q.shape[1], q)


class SlopesByGroupRank(Alibi):
    """Right where every rank has equally many heads."""

    def heads(self, q: Any, c: Call, backward: bool = False) -> Any:
        return _from(rank(c.group) if c.group else 0, q.shape[1], q)


class SlopesAsOnTwoRanks(Alibi):
    def heads(self, q: Any, c: Call, backward: bool = False) -> Any:
        return _from(rank(c.group) if c.group else 0, 6 // 2, q)


def _from(at: int, rows: int, q: Any) -> Any:
    import torch

    return torch.arange(q.shape[1]) + at * rows


class LocalGroups(Kernel):
    def kv_heads(self, q: Any, k: Any, c: Call, backward: bool = False) -> Any:
        import torch

        return torch.arange(q.shape[1]) // max(q.shape[1] // k.shape[1], 1)


class PackedByShape(Kernel):
    """The split path packs its operands once per shape: values are served the keys."""

    def expand(self, k: Any, q: Any, c: Call) -> Any:
        packed = super().expand(k, q, c)
        if not splits_keys(q):
            return packed
        held = getattr(self, "_packed", None)
        self._packed = None if held is not None else packed
        return packed if held is None else held


# --- backward --------------------------------------------------------------------------------------


class ScaleFromValuesBackward(Kernel):
    def scale(self, q: Any, v: Any, c: Call, backward: bool = False) -> float:
        return float(v.shape[-1] ** -0.5) if backward else c.scale


class LocalRowsBackward(Kernel):
    def rows(self, q: Any, c: Call, backward: bool = False) -> Any:
        import torch

        return torch.arange(q.shape[2]) if backward else super().rows(q, c)


class WindowOffByOneBackward(Kernel):
    def visible(self, i: Any, j: Any, q: Any, c: Call, backward: bool) -> Any:
        first = (i[:1] > 0).long() if backward else 0
        return super().visible(i + first, j, q, c, backward)


class SoftcapSlopeForgotten(Kernel):
    def softcap(self, value: Any, q: Any, c: Call, backward: bool) -> tuple[Any, Any]:
        value, slope = super().softcap(value, q, c, backward)
        return value, 1.0 if splits_keys(q) else slope


class Bfloat16AccumulatorBackward(Kernel):
    def sum_over_rows(self, ds: Any, q32: Any, q: Any) -> Any:
        import torch

        if not splits_keys(q):
            return super().sum_over_rows(ds, q32, q)
        return accumulated(ds.transpose(-1, -2), q32, torch.bfloat16, 8)


class AnotherMaskBackward(Kernel):
    def seed(self, c: Call, phase: str) -> int:
        # Forward drew after the rank's offset was added, backward draws before.
        import torch

        return torch.initial_seed() if phase == "backward" else super().seed(c, phase)


class GradientLayoutGuessed(Kernel):
    def read_gradient(self, dout: Any, q: Any) -> Any:
        if q.shape[1] > q.shape[2]:
            return dout
        return dout.transpose(1, 2).contiguous()


class EmptyRowsNanBackward(Kernel):
    def backward_probabilities(self, p: Any, visible: Any, q: Any) -> Any:
        if splits_keys(q):
            p = p.masked_fill(~visible.any(-1, keepdim=True), float("nan"))  # exp(-inf - -inf)
        return p


class LseReadAsLog2(Kernel):
    def read_lse(self, lse: Any, q: Any) -> Any:
        return lse * 0.6931471805599453 if splits_keys(q) else lse


class OrderByRankBackward(Kernel):
    def sum_over_rows(self, ds: Any, q32: Any, q: Any) -> Any:
        if rank() % 2 == 0:
            return super().sum_over_rows(ds, q32, q)
        return ds.flip(-2).transpose(-1, -2) @ q32.flip(-2)


class QueryGradientNeverWritten(Kernel):
    def store_gradients(self, dq: Any, dk: Any, dv: Any, q: Any, k: Any) -> tuple[Any, Any, Any]:
        dq, dk, dv = super().store_gradients(dq, dk, dv, q, k)
        return (never_written(dq) if splits_keys(q) else dq), dk, dv


class TailRowsSkippedBackward(Kernel):
    def store_gradients(self, dq: Any, dk: Any, dv: Any, q: Any, k: Any) -> tuple[Any, Any, Any]:
        dq = dq.clone()
        dq[:, :, q.shape[2] // BLOCK * BLOCK :] = 0
        return super().store_gradients(dq, dk, dv, q, k)


class ValuesGradientTwice(Kernel):
    def store_gradients(self, dq: Any, dk: Any, dv: Any, q: Any, k: Any) -> tuple[Any, Any, Any]:
        twice = dv + dv if splits_keys(q) else dv  # once by each half of the split
        return super().store_gradients(dq, dk, twice, q, k)


class KeysGradientSummedOverCalls(Kernel):
    """dk is summed into a buffer that is zeroed when it is made, and kept by shape."""

    def store_gradients(self, dq: Any, dk: Any, dv: Any, q: Any, k: Any) -> tuple[Any, Any, Any]:
        buffers = self.__dict__.setdefault("buffers", {})
        buffer = buffers.setdefault(tuple(dk.shape), dk * 0)
        buffer += dk
        return super().store_gradients(dq, buffer, dv, q, k)


class KeysGradientByGroup(Kernel):
    def group_sum(self, x: Any, k: Any, q: Any, c: Call) -> Any:
        mean = x / (q.shape[1] / k.shape[1]) if splits_keys(q) else x
        return super().group_sum(mean, k, q, c)


class LocalSlopesBackward(Alibi):
    def heads(self, q: Any, c: Call, backward: bool = False) -> Any:
        import torch

        return torch.arange(q.shape[1]) if backward else super().heads(q, c)


class LocalGroupsBackward(Kernel):
    def kv_heads(self, q: Any, k: Any, c: Call, backward: bool = False) -> Any:
        import torch

        if not backward:
            return super().kv_heads(q, k, c)
        return torch.arange(q.shape[1]) // max(q.shape[1] // k.shape[1], 1)


# --- where they show -------------------------------------------------------------------------------

HEADS_SPLIT = setting("plain", "heads")
REPLICATED = setting("plain", "replicate")
HEAD_DIM_SPLIT = setting("head_dim", "head_dim")
CAUSAL = setting("causal", "query", rows=True, causal=True)
WINDOW = setting("window", "query", rows=True, window=5)
SOFTCAP = setting("softcap", "heads", softcap=1.5)
# Long enough for a float16 sum to show beyond the rounding of a float16 result.
HALF = setting("float16", "heads", {"sequence": 22, "kv_sequence": 3328}, "float16")
HALF_BACKWARD = setting("float16", "heads", {"sequence": 1664, "kv_sequence": 22}, "float16")
# More queries than keys, and a window: the last queries see nothing.
EMPTY_ROWS = setting("empty_rows", "heads", {"sequence": 26, "kv_sequence": 14}, window=5)
DROPOUT = setting("dropout", "heads", {"kv_sequence": 16, "sequence": 22}, dropout=0.25)
# 8 heads and 4 queries; on two ranks 4 heads and 4 queries.
EQUAL_SIZES = setting(
    "equal_sizes", "heads", {"heads": 8, "kv_heads": 8, "sequence": 4, "kv_sequence": 4}
)
TAIL = setting("tail", "query", rows=True)
ALIBI = setting("alibi", "heads", heads=True)
ALIBI_SIX = setting("alibi", "heads", {"heads": 6, "kv_heads": 6})
ALIBI_UNEVEN = setting("alibi_uneven", "heads", {"heads": 5, "kv_heads": 5}, heads=True)
ALIBI_2D = setting("alibi_2d", "heads", {"batch": 10}, heads=True)
GQA = setting("gqa", "heads", {"kv_heads": 2})
GQA_KV_WHOLE = setting("gqa_kv_whole", "heads", {"kv_heads": 2}, heads=True, kv_whole=True)

WRONG, GRADIENT, DRIFT, REPLICAS = ("ATN201",), ("ATN202",), ("ATN203",), ("ATN204",)
MASK, STALE = ("ATN205",), ("ATN207",)

_TWINS: dict[tuple[Any, ...], Operator] = {}


def _twin(kernel: Kernel, where: Setting, kind: str, **more: Any) -> Operator:
    """The healthy operator of a setting: mutants of one base and setting share it."""
    key = (type(kernel), where.name, where.placements, tuple(where.sizes.items()), kind)
    if key not in _TWINS:
        name = f"healthy_{len(_TWINS) + 1}_{where.name}"
        _TWINS[key] = operator(name, kernel, where, kind, **more)
    return _TWINS[key]


def custom(
    mistake: str,
    kernel: Kernel,
    where: Setting,
    rules: tuple[str, ...],
    direction: str = "forward",
    *,
    kind: str = "plain",
    twin: Kernel | None = None,
    mesh: str = "2",
    name: str = "",
    **more: Any,
) -> Mutant:
    """A mutant on a custom op, named after its class where no `name` is given."""
    if not name:
        name = re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", type(kernel).__name__).lower()
        name = re.sub("_backward$", "_grad", name)
    if twin is None:
        twin = next(base for base in (Alibi, HeadDimSharded, Kernel) if isinstance(kernel, base))()
    return Mutant(
        name=name,
        family="kernel",
        layer="custom",
        mistake=mistake,
        rules=rules,
        kernel_op=op_names(name)[direction == "backward"],
        operator=operator(name, kernel, where, kind, **more),
        twin=_twin(twin, where, kind, **more),
        direction=direction,
        mesh=mesh,
    )


def backward(
    mistake: str, kernel: Kernel, where: Setting, rules: tuple[str, ...], **more: Any
) -> Mutant:
    return custom(mistake, kernel, where, rules, "backward", **more)


FORWARD = (
    custom("The softmax scale is taken from the local head_dim.", ScaleFromLocalHeadDim(),
           HEAD_DIM_SPLIT, WRONG, kind="head_dim", communicates=True),
    custom("The softmax scale is taken from the head_dim of the values, which are sharded.",
           ScaleFromValues(), HEAD_DIM_SPLIT, WRONG, kind="value_dim"),
    custom("The causal mask starts at the first local query.", LocalRows(), CAUSAL, WRONG),
    custom("The window of a shard is off by one.", WindowOffByOne(), WINDOW, WRONG),
    custom("The path that splits the keys ignores the softcap.", SoftcapIgnored(), SOFTCAP, WRONG),
    custom("The path that splits the keys accumulates in float16.", Float16Accumulator(), HALF, DRIFT),
    custom("Every rank draws its dropout mask from the same seed.", SameSeedEverywhere(), DROPOUT, MASK),
    custom("On several ranks the kept probabilities are not scaled up.", NotRescaled(), DROPOUT, MASK),
    custom("On several ranks dropout takes another rate.", RateInBytes(), DROPOUT, MASK),
    custom("With as many heads as queries, BSHD is read as BHSD.", LayoutGuessed(), EQUAL_SIZES, WRONG),
    custom("A query that sees no key gives NaN on the split path.", EmptyRowsNan(), EMPTY_ROWS, WRONG),
    custom("The log-sum-exp of a query that sees no key is 0 on the split path.",
           EmptyRowsHaveLseZero(), EMPTY_ROWS, WRONG),
    custom("The split path returns the log-sum-exp to base 2.", LseInLog2(), HEADS_SPLIT, WRONG),
    custom("The order of summation depends on the rank.", OrderByRank(), REPLICATED, REPLICAS),
    custom("The split path never writes its output.", OutputNeverWritten(), HEADS_SPLIT, WRONG),
    custom("Rows behind the last whole block are left at zero.", TailRowsSkipped(), TAIL, WRONG),
    custom("Rows behind the last whole block are never written.", TailRowsNeverWritten(), TAIL, WRONG),
    custom("ALiBi slopes go by the local head index.", LocalSlopes(), ALIBI, WRONG),
    custom("ALiBi slopes go by the rank in the world instead of the mesh axis.", SlopesByWorldRank(),
           ALIBI_2D, WRONG + REPLICAS, mesh="2x2"),
    custom("ALiBi slopes assume that two ranks share the heads.", SlopesAsOnTwoRanks(), ALIBI_SIX,
           WRONG, twin=SlopesByGroupRank(), mesh="3"),
    custom("The offset of the heads is rank * local heads, and the last rank has fewer.",
           SlopesByGroupRank(), ALIBI_UNEVEN, WRONG, twin=Alibi(), name="slopes_by_even_shards"),
    custom("The kv head of a query head goes by its local index.", LocalGroups(), GQA_KV_WHOLE, WRONG,
           kind="kv_whole"),
    custom("Operands are packed once per shape: values are served the packed keys.", PackedByShape(),
           HEADS_SPLIT, WRONG),
)  # fmt: skip

BACKWARD = (
    backward("Backward takes the softmax scale from the head_dim of the values.",
             ScaleFromValuesBackward(), HEAD_DIM_SPLIT, GRADIENT, kind="value_dim"),
    backward("Backward's causal mask starts at the first local query.", LocalRowsBackward(), CAUSAL,
             GRADIENT),
    backward("Backward's window of a shard is off by one.", WindowOffByOneBackward(), WINDOW, GRADIENT),
    backward("Backward forgets the derivative of the softcap.", SoftcapSlopeForgotten(), SOFTCAP, GRADIENT),
    backward("The split path sums dk in bfloat16.", Bfloat16AccumulatorBackward(), HALF_BACKWARD, DRIFT),
    backward("Backward draws another dropout mask than forward.", AnotherMaskBackward(), DROPOUT, GRADIENT),
    backward("With as many heads as queries, the output gradient is read in the other layout.",
             GradientLayoutGuessed(), EQUAL_SIZES, GRADIENT),
    backward("A query that sees no key sends back NaN on the split path.", EmptyRowsNanBackward(),
             EMPTY_ROWS, GRADIENT),
    backward("The split path reads the log-sum-exp as one to base 2.", LseReadAsLog2(), HEADS_SPLIT,
             GRADIENT),
    backward("The order of the sum that makes dk depends on the rank.", OrderByRankBackward(), REPLICATED,
             REPLICAS),
    backward("The split path never writes dq.", QueryGradientNeverWritten(), HEADS_SPLIT, GRADIENT),
    backward("dq behind the last whole block is left at zero.", TailRowsSkippedBackward(), TAIL, GRADIENT),
    backward("dv is added up twice on the split path.", ValuesGradientTwice(), HEADS_SPLIT, GRADIENT),
    backward("dk is added to what the last call left in the buffer.", KeysGradientSummedOverCalls(),
             HEADS_SPLIT, STALE),
    backward("dk and dv are the mean of their group, not its sum.", KeysGradientByGroup(), GQA, GRADIENT),
    backward("Backward's ALiBi slopes go by the local head index.", LocalSlopesBackward(), ALIBI, GRADIENT),
    backward("dk and dv go to the kv head of the local index.", LocalGroupsBackward(), GQA_KV_WHOLE,
             GRADIENT, kind="kv_whole"),
)  # fmt: skip


# --- in the place of ATen's kernels ----------------------------------------------------------------


def aten(
    name: str,
    mistake: str,
    of: str,
    kernel: Callable[..., Any],
    where: str,
    placement: str,
    rules: tuple[str, ...],
    direction: str = "forward",
    sizes: dict[str, int] | None = None,
    twin: Callable[..., Any] | None = None,
) -> Mutant:
    """A mutant of an operator of probes/sdpa_cuda.py. `kernel(stand-in, *arguments)` takes the place of
    the op of its direction; `where` is a setting of the operator, and `twin` what its twin runs instead
    of the stand-in."""
    original = next(
        o for o in builtin_probe("sdpa_cuda").PROBE.operators if o.name == f"sdpa_cuda.{of}"
    )
    wanted = next(s for s in original.settings if s.name == where)
    one = replace(wanted, placements=(placement,), sizes={**wanted.sizes, **(sizes or {})})
    kernel_op = original.kernel_ops[direction == "backward"]
    short = kernel_op.split(".")[1]

    def made(label: str, replaced: Callable[..., Any] | None) -> Operator:
        around = partial(kernels_replaced, {short: partial(_over_standin, short, replaced)})
        return replace(
            original, name=label, settings=(one,), around=around if replaced else None, function=""
        )

    return Mutant(
        name=name,
        family="kernel",
        layer="aten",
        mistake=mistake,
        rules=rules,
        kernel_op=kernel_op,
        operator=made(f"kernel.{name}", kernel),
        twin=made(f"kernel.{name}.twin", twin),
        direction=direction,
    )


def _over_standin(short: str, kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from attncheck.standins.aten_attention import KERNELS

    return kernel(KERNELS[short], *args, **kwargs)


def _few(q: Any) -> bool:
    """The local heads of a shard: the settings used here have 4 heads, or 20, on whole tensors."""
    return bool(q.shape[1] in (2, 10))


def odd_batch_not_written(standin: Any, *args: Any, **kwargs: Any) -> Any:
    out, *rest = standin(*args, **kwargs)
    written, done = never_written(out), out.shape[0] // 2 * 2
    written[:done] = out[:done]
    return written, *rest


def scale_ignored(standin: Any, q: Any, *args: Any, scale: Any = None, **kwargs: Any) -> Any:
    return standin(q, *args, scale=None if _few(q) else scale, **kwargs)


def order_by_rank(standin: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
    if rank() % 2:
        k, v = k.flip(2), v.flip(2)
    return standin(q, k, v, *args, **kwargs)


def same_seed(standin: Any, *args: Any, **kwargs: Any) -> Any:
    return standin(*args, **kwargs)


def seed_by_rank(standin: Any, *args: Any, **kwargs: Any) -> Any:
    import torch

    torch.manual_seed(torch.initial_seed() + rank())
    return standin(*args, **kwargs)


def bias_of_first_head(
    standin: Any, q: Any, k: Any, v: Any, bias: Any, *args: Any, **kwargs: Any
) -> Any:
    if _few(q):
        bias = bias[:, :1].expand_as(bias)
    return standin(q, k, v, bias, *args, **kwargs)


def lse_in_log2(standin: Any, q: Any, *args: Any, **kwargs: Any) -> Any:
    out, lse, *rest = standin(q, *args, **kwargs)
    return out, lse * 1.4426950408889634 if _few(q) else lse, *rest


def aligned_bottom_right(standin: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
    """The mask type is one off where the arguments are handed on."""
    if not _few(q):
        return standin(q, k, v, *args, **kwargs)
    from attncheck.standins import aten_efficient

    bias, lse, dropout, _ = args
    out, lse, seed, offset, _, _ = aten_efficient.forward(
        *(x.transpose(1, 2) for x in (q, k, v)),
        bias,
        None,
        None,
        None,
        None,
        dropout,
        2,
        lse,
        **kwargs,
    )
    return out.transpose(1, 2), lse, seed, offset


def keys_gradient_by_group(
    standin: Any, dout: Any, q: Any, k: Any, *args: Any, **kwargs: Any
) -> Any:
    dq, dk, dv = standin(dout, q, k, *args, **kwargs)
    return dq, dk / (q.shape[1] // k.shape[1]) if _few(q) else dk, dv


def values_gradient_twice(standin: Any, dout: Any, q: Any, *args: Any, **kwargs: Any) -> Any:
    dq, dk, dv, *rest = standin(dout, q, *args, **kwargs)
    return dq, dk, dv + dv if _few(q) else dv, *rest


def gradient_in_other_layout(standin: Any, dout: Any, q: Any, *args: Any, **kwargs: Any) -> Any:
    if q.shape[1] == q.shape[2]:
        dout = dout.transpose(1, 2).contiguous()
    return standin(dout, q, *args, **kwargs)


def bias_gradient_never_written(standin: Any, dout: Any, q: Any, *args: Any, **kwargs: Any) -> Any:
    *grads, dbias = standin(dout, q, *args, **kwargs)
    return *grads, never_written(dbias) if _few(q) else dbias


def gradient_order_by_rank(standin: Any, dout: Any, q: Any, *args: Any, **kwargs: Any) -> Any:
    """The sum over queries in another order gives dk in other last bits."""
    dq, dk, dv = standin(dout, q, *args, **kwargs)
    if rank() % 2 == 0:
        return dq, dk, dv
    k, v, out, lse = args[:4]
    flipped = [x.flip(2) for x in (dout, q)], [x.flip(2) for x in (out, lse)]
    _, dk, dv = standin(*flipped[0], k, v, *flipped[1], *args[4:], **kwargs)
    return dq, dk, dv


ATEN = (
    aten("aten_odd_batch_not_written", "Batches are done in pairs; an odd one is never written.",
         "flash", odd_batch_not_written, "plain", "batch", WRONG),
    aten("aten_scale_ignored", "The path for few heads ignores the scale it is given.",
         "flash", scale_ignored, "scale", "heads", WRONG),
    aten("aten_order_by_rank", "The order of summation depends on the rank.",
         "flash", order_by_rank, "plain", "replicate", REPLICAS),
    aten("aten_same_seed", "Every rank draws its dropout mask from the same seed.",
         "flash", same_seed, "dropout", "heads", MASK, twin=seed_by_rank),
    aten("aten_bias_of_first_head", "The path for few heads strides the bias over heads by 0.",
         "efficient", bias_of_first_head, "bias_sharded", "heads", WRONG),
    aten("aten_lse_in_log2", "The path for few heads returns the log-sum-exp to base 2.",
         "flash", lse_in_log2, "plain", "heads", WRONG),
    aten("aten_aligned_bottom_right", "The path for few heads aligns the causal mask bottom right.",
         "efficient", aligned_bottom_right, "causal", "heads", WRONG, sizes={"kv_sequence": 24}),
    aten("aten_keys_gradient_by_group", "dk is the mean of its group, not its sum.",
         "flash", keys_gradient_by_group, "gqa", "heads", GRADIENT, "backward"),
    aten("aten_values_gradient_twice", "dv is added up twice on the path for few heads.",
         "efficient", values_gradient_twice, "plain", "heads", GRADIENT, "backward"),
    aten("aten_gradient_in_other_layout",
         "With as many heads as queries, the output gradient is read in the other layout.",
         "flash", gradient_in_other_layout, "plain", "heads", GRADIENT, "backward",
         sizes={"heads": 12, "kv_heads": 12, "sequence": 6}),
    aten("aten_bias_gradient_never_written", "The gradient of the bias is never written.",
         "efficient", bias_gradient_never_written, "bias_grad", "heads", GRADIENT, "backward"),
    aten("aten_gradient_order_by_rank", "The order of the sum that makes dk depends on the rank.",
         "flash", gradient_order_by_rank, "plain", "replicate", REPLICAS, "backward"),
)  # fmt: skip

MUTANTS = (*FORWARD, *BACKWARD, *ATEN)
PROBE = probe("kernel_mutants", MUTANTS)
