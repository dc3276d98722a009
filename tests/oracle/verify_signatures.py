"""Verify the signatures of attncheck.fixes.packages without DTensor: cut, compute piece by piece, compare.

    python tests/oracle/verify_signatures.py 'sdpa*' 'flash_attn*'     # prints what was compared, as JSON

The built-in probes' operators run on whole plain tensors, forward and backward, while every call of an op
that has a signature is recorded. For meshes of one and two axes and each layout that follows, the recorded
arguments are cut as the layout says, the op is called on each piece, and the results, put together as the
layout says, are held against those of the whole call.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import Placement

sys.path.insert(0, str(Path(__file__).parent))

import verified_strategies as strategies
from verify_strategies import Call, Recorder, _distance, recorded

from attncheck import plugins, standins
from attncheck.fixes import packages
from attncheck.fixes.notation import Layout, Refused, Signature, by_op, form_of, layouts, read
from attncheck.fixes.strategies import arguments
from attncheck.probing import Operator, Setting

MESHES = ((2,), (3,), (2, 2))
# Of the largest value. The sums are the same, in an order that may differ, in the dtype of the results.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

__all__ = ["Call", "Recorder", "by_op", "main", "verify", "written"]

Forms = Mapping[str, Sequence[Signature]]


def written(forms: Forms) -> dict[str, tuple[str, ...]]:
    """By op: the arguments that it writes into, by what its signatures say."""
    return {
        op: tuple(n for n, text in described[0].takes.items() if read(text).in_place)
        for op, described in forms.items()
    }


def verify(call: Call, forms: Forms, mesh: Sequence[int]) -> dict[str, float]:
    """By layout: the largest gap between the pieces put together and the whole, 1 being what rounding may do.

    inf where a layout says that there is a result and there is none, or the other way round.
    """
    values = arguments(call.op, (), call.arguments)
    shapes = {n: tuple(v.shape) for n, v in values.items() if isinstance(v, torch.Tensor)}
    form = form_of(forms[str(call.op)], values)
    gaps = {}
    for layout in layouts(form, values, shapes, mesh):
        try:
            gaps[", ".join(layout.ways)] = max(_gaps(call, layout, mesh), default=0.0)
        except RuntimeError:  # the kernel refuses its pieces
            gaps[", ".join(layout.ways)] = torch.inf
    return gaps


def _gaps(call: Call, layout: Layout, mesh: Sequence[int]) -> Iterator[float]:
    ranks = list(itertools.product(*map(range, mesh)))
    ran = {rank: _on_rank(call, layout, rank, mesh) for rank in ranks}
    for at, (whole, placed) in enumerate(zip(call.results, layout.gives, strict=True)):
        if placed is None:
            # DTensor hands on numbers, None, and tensors without dims, and nothing else.
            if isinstance(whole, torch.Tensor) and whole.ndim:
                yield torch.inf
        elif not isinstance(whole, torch.Tensor):
            yield torch.inf
        else:
            yield _gap({rank: results[at] for rank, (results, _) in ran.items()}, placed, whole)
    for name, whole in call.buffers.items():
        yield _gap({rank: b[name] for rank, (_, b) in ran.items()}, layout.takes[name], whole)


def _on_rank(
    call: Call, layout: Layout, rank: Sequence[int], mesh: Sequence[int]
) -> tuple[tuple[Any, ...], dict[str, torch.Tensor]]:
    """Results and buffers of the op on this rank's pieces."""
    given = {
        name: _cut(value, layout.takes[name], rank, mesh).clone()
        if isinstance(value, torch.Tensor)
        else value
        for name, value in call.arguments.items()
    }
    values = list(given.items())
    returned = call.op(
        *(value for _, value in values[: call.positional]), **dict(values[call.positional :])
    )
    results = returned if isinstance(returned, tuple) else (returned,)
    return results, {name: given[name] for name in call.buffers}


def _cut(
    whole: torch.Tensor, placed: Sequence[Placement], rank: Sequence[int], mesh: Sequence[int]
) -> torch.Tensor:
    for placement, at, ranks in zip(placed, rank, mesh, strict=True):
        if placement.is_shard():
            pieces = whole.chunk(ranks, placement.dim)  # type: ignore[attr-defined]
            assert len(pieces) == ranks, "a rank without rows"
            whole = pieces[at]
    return whole


def _gap(
    pieces: Mapping[tuple[int, ...], torch.Tensor],
    placed: Sequence[Placement],
    whole: torch.Tensor,
) -> float:
    """Puts the last mesh axis together first, as it was cut last."""
    apart = 0.0
    for placement in reversed(placed):
        groups: dict[tuple[int, ...], list[torch.Tensor]] = defaultdict(list)
        for rank in sorted(pieces):
            groups[rank[:-1]].append(pieces[rank])
        joined = {}
        for rank, parts in groups.items():
            if placement.is_shard():
                dim: int = placement.dim  # type: ignore[attr-defined]
                if len({(p.shape[:dim], p.shape[dim + 1 :]) for p in parts}) > 1:
                    return torch.inf  # they are no parts of one tensor
                joined[rank] = torch.cat(parts, dim)
            elif placement.is_partial():
                joined[rank] = torch.stack(parts).sum(0)
            else:
                apart = max(apart, *(_distance(part, parts[0]) for part in parts))
                joined[rank] = parts[0]
        pieces = joined
    return max(apart, _distance(pieces[()], whole)) / CLOSE.get(whole.dtype, 1e-5)


def differs_from_the_table(call: Call, forms: Forms, ranks: int) -> str:
    """Where a signature and the table written by hand for the same op do not agree, or ''."""
    name = str(call.op)
    values = arguments(call.op, (), call.arguments)
    shapes = {n: tuple(v.shape) for n, v in values.items() if isinstance(v, torch.Tensor)}
    made = {
        layout.ways[0]: layout
        for layout in layouts(form_of(forms[name], values), values, shapes, (ranks,))
    }
    if not _in_a_table(name, shapes):
        return ""
    undefined = strategies._undefined(name, call.arguments)
    for row in strategies.rows(name, shapes, ranks, undefined):
        layout = made.get(row.pattern)
        if layout is None:
            return f"{name}: no {row.pattern} on {ranks}"
        takes = {n: _as_in_a_table(p[0]) for n, p in layout.takes.items()}
        if takes != row.arguments:
            return f"{name}: {row.pattern} takes {takes}, by hand {row.arguments}"
        for at, (given, absent) in enumerate(zip(layout.gives, row.absent, strict=True)):
            if given is not None and not absent and _as_in_a_table(given[0]) != row.results[at]:
                return f"{name}: {row.pattern} gives {given} at {at}, by hand {row.results[at]}"
    extra = {"batch", "heads", "replicate"} & set(made)
    missing = {row.pattern for row in strategies.rows(name, shapes, ranks, undefined)}
    return "" if extra == missing else f"{name}: {extra} on {ranks}, by hand {missing}"


def _in_a_table(op: str, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether the tables know tensors with so many dims: they know no slopes by batch, and no pages."""
    packed = op in strategies.PACKED and any(len(shapes.get(n, ())) for n in strategies._STARTS)
    table = (strategies.PACKED if packed else strategies.TABLES)[op]
    roles = {**table.arguments, **table.buffers}
    return all(len(roles[name]) == len(shape) for name, shape in shapes.items() if name in roles)


def _as_in_a_table(placement: Placement) -> int | str | None:
    if placement.is_partial():
        return "sum"
    return placement.dim if placement.is_shard() else None  # type: ignore[attr-defined]


# --- the built-in probes' operators ----------------------------------------------------------------


def operators() -> Iterator[Operator]:
    for file in sorted(plugins.builtin_dir("probes").glob("*.py")):
        yield from plugins.load_probe_file(file).operators


def settings(operator: Operator) -> Iterator[Setting]:
    """Without dropout; once more with three times the heads, so
    that 3 ranks get some, and where heads are grouped with one kv head for all."""
    for setting in operator.settings:
        if setting.dropout:
            continue
        yield setting
        heads, kv_heads = setting.sizes.get("heads", 0), setting.sizes.get("kv_heads", 0)
        if heads and kv_heads:
            more = {"heads": 3 * heads, "kv_heads": 3 * kv_heads if kv_heads > 1 else 1}
            yield replace(setting, name=f"{setting.name}_3", sizes={**setting.sizes, **more})
            if heads > kv_heads > 1 and not setting.get("grouped"):
                one = {**setting.sizes, "kv_heads": 1}
                yield replace(setting, name=f"{setting.name}_1", sizes=one)


def main(
    globs: Sequence[str],
    names: Collection[str] = (),
    signatures: Sequence[Signature] = packages.known(),
) -> dict[str, Any]:
    """What there is to say of the calls that operators make, in the settings of these names (all).

    `gaps`: op -> layout and mesh -> the largest gap, 1 being what rounding may do. `refused`: op -> why a
    call got no layout. `failed`: operator -> why it did not run on whole tensors. `tables`: where signatures
    differ from tables written by hand. `forms`: how many calls each had.
    """
    forms = by_op(signatures)
    gaps: dict[str, dict[str, float]] = defaultdict(dict)
    refused: dict[str, set[str]] = defaultdict(set)
    failed: dict[str, set[str]] = defaultdict(set)
    tables: set[str] = set()
    count: dict[str, int] = defaultdict(int)
    for operator in operators():
        if not any(fnmatch.fnmatchcase(operator.name, g.replace("[", "[[]")) for g in globs):
            continue
        if not set(operator.kernel_ops) & set(forms):
            continue
        try:
            for name in operator.standins:
                standins.provide(name)
            if operator.missing is not None and operator.missing():
                continue
        except ImportError:  # its package is not here
            continue
        for setting in settings(operator):
            if names and setting.name not in names:
                continue
            try:
                calls = recorded(operator, setting, written(forms))
            except (RuntimeError, ValueError) as error:  # whole tensors it refuses too
                failed[operator.name].add(str(error).splitlines()[0])
                continue
            for call in calls:
                op = str(call.op)
                try:
                    form = form_of(forms[op], arguments(call.op, (), call.arguments))
                    count[f"{op} {forms[op].index(form)}"] += 1
                    for mesh in MESHES:
                        for ways, gap in verify(call, forms, mesh).items():
                            key = f"{ways} on {mesh}"
                            gaps[op][key] = max(gaps[op].get(key, 0.0), gap)
                        if op in strategies.TABLES and len(mesh) == 1:
                            tables |= {differs_from_the_table(call, forms, mesh[0])} - {""}
                except Refused as error:
                    refused[op].add(str(error))
    return {
        "gaps": dict(gaps),
        "refused": {op: sorted(why) for op, why in refused.items()},
        "failed": {name: sorted(why) for name, why in failed.items()},
        "tables": sorted(tables),
        "forms": dict(count),
    }


if __name__ == "__main__":
    # The tensors are small, and on a busy machine threads wait for each other.
    torch.set_num_threads(1)
    print(json.dumps(main(sys.argv[1:] or ["*"]), indent=1))
