"""From an attention call of a model to what can be run of it here: an operator and a setting of reduced size.

Torch-free. What decides whether a call works is kept: flags, dtype, which dim each mesh axis shards and
whether it divides it, how many query heads share a kv head. What only costs time is made small: tokens,
head_dim, ranks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from attncheck import models
from attncheck.audit.seen import Argument, Seen, Texts
from attncheck.audited import AttentionCall
from attncheck.models.planning import SOFTCAP
from attncheck.probing import (
    BATCH,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    KV_SEQUENCE,
    SEQUENCE,
    Setting,
)

# Ranks that a laptop runs, at most: two for an axis that shards something, while they last.
RANKS = 4
TOKENS = {
    SEQUENCE: 36,
    KV_SEQUENCE: 44,
}  # each of them and its half differ, as in the probes' own settings
HEAD_DIMS = 64

BSHD = (BATCH, SEQUENCE, HEADS, HEAD_DIM)
BHSD = (BATCH, HEADS, SEQUENCE, HEAD_DIM)
KV_ROLES = {HEADS: KV_HEADS, SEQUENCE: KV_SEQUENCE}
MASK_ROLES = (BATCH, HEADS, SEQUENCE, KV_SEQUENCE)
PLAIN = ("plain",)
RUNNABLE = re.compile(r"R|P\(sum\)|S\([0-3]\)")  # see `Setting.explicit`


@dataclass(frozen=True)
class Kind:
    """How a kernel op is called by the operator that runs it. `names`: the op's q, k and v; `options` makes
    those of the setting from the op's flags; `mask` is the op's name for a mask, and `masked` makes the
    options of one from its dtype, what it broadcasts over and how it is passed (`sharded` or `plain`);
    `tensors` is what the operator calls q, k, v and it."""

    operator: str
    function: str
    layout: tuple[str, ...]
    names: tuple[str, str, str]
    options: Callable[[Mapping[str, Any]], dict[str, Any]]
    mask: str = ""
    masked: Callable[[str, str, str], dict[str, Any]] | None = None
    tensors: tuple[str, str, str, str] = ("q", "k", "v", "mask")


def _flash_attn(flags: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if flags.get("causal"):
        options["causal"] = True
    window = (flags.get("window_size_left", -1), flags.get("window_size_right", -1))
    if window != (-1, -1) and not (flags.get("causal") and window == (-1, 0)):
        options["window"] = [_window(side) for side in window]
    if flags.get("softcap"):
        options["softcap"] = min(flags["softcap"], SOFTCAP)
    return options


def _window(side: int) -> int:
    """A window that is one at the reduced size, too."""
    return side if side < 0 else min(side, 8)


def _sdpa(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {"causal": True} if flags.get("is_causal") else {}


def _sdpa_cuda(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {"causal": "top_left"} if flags.get("is_causal") else {}


def _mask(dtype: str, broadcast: str, passed: str) -> dict[str, Any]:
    return {
        "mask": "bool" if dtype == "bool" else "float",
        "mask_as": passed,
        "mask_broadcast": broadcast,
    }


def _bias(dtype: str, broadcast: str, passed: str) -> dict[str, Any]:
    # F.scaled_dot_product_attention expands what broadcasts, whatever it broadcast over.
    return {"bias": passed, "bias_expanded": True}


SDPA = "F.scaled_dot_product_attention"
SDPA_NAMES = ("query", "key", "value")
_FLASH = Kind("sdpa_cuda.flash", SDPA, BHSD, SDPA_NAMES, _sdpa_cuda)
_EFFICIENT = replace(
    _FLASH,
    operator="sdpa_cuda.efficient",
    mask="attn_bias",
    masked=_bias,
    tensors=("q", "k", "v", "bias"),
)
_MATH = Kind("sdpa[MATH]", SDPA, BHSD, SDPA_NAMES, _sdpa, mask="attn_mask", masked=_mask)
KINDS: Mapping[str, Kind] = {
    "flash_attn._flash_attn_forward.default": Kind(
        "flash_attn_func", "flash_attn.flash_attn_func", BSHD, ("q", "k", "v"), _flash_attn
    ),
    "aten._scaled_dot_product_flash_attention.default": _FLASH,
    "aten._scaled_dot_product_efficient_attention.default": _EFFICIENT,
    "aten._scaled_dot_product_cudnn_attention.default": replace(
        _EFFICIENT, operator="sdpa_cuda.cudnn"
    ),
    "aten._scaled_dot_product_attention_math.default": _MATH,
    "aten._scaled_dot_product_flash_attention_for_cpu.default": replace(
        _MATH, operator="sdpa[FLASH_ATTENTION]"
    ),
}


@dataclass(frozen=True)
class Planned:
    """A call, and the setting that runs it on `mesh`; `setting` is None where none does, and `call.note` says
    why."""

    call: AttentionCall
    setting: Setting | None
    mesh: Mapping[str, int]


def plan(seen: Sequence[Seen], mesh: Mapping[str, int]) -> tuple[Planned, ...]:
    """One for each distinct call; `mesh` is the model's."""
    return tuple(_plan(f"call{at}", one, mesh) for at, one in enumerate(seen, 1))


def _plan(name: str, seen: Seen, mesh: Mapping[str, int]) -> Planned:
    call = seen.call
    flags: dict[str, Any] = json.loads(call.flags)
    kind = KINDS.get(call.op)
    told = AttentionCall(seen.modules, call.op, call.op, seen.calls, options=flags)
    if kind is None:
        placements = {t.name: t.placements or PLAIN for t in call.tensors}
        why = "attncheck has no operator that calls this op with the arguments of another model"
        return Planned(replace(told, placements=placements, note=why), None, mesh)
    by_name = {tensor.name: tensor for tensor in call.tensors}
    q, k, v = (by_name[each] for each in kind.names)
    mask = by_name.get(kind.mask)
    tensors = dict(zip(kind.tensors, (q, k, v, mask), strict=True))
    given = {own: tensor for own, tensor in tensors.items() if tensor is not None}
    sizes = _sizes(kind.layout, q, k) if len(q.shape) == len(k.shape) == len(kind.layout) else {}
    options = kind.options(flags)
    told = replace(
        told,
        function=kind.function,
        sizes=sizes,
        options=options,
        placements={own: tensor.placements or PLAIN for own, tensor in given.items()},
    )
    if why := _refusal(q, k, v, sizes, [t for t in call.tensors if t.placements], mesh):
        return Planned(replace(told, note=why), None, mesh)
    explicit = {own: _on_axes(tensor, mesh) for own, tensor in given.items() if tensor.placements}
    roles = _sharded_roles(kind, explicit)
    small_mesh = reduced_mesh(mesh, roles)
    notes = [
        f"run with one rank on {axis}, for want of ranks"
        for at, axis in enumerate(mesh)
        if small_mesh[axis] < min(2, mesh[axis]) and any(at in axes for axes in roles.values())
    ]
    if rate := float(flags.get("dropout_p") or 0.0):
        notes.append(f"run without its dropout of {rate:g}")
    if mask is not None and kind.masked is not None:
        passed = "sharded" if mask.placements else "plain"
        options |= kind.masked(mask.dtype, _broadcast(mask), passed)
        if any(size == 1 < sizes[role] for role, size in _rows_and_columns(mask)):
            notes.append("run with a mask that has a row for each query and a column for each key")
    elif "alibi_slopes" in by_name:
        notes.append("run without its alibi slopes")
    setting = Setting(
        name,
        reduced_sizes(sizes, roles, mesh, small_mesh),
        dtype=q.dtype,
        options=options,
        level="quick",
        explicit=explicit,
    )
    told = replace(
        told,
        options=options,
        placements={**told.placements, **explicit},
        operator=kind.operator,
        setting=name,
        note="; ".join(notes),
    )
    return Planned(told, setting, small_mesh)


def _refusal(
    q: Argument,
    k: Argument,
    v: Argument,
    sizes: Mapping[str, int],
    placed: Sequence[Argument],
    mesh: Mapping[str, int],
) -> str:
    """Why no probe makes the same call, or ''. `placed`: those of its tensors that are DTensors."""
    if not placed:
        return "its tensors are ordinary ones (local_map, to_local): DTensor has no part in it"
    if not all(tensor.placements for tensor in (q, k, v)):
        return "some of q, k and v are ordinary tensors and some are DTensors, which no probe mixes"
    if not sizes:
        return f"q has {len(q.shape)} dims and k has {len(k.shape)}, where probes have 4"
    if v.shape[-1] != q.shape[-1]:
        return "q and v have different head_dims, which no probe calls"
    if sizes[HEADS] % sizes[KV_HEADS]:
        return "its heads are no multiple of those of keys and values, which no probe calls"
    for tensor in placed:
        if not _on_axes(tensor, mesh):
            return f"{tensor.name} lies on a mesh whose axes are none of {', '.join(mesh)}"
        for text in tensor.placements:
            if not RUNNABLE.fullmatch(text):
                return f"{tensor.name} is {text}, in which no probe places a tensor"
    return ""


def _on_axes(tensor: Argument, mesh: Mapping[str, int]) -> Texts:
    """The placements of a DTensor on every axis of `mesh`: on those that its own mesh has not, each rank has
    values of its own, which for one call is as if they were replicated. Empty where its mesh has others. A
    mask has four dims here, as broadcasting counts them."""
    axes = tensor.axes or tuple(mesh)
    if len(axes) != len(tensor.placements) or not {*axes} <= {*mesh}:
        return ()
    texts = dict(zip(axes, tensor.placements, strict=True))
    shift = 4 - len(tensor.shape)
    return tuple(_shifted(texts.get(axis, "R"), shift) for axis in mesh)


def _shifted(text: str, dims: int) -> str:
    return f"S({int(text[2:-1]) + dims})" if dims and text.startswith("S(") else text


def _sizes(layout: Sequence[str], q: Argument, k: Argument) -> dict[str, int]:
    sizes = dict(zip(layout, q.shape, strict=True))
    for role, size in zip(layout, k.shape, strict=True):
        if role in KV_ROLES:
            sizes[KV_ROLES[role]] = size
    return sizes


def _broadcast(mask: Argument) -> str:
    """Over what a mask broadcasts, as probes call it."""
    batch, heads, *_ = (*(1,) * (4 - len(mask.shape)), *mask.shape)
    if batch == heads == 1:
        return "both"
    return "heads" if heads == 1 else "batch" if batch == 1 else "full"


def _rows_and_columns(mask: Argument) -> Iterable[tuple[str, int]]:
    return zip((SEQUENCE, KV_SEQUENCE), mask.shape[-2:], strict=False)


def _sharded_roles(kind: Kind, explicit: Mapping[str, Texts]) -> dict[str, tuple[int, ...]]:
    """Which mesh axes shard which role, over all tensors; those of partial sums under ''."""
    kv_layout = tuple(KV_ROLES.get(role, role) for role in kind.layout)
    dims = dict(zip(kind.tensors, (kind.layout, kv_layout, kv_layout, MASK_ROLES), strict=True))
    found: dict[str, dict[int, None]] = {}
    for name, texts in explicit.items():
        for axis, text in enumerate(texts):
            if text != "R":
                role = dims[name][int(text[2:-1])] if text.startswith("S(") else ""
                found.setdefault(role, {})[axis] = None
    return {role: tuple(axes) for role, axes in found.items()}


def reduced_mesh(mesh: Mapping[str, int], roles: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The same axes with fewer ranks: two where an axis shards something, while they last, and one elsewhere.
    Axes that shard the batch alone, which attention does not mix, come last; before them those at the front.
    `roles`: the axes that shard each role, by number.

    >>> reduced_mesh({"dp": 4, "tp": 8}, {"heads": (1,)})
    {'dp': 1, 'tp': 2}
    >>> reduced_mesh({"tp": 8, "cp": 2, "dp": 4}, {"heads": (0,), "sequence": (1,), "batch": (2,)})
    {'tp': 2, 'cp': 2, 'dp': 1}
    """
    mixed = {axis for role, axes in roles.items() if role != BATCH for axis in axes}
    used = {axis for axes in roles.values() for axis in axes}
    several = [at for at, size in enumerate(mesh.values()) if size > 1]
    wanted = sorted((at for at in several if at in used), key=lambda at: (at not in mixed, -at))
    # Where nothing is sharded there are still ranks, that may disagree.
    two = wanted[: RANKS // 2] or several[-1:]
    return {axis: 2 if at in two else 1 for at, axis in enumerate(mesh)}


def reduced_sizes(
    sizes: Mapping[str, int],
    roles: Mapping[str, tuple[int, ...]],
    mesh: Mapping[str, int],
    small: Mapping[str, int],
) -> dict[str, int]:
    """Sizes that lie on the ranks of `small` as the model's own lie on those of `mesh`: they divide them,
    they do not, or there are fewer than ranks. Where `small` has one rank for what is sharded, nothing is
    kept."""

    def ranks(*names: str) -> tuple[int, int]:
        many, few = (
            max(math.prod([*of.values()][axis] for axis in roles.get(name, ())) for name in names)
            for of in (mesh, small)
        )
        return (many, few) if few > 1 else (1, 1)

    out: dict[str, int] = {}
    for role, size in sizes.items():
        many, few = ranks(role)
        if role in TOKENS:
            out[role] = _length(size, many, few, TOKENS[role])
        elif role == BATCH:
            out[role] = _alike(size, many, few, min(size // many, 2) * few)
        elif role == HEAD_DIM:
            out[role] = _alike(size, many, few, min(size, HEAD_DIMS) // few * few)
    if sizes[SEQUENCE] == sizes[KV_SEQUENCE]:
        # One length: that of the side which is sharded.
        by, other = SEQUENCE, KV_SEQUENCE
        if KV_SEQUENCE in roles and SEQUENCE not in roles:
            by, other = other, by
        if other not in roles or roles[by] == roles[other]:
            out[other] = out[by]
    many, few = ranks(HEADS, KV_HEADS)
    out[HEADS], out[KV_HEADS] = models.reduce(sizes[HEADS], sizes[KV_HEADS], many, few)
    return {role: out[role] for role in sizes}


def _length(size: int, many: int, few: int, like: int) -> int:
    if few == many and size <= like:
        return size
    return few - 1 if size < many else models.reduce_length(size, many, few, like)


def _alike(size: int, many: int, few: int, divided: int) -> int:
    """Where `many` ranks divide `size`, `divided`, which `few` do; else a size near it that they do not, or
    of which some get nothing.

    >>> [_alike(size, 8, 2, 64) for size in (128, 60, 7)]
    [64, 65, 1]
    """
    return few - 1 if size < many else divided + (size % many > 0)
