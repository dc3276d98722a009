"""A form of the call in the notation of signatures, from the rows that were found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attncheck.errors import UserError
from attncheck.fixes import recording
from attncheck.fixes.notation import (
    BATCH,
    HEADS,
    KV_HEADS,
    QUERIES,
    Refused,
    Signature,
    results_shapes,
)
from attncheck.fixes.recording import SUM, Call, Placed
from attncheck.fixes.synthesis.dims import Class, Dim, output_names, shapes_of
from attncheck.fixes.synthesis.search import HEADS_AND_KV, Search
from attncheck.runner import compat

# Names for dims that are never sharded.
OTHERS = ("n", "m", "r", "s", "t", "u", "w", "x", "y", "z")


@dataclass(frozen=True)
class Rejected:
    """A way to shard that held on the calls it was found with, and why it is not offered."""

    way: str
    why: str


@dataclass
class Form:
    """One form of the call: what is known of it. `fake`: its results are described such that a Meta kernel
    can be made of it."""

    calls: list[Call]
    fake: bool
    takes: dict[str, str] = field(default_factory=dict)
    gives: dict[str, str] = field(default_factory=dict)
    queries: dict[str, Any] | None = None
    tried: int = 0
    valid: int = 0
    checks: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    beyond: list[str] = field(default_factory=list)
    verified_on: list[str] = field(default_factory=list)

    def signature(self) -> Signature:
        return Signature(self.calls[0].op, self.takes, self.gives, queries=self.queries)


def describe_form(
    out: Form, search: Search, letters: Mapping[Class, str], found: Sequence[Call]
) -> None:
    names = _names(search, letters)
    of_dim = {dim: names[one] for one in search.classes for dim in one}
    out.takes = {}
    placed = _placed(search, letters)
    declared = compat.schema_of(compat.find_overload(found[0].op)).arguments
    for argument in declared:
        forms = {
            call.tensors[argument.name].ndim: call
            for call in out.calls
            if argument.name in call.tensors
        }
        if not forms:
            continue
        if not any(argument.name in call.tensors for call in found):
            continue
        text = _argument_text(argument.name, forms, of_dim, search, letters)
        if text is None:
            continue
        if any(argument.name in call.written for call in found):
            text += ", in place"
        out.takes[argument.name] = text
    out.gives = {}
    called = output_names(found[0])
    for at in range(len(found[0].results)):
        out.gives[called[f"#{at}"]] = _result_text(f"#{at}", out, placed, of_dim, found)


def _names(search: Search, letters: Mapping[Class, str]) -> dict[Class, str]:
    """A name for every class: those that are sharded have theirs."""
    names = dict(letters)
    taken = {*letters.values(), BATCH, HEADS, KV_HEADS}

    def give(one: Class, *wishes: str) -> None:
        spare = (*OTHERS, *(f"n{at}" for at in range(len(search.classes))))
        names[one] = next(wish for wish in (*wishes, *spare) if wish not in taken)
        taken.add(names[one])

    last = [c for c in search.classes if any(n == search.first and d == nd - 1 for n, nd, d in c)]
    mine = [c for c in search.classes if search._has_first(c) and c not in names and c not in last]
    for one in search.classes:
        if one in names:
            continue
        if one in last:
            give(one, "d")
        elif search._has_first(one):
            # `sq` is what is left of the query; it is cut only where `queries` says when.
            give(one, *(("sq",) if len(mine) == 1 else ()))
        elif all(dim == ndim - 1 and ndim > 2 for _, ndim, dim in one):
            give(one, "dv")
        elif len({name for name, _, _ in one}) > 1:
            give(one, "sk")
        else:
            give(one)
    return names


def _placed(search: Search, letters: Mapping[Class, str]) -> dict[str, dict[str, set[Placed]]]:
    """output -> letter -> where it lies when that is cut."""
    by_letter = {name: one for one, name in letters.items()}
    rows: list[tuple[str, tuple[Class, ...]]] = []
    for name in (BATCH, HEADS, QUERIES):
        if name in by_letter:
            rows.append((name, (by_letter[name],)))
    if HEADS in by_letter and KV_HEADS in by_letter:
        rows.append((HEADS_AND_KV, (by_letter[HEADS], by_letter[KV_HEADS])))
    out: dict[str, dict[str, set[Placed]]] = {}
    for letter, cut in rows:
        for row in search.row(*cut).values():
            if isinstance(row, dict):
                for name, at in row.items():
                    out.setdefault(name, {}).setdefault(letter, set()).add(at)
    return out


def _argument_text(
    name: str,
    forms: Mapping[int, Call],
    of_dim: Mapping[Dim, str],
    search: Search,
    letters: Mapping[Class, str],
) -> str | None:
    """None for a tensor of which a dim was 1 in all calls, so that nobody knows what it is."""
    texts = []
    sharded = False
    for ndim, call in sorted(forms.items()):
        dims = [of_dim.get((name, ndim, at)) for at in range(ndim)]
        if None in dims:
            # 1 wherever it was seen: where the op takes nothing else there is nothing to know.
            if any(d is None and (name, ndim, at) not in search.ones for at, d in enumerate(dims)):
                return None
            dims = ["one" if d is None else d for d in dims]
        sharded = sharded or any(d in (*letters.values(), QUERIES) for d in dims)
        texts.append(" ".join(str(d) for d in dims))
        is_float = call.tensors[name].is_floating_point()
        if ndim == 0 or (not is_float and not sharded):
            return "replicated"
    return " | ".join(dict.fromkeys(texts))


def _result_text(
    name: str,
    out: Form,
    placed: Mapping[str, Mapping[str, set[Placed]]],
    of_dim: Mapping[Dim, str],
    found: Sequence[Call],
) -> str:
    having = [call for call in out.calls if name in call.outputs]
    if not having:
        return "none"
    shown = [call for call in found if name in call.outputs] or having
    condition, of_argument = _present_if(name, having, out, of_dim)
    rows = placed.get(name, {})
    summed = [
        letter
        for letter, keys in (
            (BATCH, (BATCH,)),
            (HEADS, (HEADS, HEADS_AND_KV)),
            (QUERIES, (QUERIES,)),
        )
        if any(SUM in rows.get(key, ()) for key in keys)
    ]
    like = of_argument or _like(name, having, out.takes, rows)
    if like:
        over = f", summed over {' '.join(summed)}" if summed else ""
        return f"like {like}{over}{condition}{_dtype(name, out, having)}"
    ndim = shown[0].outputs[name].ndim
    cut: dict[int, str] = {}
    for letter, places in rows.items():
        for at in places:
            if isinstance(at, int):
                cut[at] = letter
    # Under heads a result is cut along whichever of the two it has.
    for at, letter in list(cut.items()):
        if letter == HEADS_AND_KV:
            alone = rows.get(HEADS, set())
            grouped = bool(alone) and at not in alone
            grouped = grouped or any(
                call.outputs[name].shape[at] != _letter_size(call, HEADS, of_dim) for call in having
            )
            cut[at] = KV_HEADS if grouped else HEADS
    if not cut and not summed:
        same = next((arg for arg in out.takes if _is_like(arg, name, having)), "")
        if same and out.takes[same] == "replicated":
            return f"like {same}{condition}{_dtype(name, out, having)}"
        sizes = [
            _by_size(having, name, at, of_dim, set())
            if (one := _constant(having, name, at)) is None
            else str(one)
            for at in range(ndim)
        ]
        text = " ".join(["replicated", *sizes]) if out.fake and all(sizes) else "replicated"
        return text + condition + _dtype(name, out, having)
    used = set(cut.values())
    dims = []
    for at in range(ndim):
        letter = cut.get(at) or _by_size(having, name, at, of_dim, used)
        if not letter:
            size = _constant(having, name, at) if out.fake else None
            letter = f"r{at}" if size is None else str(size)
        used.add(letter)
        dims.append(letter)
    text = " ".join(dims)
    if summed:
        text += f", summed over {' '.join(summed)}"
    return text + condition + _dtype(name, out, having)


def _letter_size(call: Call, letter: str, of_dim: Mapping[Dim, str]) -> int:
    return max(
        (
            call.tensors[name].shape[at]
            for (name, ndim, at), known in of_dim.items()
            if known == letter and name in call.tensors and call.tensors[name].ndim == ndim
        ),
        default=1,
    )


def _constant(calls: Sequence[Call], name: str, at: int) -> int | None:
    sizes = {call.outputs[name].shape[at] for call in calls if call.outputs[name].ndim > at}
    return sizes.pop() if len(sizes) == 1 else None


def _by_size(
    calls: Sequence[Call], name: str, at: int, of_dim: Mapping[Dim, str], used: set[str]
) -> str:
    """The argument's dim that is as large in every call, if there is one that has not been given away."""
    for letter in dict.fromkeys(of_dim.values()):
        if letter not in used and all(
            _letter_size(call, letter, of_dim) == call.outputs[name].shape[at]
            for call in calls
            if call.outputs[name].ndim > at
        ):
            return letter
    return ""


def _like(
    name: str,
    having: Sequence[Call],
    takes: Mapping[str, str],
    rows: Mapping[str, set[Placed]],
) -> str:
    """The argument whose gradient it is: as large in every call, and a sum where that broadcasts."""
    if not any(SUM in places and len(places) > 1 for places in rows.values()):
        return ""
    return next((arg for arg in takes if _is_like(arg, name, having)), "")


def _is_like(arg: str, output: str, having: Sequence[Call]) -> bool:
    """Whether an output is as large as an argument in every call."""
    return all(
        arg in call.tensors and call.tensors[arg].shape == call.outputs[output].shape
        for call in having
    )


def _present_if(
    name: str, having: Sequence[Call], out: Form, of_dim: Mapping[Dim, str]
) -> tuple[str, str]:
    """`, if grad_input_mask[3]`: the argument by which a result is there or not. And the argument that it is
    the gradient of, where it is there only with that."""
    calls = out.calls
    there = [name in call.outputs for call in calls]
    if all(there):
        return "", ""
    few = [_letter_size(call, KV_HEADS, of_dim) for call in calls]
    many = [_letter_size(call, HEADS, of_dim) for call in calls]
    if there == [a != b for a, b in zip(few, many, strict=True)]:
        return ", if grouped", ""
    likes = ["", *(arg for arg in out.takes if _is_like(arg, name, having))]
    conditions = dict(_told_by(calls))
    for like in likes:
        given = [not like or like in call.tensors for call in calls]
        if like and given == there:
            return "", like
        for text, told in conditions.items():
            if there == [a and b for a, b in zip(told, given, strict=True)]:
                return f", if {text}", like
    raise UserError(
        f"{calls[0].op} makes its result {name.removeprefix('#')} in some calls and not in others, and no "
        "argument says when."
    )


def _told_by(calls: Sequence[Call]) -> Iterator[tuple[str, list[bool]]]:
    """Each argument, and item of one, that could say whether a result is there, and what it says."""
    for argument in compat.schema_of(compat.find_overload(calls[0].op)).arguments:
        given = [recording.value_of(call, argument.name) for call in calls]
        yield argument.name, [_says_yes(value) for value in given]
        longest = max((len(v) for v in given if isinstance(v, (list, tuple))), default=0)
        for at in range(longest):
            if all(isinstance(v, (list, tuple)) and len(v) > at for v in given):
                yield f"{argument.name}[{at}]", [_says_yes(value[at]) for value in given]


def _says_yes(value: Any) -> bool:
    return value is not None and value is not False


def _dtype(name: str, out: Form, calls: Sequence[Call]) -> str:
    """`, float32` where a result has that dtype whatever the first tensor has."""
    if not out.fake or all(
        call.outputs[name].dtype == next(iter(call.tensors.values())).dtype for call in calls
    ):
        return ""
    dtypes = {call.outputs[name].dtype for call in calls}
    return f", {str(dtypes.pop()).removeprefix('torch.')}" if len(dtypes) == 1 else ""


def refuse_unfakeable(op: str, one: Form) -> None:
    """DTensor asks what comes of an op before it asks how to shard it; only a Meta kernel can answer."""
    for call in one.calls:
        made = results_shapes(one.signature(), recording.values(call), shapes_of(call))
        try:
            shapes = [None if r is None else r[0] for r in made]
        except Refused as refused:
            raise UserError(
                f"{op} has no Meta kernel (register_fake), and the shape of what it returns does not follow "
                f"from its arguments: {refused}"
            ) from None
        want = [tuple(r.shape) if isinstance(r, torch.Tensor) else None for r in call.results]
        if [s for s in shapes if s is not None] != [s for s in want if s is not None]:
            raise UserError(
                f"{op} has no Meta kernel (register_fake), and the shapes of what it returns, {want}, do not "
                "follow from those of its arguments."
            )
