"""The dims of an op's tensor arguments, and which of them belong together.

Dims that are equally large in every call at hand are cut together; which those are is all that is known of
an op that nobody described.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attncheck.fixes import recording
from attncheck.fixes.notation import GIVEN
from attncheck.fixes.recording import Call
from attncheck.runner import compat
from attncheck.runner.signature import KEY, QUERY, VALUE

# A dim of a tensor argument: the tensor, of how many dims it has, which.
Dim = tuple[str, int, int]
# Dims that belong together, in the order of the schema.
Class = tuple[Dim, ...]


def float_tensors(call: Call) -> dict[str, torch.Tensor]:
    return {name: t for name, t in call.tensors.items() if t.is_floating_point()}


def shapes_of(call: Call) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in call.tensors.items()}


def form_key(call: Call) -> tuple[Any, ...]:
    """What tells forms of a call apart: how many dims query, key and value have, whether lengths and other
    integers are given, and words (`BSHD`)."""
    main = {first_tensor(call), *main_tensors(call)}
    shape: list[Any] = []
    for name, value in recording.values(call).items():
        if isinstance(value, str):
            shape.append((name, value))
        elif isinstance(value, torch.Tensor):
            if name in main:
                shape.append((name, value.ndim))
            elif not value.is_floating_point() and value.dtype != torch.bool:
                shape.append((name, GIVEN))
    return tuple(shape)


def classes(calls: Sequence[Call]) -> list[Class]:
    """Dims of tensor arguments that are equally large in every call at hand, in the order of the schema.

    A dim that is 1 in some calls, and as large as those of one class in the others, broadcasts: it belongs
    to them. One that is 1 in all calls belongs to none.
    """
    sizes: dict[Dim, dict[int, int]] = {}
    for at, call in enumerate(calls):
        for name, tensor in call.tensors.items():
            for axis, size in enumerate(tensor.shape):
                sizes.setdefault((name, tensor.ndim, axis), {})[at] = size
    order = {
        a.name: i
        for i, a in enumerate(compat.schema_of(compat.find_overload(calls[0].op)).arguments)
    }
    groups: list[list[Dim]] = []
    for dim in sorted(sizes, key=lambda d: (order[d[0]], d[1], d[2])):
        if set(sizes[dim].values()) != {1}:
            fits = [g for g in groups if _agree(dim, g, sizes, broadcast=False)]
            _preferred(dim, fits, groups).append(dim)
    alone = [g for g in groups if len({d[0] for d in g}) == 1]
    for group in alone:
        if any(1 in sizes[dim].values() for dim in group):
            others = [
                g
                for g in groups
                if g is not group and all(_agree(dim, g, sizes, broadcast=True) for dim in group)
            ]
            if others:
                groups.remove(group)
                _preferred(group[0], others, groups).extend(group)
    return [tuple(group) for group in groups]


def _agree(
    dim: Dim, group: Sequence[Dim], sizes: Mapping[Dim, Mapping[int, int]], broadcast: bool
) -> bool:
    seen = 0
    for other in group:
        for at in sizes[dim].keys() & sizes[other].keys():
            mine, theirs = sizes[dim][at], sizes[other][at]
            if broadcast and mine == 1:
                continue
            if mine != theirs:
                return False
            seen += 1
    return seen > 0


def _preferred(dim: Dim, fits: list[list[Dim]], groups: list[list[Dim]]) -> list[Dim]:
    """A tensor seldom has two dims of one kind: another group first, and a new one where there is none."""
    for group in fits:
        if not any(other[:2] == dim[:2] for other in group):
            return group
    if fits:
        return fits[0]
    groups.append([])
    return groups[-1]


def cuts_of(call: Call, cut: Sequence[Class]) -> dict[str, int] | None:
    """Which dim of each tensor is cut when these classes are; None where a tensor has two of them, and
    where a class has nothing to cut."""
    tensors = call.tensors
    out: dict[str, int] = {}
    for one in cut:
        count = len(out)
        for name, ndim, dim in one:
            if name in tensors and tensors[name].ndim == ndim and tensors[name].shape[dim] > 1:
                if name in out:
                    return None
                out[name] = dim
        if len(out) == count:
            return None
    return dict(sorted(out.items(), key=lambda item: list(tensors).index(item[0])))


def size_of(call: Call, one: Class) -> int:
    """The size of a class in a call."""
    return max(
        (
            call.tensors[name].shape[dim]
            for name, ndim, dim in one
            if name in call.tensors and call.tensors[name].ndim == ndim
        ),
        default=1,
    )


def output_names(call: Call) -> dict[str, str]:
    """What each output is called: by the schema, else `result` or `result_2`; buffers by their own name."""
    returns = compat.schema_of(compat.find_overload(call.op)).returns
    names = {}
    for at, returned in enumerate(returns):
        plain = "result" if len(returns) == 1 else f"result_{at}"
        names[f"#{at}"] = returned.name or plain
    return {**names, **{name: name for name in call.written}}


def first_tensor(call: Call) -> str:
    return next(
        (n for n, t in call.tensors.items() if t.is_floating_point() and t.ndim > 1),
        next(iter(call.tensors), ""),
    )


def main_tensors(call: Call) -> set[str]:
    """Query, key and value; of an op that calls them otherwise, its required tensors with most dims."""
    roles = [
        next((name for name in call.tensors if name.strip("_") in role), None)
        for role in (QUERY, KEY, VALUE)
    ]
    if None not in roles:
        return {name for name in roles if name is not None}
    required = {
        a.name
        for a in compat.schema_of(compat.find_overload(call.op)).arguments
        if str(a.type) == "Tensor" and a.name in float_tensors(call) and a.name not in call.written
    }
    most = max((call.tensors[name].ndim for name in required), default=0)
    return {name for name in required if call.tensors[name].ndim == most}
