"""A signature against calls that were not used to find it, and the arguments under which queries hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import Placement, Shard

from attncheck.fixes import recording
from attncheck.fixes.notation import BATCH, GIVEN, HEADS, QUERIES, Refused, Signature, layouts
from attncheck.fixes.recording import INAPPLICABLE, SUM, WHOLE, Bench, Call, Placed
from attncheck.fixes.synthesis.description import Form
from attncheck.fixes.synthesis.dims import Class, shapes_of
from attncheck.fixes.synthesis.search import Row
from attncheck.fixes.synthesis.variations import RANKS
from attncheck.runner import compat


def check(
    out: Form,
    found: Sequence[Call],
    held: Sequence[Call],
    bench: Bench,
    letters: Mapping[Class, str],
) -> tuple[str, str] | None:
    """The first way that the signature offers and that does not hold, and why; None where all do.

    Learns on the way under which arguments queries may be cut.
    """
    calls = [*found, *held]
    out.queries = {} if QUERIES in letters.values() else None
    out.checks = 0
    good: list[Call] = []
    bad: list[tuple[Call, str]] = []
    tested: dict[str, int] = {}
    for call in calls:
        for way, ranks, why in _outcomes(out.signature(), call, bench):
            if way == "queries":
                if why:
                    bad.append((call, why))
                else:
                    good.append(call)
            elif why:
                return way, f"fails on {ranks} ranks in {call.label}: {why}"
            if any(call is one for one in held):
                out.checks += 1
                tested[way] = tested.get(way, 0) + (not why)
    wanted = {
        "batch": BATCH in letters.values(),
        "heads": HEADS in letters.values(),
        "queries": QUERIES in letters.values(),
    }
    for way, is_wanted in wanted.items():
        if is_wanted and not tested.get(way):
            return way, "nothing that was held out could be laid out so and agreed"
    if QUERIES in letters.values():
        failed = [call for call, _ in bad]
        held_there = [call for call in good if not any(call is one for one in failed)]
        out.queries = conditions(held_there, failed)
        if out.queries is None:
            return "queries", (
                f"fails in {bad[0][0].label} ({bad[0][1]}), and no argument tells such calls from those "
                "where it holds"
            )
    return None


def _outcomes(signature: Signature, call: Call, bench: Bench) -> Iterator[tuple[str, int, str]]:
    """(way, ranks, '' or why it is wrong) of all that a signature offers for a call."""
    values, shapes = recording.values(call), shapes_of(call)
    for ranks in RANKS:
        try:
            offered = layouts(signature, values, shapes, (ranks,))
        except Refused:
            return
        for layout in offered:
            way = layout.ways[0]
            if way == "replicate":
                continue
            lying = {name: _as_placed(placed[0]) for name, placed in layout.takes.items()}
            cuts = {name: at for name, at in lying.items() if isinstance(at, int)}
            expected = _expected(call, layout.takes, layout.gives)
            if isinstance(expected, str):
                yield way, ranks, expected
                continue
            row = bench.cut(call, cuts, ranks, expected)
            if row != INAPPLICABLE:
                yield way, ranks, row if isinstance(row, str) else ""


def _expected(
    call: Call,
    takes: Mapping[str, tuple[Placement, ...]],
    gives: Sequence[tuple[Placement, ...] | None],
) -> Row | str:
    """Where a layout says that the outputs of a call lie."""
    row: Row = {}
    for at, placed in enumerate(gives):
        made = f"#{at}" in call.outputs
        if made != (placed is not None):
            return f"result {at} is {'there' if made else 'missing'}"
        if placed is not None:
            row[f"#{at}"] = _as_placed(placed[0])
    for name in call.written:
        if name in takes:
            row[name] = _as_placed(takes[name][0])
    return row


def _as_placed(placement: Placement) -> Placed:
    if isinstance(placement, Shard):
        return placement.dim
    return SUM if placement.is_partial() else WHOLE


def conditions(good: Sequence[Call], bad: Sequence[Call]) -> dict[str, Any] | None:
    """The values of arguments under which something holds that held in `good` calls and failed in `bad`
    ones; None where no argument tells them apart.

    Careful: of a flag, a word and a whole number that is no size, what was not seen to hold is left out.
    Numbers that are not whole, and sizes, only count where nothing else tells.
    """
    if not good:
        return None
    declared = compat.schema_of(compat.find_overload(good[0].op)).arguments
    out: dict[str, Any] = {}
    spare: dict[str, list[Any]] = {}
    for argument in declared:
        name = argument.name
        held = [token_of(recording.value_of(call, name)) for call in good]
        failed = [token_of(recording.value_of(call, name)) for call in bad]
        if any(token is OTHER for token in (*held, *failed)):
            continue
        allowed = list(dict.fromkeys(held))
        if _is_tensor_type(argument):
            if len(allowed) == 1 and set(failed) - set(allowed):
                out[name] = allowed[0]
            continue
        kinds = {type(token) for token in (*held, *failed)} - {type(None)}
        if kinds == {str}:
            continue  # a form of its own
        if kinds == {bool}:
            if len(allowed) == 1:
                out[name] = allowed[0]
        elif kinds == {float} or (kinds == {int} and _is_size(name, good)):
            spare[name] = allowed
        elif kinds == {int} and len(allowed) > 2 and not set(failed) - set(allowed):
            continue  # it varied, and nothing came of it
        elif kinds:
            out[name] = allowed[0] if len(allowed) == 1 else tuple(allowed)

    def told(call: Call, name: str, allowed: Any) -> bool:
        options = allowed if isinstance(allowed, tuple) else (allowed,)
        return token_of(recording.value_of(call, name)) not in options

    for call in bad:
        if any(told(call, name, allowed) for name, allowed in out.items()):
            continue
        for name, options in spare.items():
            if token_of(recording.value_of(call, name)) not in options and len(options) <= 4:
                out[name] = options[0] if len(options) == 1 else tuple(options)
                break
        else:
            return None
    return out


OTHER = object()


def token_of(value: Any) -> Any:
    """A value as conditions have it: a literal, None, or that a tensor is given."""
    if isinstance(value, torch.Tensor):
        return GIVEN
    return value if value is None or isinstance(value, (bool, int, float, str)) else OTHER


def _is_tensor_type(argument: Any) -> bool:
    return "Tensor" in str(argument.type)


def _is_size(name: str, calls: Sequence[Call]) -> bool:
    """Whether a number is the size of some dim in every call: `max_seqlen_q`, `head_num`."""
    return all(
        any(recording.value_of(call, name) in t.shape for t in call.tensors.values())
        for call in calls
    )
