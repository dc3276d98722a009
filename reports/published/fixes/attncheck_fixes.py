"""Sharding strategies for DTensor, written by attncheck 0.1.0 on 2026-11-25.

    import attncheck_fixes
    attncheck_fixes.register()      # before or after the ops' first use; twice is harmless
    attncheck_fixes.unregister()    # puts back what was there

The signatures below say what the dims of each op's tensors are, and the strategies follow: see `layouts`.
A strategy that torch has of its own is left alone, unless a signature says in which versions it is wrong.
The functions under FUNCTIONS are no dispatcher ops, or mix plain tensors with DTensors. `register` puts a
wrapper in the place of each that calls it on local shards: import them by name after it, or call them by
their module.

Verified on 2026-11-25 by `attncheck fix --with flash-attn --with xformers --seed 20261125 --write
attncheck_fixes.py --output json:fix.json --output markdown:fix.md`:
torch 2.13.0+cpu, flash-attn 2.8.3.post2, xformers 0.0.35, numpy 2.4.6; Python 3.11.7; device cpu;
meshes
dp=2 x tp=2, tp=2, tp=3; bfloat16, float16, float32; seed 20261125.
Stand-in kernels: aten CUDA attention ops: CPU reference kernels by attncheck; PyTorch's own
sharding rules, Meta kernels and autograd formulas run unchanged
Stand-in kernels: flash_attn_2_cuda: CPU reference kernels by attncheck; flash_attn's own Python and
op registration run unchanged
Stand-in kernels: flash_attn_3: nothing of the package is here, only the schemas of its ops; kernels
and the functions that call them are attncheck's
Stand-in kernels: torch.nn.attention.varlen: CPU reference kernels by attncheck for aten's flash
attention ops; PyTorch's own op bodies, fake kernels and autograd formula run unchanged
Stand-in kernels: xformers: CPU reference kernels by attncheck behind its cutlass, flash and flash3
ops; its own dispatch, checks and autograd run unchanged, but take the CPU for an H100

aten._scaled_dot_product_flash_attention_for_cpu.default
  304 of 382 cases right, with errors up to 0.36 of their bound; before: 4 diverged, 159
    missing_strategy, 64 mixed_tensor, 4 error, 8 redistributed, 15 supported, 128 not run; after:
    64 mixed_tensor, 14 error, 86 redistributed, 218 supported
  refused in 10: within context_parallel, which takes what comes out for shards of the sequence: no
    strategy leaves the queries where they lie
  4 more cases fail for what this strategy cannot mend, the first:
    merged_heads/merged_heads.sdpa/causal/dtensor/tp=2/sequence/forward: error: view size is not
    compatible with input tensor's size and stride (at least one dimension spans across two
    contiguous subspaces). Use .reshape(...) instead.
  64 cases fail as they did before

aten._scaled_dot_product_flash_attention_for_cpu_backward.default
  151 of 183 cases right, with errors up to 0.36 of their bound; before: 2 diverged, 83
    missing_strategy, 32 mixed_tensor, 2 error, 64 not run; after: 32 mixed_tensor, 42
    redistributed, 109 supported
  32 cases fail as they did before

aten._scaled_dot_product_fused_attention_overrideable.default
  80 of 82 cases right, with errors up to 0.33 of their bound; before: 82 missing_strategy; after: 2
    error, 16 redistributed, 64 supported
  refused in 2: with dropout_p=0.25 has no right strategy: shards that draw from equal seeds share a
    dropout mask, and replicas that do not differ

aten._scaled_dot_product_fused_attention_overrideable_backward.default
  40 of 40 cases right, with errors up to 0.33 of their bound; before: 40 missing_strategy; after: 8
    redistributed, 32 supported

aten._scaled_dot_product_flash_attention.default
  166 of 172 cases right, with errors up to 0.48 of their bound; before: 10 diverged, 8 wrong, 2
    error, 26 redistributed, 126 supported; after: 4 wrong, 2 error, 30 redistributed, 136 supported
  6 cases fail as they did before

aten._scaled_dot_product_flash_attention_backward.default
  83 of 85 cases right, with errors up to 0.48 of their bound; before: 5 diverged, 4 wrong, 13
    redistributed, 63 supported; after: 2 wrong, 15 redistributed, 68 supported
  2 cases fail as they did before

aten._scaled_dot_product_cudnn_attention.default
  138 of 142 cases right, with errors up to 0.34 of their bound; before: 6 diverged, 4 wrong, 2
    mixed_tensor, 22 error, 16 redistributed, 92 supported; after: 2 wrong, 2 mixed_tensor, 28
    redistributed, 110 supported
  4 cases fail as they did before

aten._scaled_dot_product_cudnn_attention_backward.default
  69 of 71 cases right, with errors up to 0.34 of their bound; before: 3 diverged, 2 wrong, 1
    mixed_tensor, 11 error, 8 redistributed, 46 supported; after: 1 wrong, 1 mixed_tensor, 14
    redistributed, 55 supported
  2 cases fail as they did before

aten._flash_attention_forward.default
  76 of 76 cases right, with errors up to 0.33 of their bound; before: 76 missing_strategy; after:
    10 redistributed, 66 supported

aten._flash_attention_backward.default
  38 of 38 cases right, with errors up to 0.33 of their bound; before: 38 missing_strategy; after: 5
    redistributed, 33 supported

aten._efficient_attention_forward.default
  91 of 113 cases right, with errors up to 0.33 of their bound; before: 109 missing_strategy, 4
    mixed_tensor; after: 22 mixed_tensor, 20 redistributed, 71 supported
  18 more cases fail for what this strategy cannot mend, the first:
    xformers/xformers.cuda_dispatch/plain/dtensor/tp=2/heads/backward: mixed_tensor:
    aten._efficient_attention_backward.default got mixed torch.Tensor and DTensor, need to convert
    all torch.Tensor to DTensor before calling distributed operators!
  4 cases fail as they did before

aten._efficient_attention_backward.default
  29 of 49 cases right, with errors up to 0.31 of their bound; before: 47 missing_strategy, 2
    mixed_tensor; after: 20 mixed_tensor, 5 redistributed, 24 supported
  18 more cases fail for what this strategy cannot mend, the first:
    xformers/xformers.cuda_dispatch/plain/dtensor/tp=2/heads/backward: mixed_tensor:
    aten._efficient_attention_backward.default got mixed torch.Tensor and DTensor, need to convert
    all torch.Tensor to DTensor before calling distributed operators!
  2 cases fail as they did before

aten._cudnn_attention_forward.default
  84 of 84 cases right, with errors up to 0.31 of their bound; before: 84 missing_strategy; after:
    16 redistributed, 68 supported

aten._cudnn_attention_backward.default
  42 of 42 cases right, with errors up to 0.31 of their bound; before: 42 missing_strategy; after: 8
    redistributed, 34 supported

torch_attn._varlen_attn.default
  68 of 72 cases right, with errors up to 0.29 of their bound; before: 68 missing_strategy, 4
    mixed_tensor; after: 4 mixed_tensor, 16 redistributed, 52 supported
  4 cases fail as they did before

torch_attn._varlen_attn_backward.default
  34 of 36 cases right, with errors up to 0.29 of their bound; before: 34 missing_strategy, 2
    mixed_tensor; after: 2 mixed_tensor, 8 redistributed, 26 supported
  2 cases fail as they did before

torch_attn._varlen_attn_out.default
  5 of 6 cases right, with errors up to 0.24 of their bound; before: 6 missing_strategy; after: 1
    error, 5 supported
  refused in 1: cannot move what it writes into or gets by keyword; so placed: out S(1)

flash_attn._flash_attn_forward.default
  234 of 328 cases right, with errors up to 0.35 of their bound; before: 328 missing_strategy;
    after: 67 mixed_tensor, 27 error, 29 redistributed, 205 supported
  refused in 4: with dropout_p=0.25 has no right strategy: shards that draw from equal seeds share a
    dropout mask, and replicas that do not differ
  90 more cases fail for what this strategy cannot mend, the first:
    flash_attn/flash_attn_func/plain/dtensor/tp=2/head_dim/backward: error: attncheck fix:
    flash_attn._flash_attn_backward.default cannot move what it writes into or gets by keyword, and
    no strategy has dq S(3), dk S(3), dv S(3): bring its arguments to one of these placements

flash_attn._flash_attn_backward.default
  72 of 162 cases right, with errors up to 0.35 of their bound; before: 162 missing_strategy; after:
    67 mixed_tensor, 23 error, 72 supported
  refused in 23: cannot move what it writes into or gets by keyword; so placed: dq P(sum), dk R, dv
    R; dq S(0), dk S(0), dv S(0); dq S(1), dk R, dv R; dq S(1), dk S(1), dv S(1); dq S(2), dk S(2),
    dv S(2); dq S(3), dk S(3), dv S(3)
  67 more cases fail for what this strategy cannot mend, the first:
    flash_attn/flash_attn_qkvpacked_func/plain/dtensor/tp=2/replicate/backward: mixed_tensor:
    flash_attn._flash_attn_backward.default got mixed torch.Tensor and DTensor, need to convert all
    torch.Tensor to DTensor before calling distributed operators!

flash_attn._flash_attn_varlen_forward.default
  88 of 130 cases right, with errors up to 0.29 of their bound; before: 126 missing_strategy, 4
    mixed_tensor; after: 34 mixed_tensor, 8 error, 16 redistributed, 72 supported
  38 more cases fail for what this strategy cannot mend, the first:
    flash_attn/flash_attn_varlen_func/plain/dtensor/tp=2/sequence/backward: error: attncheck fix:
    flash_attn._flash_attn_varlen_backward.default cannot move what it writes into or gets by
    keyword, and no strategy has dq S(0), dk S(0), dv S(0): bring its arguments to one of these pla
  4 cases fail as they did before

flash_attn._flash_attn_varlen_backward.default
  24 of 64 cases right, with errors up to 0.29 of their bound; before: 62 missing_strategy, 2
    mixed_tensor; after: 32 mixed_tensor, 8 error, 24 supported
  refused in 8: cannot move what it writes into or gets by keyword; so placed: dq S(0), dk R, dv R;
    dq S(0), dk S(0), dv S(0); dq S(1), dk S(1), dv S(1)
  30 more cases fail for what this strategy cannot mend, the first:
    flash_attn/flash_attn_varlen_qkvpacked_func/plain/dtensor/tp=2/replicate/backward: mixed_tensor:
    flash_attn._flash_attn_varlen_backward.default got mixed torch.Tensor and DTensor, need to
    convert all torch.Tensor to DTensor before calling distributed operators!
  2 cases fail as they did before

flash_attn_3.fwd.default
  51 of 104 cases right, with errors up to 0.29 of their bound; before: 102 missing_strategy, 2
    mixed_tensor; after: 51 missing_strategy, 2 mixed_tensor, 9 redistributed, 42 supported
  51 more cases fail for what this strategy cannot mend, the first:
    flash_attn_3/flash_attn_3.raw/plain/dtensor/tp=2/replicate/backward: missing_strategy: Sharding
    propagation failed for flash_attn_3.bwd.default: it has no Meta kernel, and DTensor runs an op
    on meta tensors before it asks for a sharding strategy
  2 cases fail as they did before

flash_attn_3._flash_attn_forward.default
  111 of 126 cases right, with errors up to 0.35 of their bound; before: 124 missing_strategy, 2
    mixed_tensor; after: 2 mixed_tensor, 13 error, 10 redistributed, 101 supported
  13 more cases fail for what this strategy cannot mend, the first:
    flash_attn_3/flash_attn_3.custom_op/gqa_uneven_kv/dtensor/tp=2/heads/backward: error: attncheck
    fix: flash_attn_3._flash_attn_backward.default cannot move what it writes into or gets by
    keyword, and no strategy has dq S(2), dk S(2), dv S(2): bring its arguments to one of these
    placemen
  2 cases fail as they did before

flash_attn_3._flash_attn_backward.default
  49 of 63 cases right, with errors up to 0.35 of their bound; before: 62 missing_strategy, 1
    mixed_tensor; after: 1 mixed_tensor, 13 error, 49 supported
  refused in 13: cannot move what it writes into or gets by keyword; so placed: dq S(0), dk S(0), dv
    S(0); dq S(1), dk R, dv R; dq S(1), dk S(1), dv S(1); dq S(2), dk S(2), dv S(2)
  1 case fail as they did before

xformers_flash.flash_fwd.default
  22 of 24 cases right, with errors up to 0.09 of their bound; before: 22 missing_strategy, 2
    mixed_tensor; after: 2 mixed_tensor, 4 redistributed, 18 supported
  2 cases fail as they did before

xformers_flash.flash_bwd.default
  16 of 17 cases right, with errors up to 0.10 of their bound; before: 16 missing_strategy, 1
    mixed_tensor; after: 1 mixed_tensor, 3 redistributed, 13 supported
  1 case fail as they did before

xformers_flash3.flash_fwd.default
  12 of 12 cases right, with errors up to 0.15 of their bound; before: 12 missing_strategy; after: 2
    redistributed, 10 supported

xformers_flash3.flash_bwd.default
  6 of 6 cases right, with errors up to 0.15 of their bound; before: 6 missing_strategy; after: 1
    redistributed, 5 supported

flash_attn.flash_attn_kvpacked_func
  82 of 82 cases right, with errors up to 0.33 of their bound; before: 82 missing_strategy; after:
    14 redistributed, 68 supported

flash_attn.flash_attn_qkvpacked_func
  52 of 52 cases right, with errors up to 0.31 of their bound; before: 52 missing_strategy; after: 8
    redistributed, 44 supported

flash_attn.flash_attn_varlen_kvpacked_func
  28 of 28 cases right, with errors up to 0.27 of their bound; before: 28 missing_strategy; after: 8
    redistributed, 20 supported

flash_attn.flash_attn_varlen_qkvpacked_func
  32 of 32 cases right, with errors up to 0.24 of their bound; before: 32 missing_strategy; after: 8
    redistributed, 24 supported

flash_attn.flash_attn_with_kvcache
  37 of 39 cases right, with errors up to 0.31 of their bound; before: 39 error; after: 2 error, 2
    redistributed, 35 supported
  refused in 2: writes into its arguments, and none of its layouts has k_cache S(2), v_cache S(2):
    bring them to one of these placements before the call: batch (k_cache S(0), v_cache S(0));
    replicate (k_cache R, v_cache R)

flash_attn_interface.flash_attn_func
  90 of 90 cases right, with errors up to 0.34 of their bound; before: 90 missing_strategy; after:
    16 redistributed, 74 supported

flash_attn_interface.flash_attn_varlen_func
  14 of 14 cases right, with errors up to 0.31 of their bound; before: 12 missing_strategy, 2
    mixed_tensor; after: 2 redistributed, 12 supported

xformers.ops.memory_efficient_attention
  91 of 93 cases right, with errors up to 0.38 of their bound; before: 85 missing_strategy, 6
    mixed_tensor, 2 error; after: 2 error, 17 redistributed, 74 supported
  refused in 2: attn_bias is an ordinary tensor beside DTensors, and would have to be S(1): pass it
    as a DTensor, DTensor.from_local(attn_bias, mesh, [Replicate()] * mesh.ndim)

attncheck-fix: c3c1bfa941d890ad78a5ea2e13b5c21e
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import _op_schema as schemas, DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._collective_utils import redistribute_cost
from torch.distributed.tensor._dtensor_spec import DTensorSpec


# --- notation ------------------------------------------------------------------------------------
# Kernel ops by named dims, and the ways to lay a call out over a mesh that follow from the names.
#
# Attention never mixes two batch rows, nor two groups of heads, nor (without a mask by position) two queries.
# So a call on a part of one of them gives that part of every result, and the names of the dims say where the
# part lies in each tensor. Four ways to shard one mesh axis follow, and a mesh of several axes takes one each:
#
# - batch: every tensor on its dim `b`;
# - heads: query heads `h` and key and value heads `g` together, where no group of query heads is torn from
#   its kv head: equally many of both, or both divisible by the ranks. One kv head for all stays whole, and
#   its gradient is a sum over the ranks;
# - queries: `sq` alone, keys and values whole, their gradients sums, where a signature says when;
# - replicate: everything whole.
#
# What leaves a rank without rows is not offered: kernels have died of empty shards.

GIVEN = "given"  # of an argument: anything but None
BATCH, HEADS, KV_HEADS, QUERIES = "b", "h", "g", "sq"
WAYS: Mapping[str, tuple[str, ...]] = {
    "batch": (BATCH,),
    "heads": (HEADS, KV_HEADS),
    "query heads": (HEADS,),  # where all of them share one kv head
    "queries": (QUERIES,),
    "replicate": (),
}


NO_STRATEGY_HAS = ", and no strategy has "


class Refused(RuntimeError):
    """No strategy is right for this call. The text is one sentence."""

    def __init__(self, text: str) -> None:
        super().__init__(f"attncheck fix: {text}")


@dataclass(frozen=True)
class Signature:
    """A kernel op by named dims: what there is to know in order to shard it.

    `op`: as PyTorch writes it, `flash_attn._flash_attn_forward.default`; of a function, its import path.
    `takes` has its tensor arguments by name, `gives` its results in order, each described in one line:

        "b sq h d"                     its dims; other names than b, h, g and sq are never sharded
        "h | b h"                      whichever has as many dims
        "replicated"                   whole on every rank (a random state, lengths)
        "b sq h d, in place"           the op writes into it, so it is never moved
        "b sk g d, summed over sq h"   where these are sharded and it has none of it, ranks hold addends
        "like bias, summed over b h"   placed as that argument; where it broadcasts, ranks hold addends
        "none"                         no tensor
        "..., if grad_input_mask[3]"   None unless that argument (or item) is true or given
        "..., float32"                 its dtype, where the op has no Meta kernel to say it

    `when`: the values of arguments under which this is the op's form (packed tensors have fewer dims).
    `needs`: without these no strategy is right. `queries`: under these each query stands alone (no mask by
    position); None where it never does. A value is a literal, several in a tuple, None or `GIVEN`.
    `because` says why, for those who are refused. `overrides`: from which torch up to which other one its
    own strategy is wrong, and is replaced; else an op that torch has a strategy for is left alone.
    `unless`: of a function, the op that makes its wrapper needless where it is registered.
    `imports`: the module that registers the op. `fake`: the op has no Meta kernel, without which DTensor
    asks no strategy, and gets one made of `gives`.
    """

    op: str
    takes: Mapping[str, str]
    gives: Mapping[str, str]
    when: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, Any] = field(default_factory=dict)
    queries: Mapping[str, Any] | None = None
    because: str = ""
    overrides: tuple[str, str] | None = None
    imports: str = ""
    fake: bool = False
    unless: str = ""


@dataclass(frozen=True)
class Dims:
    """One description, read."""

    forms: tuple[tuple[str, ...], ...] = ()
    replicated: bool = False
    in_place: bool = False
    none: bool = False
    like: str = ""
    summed: tuple[str, ...] = ()
    only_if: str = ""
    dtype: str = ""

    def of(self, ndim: int) -> tuple[str, ...] | None:
        """The names of its dims where it has so many; None where no form has."""
        return next((form for form in self.forms if len(form) == ndim), None)


@functools.cache
def read(text: str) -> Dims:
    """Raises ValueError for a description that is none."""
    first, *rest = (part.strip() for part in text.split(","))
    found: dict[str, Any] = {}
    if first == "none":
        found["none"] = True
    elif match := re.fullmatch(r"like (\w+)", first):
        found["like"] = match[1]
    else:
        found["replicated"] = first.startswith("replicated")
        names = first.removeprefix("replicated").strip()
        if names or not found["replicated"]:
            found["forms"] = tuple(tuple(form.split()) for form in names.split("|"))
    for part in rest:
        if part == "in place":
            found["in_place"] = True
        elif match := re.fullmatch(r"summed over ([\w ]+)", part):
            found["summed"] = tuple(match[1].split())
        elif match := re.fullmatch(r"if (\w+(?:\[\d+\])?)", part):
            found["only_if"] = match[1]
        elif re.fullmatch(r"(float|int|uint|bfloat)\d+", part):
            found["dtype"] = part
        else:
            raise ValueError(f"{text!r}: nobody knows what {part!r} says of a tensor")
    return Dims(**found)


@dataclass(frozen=True)
class Layout:
    """One way to lay a call out: a way for each mesh axis, and the placements of every tensor under it."""

    ways: tuple[str, ...]
    takes: Mapping[str, tuple[Placement, ...]]
    gives: tuple[tuple[Placement, ...] | None, ...]


def form_of(signatures: Sequence[Signature], values: Mapping[str, Any]) -> Signature:
    """The signature whose `when` holds for these arguments. Raises Refused where none does."""
    for signature in signatures:
        if not failing(signature.when, values):
            return signature
    raise Refused(f"{signatures[0].op}: nobody described this form of the call")


def failing(conditions: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """The first condition that these arguments do not meet, as `causal=True`, or ''."""
    for name, wanted in conditions.items():
        value = values.get(name)
        accepted = wanted if isinstance(wanted, tuple) else (wanted,)
        if not any(_is(value, one) for one in accepted):
            return f"{name}={value if isinstance(value, (bool, int, float, str)) else '...'}"
    return ""


def _is(value: Any, wanted: Any) -> bool:
    if wanted is None or wanted == GIVEN:
        return (value is None) == (wanted is None)
    return isinstance(value, (bool, int, float, str)) and bool(value == wanted)


def layouts(
    signature: Signature,
    values: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    mesh: Sequence[int],
) -> list[Layout]:
    """Every way to lay a call out over a mesh with axes of these sizes; to replicate it is the last.

    `values`: all arguments by name; `shapes`: the global shapes of those that are tensors. Raises Refused
    where the call is not what the signature describes, or what it `needs` does not hold.
    """
    if unmet := failing(signature.needs, values):
        raise Refused(f"{signature.op} with {unmet} has no right strategy: {signature.because}")
    dims = {name: read(text) for name, text in signature.takes.items()}
    sizes = _sizes(signature, dims, shapes)
    apart = signature.queries is not None and not failing(signature.queries, values)
    ways = [
        way
        for way, names in WAYS.items()
        if (not names or names[0] in sizes) and (way != "queries" or apart)
    ]
    out = []
    for combination in itertools.product(ways, repeat=len(mesh)):
        if _fits(combination, sizes, mesh):
            made = _layout(signature, dims, values, shapes, sizes, combination)
            if made is not None:
                out.append(made)
    return out


def _sizes(
    signature: Signature, dims: Mapping[str, Dims], shapes: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    """The size of each named dim. One of size 1 broadcasts where another tensor has more of it."""
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in dims:
            raise Refused(f"{signature.op}: nothing says what the dims of its tensor {name} are")
        if dims[name].replicated:
            continue
        form = dims[name].of(len(shape))
        if form is None:
            raise Refused(
                f"{signature.op}: {name} is described as {signature.takes[name]!r}, and has "
                f"{len(shape)} dims"
            )
        for letter, size in zip(form, shape, strict=True):
            known = sizes.get(letter, 1)
            if (
                letter in (BATCH, HEADS, KV_HEADS, QUERIES)
                and 1 not in (known, size)
                and known != size
            ):
                raise Refused(
                    f"{signature.op}: the dim {letter!r} of {name} has size {size}, and {known} elsewhere"
                )
            sizes[letter] = max(known, size)
    return sizes


def _fits(ways: Sequence[str], sizes: Mapping[str, int], mesh: Sequence[int]) -> bool:
    """Whether every rank gets something, and no group of heads is torn."""
    parts: dict[str, list[int]] = {}
    for way, ranks in zip(ways, mesh, strict=True):
        parts.setdefault(way, []).append(ranks)
    for way, axes in parts.items():
        size = sizes.get(WAYS[way][0], 1) if way != "replicate" else None
        if size is not None and _fewest(size, axes) < 1:
            return False
    heads, kv_heads = sizes.get(HEADS, 1), sizes.get(KV_HEADS)
    if "query heads" in parts and (kv_heads != 1 or heads == 1):
        return False
    if "heads" in parts and kv_heads not in (None, heads):
        ranks = math.prod(parts["heads"])
        return heads % ranks == 0 and kv_heads is not None and kv_heads % ranks == 0
    return True


def _fewest(size: int, axes: Sequence[int]) -> int:
    """How many rows the last rank gets, split like torch.chunk by one axis after the other."""
    for ranks in axes:
        size -= -(-size // ranks) * (ranks - 1)
    return size


def _layout(
    signature: Signature,
    dims: Mapping[str, Dims],
    values: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    sizes: Mapping[str, int],
    ways: tuple[str, ...],
) -> Layout | None:
    """None where a result could not be said to be sharded, replicated or a sum."""
    takes: dict[str, tuple[Placement, ...]] = {}
    for name, shape in shapes.items():
        placed = [_place(dims[name], WAYS[way], shape, sizes) for way in ways]
        if dims[name].in_place:  # as much a result as an argument
            made = _results(dims[name], ways, placed)
            if made is None:
                return None
            placed = list(made)
        takes[name] = tuple(placed)
    gives: list[tuple[Placement, ...] | None] = []
    for text in signature.gives.values():
        result = read(text)
        like = shapes.get(result.like)
        if result.none or not present(result, values) or (result.like and like is None):
            gives.append(None)
            continue
        source = dims[result.like] if result.like else result
        if source.replicated:
            gives.append(tuple(Replicate() for _ in ways))
            continue
        made = _results(result, ways, [_place(source, WAYS[way], like, sizes) for way in ways])
        if made is None:
            return None
        gives.append(made)
    return Layout(ways, takes, tuple(gives))


def present(result: Dims, values: Mapping[str, Any]) -> bool:
    """Whether a call with these arguments makes this result."""
    if not result.only_if:
        return True
    name, _, item = result.only_if.rstrip("]").partition("[")
    value = values.get(name)
    if item and value is not None:
        value = value[int(item)]
    return value is not None and value is not False


def _place(
    dims: Dims, sharded: Sequence[str], shape: Sequence[int] | None, sizes: Mapping[str, int]
) -> Placement:
    """The placement of a tensor of which these dims are sharded; whole where it has none of them."""
    if dims.replicated:
        return Replicate()
    form = dims.forms[0] if shape is None else dims.of(len(shape))
    assert form is not None
    for at, letter in enumerate(form):
        broadcast = shape is not None and shape[at] == 1 and sizes.get(letter, 1) > 1
        if letter in sharded and not broadcast:
            return Shard(at)
    return Replicate()


def _results(
    dims: Dims, ways: Sequence[str], placed: Sequence[Placement]
) -> tuple[Placement, ...] | None:
    """The placements of a result; None where it is whole, and nothing says that it may be."""
    out = []
    for way, placement in zip(ways, placed, strict=True):
        if not WAYS[way] or dims.replicated or placement.is_shard():
            out.append(placement)
        elif any(letter in dims.summed for letter in WAYS[way]):
            out.append(Partial("sum"))
        else:
            return None
    return tuple(out)


def describe(ways: Sequence[str], placements: Mapping[str, Sequence[Placement]]) -> str:
    """`heads (q S(2), k S(2), v S(2))`, for messages."""
    return f"{', '.join(ways)} ({', '.join(f'{n} {_text(p)}' for n, p in placements.items())})"


def _text(placements: Sequence[Placement]) -> str:
    return "".join(map(str, placements))


def results_shapes(
    signature: Signature, values: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> Iterator[tuple[tuple[int, ...], str] | None]:
    """Shape and dtype ('' for that of the first tensor) of each result of a call, None for those it lacks.

    Raises Refused where a result has a dim that no argument has.
    """
    dims = {name: read(text) for name, text in signature.takes.items()}
    sizes = _sizes(signature, dims, shapes)
    for name, text in signature.gives.items():
        result = read(text)
        if result.none or not present(result, values):
            yield None
        elif result.like:
            yield tuple(shapes[result.like]), result.dtype
        else:
            letters = result.forms[0] if result.forms else ()
            unknown = [one for one in letters if one not in sizes and not one.isdigit()]
            if unknown:
                raise Refused(
                    f"{signature.op}: no argument says how large {unknown[0]!r} of {name} is"
                )
            yield (
                tuple(int(one) if one.isdigit() else sizes[one] for one in letters),
                result.dtype,
            )


SIGNATURES: tuple[Signature, ...] = (
    Signature(
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        takes={
            "query": "b h sq d",
            "key": "b g sk d",
            "value": "b g sk d",
            "attn_mask": "b h sq sk | sq sk",
        },
        gives={"output": "b h sq d", "logsumexp": "b h sq"},
        needs={"dropout_p": 0.0},
        queries={"is_causal": False},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
    ),
    Signature(
        "aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
        takes={
            "grad_out": "b h sq d",
            "query": "b h sq d",
            "key": "b g sk d",
            "value": "b g sk d",
            "out": "b h sq d",
            "logsumexp": "b h sq",
            "attn_mask": "b h sq sk | sq sk",
        },
        gives={
            "grad_query": "b h sq d",
            "grad_key": "b g sk d, summed over h sq",
            "grad_value": "b g sk d, summed over h sq",
        },
        needs={"dropout_p": 0.0},
        queries={"is_causal": False},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
    ),
    Signature(
        "aten._scaled_dot_product_fused_attention_overrideable.default",
        takes={
            "query": "b h sq d",
            "key": "b g sk d",
            "value": "b g sk d",
            "attn_bias": "b h sq sk | sq sk",
        },
        gives={
            "output": "b h sq d",
            "logsumexp": "b h sq",
            "cum_seq_q": "none",
            "cum_seq_k": "none",
            "max_q": "none",
            "max_k": "none",
            "philox_seed": "replicated",
            "philox_offset": "replicated",
            "debug_attn_mask": "none",
        },
        needs={"dropout_p": 0.0},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
    ),
    Signature(
        "aten._scaled_dot_product_fused_attention_overrideable_backward.default",
        takes={
            "grad_out": "b h sq d",
            "query": "b h sq d",
            "key": "b g sk d",
            "value": "b g sk d",
            "attn_bias": "b h sq sk | sq sk",
            "out": "b h sq d",
            "logsumexp": "b h sq",
            "philox_seed": "replicated",
            "philox_offset": "replicated",
        },
        gives={
            "grad_query": "b h sq d",
            "grad_key": "b g sk d, summed over h",
            "grad_value": "b g sk d, summed over h",
            "grad_attn_bias": "like attn_bias, summed over b h, if grad_input_mask[3]",
        },
        needs={"dropout_p": 0.0},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
    ),
    Signature(
        "aten._scaled_dot_product_flash_attention.default",
        takes={"query": "b h sq d", "key": "b g sk d", "value": "b g sk d"},
        gives={
            "output": "b h sq d",
            "logsumexp": "b h sq",
            "cum_seq_q": "none",
            "cum_seq_k": "none",
            "max_q": "none",
            "max_k": "none",
            "rng_state": "replicated",
            "unused": "none",
            "debug_attn_mask": "replicated",
        },
        when={"return_debug_mask": False},
        queries={"is_causal": False, "dropout_p": 0.0},
        overrides=("2.9", "2.15"),
    ),
    Signature(
        "aten._scaled_dot_product_flash_attention.default",
        takes={"query": "b h sq d", "key": "b g sk d", "value": "b g sk d"},
        gives={
            "output": "b h sq d",
            "logsumexp": "b h sq",
            "cum_seq_q": "none",
            "cum_seq_k": "none",
            "max_q": "none",
            "max_k": "none",
            "rng_state": "replicated",
            "unused": "none",
            "debug_attn_mask": "b h padded padded_k",
        },
        when={"return_debug_mask": True},
        overrides=("2.9", "2.15"),
    ),
    Signature(
        "aten._scaled_dot_product_flash_attention_backward.default",
        takes={
            "grad_out": "b h sq d",
            "query": "b h sq d",
            "key": "b g sk d",
            "value": "b g sk d",
            "out": "b h sq d",
            "logsumexp": "b h sq",
            "cum_seq_q": "replicated",
            "cum_seq_k": "replicated",
            "philox_seed": "replicated",
            "philox_offset": "replicated",
        },
        gives={
            "grad_query": "b h sq d",
            "grad_key": "b g sk d, summed over h sq",
            "grad_value": "b g sk d, summed over h sq",
        },
        queries={"is_causal": False, "dropout_p": 0.0},
        overrides=("2.9", "2.15"),
    ),
    Signature(
        "aten._scaled_dot_product_cudnn_attention.default",
        takes={
            "query": "b h sq d",
            "key": "b g sk d",
            "value": "b g sk dv",
            "attn_bias": "b h sq sk",
        },
        gives={
            "output": "b h sq dv",
            "logsumexp": "b h sq 1, if compute_log_sumexp",
            "cum_seq_q": "none",
            "cum_seq_k": "none",
            "max_q": "none",
            "max_k": "none",
            "philox_seed": "none",
            "philox_offset": "none",
            "debug_attn_mask": "none",
        },
        overrides=("2.9", "2.15"),
    ),
    Signature(
        "aten._scaled_dot_product_cudnn_attention_backward.default",
        takes={
            "grad_out": "b h sq dv",
            "query": "b h sq d",
            "key": "b g sk d",
            "value": "b g sk dv",
            "out": "b h sq dv",
            "logsumexp": "b h sq 1 | b h sq",
            "philox_seed": "replicated",
            "philox_offset": "replicated",
            "attn_bias": "b h sq sk",
            "cum_seq_q": "replicated",
            "cum_seq_k": "replicated",
        },
        gives={
            "grad_query": "b h sq d",
            "grad_key": "b g sk d, summed over h",
            "grad_value": "b g sk dv, summed over h",
        },
        overrides=("2.9", "2.15"),
    ),
    Signature(
        "aten._flash_attention_forward.default",
        takes={
            "query": "b sq h d",
            "key": "b sk g d",
            "value": "b sk g d",
            "alibi_slopes": "h | b h",
        },
        gives={
            "output": "b sq h d",
            "softmax_logsumexp": "b h sq",
            "rng_state": "replicated",
            "unused": "replicated",
            "debug_attn_mask": "replicated",
        },
        when={"cum_seq_q": None, "cum_seq_k": None},
        needs={"dropout_p": 0.0},
        queries={
            "is_causal": False,
            "window_size_left": (None, -1),
            "window_size_right": (None, -1),
            "alibi_slopes": None,
        },
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
    ),
    Signature(
        "aten._flash_attention_forward.default",
        takes={
            "query": "t h d",
            "key": "tk g d | pages rows g d",
            "value": "tk g d | pages rows g d",
            "cum_seq_q": "replicated",
            "cum_seq_k": "replicated",
            "seqused_k": "replicated",
            "alibi_slopes": "h | sequences h",
            "block_table": "replicated",
        },
        gives={
            "output": "t h d",
            "softmax_logsumexp": "h t",
            "rng_state": "replicated",
            "unused": "replicated",
            "debug_attn_mask": "replicated",
        },
        when={"cum_seq_q": "given", "cum_seq_k": "given"},
        needs={"dropout_p": 0.0},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
    ),
    Signature(
        "aten._flash_attention_backward.default",
        takes={
            "grad_out": "b sq h d",
            "query": "b sq h d",
            "key": "b sk g d",
            "value": "b sk g d",
            "out": "b sq h d",
            "logsumexp": "b h sq",
            "rng_state": "replicated",
            "unused": "replicated",
        },
        gives={
            "grad_query": "b sq h d",
            "grad_key": "b sk g d, summed over h sq",
            "grad_value": "b sk g d, summed over h sq",
        },
        when={"cum_seq_q": None, "cum_seq_k": None},
        needs={"dropout_p": 0.0},
        queries={
            "is_causal": False,
            "window_size_left": (None, -1),
            "window_size_right": (None, -1),
        },
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
    ),
    Signature(
        "aten._flash_attention_backward.default",
        takes={
            "grad_out": "t h d",
            "query": "t h d",
            "key": "tk g d | pages rows g d",
            "value": "tk g d | pages rows g d",
            "out": "t h d",
            "logsumexp": "h t",
            "cum_seq_q": "replicated",
            "cum_seq_k": "replicated",
            "rng_state": "replicated",
            "unused": "replicated",
        },
        gives={
            "grad_query": "t h d",
            "grad_key": "tk g d, summed over h",
            "grad_value": "tk g d, summed over h",
        },
        when={"cum_seq_q": "given", "cum_seq_k": "given"},
        needs={"dropout_p": 0.0},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
    ),
    Signature(
        "aten._efficient_attention_forward.default",
        takes={
            "query": "b sq h d",
            "key": "b sk h d",
            "value": "b sk h dv",
            "bias": "b h sq sk",
            "seqlen_k": "b",
        },
        gives={
            "output": "b sq h dv",
            "logsumexp": "b h padded",
            "philox_seed": "replicated",
            "philox_offset": "replicated",
            "max_seqlen_batch_q": "none",
            "max_seqlen_batch_k": "none",
        },
        when={"cu_seqlens_q": None, "cu_seqlens_k": None},
        needs={"dropout_p": 0.0},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
    ),
    Signature(
        "aten._efficient_attention_forward.default",
        takes={
            "query": "one t h d",
            "key": "one tk h d",
            "value": "one tk h dv",
            "cu_seqlens_q": "replicated",
            "cu_seqlens_k": "replicated",
            "seqlen_k": "replicated",
        },
        gives={
            "output": "one t h dv",
            "logsumexp": "sequences h padded",
            "philox_seed": "replicated",
            "philox_offset": "replicated",
            "max_seqlen_batch_q": "none",
            "max_seqlen_batch_k": "none",
        },
        when={"cu_seqlens_q": "given", "cu_seqlens_k": "given"},
        needs={"dropout_p": 0.0},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
    ),
    Signature(
        "aten._efficient_attention_backward.default",
        takes={
            "grad_out_": "b sq h dv",
            "query": "b sq h d",
            "key": "b sk h d",
            "value": "b sk h dv",
            "bias": "b h sq sk",
            "out": "b sq h dv",
            "logsumexp": "b h padded",
            "philox_seed": "replicated",
            "philox_offset": "replicated",
        },
        gives={
            "grad_query": "b sq h d",
            "grad_key": "b sk h d",
            "grad_value": "b sk h dv",
            "grad_bias": "like bias, summed over b h, if bias_requires_grad",
        },
        when={"cu_seqlens_q": None, "cu_seqlens_k": None},
        needs={"dropout_p": 0.0},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
    ),
    Signature(
        "aten._efficient_attention_backward.default",
        takes={
            "grad_out_": "one t h dv",
            "query": "one t h d",
            "key": "one tk h d",
            "value": "one tk h dv",
            "out": "one t h dv",
            "cu_seqlens_q": "replicated",
            "cu_seqlens_k": "replicated",
            "logsumexp": "sequences h padded",
            "philox_seed": "replicated",
            "philox_offset": "replicated",
        },
        gives={
            "grad_query": "one t h d",
            "grad_key": "one tk h d",
            "grad_value": "one tk h dv",
            "grad_bias": "none",
        },
        when={"cu_seqlens_q": "given", "cu_seqlens_k": "given"},
        needs={"dropout_p": 0.0},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
    ),
    Signature(
        "aten._cudnn_attention_forward.default",
        takes={
            "query": "b h sq d",
            "key": "b g sk d",
            "value": "b g sk dv",
            "attn_bias": "b h sq sk",
        },
        gives={
            "output": "b h sq dv",
            "logsumexp": "b h sq 1, if compute_log_sumexp, float32",
            "cum_seq_q": "none",
            "cum_seq_k": "none",
            "max_q": "none",
            "max_k": "none",
            "philox_seed": "replicated, int64",
            "philox_offset": "replicated, int64",
            "debug_attn_mask": "none",
        },
        when={"cum_seq_q": None, "cum_seq_k": None},
        needs={"dropout_p": 0.0},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
        fake=True,
    ),
    Signature(
        "aten._cudnn_attention_forward.default",
        takes={
            "query": "t h d",
            "key": "tk g d",
            "value": "tk g dv",
            "cum_seq_q": "replicated",
            "cum_seq_k": "replicated",
        },
        gives={
            "output": "t h dv",
            "logsumexp": "t h 1, if compute_log_sumexp, float32",
            "cum_seq_q": "like cum_seq_q, int32",
            "cum_seq_k": "like cum_seq_k, int32",
            "max_q": "none",
            "max_k": "none",
            "philox_seed": "replicated, int64",
            "philox_offset": "replicated, int64",
            "debug_attn_mask": "none",
        },
        when={"cum_seq_q": "given", "cum_seq_k": "given"},
        needs={"dropout_p": 0.0},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
        fake=True,
    ),
    Signature(
        "aten._cudnn_attention_backward.default",
        takes={
            "grad_out": "b h sq dv",
            "query": "b h sq d",
            "key": "b g sk d",
            "value": "b g sk dv",
            "out": "b h sq dv",
            "logsumexp": "b h sq 1 | b h sq",
            "philox_seed": "replicated",
            "philox_offset": "replicated",
            "attn_bias": "b h sq sk",
        },
        gives={
            "grad_query": "b h sq d",
            "grad_key": "b g sk d, summed over h",
            "grad_value": "b g sk dv, summed over h",
        },
        when={"cum_seq_q": None, "cum_seq_k": None},
        needs={"dropout_p": 0.0},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
        fake=True,
    ),
    Signature(
        "aten._cudnn_attention_backward.default",
        takes={
            "grad_out": "t h dv",
            "query": "t h d",
            "key": "tk g d",
            "value": "tk g dv",
            "out": "t h dv",
            "logsumexp": "t h 1 | t h",
            "philox_seed": "replicated",
            "philox_offset": "replicated",
            "cum_seq_q": "replicated",
            "cum_seq_k": "replicated",
        },
        gives={
            "grad_query": "t h d",
            "grad_key": "tk g d, summed over h",
            "grad_value": "tk g dv, summed over h",
        },
        when={"cum_seq_q": "given", "cum_seq_k": "given"},
        needs={"dropout_p": 0.0},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
        fake=True,
    ),
    Signature(
        "torch_attn._varlen_attn.default",
        takes={
            "query": "t h d",
            "key": "tk g d | pages rows g d",
            "value": "tk g d | pages rows g d",
            "cu_seq_q": "replicated",
            "cu_seq_k": "replicated",
            "seqused_k": "replicated",
            "block_table": "replicated",
        },
        gives={"out": "t h d", "lse": "h t", "rng_state": "replicated"},
        imports="torch.nn.attention.varlen",
    ),
    Signature(
        "torch_attn._varlen_attn_backward.default",
        takes={
            "grad_out": "t h d",
            "query": "t h d",
            "key": "tk g d | pages rows g d",
            "value": "tk g d | pages rows g d",
            "out": "t h d",
            "lse": "h t",
            "cu_seq_q": "replicated",
            "cu_seq_k": "replicated",
            "rng_state": "replicated",
        },
        gives={
            "grad_query": "t h d",
            "grad_key": "tk g d, summed over h",
            "grad_value": "tk g d, summed over h",
        },
        imports="torch.nn.attention.varlen",
    ),
    Signature(
        "torch_attn._varlen_attn_out.default",
        takes={
            "out": "t h d, in place",
            "query": "t h d",
            "key": "tk g d | pages rows g d",
            "value": "tk g d | pages rows g d",
            "cu_seq_q": "replicated",
            "cu_seq_k": "replicated",
            "seqused_k": "replicated",
            "block_table": "replicated",
        },
        gives={"lse": "h t"},
        imports="torch.nn.attention.varlen",
    ),
    Signature(
        "flash_attn._flash_attn_forward.default",
        takes={
            "q": "b sq h d",
            "k": "b sk g d",
            "v": "b sk g d",
            "alibi_slopes": "h | b h",
        },
        gives={
            "out": "b sq h d",
            "softmax_lse": "b h sq",
            "S_dmask": "replicated",
            "rng_state": "replicated",
        },
        needs={"dropout_p": 0.0},
        queries={
            "causal": False,
            "window_size_left": -1,
            "window_size_right": -1,
            "alibi_slopes": None,
        },
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
        imports="flash_attn",
    ),
    Signature(
        "flash_attn._flash_attn_backward.default",
        takes={
            "dout": "b sq h d",
            "q": "b sq h d",
            "k": "b sk g d",
            "v": "b sk g d",
            "out": "b sq h d",
            "softmax_lse": "b h sq",
            "dq": "b sq h d, in place",
            "dk": "b sk g d, in place",
            "dv": "b sk g d, in place",
            "alibi_slopes": "h | b h",
            "rng_state": "replicated",
        },
        gives={"softmax_d": "b h padded"},
        needs={"dropout_p": 0.0},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
        imports="flash_attn",
    ),
    Signature(
        "flash_attn._flash_attn_varlen_forward.default",
        takes={
            "q": "t h d",
            "k": "tk g d | pages rows g d",
            "v": "tk g d | pages rows g d",
            "cu_seqlens_q": "replicated",
            "cu_seqlens_k": "replicated",
            "alibi_slopes": "h | sequences h",
            "block_table": "replicated",
            "leftpad_k": "replicated",
            "seqused_k": "replicated",
        },
        gives={
            "out": "t h d",
            "softmax_lse": "h t",
            "S_dmask": "replicated",
            "rng_state": "replicated",
        },
        needs={"dropout_p": 0.0},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
        imports="flash_attn",
    ),
    Signature(
        "flash_attn._flash_attn_varlen_backward.default",
        takes={
            "dout": "t h d",
            "q": "t h d",
            "k": "tk g d | pages rows g d",
            "v": "tk g d | pages rows g d",
            "out": "t h d",
            "softmax_lse": "h t",
            "dq": "t h d, in place",
            "dk": "tk g d, in place",
            "dv": "tk g d, in place",
            "cu_seqlens_q": "replicated",
            "cu_seqlens_k": "replicated",
            "alibi_slopes": "h | sequences h",
            "rng_state": "replicated",
        },
        gives={"softmax_d": "h padded"},
        needs={"dropout_p": 0.0},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
        imports="flash_attn",
    ),
    Signature(
        "flash_attn_3.fwd.default",
        takes={
            "q": "b sq h d",
            "k": "b sk g d",
            "v": "b sk g dv",
            "q_v": "b sq h dv",
            "out": "b sq h dv, in place",
        },
        gives={
            "out": "b sq h dv",
            "softmax_lse": "b h sq, float32",
            "out_accum": "none",
            "softmax_lse_accum": "none",
        },
        when={"cu_seqlens_q": None, "cu_seqlens_k": None},
        needs={"num_splits": 1},
        queries={
            "is_causal": False,
            "window_size_left": -1,
            "window_size_right": -1,
            "attention_chunk": 0,
        },
        because="what it returns then depends on how the kernel splits the keys",
        imports="flash_attn_interface",
        fake=True,
    ),
    Signature(
        "flash_attn_3.fwd.default",
        takes={
            "q": "t h d",
            "k": "tk g d",
            "v": "tk g dv",
            "q_v": "t h dv",
            "out": "t h dv, in place",
            "cu_seqlens_q": "replicated",
            "cu_seqlens_k": "replicated",
        },
        gives={
            "out": "t h dv",
            "softmax_lse": "h t, float32",
            "out_accum": "none",
            "softmax_lse_accum": "none",
        },
        when={"cu_seqlens_q": "given", "cu_seqlens_k": "given"},
        needs={"num_splits": 1},
        because="what it returns then depends on how the kernel splits the keys",
        imports="flash_attn_interface",
        fake=True,
    ),
    Signature(
        "flash_attn_3._flash_attn_forward.default",
        takes={
            "q": "b sq h d",
            "k": "b sk g d",
            "v": "b sk g dv",
            "qv": "b sq h dv",
            "out_": "b sq h dv, in place",
        },
        gives={
            "out": "b sq h dv",
            "softmax_lse": "b h sq",
            "out_accum": "replicated",
            "softmax_lse_accum": "replicated",
        },
        when={"cu_seqlens_q": None, "cu_seqlens_k": None},
        needs={"num_splits": 1},
        queries={
            "causal": False,
            "window_size_left": -1,
            "window_size_right": -1,
            "attention_chunk": 0,
        },
        because="what it returns then depends on how the kernel splits the keys",
        imports="flash_attn_interface",
    ),
    Signature(
        "flash_attn_3._flash_attn_forward.default",
        takes={
            "q": "t h d",
            "k": "tk g d",
            "v": "tk g dv",
            "qv": "t h dv",
            "out_": "t h dv, in place",
            "cu_seqlens_q": "replicated",
            "cu_seqlens_k": "replicated",
        },
        gives={
            "out": "t h dv",
            "softmax_lse": "h t",
            "out_accum": "replicated",
            "softmax_lse_accum": "replicated",
        },
        when={"cu_seqlens_q": "given", "cu_seqlens_k": "given"},
        needs={"num_splits": 1},
        because="what it returns then depends on how the kernel splits the keys",
        imports="flash_attn_interface",
    ),
    Signature(
        "flash_attn_3._flash_attn_backward.default",
        takes={
            "dout": "b sq h dv",
            "q": "b sq h d",
            "k": "b sk g d",
            "v": "b sk g dv",
            "out": "b sq h dv",
            "softmax_lse": "b h sq",
            "dq": "b sq h d, in place",
            "dk": "b sk g d, in place",
            "dv": "b sk g dv, in place",
        },
        gives={"softmax_d": "b h padded"},
        when={"cu_seqlens_q": None, "cu_seqlens_k": None},
        imports="flash_attn_interface",
    ),
    Signature(
        "flash_attn_3._flash_attn_backward.default",
        takes={
            "dout": "t h dv",
            "q": "t h d",
            "k": "tk g d",
            "v": "tk g dv",
            "out": "t h dv",
            "softmax_lse": "h t",
            "dq": "t h d, in place",
            "dk": "tk g d, in place",
            "dv": "tk g dv, in place",
            "cu_seqlens_q": "replicated",
            "cu_seqlens_k": "replicated",
        },
        gives={"softmax_d": "h padded"},
        when={"cu_seqlens_q": "given", "cu_seqlens_k": "given"},
        imports="flash_attn_interface",
    ),
    Signature(
        "xformers_flash.flash_fwd.default",
        takes={"query": "b sq h d", "key": "b sk g d", "value": "b sk g d"},
        gives={"out": "b sq h d", "lse": "b h sq", "rng_state": "replicated"},
        when={"cu_seqlens_q": None, "cu_seqlens_k": None, "seqused_k": None},
        needs={"p": 0.0},
        queries={"is_causal": False, "window_left": -1, "window_right": -1},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
        imports="xformers.ops.fmha",
    ),
    Signature(
        "xformers_flash.flash_fwd.default",
        takes={
            "query": "t h d",
            "key": "tk g d | pages rows g d",
            "value": "tk g d | pages rows g d",
            "cu_seqlens_q": "replicated",
            "cu_seqlens_k": "replicated",
            "seqused_k": "replicated",
            "block_tables": "replicated",
        },
        gives={"out": "t h d", "lse": "h t", "rng_state": "replicated"},
        when={"cu_seqlens_q": "given", "cu_seqlens_k": "given"},
        needs={"p": 0.0},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
        imports="xformers.ops.fmha",
    ),
    Signature(
        "xformers_flash.flash_bwd.default",
        takes={
            "grad": "b sq h d",
            "query": "b sq h d",
            "key": "b sk g d",
            "value": "b sk g d",
            "out": "b sq h d",
            "lse": "b h sq",
            "rng_state": "replicated",
        },
        gives={
            "dq": "b sq h d",
            "dk": "b sk g d, summed over h sq",
            "dv": "b sk g d, summed over h sq",
        },
        when={"cu_seqlens_q": None, "cu_seqlens_k": None, "seqused_k": None},
        needs={"p": 0.0},
        queries={"is_causal": False, "window_left": -1, "window_right": -1},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
        imports="xformers.ops.fmha",
    ),
    Signature(
        "xformers_flash.flash_bwd.default",
        takes={
            "grad": "t h d",
            "query": "t h d",
            "key": "tk g d | pages rows g d",
            "value": "tk g d | pages rows g d",
            "out": "t h d",
            "lse": "h t",
            "cu_seqlens_q": "replicated",
            "cu_seqlens_k": "replicated",
            "rng_state": "replicated",
        },
        gives={
            "dq": "t h d",
            "dk": "tk g d, summed over h",
            "dv": "tk g d, summed over h",
        },
        when={"cu_seqlens_q": "given", "cu_seqlens_k": "given"},
        needs={"p": 0.0},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
        imports="xformers.ops.fmha",
    ),
    Signature(
        "xformers_flash3.flash_fwd.default",
        takes={"query": "b sq h d", "key": "b sk g d", "value": "b sk g d"},
        gives={"out": "b sq h d", "lse": "b h sq"},
        when={"cu_seqlens_q": None, "cu_seqlens_k": None, "seqused_k": None},
        needs={"p": 0.0},
        queries={"is_causal": False, "window_left": -1, "window_right": -1},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
        imports="xformers.ops.fmha",
    ),
    Signature(
        "xformers_flash3.flash_fwd.default",
        takes={
            "query": "t h d",
            "key": "tk g d | pages rows g d",
            "value": "tk g d | pages rows g d",
            "cu_seqlens_q": "replicated",
            "cu_seqlens_k": "replicated",
            "seqused_k": "replicated",
            "leftpad_k": "replicated",
            "block_table": "replicated",
        },
        gives={"out": "t h d", "lse": "h t"},
        when={"cu_seqlens_q": "given", "cu_seqlens_k": "given"},
        needs={"p": 0.0},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
        imports="xformers.ops.fmha",
    ),
    Signature(
        "xformers_flash3.flash_bwd.default",
        takes={
            "dout": "b sq h d",
            "query": "b sq h d",
            "key": "b sk g d",
            "value": "b sk g d",
            "out": "b sq h d",
            "softmax_lse": "b h sq",
        },
        gives={
            "dq": "b sq h d",
            "dk": "b sk g d, summed over h sq",
            "dv": "b sk g d, summed over h sq",
        },
        when={"cu_seqlens_q": None, "cu_seqlens_k": None, "seqused_k": None},
        queries={"is_causal": False, "window_left": -1, "window_right": -1},
        imports="xformers.ops.fmha",
    ),
    Signature(
        "xformers_flash3.flash_bwd.default",
        takes={
            "dout": "t h d",
            "query": "t h d",
            "key": "tk g d | pages rows g d",
            "value": "tk g d | pages rows g d",
            "out": "t h d",
            "softmax_lse": "one h t | h t",
            "cu_seqlens_q": "replicated",
            "cu_seqlens_k": "replicated",
        },
        gives={
            "dq": "t h d",
            "dk": "tk g d, summed over h",
            "dv": "tk g d, summed over h",
        },
        when={"cu_seqlens_q": "given", "cu_seqlens_k": "given"},
        imports="xformers.ops.fmha",
    ),
)


FUNCTIONS: tuple[Signature, ...] = (
    Signature(
        "flash_attn.flash_attn_kvpacked_func",
        takes={"q": "b sq h d", "kv": "b sk two g d", "alibi_slopes": "h | b h"},
        gives={"out": "b sq h d", "softmax_lse": "b h sq", "S_dmask": "replicated"},
        needs={"dropout_p": 0.0},
        queries={
            "causal": False,
            "window_size[0]": -1,
            "window_size[1]": -1,
            "alibi_slopes": None,
        },
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
    ),
    Signature(
        "flash_attn.flash_attn_qkvpacked_func",
        takes={"qkv": "b s three h d", "alibi_slopes": "h | b h"},
        gives={"out": "b s h d", "softmax_lse": "b h s", "S_dmask": "replicated"},
        needs={"dropout_p": 0.0},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
    ),
    Signature(
        "flash_attn.flash_attn_varlen_kvpacked_func",
        takes={
            "q": "t h d",
            "kv": "u two g d",
            "cu_seqlens_q": "replicated",
            "cu_seqlens_k": "replicated",
            "alibi_slopes": "h | n h",
        },
        gives={
            "out": "t h d",
            "softmax_lse": "h t | n h longest",
            "S_dmask": "replicated",
        },
        needs={"dropout_p": 0.0},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
    ),
    Signature(
        "flash_attn.flash_attn_varlen_qkvpacked_func",
        takes={
            "qkv": "t three h d",
            "cu_seqlens": "replicated",
            "alibi_slopes": "h | n h",
        },
        gives={
            "out": "t h d",
            "softmax_lse": "h t | n h longest",
            "S_dmask": "replicated",
        },
        needs={"dropout_p": 0.0},
        because=(
            "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
        ),
    ),
    Signature(
        "flash_attn.flash_attn_with_kvcache",
        takes={
            "q": "n sq h d",
            "k_cache": "pages rows g d, in place",
            "v_cache": "pages rows g d, in place",
            "k": "n new g d",
            "v": "n new g d",
            "rotary_cos": "replicated",
            "rotary_sin": "replicated",
            "cache_seqlens": "n",
            "cache_leftpad": "n",
            "alibi_slopes": "h | n h",
            "block_table": "n pages",
        },
        gives={"out": "n sq h d", "softmax_lse": "n h sq"},
        when={"block_table": "given"},
    ),
    Signature(
        "flash_attn.flash_attn_with_kvcache",
        takes={
            "q": "n sq h d",
            "k_cache": "rows sk g d, in place",
            "v_cache": "rows sk g d, in place",
            "k": "n new g d",
            "v": "n new g d",
            "rotary_cos": "replicated",
            "rotary_sin": "replicated",
            "cache_seqlens": "n",
            "cache_leftpad": "n",
            "alibi_slopes": "h | n h",
            "cache_batch_idx": "n",
        },
        gives={"out": "n sq h d", "softmax_lse": "n h sq"},
        when={"cache_batch_idx": "given"},
    ),
    Signature(
        "flash_attn.flash_attn_with_kvcache",
        takes={
            "q": "b sq h d",
            "k_cache": "b sk g d, in place",
            "v_cache": "b sk g d, in place",
            "k": "b new g d",
            "v": "b new g d",
            "rotary_cos": "replicated",
            "rotary_sin": "replicated",
            "cache_seqlens": "b",
            "cache_leftpad": "b",
            "alibi_slopes": "h | b h",
        },
        gives={"out": "b sq h d", "softmax_lse": "b h sq"},
        when={"k": "given"},
    ),
    Signature(
        "flash_attn.flash_attn_with_kvcache",
        takes={
            "q": "b sq h d",
            "k_cache": "b sk g d",
            "v_cache": "b sk g d",
            "rotary_cos": "replicated",
            "rotary_sin": "replicated",
            "cache_seqlens": "b",
            "cache_leftpad": "b",
            "alibi_slopes": "h | b h",
        },
        gives={"out": "b sq h d", "softmax_lse": "b h sq"},
        queries={
            "causal": False,
            "window_size[0]": -1,
            "window_size[1]": -1,
            "alibi_slopes": None,
        },
    ),
    Signature(
        "flash_attn_interface.flash_attn_func",
        takes={"q": "b sq h d", "k": "b sk g d", "v": "b sk g dv", "qv": "b sq h dv"},
        gives={"out": "b sq h dv", "softmax_lse": "b h sq"},
        queries={
            "causal": False,
            "window_size[0]": -1,
            "window_size[1]": -1,
            "attention_chunk": 0,
        },
        unless="flash_attn_3._flash_attn_forward.default",
    ),
    Signature(
        "flash_attn_interface.flash_attn_varlen_func",
        takes={
            "q": "t h d",
            "k": "u g d",
            "v": "u g dv",
            "qv": "t h dv",
            "cu_seqlens_q": "replicated",
            "cu_seqlens_k": "replicated",
        },
        gives={"out": "t h dv", "softmax_lse": "h t"},
        unless="flash_attn_3._flash_attn_forward.default",
    ),
    Signature(
        "xformers.ops.memory_efficient_attention",
        takes={
            "query": "b sq d | b sq h d | b sq h in_group d",
            "key": "b sk d | b sk h d | b sk h in_group d",
            "value": "b sk dv | b sk h dv | b sk h in_group dv",
            "attn_bias": "b sq sk | b h sq sk | b h in_group sq sk",
        },
        gives={"out": "b sq h dv | b sq dv | b sq h in_group dv"},
        needs={
            "p": 0.0,
            "type(attn_bias)": (
                "NoneType",
                "Tensor",
                "DTensor",
                "LowerTriangularMask",
                "LowerTriangularFromBottomRightMask",
                "BlockDiagonalMask",
                "BlockDiagonalCausalMask",
                "BlockDiagonalCausalFromBottomRightMask",
                "BlockDiagonalCausalLocalAttentionMask",
                "LocalAttentionFromBottomRightMask",
                "BlockDiagonalCausalLocalAttentionFromBottomRightMask",
            ),
        },
        queries={"type(attn_bias)": ("NoneType", "Tensor", "DTensor")},
        because=(
            "shards that draw from equal seeds share a dropout mask, and a bias object that holds one"
            " bias for each head cannot be sharded"
        ),
    ),
)


# --- strategies ----------------------------------------------------------------------------------
# Giving DTensor the strategies that follow from signatures, taking them back, and proving both.
#
# PyTorch's `register_sharding` is not enough here. It derives a cache key that ignores floats and booleans
# before the first integer (a strategy that looks at `causal` is served stale); it is ignored where torch has
# a single-dim strategy for the op (2.13 on); it expands rows over a mesh without asking whether two axes
# together tear a group of heads; and it lets DTensor redistribute what an op writes in place, which loses
# what was written. So this goes one step below it, to the tables that it writes into. They are private:
# `op_strategy_funcs` and `op_to_schema_info` (2.5 to 2.15), the two of single-dim strategies (2.11 on),
# `op_to_rules` (to 2.12), and the caches (in Python; in C++ from 2.10 on).

REGISTERED, KEPT, LEFT, ABSENT = "registered", "registered before", "left alone", "absent"
OTHER = "another version"
MADE_BY = "attncheck"

_TABLES = (
    "op_strategy_funcs",
    "op_to_schema_info",
    "op_single_dim_strategy_funcs",
    "op_to_schema_info_for_single_dim_strategy",
    "op_to_rules",
)
# Those of them that hold strategies: propagation notes an op it decomposes in `op_to_schema_info` too.
_STRATEGIES = ("op_strategy_funcs", "op_single_dim_strategy_funcs", "op_to_rules")
# `PlacementStrategy` up to 2.7.
_OpSpec = getattr(schemas, "OpSpec", None) or schemas.PlacementStrategy  # type: ignore[attr-defined]


class NotRegistered(RuntimeError):
    """Something of the registration is not as it must be. The text is one sentence."""


class Strategy:
    """What DTensor asks for the sharding of one op; its forms are told apart by their arguments."""

    made_by = MADE_BY

    def __init__(self, op: Any, forms: Sequence[Signature]) -> None:
        self.op = op
        self.forms = tuple(forms)
        self.roll_call = False

    def __call__(self, *asked: Any) -> Any:
        if self.roll_call:
            raise _Present
        schema = asked[-1]  # up to 2.6 the mesh comes first
        values = arguments(self.op, schema.args_schema, schema.kwargs_schema)
        specs = {name: spec for name, value in values.items() if (spec := _spec(value)) is not None}
        signature = form_of(self.forms, values)
        mesh = next(iter(specs.values())).mesh
        shapes = {name: tuple(spec.shape) for name, spec in specs.items()}
        fixed = _unmovable(signature, specs, schema.kwargs_schema)
        possible = [
            layout
            for layout in layouts(signature, values, shapes, tuple(mesh.shape))
            if all(layout.takes[name] == tuple(specs[name].placements) for name in fixed)
        ]
        if not possible:
            raise Refused(_none_fits(signature, fixed, specs, shapes, values, mesh))
        if "query" in specs and _in_context_parallel():
            lies = tuple(specs["query"].placements)
            possible = [layout for layout in possible if layout.takes["query"] == lies]
            if not possible:
                raise Refused(
                    f"{signature.op} within context_parallel, which takes what comes out for shards of the "
                    "sequence: no strategy leaves the queries where they lie"
                )
        return self._spec_of(cheapest(possible, specs, mesh), specs, mesh)

    def _spec_of(self, layout: Layout, specs: Mapping[str, Any], mesh: Any) -> Any:
        outputs = [None if p is None else DTensorSpec(mesh, p) for p in layout.gives]
        inputs = [
            DTensorSpec(mesh, layout.takes[name], tensor_meta=spec.tensor_meta)
            for name, spec in specs.items()
        ]
        costs = [[redistribute_cost(specs[n], s)] for n, s in zip(specs, inputs, strict=True)]
        made = outputs[0] if len(self.op._schema.returns) == 1 else tuple(outputs)
        return schemas.OpStrategy(
            [_OpSpec(output_specs=made, input_specs=inputs, redistribute_cost=costs)]
        )


class _Present(Exception):
    """Raised by a strategy that is asked whether it is the one that answers."""


def arguments(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name. PyTorch's dispatcher leaves out those that equal their defaults."""
    declared = op._schema.arguments
    given = dict(zip((a.name for a in declared), args, strict=False))
    given.update(kwargs)
    for argument in declared:
        if argument.name not in given:
            given[argument.name] = argument.default_value if argument.has_default_value() else None
    return given


def _spec(value: Any) -> Any:
    """The DTensorSpec of an argument, None where it is no tensor."""
    if isinstance(value, schemas.OpStrategy):
        return value.strategies[0].output_spec
    return value if isinstance(value, DTensorSpec) else None


def _unmovable(
    signature: Signature, specs: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> list[str]:
    """Tensors that must stay as they lie: what the op writes into, and what is passed by keyword, which
    DTensor never redistributes, whatever a strategy says."""
    written = {name for name, text in signature.takes.items() if read(text).in_place}
    return [name for name in specs if name in written or name in kwargs]


def _in_context_parallel() -> bool:
    """It hands its shards of the sequence to SDPA, and takes what comes out for such, wherever it lies."""
    handled = getattr(DTensor._op_dispatcher, "_custom_op_handlers", {})
    return torch.ops.aten._scaled_dot_product_flash_attention.default in handled


def cheapest(possible: Sequence[Layout], specs: Mapping[str, Any], mesh: Any) -> Layout:
    """The least communication, then the fewest tensors moved: the same choice on every rank."""

    def price(layout: Layout) -> tuple[float, int]:
        moved = [name for name in specs if layout.takes[name] != tuple(specs[name].placements)]
        costs = (redistribute_cost(specs[n], DTensorSpec(mesh, layout.takes[n])) for n in moved)
        return sum(costs), len(moved)

    return min(possible, key=price)


def _none_fits(
    signature: Signature,
    fixed: Sequence[str],
    specs: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    values: Mapping[str, Any],
    mesh: Any,
) -> str:
    """Why no layout is left, and what to do."""
    have = ", ".join(f"{n} {''.join(map(str, specs[n].placements))}" for n in fixed)
    wanted = [
        describe(layout.ways, {n: layout.takes[n] for n in fixed})
        for layout in layouts(signature, values, shapes, tuple(mesh.shape))
    ]
    return (
        f"{signature.op} cannot move what it writes into or gets by keyword{NO_STRATEGY_HAS}{have}: "
        f"bring its arguments to one of these placements before the call: {'; '.join(wanted)}"
    )


# --- registering ---------------------------------------------------------------------------------

# What the tables held for an op before it was registered here.
_saved: dict[Any, list[dict[Any, Any]]] = {}
_libraries: dict[Any, Any] = {}


def install(signatures: Iterable[Signature], required: bool = True) -> dict[str, str]:
    """Give DTensor a strategy for each op, before or after its first use; twice is harmless.

    Returns what became of each op: `registered`, `registered before`, `left alone` (torch has a strategy
    of its own), `another version` (it returns more or less than described) or `absent`. Raises
    NotRegistered where a required op is absent, or a strategy does not answer once it is registered.
    """
    forms: dict[str, list[Signature]] = {}
    for signature in signatures:
        forms.setdefault(signature.op, []).append(signature)
    became: dict[str, str] = {}
    new: list[Strategy] = []
    for name, described in forms.items():
        op = find_op(name, described[0].imports if required else "")
        if op is None:
            if required:
                raise NotRegistered(
                    f"The op {name} is not registered in this process: import what registers it first"
                )
            became[name] = ABSENT
        elif op in _saved or _is_ours(op):
            became[name] = KEPT
        elif _is_known(op) and not _is_overridden(described):
            became[name] = LEFT
        elif any(len(form.gives) != len(op._schema.returns) for form in described):
            became[name] = OTHER
        else:
            new.append(_put(op, described))
            became[name] = REGISTERED
    if new:
        forget_propagated()
    for strategy in new:
        if not answers(strategy):
            _take_back([each.op for each in new])
            raise NotRegistered(
                f"The strategy registered for {strategy.op} is not the one that answers: this torch "
                f"({torch.__version__}) looks for strategies somewhere else"
            )
    return became


def remove() -> None:
    """Put back what DTensor had before `install`."""
    _take_back([*_saved])


def _take_back(ops: Iterable[Any]) -> None:
    for op in ops:
        for table, saved in zip(_tables(), _saved.pop(op), strict=True):
            table.pop(op, None)
            table.update(saved)
        if library := _libraries.pop(op, None):
            library._destroy()
    forget_propagated()


def find_op(name: str, imports: str = "") -> Any:
    """The overload of `flash_attn._flash_attn_forward.default`, or None. May import the module that
    registers it, and raises what that raises."""
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.rpartition(".")
    found = getattr(getattr(torch.ops, namespace), packet, None)
    if found is None and imports:
        importlib.import_module(imports)
        found = getattr(getattr(torch.ops, namespace), packet, None)
    return getattr(found, overload, None)


def _propagator() -> Any:
    return DTensor._op_dispatcher.sharding_propagator


def _tables() -> list[dict[Any, Any]]:
    propagator = _propagator()
    return [getattr(propagator, name) for name in _TABLES if hasattr(propagator, name)]


def _is_known(op: Any) -> bool:
    """Whether a strategy is registered for an op, by torch or by another such module."""
    return any(op in getattr(_propagator(), name, {}) for name in _STRATEGIES)


def _is_ours(op: Any) -> bool:
    """Whether another module that attncheck wrote has registered a strategy for it."""
    return getattr(_propagator().op_strategy_funcs.get(op), "made_by", "") == MADE_BY


def _is_overridden(forms: Sequence[Signature]) -> bool:
    """Whether this torch is one of those whose own strategy is wrong."""
    bounds = forms[0].overrides
    return bounds is not None and bounds[0] <= torch.__version__ < bounds[1]


def _put(op: Any, forms: Sequence[Signature]) -> Strategy:
    strategy = Strategy(op, forms)
    _saved[op] = [{op: table.pop(op)} if op in table else {} for table in _tables()]
    declared = op._schema.arguments
    # Everything from the first argument on that is no tensor is in the cache key, flags included.
    first = next(
        (at for at, a in enumerate(declared) if str(a.type) not in ("Tensor", "Optional[Tensor]")),
        len(declared),
    )
    keywords = [a.name for a in declared if a.kwarg_only]
    # Looking into lists makes every dispatch half as dear again, so only where they can hold tensors.
    lists = any("List[" in str(a.type) and "Tensor" in str(a.type) for a in declared)
    info = schemas.RuntimeSchemaInfo(first, keywords or None, needs_pytree=lists)
    _propagator().register_op_strategy(op, strategy, info)
    if forms[0].fake and not op.has_kernel_for_dispatch_key("Meta"):
        _give_fake(op, forms)
    return strategy


def _give_fake(op: Any, forms: Sequence[Signature]) -> None:
    """A Meta kernel made of what the signatures say of the results."""

    def fake(*args: Any, **kwargs: Any) -> Any:
        values = arguments(op, args, kwargs)
        tensors = {n: v for n, v in values.items() if isinstance(v, torch.Tensor)}
        like = next(iter(tensors.values()))
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        form = form_of(forms, values)
        made = [
            values.get(name)  # what is no tensor: None, or a number that was an argument
            if result is None
            else like.new_empty(result[0], dtype=getattr(torch, result[1]) if result[1] else None)
            for name, result in zip(form.gives, results_shapes(form, values, shapes), strict=True)
        ]
        return made[0] if len(op._schema.returns) == 1 else tuple(made)

    namespace, name = op._schema.name.split("::")
    library: Any = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
    library.impl(name, fake, "Meta")
    _libraries[op] = library


def answers(strategy: Strategy) -> bool:
    """Whether DTensor, asked for the sharding of the op, asks this strategy: by asking it.

    What runs the op on meta tensors first is left out, so that no arguments need to be made up.
    """
    propagator, op = _propagator(), strategy.op
    if op in getattr(DTensor._op_dispatcher, "_custom_op_handlers", {}):
        return False
    name = next(
        n
        for n in ("_propagate_tensor_meta_non_cached", "_propagate_tensor_meta")  # 2.7 on; before
        if hasattr(propagator, n)
    )
    strategy.roll_call = True
    setattr(propagator, name, lambda schema: None)
    try:
        # Up to 2.8 a tensor is looked for, to tell the mesh.
        return _asks(propagator, op, ()) or _asks(
            propagator,
            op,
            (DTensorSpec(None, (Replicate(),)),),  # type: ignore[arg-type]
        )
    finally:
        delattr(propagator, name)
        strategy.roll_call = False


def _asks(propagator: Any, op: Any, args: tuple[Any, ...]) -> bool:
    try:
        propagator.propagate_op_sharding_non_cached(schemas.OpSchema(op, args, {}))
    except _Present:
        return True
    except Exception:
        return False
    return False


def forget_propagated() -> None:
    """Clear what was propagated before in this thread: in Python and, from 2.10 on, in C++."""
    cached = _propagator().propagate_op_sharding
    (cached if hasattr(cached, "cache_clear") else cached.cache).cache_clear()
    clear = getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", None)
    if clear is not None:
        clear()


# --- local_calls ---------------------------------------------------------------------------------
# Functions that are no dispatcher ops, called on each rank's own shards.
#
# DTensor never gets to see such a function (pybind, Triton, CuTe behind Python), so no strategy can be
# registered for it; it would read a DTensor through a null pointer. Its wrapper here does what DTensor does
# for an op: choose the cheapest layout that the signature allows, bring the arguments to it, call the
# function on the local tensors, and make DTensors of the results.
#
# That is `torch.distributed.tensor.experimental.local_map`, and three things that it leaves to its caller: the
# placements follow from the call instead of being fixed; an argument that is whole where others are sharded
# gets a gradient that is a sum over the ranks (`in_grad_placements`, silently one rank's share without it);
# and results have their global shape, where `local_map` multiplies the local one by the ranks, which is wrong
# for shards of different sizes.

_Choice = tuple[Signature, Layout]
_KEPT_CHOICES = 1024  # calls that differ in shapes, placements or flags


def local_call(forms: Sequence[Signature], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which on DTensors is called on their local shards; its forms are told apart by their
    arguments. On ordinary tensors it is called as it is.

    In the conditions of a signature the items of a tuple are called `window_size[0]`, and the class of an
    argument `type(attn_bias)`. Ordinary tensors beside DTensors are the same on every rank, and are
    taken as they are. The wrapper raises Refused where no layout is right.
    """
    declared = inspect.signature(function)
    chosen: dict[Any, _Choice] = {}  # as DTensor keeps what it propagated

    @functools.wraps(function)
    def on_shards(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(value, DTensor) for value in (*args, *kwargs.values())):
            return function(*args, **kwargs)
        bound = declared.bind(*args, **kwargs)
        bound.apply_defaults()
        values = _by_name(bound)
        key = _key(values)
        choice = chosen.get(key)
        if choice is None:
            choice = _choose(forms, values)
            if key is not None and len(chosen) < _KEPT_CHOICES:
                chosen[key] = choice
        call = _lay_out(*choice, values)
        _localize(bound, call)
        return _assemble(function(*bound.args, **bound.kwargs), call)

    on_shards.made_by = MADE_BY  # type: ignore[attr-defined]
    return on_shards


@dataclass(frozen=True)
class _Call:
    """A call laid out: its arguments by name, and the local tensor for each DTensor among them."""

    signature: Signature
    layout: Layout
    mesh: Any
    values: Mapping[str, Any]
    locals: Mapping[str, torch.Tensor]

    def size(self, letter: str, local: bool = False) -> int | None:
        """The size of a named dim, of all of it or of this rank's part."""
        sizes = []
        for name, text in self.signature.takes.items():
            tensor = self.values.get(name)
            if isinstance(tensor, torch.Tensor):
                part = self.locals.get(name, tensor)
                form = read(text).of(tensor.ndim) or ()
                if letter in form:
                    sizes.append((tensor, part)[local].shape[form.index(letter)])
        return max(sizes) if sizes else None


def _by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """All arguments by name, and what `local_call` says of them; what is in `**kwargs` by its own names."""
    values: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            values.update(value)
        else:
            values[name] = value
    for name, value in [*values.items()]:
        values[f"type({name})"] = type(value).__name__
        if isinstance(value, (tuple, list)):
            values.update({f"{name}[{at}]": item for at, item in enumerate(value)})
    return values


def _key(values: Mapping[str, Any]) -> Any:
    """All that a choice depends on, and nothing that holds tensors. None where that cannot be a key."""
    key: list[Any] = []
    for name, value in values.items():
        if isinstance(value, DTensor):
            key.append((name, value.shape, value.placements, value.device_mesh))
        elif isinstance(value, torch.Tensor):
            key.append((name, value.shape))
        else:
            plain = value is None or isinstance(value, (bool, int, float, str))
            key.append((name, value if plain else type(value)))
    try:
        hash(tuple(key))
    except TypeError:  # sizes that are no numbers
        return None
    return tuple(key)


def _choose(forms: Sequence[Signature], values: Mapping[str, Any]) -> _Choice:
    signature = form_of(forms, values)
    tensors = {n: value for n, value in values.items() if isinstance(value, torch.Tensor)}
    placed = {n: tensor for n, tensor in tensors.items() if isinstance(tensor, DTensor)}
    mesh = next(iter(placed.values())).device_mesh
    for name, tensor in placed.items():
        if tensor.device_mesh != mesh:
            raise Refused(f"{signature.op}: {name} lies on another mesh than {next(iter(placed))}")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    every = layouts(signature, values, shapes, tuple(mesh.shape))
    # What the function writes into stays where it is: what is written into a copy is lost.
    fixed = [n for n in placed if read(signature.takes[n]).in_place]
    possible = [
        layout
        for layout in every
        if all(tuple(layout.takes[n]) == tuple(placed[n].placements) for n in fixed)
    ]
    if not possible:
        have = ", ".join(f"{n} {''.join(map(str, placed[n].placements))}" for n in fixed)
        wanted = [describe(one.ways, {n: one.takes[n] for n in fixed}) for one in every]
        raise Refused(
            f"{signature.op} writes into its arguments, and none of its layouts has {have}: bring them "
            f"to one of these placements before the call: {'; '.join(wanted)}"
        )
    return signature, cheapest(possible, {n: t._spec for n, t in placed.items()}, mesh)


def _lay_out(signature: Signature, layout: Layout, values: Mapping[str, Any]) -> _Call:
    placed = {n: value for n, value in values.items() if isinstance(value, DTensor)}
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and name not in placed:
            _accept_plain(signature, layout, name, value)
    local = {n: _local(t, layout.takes[n], layout.ways) for n, t in placed.items()}
    mesh = next(iter(placed.values())).device_mesh
    return _Call(signature, layout, mesh, values, local)


def _accept_plain(signature: Signature, layout: Layout, name: str, tensor: torch.Tensor) -> None:
    """Raises Refused where an ordinary tensor, the same on every rank, cannot be used as it is."""
    how = f"{signature.op}: {name} is an ordinary tensor beside DTensors, and would have to be"
    wanted = layout.takes[name]
    if any(not placement.is_replicate() for placement in wanted):
        raise Refused(
            f"{how} {''.join(map(str, wanted))}: pass it as a DTensor, "
            f"DTensor.from_local({name}, mesh, [Replicate()] * mesh.ndim)"
        )
    if tensor.requires_grad and torch.is_grad_enabled() and set(layout.ways) != {"replicate"}:
        raise Refused(
            f"{how} given a gradient, which would be that of one rank's shard: pass it as a DTensor"
        )


def _local(tensor: DTensor, wanted: Sequence[Placement], ways: Sequence[str]) -> torch.Tensor:
    """This rank's part under the wanted placements. Its gradient finds the way back."""
    if tuple(tensor.placements) != tuple(wanted):
        tensor = tensor.redistribute(placements=list(wanted))
    # Of what is whole while the call is not, every rank makes only its shard's part of the gradient.
    grads = [
        Partial("sum") if way != "replicate" and placement.is_replicate() else placement
        for way, placement in zip(ways, wanted, strict=True)
    ]
    part: torch.Tensor = _Part.apply(tensor, grads)  # type: ignore[no-untyped-call]
    return part


class _Part(torch.autograd.Function):
    """`to_local(grad_placements=...)`, which gives the gradient a stride that differs from rank to rank where
    the shards differ, and leaves a collective that is under way (`async_op=True`) to be waited for."""

    @staticmethod
    def forward(ctx: Any, tensor: DTensor, grads: Sequence[Placement]) -> torch.Tensor:
        ctx.mesh, ctx.shape, ctx.grads = tensor.device_mesh, tensor.shape, grads
        part = tensor._local_tensor
        if isinstance(part, AsyncCollectiveTensor):
            part = part.wait()
        return part.view_as(part)  # the same memory: the function may write into it

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _of_parts(grad, ctx.mesh, ctx.grads, ctx.shape), None


def _of_parts(
    local: torch.Tensor, mesh: Any, placements: Sequence[Placement], shape: Sequence[int]
) -> DTensor:
    """The DTensor of this global shape. Contiguous: what the strides of a rank's part would be for the whole,
    nobody can tell where a part has one head."""
    stride = [math.prod(shape[at + 1 :]) for at in range(len(shape))]
    return DTensor.from_local(
        local.contiguous(),
        mesh,
        placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(stride),
    )


def _localize(bound: inspect.BoundArguments, call: _Call) -> None:
    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            bound.arguments[name] = {n: call.locals.get(n, v) for n, v in value.items()}
        else:
            bound.arguments[name] = call.locals.get(name, value)


def _assemble(returned: Any, call: _Call) -> Any:
    """DTensors of what the function returned: a tensor, or several of which some may be None."""
    described = {name: read(text) for name, text in call.signature.gives.items()}
    if not isinstance(returned, (tuple, list)):
        return _assembled(returned, next(iter(described)), call)
    if len(returned) > len(described):
        raise Refused(
            f"{call.signature.op} returned {len(returned)} results; {len(described)} are described"
        )
    pairs = zip(returned, described, strict=False)
    return type(returned)([_assembled(one, name, call) for one, name in pairs])


def _assembled(local: Any, name: str, call: _Call) -> Any:
    text = call.signature.gives[name]
    dims = read(text)
    if dims.none or not isinstance(local, torch.Tensor):
        return local
    form = () if dims.replicated else dims.of(local.ndim)
    if form is None:
        raise Refused(
            f"{call.signature.op}: {name} is described as {text!r}, and has {local.ndim} dims"
        )
    shape = [*local.shape]
    placements: list[Placement] = []
    for way in call.layout.ways:
        at = next((form.index(letter) for letter in WAYS[way] if letter in form), None)
        if at is None:
            added = any(letter in dims.summed for letter in WAYS[way])
            placements.append(Partial("sum") if added else Replicate())
            continue
        mine = call.size(form[at], local=True)
        if local.shape[at] != mine:
            raise Refused(
                f"{call.signature.op}: {name} is described as {text!r}, and has {local.shape[at]} of "
                f"{form[at]!r} where the arguments have {mine}"
            )
        shape[at] = call.size(form[at])
        placements.append(Shard(at))
    return _of_parts(local, call.mesh, placements, shape)


# --- in place of the functions -------------------------------------------------------------------

# Where a wrapper was put: the module, the name, and what was there.
_replaced: list[tuple[Any, str, Any]] = []


def patch(functions: Iterable[Signature], required: bool = True) -> dict[str, str]:
    """Put wrappers in the place of functions, in the modules of their package that have them; twice is
    harmless. Who imported a function by name before has to do so again.

    Returns what became of each: `registered`, `registered before`, `left alone` (the op of `unless` is
    registered) or `absent`. Raises NotRegistered where a required function is absent.
    """
    forms: dict[str, list[Signature]] = {}
    for signature in functions:
        forms.setdefault(signature.op, []).append(signature)
    became = {}
    for path, described in forms.items():
        module, _, name = path.rpartition(".")
        function = _find(module, name)
        if function is None:
            if required:
                raise NotRegistered(f"There is no function {path} in this environment")
            became[path] = ABSENT
        elif getattr(function, "made_by", "") == MADE_BY:
            became[path] = KEPT
        elif described[0].unless and _calls(function, described[0].unless):
            became[path] = LEFT
        else:
            wrapper = local_call(described, function)
            for holder in _holders(module, name, function):
                _replaced.append((holder, name, function))
                setattr(holder, name, wrapper)
            became[path] = REGISTERED
    return became


def unpatch() -> None:
    """Put the functions back."""
    for holder, name, function in _replaced:
        setattr(holder, name, function)
    _replaced.clear()


def _find(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _calls(function: Any, op: str) -> bool:
    """Whether this version of a function calls the op: it is registered, and what the function's module has
    under its name is no ordinary function, as in versions from before it was an op."""
    own = getattr(function, "__globals__", {}).get(op.split(".")[1])
    return find_op(op) is not None and not inspect.isfunction(own)


def _holders(module: str, name: str, function: Any) -> list[Any]:
    """The loaded modules of the same package that have this function under its name."""
    package = module.partition(".")[0]
    return [
        loaded
        for path, loaded in [*sys.modules.items()]
        if path.partition(".")[0] == package
        and getattr(loaded, "__dict__", {}).get(name) is function
    ]


def register(required: bool = True) -> dict[str, str]:
    """Give DTensor these strategies, and let these functions take DTensors. Returns what became of each op.

    Imports what registers an op that is not there yet. `required`: raise NotRegistered where an op is
    absent all the same, instead of passing it over.
    """
    became = install(SIGNATURES, required)
    became.update(patch(FUNCTIONS, required))
    return became


def unregister() -> None:
    """Put back what was there before `register`."""
    remove()
    unpatch()
