"""From an attention call of a model to what can be run of it here: an operator and a setting of reduced size.

Torch-free. What decides whether a call works is kept: flags, dtype, which dim each mesh axis shards and
whether it divides it, how many query heads share a kv head. What only costs time is made small: tokens,
head_dim, ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from attncheck import models
from attncheck.audit.seen import Argument, Seen
from attncheck.audited import AttentionCall
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


@dataclass(frozen=True)
class Kind:
    """How a kernel op is called by the operator that runs it. `names`: the op's q, k and v; `options` makes
    those of the setting from the op's flags; `mask` is the op's name for a mask, and `masked` makes the
    options of one from its dtype and what it broadcasts over; `tensors` is what the operator calls q, k, v
    and it."""

    operator: str
    function: str
    layout: tuple[str, ...]
    names: tuple[str, str, str]
    options: Callable[[Mapping[str, Any]], dict[str, Any]]
    mask: str = ""
    masked: Callable[[str, str], dict[str, Any]] | None = None
    tensors: tuple[str, str, str, str] = ("q", "k", "v", "mask")


def _flash_attn(flags: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if flags.get("causal"):
        options["causal"] = True
    window = (flags.get("window_size_left", -1), flags.get("window_size_right", -1))
    if window != (-1, -1) and not (flags.get("causal") and window == (-1, 0)):
        options["window"] = [_window(side) for side in window]
    if flags.get("softcap"):
        options["softcap"] = flags["softcap"]
    return options


def _window(side: int) -> int:
    """A window that is one at the reduced size, too."""
    return side if side < 0 else min(side, 8)


def _sdpa(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {"causal": True} if flags.get("is_causal") else {}


def _sdpa_cuda(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {"causal": "top_left"} if flags.get("is_causal") else {}


def _mask(dtype: str, broadcast: str) -> dict[str, Any]:
    return {
        "mask": "bool" if dtype == "bool" else "float",
        "mask_as": "sharded",
        "mask_broadcast": broadcast or "full",
    }


def _bias(dtype: str, broadcast: str) -> dict[str, Any]:
    # F.scaled_dot_product_attention expands what broadcasts, whatever it broadcast over.
    return {"bias": "sharded", "bias_expanded": True}


SDPA_NAMES = ("query", "key", "value")
KINDS: Mapping[str, Kind] = {
    "flash_attn._flash_attn_forward.default": Kind(
        "flash_attn_func", "flash_attn.flash_attn_func", BSHD, ("q", "k", "v"), _flash_attn
    ),
    "aten._scaled_dot_product_flash_attention.default": Kind(
        "sdpa_cuda.flash", "F.scaled_dot_product_attention", BHSD, SDPA_NAMES, _sdpa_cuda
    ),
    "aten._scaled_dot_product_efficient_attention.default": Kind(
        "sdpa_cuda.efficient",
        "F.scaled_dot_product_attention",
        BHSD,
        SDPA_NAMES,
        _sdpa_cuda,
        mask="attn_bias",
        masked=_bias,
        tensors=("q", "k", "v", "bias"),
    ),
    "aten._scaled_dot_product_cudnn_attention.default": Kind(
        "sdpa_cuda.cudnn",
        "F.scaled_dot_product_attention",
        BHSD,
        SDPA_NAMES,
        _sdpa_cuda,
        mask="attn_bias",
        masked=_bias,
        tensors=("q", "k", "v", "bias"),
    ),
    "aten._scaled_dot_product_attention_math.default": Kind(
        "sdpa[MATH]",
        "F.scaled_dot_product_attention",
        BHSD,
        SDPA_NAMES,
        _sdpa,
        mask="attn_mask",
        masked=_mask,
    ),
    "aten._scaled_dot_product_flash_attention_for_cpu.default": Kind(
        "sdpa[FLASH_ATTENTION]",
        "F.scaled_dot_product_attention",
        BHSD,
        SDPA_NAMES,
        _sdpa,
        mask="attn_mask",
        masked=_mask,
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
        placements = {t.name: t.placements or ("plain",) for t in call.tensors}
        why = "attncheck has no operator that calls this op with the arguments of another model"
        return Planned(replace(told, placements=placements, note=why), None, mesh)
    by_name = {tensor.name: tensor for tensor in call.tensors}
    q, k, v = (by_name[each] for each in kind.names)
    mask = by_name.get(kind.mask)
    sizes = _sizes(kind.layout, q, k)
    options = kind.options(flags)
    placements = {
        own: tensor.placements or ("plain",)
        for own, tensor in zip(kind.tensors, (q, k, v, mask), strict=True)
        if tensor is not None
    }
    told = replace(
        told, function=kind.function, sizes=sizes, options=options, placements=placements
    )
    if not any(tensor.placements for tensor in call.tensors):
        why = "its tensors are ordinary ones (local_map, to_local): DTensor has no part in it"
        return Planned(replace(told, note=why), None, mesh)
    if v.shape[-1] != q.shape[-1]:
        why = "q and v have different head_dims, which no probe calls"
        return Planned(replace(told, note=why), None, mesh)
    roles = _sharded_roles(kind.layout, q, k, mask)
    small_mesh = reduced_mesh(mesh, {axis for axes in roles.values() for axis in axes})
    small = reduced_sizes(sizes, roles, mesh, small_mesh)
    notes = []
    rate = float(flags.get("dropout_p") or 0.0)
    if rate:
        notes.append(f"run without its dropout of {rate:g}")
    if mask is not None and kind.masked is not None:
        options |= kind.masked(mask.dtype, _broadcast(mask, sizes))
    elif flags.get("alibi_slopes") is not None or "alibi_slopes" in by_name:
        notes.append("run without its alibi slopes")
    setting = Setting(
        name,
        small,
        dtype=q.dtype,
        options=options,
        level="quick",
        explicit={name: texts for name, texts in placements.items() if texts != ("plain",)},
    )
    told = replace(told, operator=kind.operator, setting=name, note="; ".join(notes))
    return Planned(told, setting, small_mesh)


def _sizes(layout: Sequence[str], q: Argument, k: Argument) -> dict[str, int]:
    sizes = dict(zip(layout, q.shape, strict=True))
    for role, size in zip(layout, k.shape, strict=True):
        if role in KV_ROLES:
            sizes[KV_ROLES[role]] = size
    return sizes


def _broadcast(mask: Argument, sizes: Mapping[str, int]) -> str:
    shape = (1,) * (4 - len(mask.shape)) + mask.shape
    if shape[0] == 1 and shape[1] == 1:
        return "batch_and_heads"
    return "heads" if shape[1] == 1 else "batch" if shape[0] == 1 else ""


def _sharded_roles(
    layout: Sequence[str], q: Argument, k: Argument, mask: Argument | None
) -> dict[str, tuple[int, ...]]:
    """Which mesh axes shard which role, over all tensors."""
    found: dict[str, list[int]] = {}
    kv_layout = [KV_ROLES.get(role, role) for role in layout]
    for tensor, dims in ((q, layout), (k, kv_layout), (mask, MASK_ROLES)):
        for axis, text in enumerate(tensor.placements if tensor is not None else ()):
            if text.startswith("S("):
                axes = found.setdefault(dims[int(text[2:-1])], [])
                if axis not in axes:
                    axes.append(axis)
            elif text.startswith("P"):
                found.setdefault("", []).append(axis)
    return {role: tuple(axes) for role, axes in found.items()}


def reduced_mesh(mesh: Mapping[str, int], used: set[int]) -> dict[str, int]:
    """The same axes with fewer ranks: two where an axis shards something, one elsewhere.

    >>> reduced_mesh({"dp": 4, "tp": 8}, {1}), reduced_mesh({"dp": 4, "cp": 2, "tp": 8}, {0, 1, 2})
    ({'dp': 1, 'tp': 2}, {'dp': 1, 'cp': 2, 'tp': 2})
    """
    out: dict[str, int] = {}
    left = RANKS
    for at, (axis, size) in reversed([*enumerate(mesh.items())]):
        out[axis] = 2 if at in used and size > 1 and left > 1 else 1
        left //= out[axis]
    if (
        max(out.values(), default=1) == 1 and out
    ):  # nothing is sharded: still ranks, that may disagree
        last = list(mesh)[-1]
        out[last] = min(2, mesh[last])
    return {axis: out[axis] for axis in mesh}


def reduced_sizes(
    sizes: Mapping[str, int],
    roles: Mapping[str, tuple[int, ...]],
    mesh: Mapping[str, int],
    small: Mapping[str, int],
) -> dict[str, int]:
    """Sizes at which the ranks of `small` divide what those of `mesh` divide at the model's own."""

    def ranks(of: Mapping[str, int], role: str) -> int:
        counts = list(of.values())
        out = 1
        for axis in roles.get(role, ()):
            out *= counts[axis]
        return out

    out: dict[str, int] = {}
    for role, size in sizes.items():
        many, few = ranks(mesh, role), ranks(small, role)
        if role == BATCH:
            base = min(size, 2) * few if size % many == 0 else few + 1
            out[role] = max(1, min(base, size) if few == 1 else base)
        elif role in TOKENS:
            small_enough = size <= TOKENS[role] and few == many
            out[role] = (
                size if small_enough else models.reduce_length(size, many, few, TOKENS[role])
            )
        elif role == HEAD_DIM:
            out[role] = min(size, HEAD_DIMS)
    if sizes[SEQUENCE] == sizes[KV_SEQUENCE]:
        out[KV_SEQUENCE] = out[SEQUENCE]
    out[HEADS], out[KV_HEADS] = sizes[HEADS], sizes[KV_HEADS]
    if sizes[HEADS] % sizes[KV_HEADS] == 0:
        out[HEADS], out[KV_HEADS] = models.reduce(
            sizes[HEADS],
            sizes[KV_HEADS],
            max(ranks(mesh, HEADS), ranks(mesh, KV_HEADS)),
            max(ranks(small, HEADS), ranks(small, KV_HEADS)),
        )
    return {role: out[role] for role in sizes}
