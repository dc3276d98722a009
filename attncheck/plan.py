"""Probes x settings x placements x directions -> cases, in an order that is cheap to run. Torch-free."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from attncheck.errors import UserError, unknown
from attncheck.model import Case, case_id
from attncheck.probing import EXPLICIT, LEVELS, PATTERNS, Operator, Probe, Setting, Tensor

DIRECTIONS = ("forward", "backward")
ROUTES = ("dtensor",)
AXIS_NAMES = {1: ("tp",), 2: ("dp", "tp"), 3: ("pp", "dp", "tp")}
_NUMBER = re.compile("[0-9]{1,4}")
QUICK_PLACEMENTS = ("replicate", "batch", "heads", "sequence", "query")


@dataclass(frozen=True)
class Selection:
    """What to run. Each of the first five is a tuple of globs, empty for all; names that match nothing
    are errors."""

    operators: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    placements: tuple[str, ...] = ()
    directions: tuple[str, ...] = ()
    routes: tuple[str, ...] = ()
    level: str = "default"


def parse_mesh(text: str) -> dict[str, int]:
    """`4`, `2x2`, `dp=2,tp=4` to {axis: size}. Raises UserError.

    >>> parse_mesh("2x3")
    {'dp': 2, 'tp': 3}
    """
    expected = "expected sizes like 2x2 or named axes like dp=2,tp=2"
    parts = re.split(r"[x,]", text.strip())
    if "=" in text:
        pairs = [part.partition("=") for part in parts]
        if any(not name.isidentifier() or not _NUMBER.fullmatch(size) for name, _, size in pairs):
            raise UserError(f"Mesh {text!r} is not a mesh: {expected}.")
        mesh = {name: int(size) for name, _, size in pairs}
        if len(mesh) != len(pairs):
            raise UserError(f"Mesh {text!r} names an axis twice.")
    else:
        if any(not _NUMBER.fullmatch(part) for part in parts):
            raise UserError(f"Mesh {text!r} is not a mesh: {expected}.")
        if len(parts) not in AXIS_NAMES:
            raise UserError(
                f"Mesh {text!r} has {len(parts)} axes: up to 3, or name them (dp=2,...)."
            )
        mesh = dict(zip(AXIS_NAMES[len(parts)], map(int, parts), strict=True))
    if any(size < 1 for size in mesh.values()):
        raise UserError(f"Mesh {text!r} has an axis of size 0: every axis needs at least 1 rank.")
    return mesh


def placement_texts(tensor: Tensor, patterns: Sequence[str], first: bool) -> tuple[str, ...]:
    """What a pattern per mesh axis means for one tensor: `("S(1)",)`; `("plain",)` for a plain one."""
    if tensor.wrap == "plain":
        return ("plain",)
    if tensor.wrap == "replicate":
        return ("R",) * len(patterns)
    out = []
    for pattern in patterns:
        if pattern == "partial" and first:
            out.append("P(sum)")
            continue
        dim = next((i for i, role in enumerate(tensor.dims) if role in PATTERNS[pattern]), None)
        out.append("R" if dim is None else f"S({dim})")
    return tuple(out)


def _texts(
    tensor: Tensor, setting: Setting, patterns: Sequence[str], axes: int, first: bool
) -> tuple[str, ...]:
    if not setting.explicit or tensor.wrap == "plain":
        return placement_texts(tensor, patterns, first)
    return setting.explicit.get(tensor.name, ("R",) * axes)


def _check_explicit(operator: Operator, setting: Setting, tensors: Sequence[Tensor]) -> None:
    """Raises UserError where a setting places tensors in a way that cannot be."""
    by_name = {tensor.name: tensor for tensor in tensors}
    for name, texts in setting.explicit.items():
        where = f"Operator {operator.name}, setting {setting.name}"
        if name not in by_name:
            raise UserError(f"{where} places {name!r}; its tensors are {', '.join(by_name)}.")
        dims = len(by_name[name].dims)
        known = {"R", "P(sum)", *(f"S({dim})" for dim in range(dims))}
        for text in texts:
            if text not in known:
                raise UserError(
                    f"{where} places {name} as {text!r}; expected R, P(sum) or S(dim) of its "
                    f"{dims} dims."
                )


def patterns_for(
    operator: Operator, setting: Setting, level: str, axes: int
) -> list[tuple[str, ...]]:
    """The placement patterns of a setting: one name per mesh axis.

    `full` runs every pattern. A mesh of several axes gets batch on the first axis with each pattern on
    the last, and each pattern on all axes at once. A setting that places each tensor itself has that
    alone, on meshes of as many axes.
    """
    if setting.explicit:
        fits = all(len(texts) == axes for texts in setting.explicit.values())
        return [(EXPLICIT,)] if fits else []
    if level == "full":
        singles = tuple(PATTERNS)
    else:
        singles = setting.placements or operator.placements
        if level == "quick":
            singles = tuple(p for p in singles if p in QUICK_PLACEMENTS)
    if axes == 1:
        return [(p,) for p in singles]
    pairs = [("replicate",) * (axes - 1) + (p,) for p in singles]
    pairs += [("batch",) + ("replicate",) * (axes - 2) + (p,) for p in singles]
    pairs += [(p,) * axes for p in singles if p not in ("replicate", "partial")]
    return list(dict.fromkeys(pairs))


def plan(
    probes: Iterable[Probe],
    mesh: Mapping[str, int],
    selection: Selection,
    beside: Collection[str] = (),
) -> tuple[Case, ...]:
    """Every selected case on one mesh: see `plan_meshes`."""
    return plan_meshes(probes, (mesh,), selection, beside)


def plan_meshes(
    probes: Iterable[Probe],
    meshes: Sequence[Mapping[str, int]],
    selection: Selection,
    beside: Collection[str] = (),
) -> tuple[Case, ...]:
    """Every selected case: mesh after mesh, and on each of them cheap and safe ones first.

    `beside`: names of operators of which no case can be made, and the report says why; asking for one is
    no mistake. Raises UserError for a selector that matches nothing on any mesh, or when nothing is left.
    """
    probes = tuple(probes)
    _check_selection(probes, meshes, selection, beside)
    cases = tuple(case for mesh in meshes for case in _plan_mesh(probes, mesh, selection))
    if not cases and not any(matches(name, selection.operators) for name in beside):
        raise UserError(
            "Nothing to run: no case matches the chosen operators, settings, placements and directions "
            f"together at level {selection.level}; `attncheck list --cases` shows what there is."
        )
    return cases


def _plan_mesh(
    probes: Sequence[Probe], mesh: Mapping[str, int], selection: Selection
) -> Iterator[Case]:
    ranked = []
    for probe_at, probe in enumerate(probes):
        for operator_at, operator in enumerate(probe.operators):
            if not matches(operator.name, selection.operators):
                continue
            for setting_at, setting in enumerate(operator.settings):
                if not _wanted_setting(setting, selection):
                    continue
                for case, risk in _cases(probe, operator, setting, mesh, selection):
                    # What may end the process loses every propagation that was paid for: last.
                    # Operators that share a setting share its propagation: together.
                    key = (risk, operator.slow, probe_at, setting_at, operator_at)
                    ranked.append((key, case))
    ranked.sort(key=lambda pair: pair[0])
    return (case for _, case in ranked)


def _cases(
    probe: Probe,
    operator: Operator,
    setting: Setting,
    mesh: Mapping[str, int],
    selection: Selection,
) -> Iterator[tuple[Case, int]]:
    tensors = operator.tensors(setting)
    _check_explicit(operator, setting, tensors)
    directions = DIRECTIONS if any(t.requires_grad for t in tensors) else ("forward",)
    seen = set()
    # A placement asked for by name is run even where the level would leave it out.
    level = "full" if selection.placements else selection.level
    for patterns in patterns_for(operator, setting, level, len(mesh)):
        name = ",".join(patterns)
        if not matches(name, selection.placements):
            continue
        placements = {
            t.name: _texts(t, setting, patterns, len(mesh), first=i == 0)
            for i, t in enumerate(tensors)
        }
        key = tuple(placements.values())
        if key in seen:
            continue  # a pattern whose roles this operator does not have is `replicate` again
        seen.add(key)
        risk = _risk(tensors, placements, tuple(mesh.values()))
        for direction in directions:
            if not matches(direction, selection.directions):
                continue
            yield (
                Case(
                    id=case_id(
                        probe.name, operator.name, setting.name, "dtensor", mesh, name, direction
                    ),
                    probe=probe.name,
                    operator=operator.name,
                    route="dtensor",
                    setting=setting.to_dict(),
                    mesh=dict(mesh),
                    placement=name,
                    placements=placements,
                    direction=direction,
                    function=operator.function,
                    communicates=operator.communicates,
                    tensor_bytes={t.name: _bytes(t, setting) for t in tensors},
                    tensor_dims={t.name: t.dims for t in tensors},
                    tensor_sizes={t.name: t.sizes for t in tensors},
                ),
                risk,
            )


def _bytes(tensor: Tensor, setting: Setting) -> int:
    """What a whole tensor takes. The width of an element is in the name of its dtype, but for bool."""
    bool_mask = tensor.fill == "bool_mask"
    dtype = "bool" if bool_mask else tensor.dtype or setting.dtype
    width = re.search(r"\d+", dtype)
    return math.prod(tensor.sizes) * (int(width[0]) // 8 if width else 1)


def _wanted_setting(setting: Setting, selection: Selection) -> bool:
    if setting.name in selection.settings:  # named outright: whatever its level
        return True
    within = LEVELS.index(setting.level) <= LEVELS.index(selection.level)
    return within and matches(setting.name, selection.settings)


def matches(name: str, globs: Sequence[str]) -> bool:
    # Brackets are part of names (`sdpa[MATH]`), so a glob may use * and ? only.
    return not globs or any(
        name == glob or fnmatch.fnmatchcase(name, glob.replace("[", "[[]")) for glob in globs
    )


def _check_selection(
    probes: Sequence[Probe],
    meshes: Sequence[Mapping[str, int]],
    selection: Selection,
    beside: Collection[str],
) -> None:
    operators = [o for p in probes for o in p.operators]
    patterns = {
        ",".join(names)
        for axes in {len(mesh) for mesh in meshes}
        for o in operators
        for s in o.settings
        for names in patterns_for(o, s, "full", axes)
    }
    known = {
        "operator": (selection.operators, {*beside, *(o.name for o in operators)}),
        "setting": (selection.settings, {s.name for o in operators for s in o.settings}),
        "placement": (selection.placements, patterns or set(PATTERNS)),
        "direction": (selection.directions, set(DIRECTIONS)),
        "route": (selection.routes, set(ROUTES)),
        "level": ((selection.level,), set(LEVELS)),
    }
    for kind, (globs, names) in known.items():
        for glob in globs:
            if not any(matches(name, (glob,)) for name in names):
                raise unknown(kind, glob, names)


def _risk(
    tensors: Sequence[Tensor], placements: Mapping[str, tuple[str, ...]], mesh: Sequence[int]
) -> int:
    """0: nothing known. 1: a partial input, where ranks have been seen to choose differently and hang.
    2: an empty shard, which has been seen to kill the process inside a kernel."""
    if _has_empty_shard(tensors, placements, mesh):
        return 2
    return int(any("P(sum)" in texts for texts in placements.values()))


def _has_empty_shard(
    tensors: Sequence[Tensor],
    placements: Mapping[str, tuple[str, ...]],
    mesh: Sequence[int],
) -> bool:
    """Whether some rank holds no rows of some tensor (torch.chunk leaves the last ranks empty)."""
    for tensor in tensors:
        axes: dict[int, list[int]] = {}
        for placement, parts in zip(placements[tensor.name], mesh, strict=False):
            if placement.startswith("S("):
                axes.setdefault(int(placement[2:-1]), []).append(parts)
        if any(_fewest_rows(tensor.sizes[dim], parts) == 0 for dim, parts in axes.items()):
            return True
    return False


def _fewest_rows(size: int, axes: Sequence[int]) -> int:
    """What the rank with fewest rows gets where one axis after the other splits them like torch.chunk.

    >>> _fewest_rows(7, [2, 3]), _fewest_rows(7, [3, 2])  # 4 and 3, then 2, 2, 0; 3, 3, 1, then 2, 1 and 1, 0
    (0, 0)
    """
    sizes = {size}
    for parts in axes:
        sizes = {
            max(0, min(rows, one - at * rows))
            for one in sizes
            for rows in (-(-one // parts),)
            for at in range(parts)
        }
    return min(sizes)


def settings_by_name(operator: Operator) -> dict[str, Setting]:
    return {setting.name: setting for setting in operator.settings}


def count_by(cases: Iterable[Case], attribute: str) -> dict[str, int]:
    """How many cases per value of a Case attribute, in order of first appearance."""
    out: dict[str, int] = {}
    for case in cases:
        value = str(getattr(case, attribute))
        out[value] = out.get(value, 0) + 1
    return out
