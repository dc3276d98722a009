"""Kernel ops by named dims, and the ways to lay a call out over a mesh that follow from the names.

Attention never mixes two batch rows, nor two groups of heads, nor (without a mask by position) two queries.
So a call on a part of one of them gives that part of every result, and the names of the dims say where the
part lies in each tensor. Four ways to shard one mesh axis follow, and a mesh of several axes takes one each:

- batch: every tensor on its dim `b`;
- heads: query heads `h` and key and value heads `g` together, where no group of query heads is torn from
  its kv head: equally many of both, or both divisible by the ranks. One kv head for all stays whole, and
  its gradient is a sum over the ranks;
- queries: `sq` alone, keys and values whole, their gradients sums, where a signature says when;
- replicate: everything whole.

What leaves a rank without rows is not offered: kernels have died of empty shards.

This file is part of every module that `attncheck fix` writes: it needs torch alone.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.distributed.tensor import Partial, Placement, Replicate, Shard

GIVEN = "given"  # of an argument: anything but None
BATCH, HEADS, KV_HEADS, QUERIES = "b", "h", "g", "sq"
WAYS: Mapping[str, tuple[str, ...]] = {
    "batch": (BATCH,),
    "heads": (HEADS, KV_HEADS),
    "query heads": (HEADS,),  # where all of them share one kv head
    "queries": (QUERIES,),
    "replicate": (),
}

# What every refusal begins with, and what some go on with: others look for these.
REFUSAL = "attncheck fix: "
NO_STRATEGY_HAS = ", and no strategy has "


class Refused(RuntimeError):
    """No strategy is right for this call. The text is one sentence."""

    def __init__(self, text: str) -> None:
        super().__init__(REFUSAL + text)


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


def by_op(signatures: Iterable[Signature]) -> dict[str, list[Signature]]:
    """The forms of each op, in their order."""
    forms: dict[str, list[Signature]] = {}
    for signature in signatures:
        forms.setdefault(signature.op, []).append(signature)
    return forms


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
    """How many rows the rank with fewest gets, split like torch.chunk by one axis after the other. That need
    not be the last one: 7 rows are 4 and 3, and of these 3 ranks get 2, 2, 0 and 1, 1, 1."""
    sizes = {size}
    for ranks in axes:
        sizes = {
            max(0, min(rows, one - at * rows))
            for one in sizes
            for rows in (-(-one // ranks),)
            for at in range(ranks)
        }
    return min(sizes)


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


def leaving(every: Iterable[Layout], fixed: Mapping[str, Sequence[Placement]]) -> list[Layout]:
    """Those layouts under which these tensors stay where they lie."""
    return [
        layout
        for layout in every
        if all(tuple(layout.takes[name]) == tuple(placed) for name, placed in fixed.items())
    ]


def listed(placements: Mapping[str, Sequence[Placement]]) -> str:
    """`q S(2), k S(2)`, for messages."""
    return ", ".join(f"{name} {''.join(map(str, placed))}" for name, placed in placements.items())


def alternatives(every: Iterable[Layout], names: Iterable[str]) -> str:
    """Where these tensors lie under each layout: `heads (q S(2), k S(2)); replicate (q R, k R)`."""
    names = [*names]
    return "; ".join(
        f"{', '.join(layout.ways)} ({listed({name: layout.takes[name] for name in names})})"
        for layout in every
    )


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
