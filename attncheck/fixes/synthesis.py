"""The signature of an op that nobody described, found by calling it on pieces and comparing with the whole.

1. Dims of equal size in every call at hand belong together. Each set of them that can be cut at once is
   tried, on 2 and 3 ranks, and what holds becomes a row: where the arguments lie, where each output does.
   Where the combinations are few, all others are tried too, so that what the notation cannot say is known.
2. Rows are told apart by what they cut: query, key and value along one dim (batch); two sizes of which one
   may be smaller (heads and kv heads, where no group is torn); the query alone (queries).
3. What comes of it is a `Signature`, and its layouts are held against calls that were not used to find it:
   other shapes (odd, uneven), dtypes, settings, flags and seeds. A way that fails one is not emitted. Queries
   are offered where the arguments are such that it held.
"""

from __future__ import annotations

import fnmatch
import importlib
import itertools
import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.tensor import Placement, Shard

from attncheck import plugins
from attncheck.errors import UserError
from attncheck.fixes import recording
from attncheck.fixes.notation import (
    BATCH,
    GIVEN,
    HEADS,
    KV_HEADS,
    QUERIES,
    Refused,
    Signature,
    layouts,
    read,
)
from attncheck.fixes.recording import INAPPLICABLE, SUM, WHOLE, Bench, Call, Placed
from attncheck.inventory import Look, RegisteredOp
from attncheck.probing import Operator
from attncheck.runner import compat, inventory
from attncheck.runner.available import Availability
from attncheck.runner.signature import KEY, QUERY, VALUE

RANKS = (2, 3)
# Combinations of placements up to which all are tried, and not only those that cut equal sizes together.
ALL_UP_TO = 700
UNLIKELY = "unlikely placements"
# Rows that the notation cannot say, of which so many are told.
TOLD = 12
TIMEOUT_SECONDS = 180
# So many calls may end the process before nobody wants to wait any longer.
ENDINGS = 5
ENDINGS_IN_FORKS = 60
CALL_SECONDS = 20
# The child's exit code for a UserError.
BAD_INPUT = 2
DROPOUT = "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
# Names for dims that are never sharded.
OTHERS = ("n", "m", "r", "s", "t", "u", "w", "x", "y", "z")

Log = Callable[[str], None]
# A dim of a tensor argument: the tensor, of how many dims it has, which.
Dim = tuple[str, int, int]
Class = frozenset[Dim]
Row = dict[str, Placed]


@dataclass(frozen=True)
class Found:
    """What was tried: rows, those of them that held, checks on calls that were held out, and the time."""

    tried: int
    valid: int
    held_out: int
    calls: int
    seconds: float


@dataclass(frozen=True)
class Rejected:
    """A way to shard that held on the calls it was found with, and why it is not offered."""

    way: str
    why: str


@dataclass(frozen=True)
class Synthesis:
    """`signatures`: one for each form of the call that arguments tell apart, mostly one. `beyond`: rows
    that hold and that the notation cannot say. `verified_on`: the calls that it was checked with."""

    signatures: tuple[Signature, ...]
    found: Found
    rejected: tuple[Rejected, ...] = ()
    beyond: tuple[str, ...] = ()
    verified_on: tuple[str, ...] = ()

    @property
    def signature(self) -> Signature:
        return self.signatures[0]


def synthesise(
    op: str,
    calls: Sequence[Call],
    held_out: Sequence[Call],
    log: Log = lambda text: None,
    bench: Bench | None = None,
    imports: str = "",
) -> Synthesis:
    """Find how `op` can be sharded from `calls`, and check it on `held_out` and what can be made of both.

    Raises UserError, one sentence, where the op is random, changes its arguments, or nothing can be learned.
    """
    began = time.monotonic()
    bench = bench or Bench()
    _refuse_unfit(op, calls, bench)
    needs = _needs(calls, bench)
    fake = not _has_meta(calls[0])
    forms: dict[Any, tuple[list[Call], list[Call]]] = {}
    for call in calls:
        forms.setdefault(form_key(call), ([], []))[0].append(call)
    for call in held_out:
        if form_key(call) in forms:
            forms[form_key(call)][1].append(call)
    learned = []
    for found, held in forms.values():
        learned.append(_learn(found, held, fake, bench, log))
    signatures, untold = _told_apart(op, learned)
    because = DROPOUT if needs else ""
    signatures = tuple(
        replace(s, needs=needs, because=because, imports=imports, fake=fake) for s in signatures
    )
    if fake:
        for one in learned:
            _refuse_unfakeable(op, one)
    return Synthesis(
        signatures,
        Found(
            tried=sum(one.tried for one in learned),
            valid=sum(one.valid for one in learned),
            held_out=sum(one.checks for one in learned),
            calls=bench.made,
            seconds=round(time.monotonic() - began, 2),
        ),
        rejected=(*(r for one in learned for r in one.rejected), *untold),
        beyond=tuple(dict.fromkeys(text for one in learned for text in one.beyond))[:TOLD],
        verified_on=tuple(dict.fromkeys(label for one in learned for label in one.verified_on)),
    )


def choose(calls: Sequence[Call]) -> tuple[list[Call], list[Call]]:
    """Which calls to find rows with, and which to hold out: of each form two shapes in the widest dtype,
    and those that tell dims apart, which are equally large in the others."""
    found: list[Call] = []
    by_form: dict[Any, list[Call]] = {}
    for call in calls:
        by_form.setdefault(form_key(call), []).append(call)
    for same in by_form.values():
        dtypes = [t.dtype for t in _floats(same[0]).values()]
        widest = max(
            (_main_dtype(call) for call in same),
            key=lambda d: (d == torch.float32, -dtypes.count(d)),
        )
        mine: list[Call] = []
        # Where all sizes differ, nothing is taken for something else.
        pool = [call for call in same if _main_dtype(call) == widest]
        for call in sorted(pool, key=lambda c: -_distinct(c)):
            if not mine or _teaches(mine, call):
                mine.append(call)
        for call in pool:
            shapes = [_shapes(one) for one in mine]
            if len(mine) < 2 and _shapes(call) not in shapes:
                mine.append(call)
        found += mine
    return found, [call for call in calls if not any(call is one for one in found)]


def _main_dtype(call: Call) -> torch.dtype:
    return next((t.dtype for t in _floats(call).values()), torch.float32)


def _floats(call: Call) -> dict[str, torch.Tensor]:
    return {name: t for name, t in call.tensors.items() if t.is_floating_point()}


def _shapes(call: Call) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in call.tensors.items()}


def _distinct(call: Call) -> int:
    return len({size for t in _floats(call).values() for size in t.shape})


def _teaches(found: Sequence[Call], call: Call) -> bool:
    """Whether a call has tensors, or differences between sizes, that those before have not."""
    before, after = classes(found), classes([*found, call])
    if before != after:
        return True
    seen = {name for one in found for name in one.outputs}
    return bool(set(call.outputs) - seen)


def form_key(call: Call) -> tuple[Any, ...]:
    """What tells forms of a call apart: how many dims query, key and value have, whether lengths and other
    integers are given, and words (`BSHD`)."""
    main = {_first(call), *_main(call)}
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


# --- what is refused -----------------------------------------------------------------------------


def _refuse_unfit(op: str, calls: Sequence[Call], bench: Bench) -> None:
    overload = compat.find_overload(op)
    if overload is None:
        raise UserError(f"{op} is not registered in this process.")
    if not calls:
        raise UserError(f"{op} cannot be described: no operator of the probes calls it.")
    for argument in overload._schema.arguments:
        if "Tensor[]" in str(argument.type) or "List[Tensor]" in str(argument.type):
            raise UserError(
                f"{op} takes a list of tensors ({argument.name}), for which signatures have no words."
            )
    for call in calls[:3]:
        first, second = (_seeded(bench, call, seed) for seed in (1, 2))
        if first is None or second is None:
            continue
        if not _same(first, second):
            raise UserError(
                f"{op} is random: with another seed it gives other values for equal arguments, so that no "
                "sharding of it can be compared with the whole."
            )
        for name, before in call.tensors.items():
            if name not in call.written and not recording.equal(first.tensors[name], before):
                raise UserError(
                    f"{op} changes its argument {name}, which its schema does not say: no strategy can be "
                    "right for it."
                )
        _refuse_dependent(op, call, first, bench)


def _seeded(bench: Bench, call: Call, seed: int) -> Call | None:
    torch.manual_seed(seed)
    made = bench.run(call, call.arguments, "whole, once more")
    return None if isinstance(made, str) else made


def _same(a: Call, b: Call) -> bool:
    return all(recording.equal(t, b.outputs[name]) for name, t in a.outputs.items())


def _refuse_dependent(op: str, call: Call, first: Call, bench: Bench) -> None:
    """An op that reads what it writes into (a KV cache, a sum that goes on) has no buffers, but state."""
    if not call.written:
        return
    noise = {
        name: torch.full_like(call.tensors[name], 3)
        for name in call.written
        if name in call.tensors
    }
    other = bench.run(call, {**call.arguments, **noise}, "with other buffers")
    if isinstance(other, str):
        return
    for name, value in first.outputs.items():
        if not recording.equal(value, other.outputs[name]):
            what = name if name in call.written else "its result"
            raise UserError(
                f"{op} changes its argument {', '.join(call.written)}: {what} depends on what it held "
                "before, so that it is state and no output buffer, which no strategy may move."
            )


def _needs(calls: Sequence[Call], bench: Bench) -> dict[str, Any]:
    """Arguments that must stay 0, because with others the op is random."""
    declared = compat.find_overload(calls[0].op)._schema.arguments
    needs: dict[str, Any] = {}
    for argument in declared:
        if str(argument.type) not in ("float", "Optional[float]"):
            continue
        if any(recording.value_of(call, argument.name) != 0.0 for call in calls):
            continue
        call = recording.with_positional(calls[0], argument.name)
        call = replace(call, arguments={**call.arguments, argument.name: 0.5})
        first, second = (_seeded(bench, call, seed) for seed in (1, 2))
        random = first is not None and second is not None and not _same(first, second)
        # The stand-in of a kernel may draw no numbers.
        if random or "dropout" in argument.name:
            needs[argument.name] = 0.0
    tagged = torch.Tag.nondeterministic_seeded in compat.find_overload(calls[0].op).tags
    if tagged and not needs:
        raise UserError(
            f"{calls[0].op} is tagged as random (nondeterministic_seeded), and nothing shows which of its "
            "arguments turns that off."
        )
    return needs


def _has_meta(call: Call) -> bool:
    """Whether DTensor can ask what comes of the op without calling it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    op = compat.find_overload(call.op)
    try:
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            given = {
                k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
                for k, v in call.arguments.items()
            }
            items = list(given.items())
            op(*(v for _, v in items[: call.positional]), **dict(items[call.positional :]))
    except Exception:
        return False
    return True


# --- dims that belong together -------------------------------------------------------------------


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
    order = {a.name: i for i, a in enumerate(compat.find_overload(calls[0].op)._schema.arguments)}
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
    return [frozenset(group) for group in groups]


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


# --- learning one form ---------------------------------------------------------------------------


@dataclass
class _Learned:
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


def _learn(
    found: Sequence[Call], held: Sequence[Call], fake: bool, bench: Bench, log: Log
) -> _Learned:
    wide, ones = _unbroadcast(found, bench)
    found = [*found, *wide]
    found += _without_integers(found, bench)
    found += _broadcast(found, bench)
    found += _grouped(found, bench)
    found += _one_kv_head(found, bench)
    found += _divisible(found, bench)
    search = _Search(found, bench, ones)
    held = [*held, *_variations(found, search.classes, bench)]
    letters = search.letters()
    out = _Learned([*found, *held], fake, tried=search.tried, valid=search.valid)
    while True:
        _describe(out, search, letters, found)
        wrong = _check(out, found, held, bench, letters)
        if not wrong:
            break
        way, why = wrong
        lost = {"batch": BATCH, "queries": QUERIES}.get(way, HEADS)
        out.rejected.append(Rejected(way, why))
        log(f"{found[0].op}: {way} held where it was found, and {why}")
        letters = {
            c: name
            for c, name in letters.items()
            if name != lost and not (lost == HEADS and name == KV_HEADS)
        }
        if lost == QUERIES:
            out.queries = None
    out.beyond = search.beyond(letters)
    out.verified_on = [call.label for call in held]
    return out


class _Search:
    """The rows that hold on the calls at hand."""

    def __init__(self, calls: Sequence[Call], bench: Bench, ones: frozenset[Dim]) -> None:
        self.calls, self.bench, self.ones = list(calls), bench, ones
        self.first = _first(calls[0])
        self.main = _main(calls[0])
        self.tried = 0
        self.classes = classes(calls)
        self._table: dict[tuple[Class, ...], dict[tuple[int, int], Row | str]] = {}
        self._other: list[tuple[dict[str, int], Row]] = []
        self._try_together()
        self._try_all()
        if self._split():
            self._table.clear()
            self._try_together()

    @property
    def valid(self) -> int:
        return len(self._other) + sum(
            any(isinstance(row, dict) for row in rows.values()) for rows in self._table.values()
        )

    def _try_together(self) -> None:
        """Every class, and every two of which one is not in the first tensor, on all calls and ranks."""
        floats = {name for call in self.calls for name in _floats(call)}
        whole = [c for c in self.classes if any(name in floats for name, _, _ in c)]
        pairs = [
            (a, b)
            for a, b in itertools.permutations(whole, 2)
            if self._has_first(a) and not self._has_first(b)
        ]
        for cut in [*((c,) for c in whole), *pairs]:
            rows = self._table.setdefault(cut, {})
            for (at, call), ranks in itertools.product(enumerate(self.calls), RANKS):
                cuts = cuts_of(call, cut)
                if cuts is None:
                    continue
                row = self.bench.cut(call, cuts, ranks)
                if row != INAPPLICABLE:
                    rows[at, ranks] = row
            self.tried += 1

    def _try_all(self) -> None:
        """Every other combination of placements of the first call, where there are few."""
        call = self.calls[0]
        # An unchecked kernel reads beyond what it is given where pieces do not go together: once it has
        # ended the process, the others are left alone.
        if self.bench.has_ended(call, UNLIKELY):
            return
        options = [
            [None, *(d for d, size in enumerate(t.shape) if size > 1)]
            for t in call.tensors.values()
        ]
        if math.prod(map(len, options)) > ALL_UP_TO:
            return
        known = [cuts_of(call, cut) for cut in self._table]
        for combination in itertools.product(*options):
            cuts = {
                name: dim
                for name, dim in zip(call.tensors, combination, strict=True)
                if dim is not None
            }
            if not cuts or cuts in known:
                continue
            self.tried += 1
            row = self.bench.cut(replace(call, label=f"{call.label}, {UNLIKELY}"), cuts, RANKS[0])
            if isinstance(row, dict) and self._holds_everywhere(cuts, row):
                self._other.append((cuts, row))

    def _holds_everywhere(self, cuts: Mapping[str, int], row: Row) -> bool:
        for call, ranks in itertools.product(self.calls, RANKS):
            if all(
                name in call.tensors and call.tensors[name].ndim > dim for name, dim in cuts.items()
            ):
                again = self.bench.cut(call, cuts, ranks)
                if again != INAPPLICABLE and again != row:
                    return False
        return True

    def _split(self) -> bool:
        """Where query and key are always equally long, the query cut alone shows which dims are its own."""
        for cuts, row in self._other:
            first = next(iter(row.values()))
            if self.first not in cuts or not isinstance(first, int):
                continue
            for one in self.classes:
                own = frozenset(d for d in one if cuts.get(d[0]) == d[2])
                if len(own) == len(cuts) and own < one:
                    at = self.classes.index(one)
                    self.classes[at : at + 1] = [own, one - own]
                    return True
        return False

    def _has_first(self, one: Class) -> bool:
        return any(name == self.first for name, _, _ in one)

    def _covers_main(self, *cut: Class) -> bool:
        names = {name for one in cut for name, _, _ in one}
        return names >= self.main

    def row(self, *cut: Class) -> dict[tuple[int, int], Row | str]:
        """By call and ranks: where outputs lie when these are cut, or why that cannot be said."""
        return self._table.get(cut, {})

    def letters(self) -> dict[Class, str]:
        """Which classes batch, heads, kv heads and queries are."""
        axis = {
            c: min(d[2] for d in c if d[0] == self.first)
            for c in self.classes
            if self._has_first(c)
        }
        mine = sorted(axis, key=lambda c: axis[c])
        together = [c for c in mine if self._covers_main(c) and _always(self.row(c))]
        out: dict[Class, str] = {}
        pair = next((p for p in self._table if len(p) == 2 and self._is_grouped(*p)), None)
        if pair is not None:
            out = {pair[0]: HEADS, pair[1]: KV_HEADS}
        rest = [c for c in together if c not in out]
        names = [BATCH] if pair is not None else [BATCH, HEADS]
        if len(rest) == 1 and pair is None and axis[rest[0]] > 0:
            names = [HEADS]
        out.update(zip(rest, names, strict=False))
        for one in mine:
            if one not in out and one not in rest and not self._covers_main(one):
                rows = self.row(one)
                whole_calls = {at for at, _ in rows}
                if any(
                    all(isinstance(rows[key], dict) for key in rows if key[0] == at)
                    for at in whole_calls
                ) and self._is_query(one):
                    out[one] = QUERIES
                    break
        return out

    def _is_query(self, one: Class) -> bool:
        """Its first output is cut as it is: head_dim, cut where that holds at all, leaves sums. And so is
        every buffer: nobody passes a sum to be written into."""
        row = next(row for row in self.row(one).values() if isinstance(row, dict))
        buffers = [at for name, at in row.items() if not name.startswith("#")]
        return isinstance(next(iter(row.values()), None), int) and SUM not in buffers

    def _is_grouped(self, heads: Class, kv_heads: Class) -> bool:
        """Whether these two go together as heads and kv heads do: wherever no group is torn."""
        if not self._covers_main(heads, kv_heads):
            return False
        rows = self.row(heads, kv_heads)
        seen = set()
        for (at, ranks), row in rows.items():
            many, few = (_size(self.calls[at], c) for c in (heads, kv_heads))
            if many == few or (many % ranks == 0 and few % ranks == 0):
                if not isinstance(row, dict):
                    return False
                seen.add((ranks, many == few))
        return {ranks for ranks, _ in seen} == set(RANKS) and any(not equal for _, equal in seen)

    def beyond(self, letters: Mapping[Class, str]) -> list[str]:
        """Rows that hold, and that are none of the ways that signatures have."""
        texts = []
        for cut, rows in self._table.items():
            if _always(rows) and not all(c in letters for c in cut):
                at, _ = next(iter(rows))
                row = next(iter(rows.values()))
                assert isinstance(row, dict)
                texts.append(_text(self.calls[at], cuts_of(self.calls[at], cut) or {}, row))
        return texts + [_text(self.calls[0], cuts, row) for cuts, row in self._other]


def _always(rows: Mapping[tuple[int, int], Row | str]) -> bool:
    """Whether a row held wherever it could be asked, on each number of ranks at least once."""
    return {ranks for _, ranks in rows} == set(RANKS) and all(
        isinstance(row, dict) for row in rows.values()
    )


def _size(call: Call, one: Class) -> int:
    """The size of a class in a call."""
    return max(
        (
            call.tensors[name].shape[dim]
            for name, ndim, dim in one
            if name in call.tensors and call.tensors[name].ndim == ndim
        ),
        default=1,
    )


def _text(call: Call, cuts: Mapping[str, int], row: Row) -> str:
    """`v S(3) -> out S(3), lse R`"""
    names = output_names(call)
    given = ", ".join(f"{name} S({dim})" for name, dim in cuts.items())
    made = ", ".join(
        f"{names[name]} {f'S({at})' if isinstance(at, int) else at}" for name, at in row.items()
    )
    return f"{given} -> {made}"


def output_names(call: Call) -> dict[str, str]:
    """What each output is called: by the schema, else `result` or `result_2`; buffers by their own name."""
    returns = compat.find_overload(call.op)._schema.returns
    names = {}
    for at, returned in enumerate(returns):
        plain = "result" if len(returns) == 1 else f"result_{at}"
        names[f"#{at}"] = returned.name or plain
    return {**names, **{name: name for name in call.written}}


def _first(call: Call) -> str:
    return next(
        (n for n, t in call.tensors.items() if t.is_floating_point() and t.ndim > 1),
        next(iter(call.tensors), ""),
    )


def _main(call: Call) -> set[str]:
    """Query, key and value; of an op that calls them otherwise, its required tensors with most dims."""
    roles = [
        next((name for name in call.tensors if name.strip("_") in role), None)
        for role in (QUERY, KEY, VALUE)
    ]
    if None not in roles:
        return {name for name in roles if name is not None}
    required = {
        a.name
        for a in compat.find_overload(call.op)._schema.arguments
        if str(a.type) == "Tensor" and a.name in _floats(call) and a.name not in call.written
    }
    most = max((call.tensors[name].ndim for name in required), default=0)
    return {name for name in required if call.tensors[name].ndim == most}


# --- other calls, made of those at hand -----------------------------------------------------------


def _usable(call: Call | None) -> Iterator[Call]:
    """A call that was made of another, unless the op refused it or made nothing of it."""
    if call is not None and not any(
        bool(t.isnan().any()) for t in call.outputs.values() if t.is_floating_point()
    ):
        yield call


def _unbroadcast(found: Sequence[Call], bench: Bench) -> tuple[list[Call], frozenset[Dim]]:
    """For a dim that is 1 in all calls: one where it is not, if it is clear what it is then. And those of
    which the op takes no other size."""
    known = classes(found)
    seen = {dim for one in known for dim in one}
    made: list[Call] = []
    ones = set()
    for call in found:
        for name, tensor in call.tensors.items():
            for at, size in enumerate(tensor.shape):
                dim = (name, tensor.ndim, at)
                if size != 1 or dim in seen or not tensor.is_floating_point():
                    continue
                seen.add(dim)
                sizes = {_size(call, one) for one in known} - {1}
                taken: list[Call] = []
                for wanted in sorted(sizes):
                    shape = list(tensor.shape)
                    shape[at] = wanted
                    noise = torch.randn(
                        shape, generator=torch.Generator().manual_seed(wanted), dtype=torch.float64
                    )
                    wide = (tensor.double().expand(shape).cpu() + noise).to(tensor)
                    taken += _usable(bench.again(call, {name: wide}, f"{name} of {shape}"))
                if len(taken) == 1:
                    made += taken
                elif not taken:
                    ones.add(dim)
    return made, frozenset(ones)


def _without_integers(found: Sequence[Call], bench: Bench) -> list[Call]:
    """Calls that tell integers from the dims that they are as long as by chance: 3 sequences have 4 starts,
    and there may be 4 heads."""
    floats = {name for call in found for name in _floats(call)}
    known: list[Class] = []
    mixed: list[Class] = []
    for one in classes(found):
        own = frozenset(dim for dim in one if dim[0] in floats)
        known.append(own or one)
        if own and own != one:
            mixed.append(own)
    return _resized(found, known, mixed, bench, lambda size: size - 1, RANKS[0])


def _broadcast(found: Sequence[Call], bench: Bench) -> list[Call]:
    """Calls with one row of a mask or bias for all, where there is none yet: its gradient is a sum then."""
    known = classes(found)
    of_dim = {dim: one for one in known for dim in one}
    made: list[Call] = []
    for call in found:
        kinds = {
            name: {of_dim.get((name, t.ndim, at)) for at in range(t.ndim)}
            for name, t in call.tensors.items()
        }
        ordinary = [kinds[name] for name in {_first(call), *_main(call)} if name in kinds]
        for name, tensor in _floats(call).items():
            # What has dims that no other tensor has together: those of scores, (queries, keys).
            if name in call.written or any(kinds[name] <= those for those in ordinary):
                continue
            for at, size in enumerate(tensor.shape):
                here = [c.tensors[name] for c in (*found, *made) if name in c.tensors]
                if size > 1 and not any(t.ndim == tensor.ndim and t.shape[at] == 1 for t in here):
                    changed = recording.narrowed(
                        bench, call, {(name, at): 1}, f"one in dim {at} of {name}"
                    )
                    made += _usable(changed)
    return made


def _grouped(found: Sequence[Call], bench: Bench) -> list[Call]:
    """Calls with half as many kv heads as query heads, where all at hand have equally many of both and the
    op takes fewer: it gives then what it gives with each kv head repeated."""
    known = classes(found)
    main = _main(found[0])
    first = _first(found[0])
    made: list[Call] = []
    for one in known:
        names = {name for name, _, _ in one}
        if not names >= {*main, first} or any(dim == nd - 1 for _, nd, dim in one):
            continue
        for call in found:
            size = _size(call, one)
            kv = [dim for dim in one if dim[0] in _kv_side(call, known) and dim[0] in call.tensors]
            if not kv or size < 4 or size % 2 or _counted(call, size):
                continue
            halves = {(name, at): size // 2 for name, _, at in kv}
            few = recording.narrowed(bench, call, halves, "half as many kv heads")
            if few is None:
                continue
            repeated = {name: few.tensors[name].repeat_interleave(2, at) for (name, at) in halves}
            many = bench.again(few, repeated, "each repeated")
            if many is not None and _agree_where_alike(few, many, bench):
                made += _usable(few)
            break
    return made


def _kv_side(call: Call, known: Sequence[Class]) -> set[str]:
    """Key and value, and what is as long as they are: the buffers of their gradients."""
    first = _first(call)
    key = next((name for name in call.tensors if name.strip("_") in KEY), "")
    others = [one for one in known if first not in {name for name, _, _ in one}]
    return {name for one in others if key in {name for name, _, _ in one} for name, _, _ in one} - {
        name
        for name, t in call.tensors.items()
        if name not in _main(call) and name not in call.written
    }


def _agree_where_alike(few: Call, many: Call, bench: Bench) -> bool:
    alike = [name for name, whole in many.outputs.items() if few.outputs[name].shape == whole.shape]
    return bool(alike) and all(bench.agrees(many, name, few.outputs[name], 1) for name in alike)


def _one_kv_head(found: Sequence[Call], bench: Bench) -> list[Call]:
    """One kv head for all query heads, where a call with fewer of them than query heads is at hand."""
    known = classes(found)
    tied = _tied(found, known)
    first = _first(found[0])
    for call in found:
        for one in known:
            names = {name for name, _, _ in one}
            if first in names or len(names) < 2 or _size(call, one) < 2:
                continue
            if not any(few == one for _, few in tied):
                continue
            dims = {
                (name, dim): 1
                for name, ndim, dim in one
                if name in call.tensors and call.tensors[name].ndim == ndim
            }
            made = list(_usable(recording.narrowed(bench, call, dims, "one kv head")))
            if made:
                return made
    return []


def _divisible(found: Sequence[Call], bench: Bench) -> list[Call]:
    """Calls that can be cut in two and in three, where those at hand cannot: 4 heads leave the third rank
    empty, and 5 kv heads cannot be cut with groups whole."""
    known = classes(found)
    few = {one for _, one in _tied(found, known)}
    made = []
    for ranks in RANKS:

        def fits(size: int, one: Class, ranks: int = ranks) -> bool:
            whole = size % ranks == 0 if one in few else True
            return whole and size > 1 and len(torch.empty(size).chunk(ranks)) == ranks

        short = [one for one in known if not any(fits(_size(c, one), one) for c in found)]
        made += _resized(found, known, short, bench, partial(_multiple, ranks), RANKS[0])
    return made


def _multiple(ranks: int, size: int) -> int:
    return size - size % ranks


def _variations(found: Sequence[Call], known: Sequence[Class], bench: Bench) -> list[Call]:
    """Odd sizes that nothing divides, and flags turned over."""

    def odd(size: int) -> int:
        return next((n for n in range(size - 1, 2, -1) if n % 2 and n % 3), min(size, 3))

    inner = [one for one in known if all(dim < ndim - 1 or ndim < 3 for _, ndim, dim in one)]
    made = _resized(found, known, inner, bench, odd)
    for call in found[:2]:
        for other in recording.flipped(bench, call):
            if form_key(other) == form_key(call):
                made += _usable(other)
    return made


def _resized(
    found: Sequence[Call],
    known: Sequence[Class],
    which: Sequence[Class],
    bench: Bench,
    smaller: Callable[[int], int],
    least: int = 3,
) -> list[Call]:
    """Calls with less of these classes. Where one divides another in all calls, as kv heads do heads, it
    goes on doing so: an unchecked kernel reads beyond its tensors else."""
    tied = _tied(found, known)
    made = []
    for one in which:
        if not any(name in _floats(call) for call in found for name, _, _ in one):
            continue
        for call in found:
            size = _size(call, one)
            new = smaller(size)
            if not least <= new < size or _counted(call, size):
                continue
            if any(new % _size(call, few) for many, few in tied if many == one):
                continue
            sizes = {one: new}
            for many, few in tied:
                if few == one:
                    sizes[many] = _size(call, many) // size * new
            taken = list(_usable(_narrow(bench, call, sizes)))
            if taken:
                made += taken
                break
    return made


def _tied(found: Sequence[Call], known: Sequence[Class]) -> list[tuple[Class, Class]]:
    """(many, few) where the few divide the many in all calls: of the first tensor, and of others."""
    first = _first(found[0])
    floats = {name for call in found for name in _floats(call)}
    mine = [
        one for one in known if any(name == first and dim < ndim - 1 for name, ndim, dim in one)
    ]
    return [
        (many, few)
        for many in mine
        for few in known
        if few not in mine
        and any(name in floats for name, _, _ in few)
        and all(
            _size(call, few) > 0 and _size(call, many) % _size(call, few) == 0 for call in found
        )
    ]


def _narrow(bench: Bench, call: Call, sizes: Mapping[Class, int]) -> Call | None:
    dims = {
        (name, dim): size
        for one, size in sizes.items()
        for name, ndim, dim in one
        if name in call.tensors
        and call.tensors[name].ndim == ndim
        and call.tensors[name].shape[dim] > size
    }
    label = ", ".join(f"{name} dim {dim} of {size}" for (name, dim), size in list(dims.items())[:2])
    return recording.narrowed(bench, call, dims, label)


def _counted(call: Call, size: int) -> bool:
    """Whether lengths, or an integer, say how large a dim is: it must not become another."""
    ints = [v for v in call.arguments.values() if isinstance(v, int) and not isinstance(v, bool)]
    # A random state is one number, or unsigned.
    lengths = [
        t
        for t in call.tensors.values()
        if t.ndim == 1 and t.numel() > 0 and t.dtype in (torch.int32, torch.int64)
    ]
    return size in ints or any(int(t.max()) == size for t in lengths)


# --- the signature -------------------------------------------------------------------------------


def _describe(
    out: _Learned, search: _Search, letters: Mapping[Class, str], found: Sequence[Call]
) -> None:
    names = _names(search, letters)
    of_dim = {dim: names[one] for one in search.classes for dim in one}
    out.takes = {}
    placed = _placed(search, letters)
    declared = compat.find_overload(found[0].op)._schema.arguments
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


def _names(search: _Search, letters: Mapping[Class, str]) -> dict[Class, str]:
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


def _placed(search: _Search, letters: Mapping[Class, str]) -> dict[str, dict[str, set[Placed]]]:
    """output -> letter -> where it lies when that is cut."""
    by_letter = {name: one for one, name in letters.items()}
    rows: list[tuple[str, tuple[Class, ...]]] = []
    for name in (BATCH, HEADS, QUERIES):
        if name in by_letter:
            rows.append((name, (by_letter[name],)))
    if HEADS in by_letter and KV_HEADS in by_letter:
        rows.append(("hg", (by_letter[HEADS], by_letter[KV_HEADS])))
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
    search: _Search,
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
    out: _Learned,
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
    summed = [letter for letter in (BATCH, HEADS, QUERIES) if SUM in rows.get(letter, ())]
    like = of_argument or _like(name, having, summed, out.takes, rows)
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
        if letter == "hg":
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
    summed: Sequence[str],
    takes: Mapping[str, str],
    rows: Mapping[str, set[Placed]],
) -> str:
    """The argument whose gradient it is: as large in every call, and a sum where that broadcasts."""
    if not any(len(rows[letter]) > 1 for letter in summed):
        return ""
    return next((arg for arg in takes if _is_like(arg, name, having)), "")


def _is_like(arg: str, output: str, having: Sequence[Call]) -> bool:
    """Whether an output is as large as an argument in every call."""
    return all(
        arg in call.tensors and call.tensors[arg].shape == call.outputs[output].shape
        for call in having
    )


def _present_if(
    name: str, having: Sequence[Call], out: _Learned, of_dim: Mapping[Dim, str]
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
    for argument in compat.find_overload(calls[0].op)._schema.arguments:
        given = [recording.value_of(call, argument.name) for call in calls]
        yield argument.name, [_says_yes(value) for value in given]
        longest = max((len(v) for v in given if isinstance(v, (list, tuple))), default=0)
        for at in range(longest):
            if all(isinstance(v, (list, tuple)) and len(v) > at for v in given):
                yield f"{argument.name}[{at}]", [_says_yes(value[at]) for value in given]


def _says_yes(value: Any) -> bool:
    return value is not None and value is not False


def _dtype(name: str, out: _Learned, calls: Sequence[Call]) -> str:
    """`, float32` where a result has that dtype whatever the first tensor has."""
    if not out.fake or all(
        call.outputs[name].dtype == next(iter(call.tensors.values())).dtype for call in calls
    ):
        return ""
    dtypes = {call.outputs[name].dtype for call in calls}
    return f", {str(dtypes.pop()).removeprefix('torch.')}" if len(dtypes) == 1 else ""


def _refuse_unfakeable(op: str, one: _Learned) -> None:
    """DTensor asks what comes of an op before it asks how to shard it; only a Meta kernel can answer."""
    from attncheck.fixes.notation import results_shapes

    for call in one.calls:
        made = results_shapes(one.signature(), recording.values(call), _shapes(call))
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


# --- checking it ---------------------------------------------------------------------------------


def _check(
    out: _Learned,
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
    values, shapes = recording.values(call), _shapes(call)
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
    declared = compat.find_overload(good[0].op)._schema.arguments
    out: dict[str, Any] = {}
    spare: dict[str, list[Any]] = {}
    for argument in declared:
        name = argument.name
        held = [_token(recording.value_of(call, name)) for call in good]
        failed = [_token(recording.value_of(call, name)) for call in bad]
        if any(token is _OTHER for token in (*held, *failed)):
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
        return _token(recording.value_of(call, name)) not in options

    for call in bad:
        if any(told(call, name, allowed) for name, allowed in out.items()):
            continue
        for name, options in spare.items():
            if _token(recording.value_of(call, name)) not in options and len(options) <= 4:
                out[name] = options[0] if len(options) == 1 else tuple(options)
                break
        else:
            return None
    return out


_OTHER = object()


def _token(value: Any) -> Any:
    """A value as conditions have it: a literal, None, or that a tensor is given."""
    if isinstance(value, torch.Tensor):
        return GIVEN
    return value if value is None or isinstance(value, (bool, int, float, str)) else _OTHER


def _is_tensor_type(argument: Any) -> bool:
    return "Tensor" in str(argument.type)


def _is_size(name: str, calls: Sequence[Call]) -> bool:
    """Whether a number is the size of some dim in every call: `max_seqlen_q`, `head_num`."""
    return all(
        any(recording.value_of(call, name) in t.shape for t in call.tensors.values())
        for call in calls
    )


# --- several forms -------------------------------------------------------------------------------


def _told_apart(
    op: str, learned: Sequence[_Learned]
) -> tuple[tuple[Signature, ...], list[Rejected]]:
    """One signature for each form that arguments tell from the others; equal ones are one."""
    merged: list[_Learned] = []
    for one in sorted(learned, key=lambda o: -len(o.calls)):
        for other in merged:
            if _join(other, one):
                break
        else:
            merged.append(one)
    words = _words(learned)
    out: list[Signature] = []
    untold: list[Rejected] = []
    for one in merged:
        others = [call for other in merged if other is not one for call in other.calls]
        when = {
            name: _several([recording.value_of(call, name) for call in one.calls]) for name in words
        }
        telling = _telling(one.calls, others, words)
        if others and telling is None:
            if out:
                untold.append(
                    Rejected(
                        "another form of the call", f"no argument tells it: {one.calls[0].label}"
                    )
                )
                continue
            telling = {}
        out.append(replace(one.signature(), when={**when, **(telling or {})}))
    return tuple(out), untold


def _join(into: _Learned, one: _Learned) -> bool:
    """Put two forms together whose descriptions agree. A result has one form, an argument several."""
    if into.gives != one.gives or into.queries != one.queries:
        return False
    takes = dict(into.takes)
    for name, text in one.takes.items():
        mine, theirs = takes.get(name, ""), text
        if mine and mine != theirs:
            a, b = read(mine), read(theirs)
            known = {len(form): form for form in a.forms}
            if a.replicated or b.replicated or any(known.get(len(f), f) != f for f in b.forms):
                return False
            ending = ", in place" if a.in_place else ""
            forms = dict.fromkeys((*a.forms, *b.forms))
            theirs = " | ".join(" ".join(form) for form in forms) + ending
        takes[name] = theirs
    into.takes = takes
    into.calls = [*into.calls, *one.calls]
    return True


def _words(learned: Sequence[_Learned]) -> list[str]:
    """Arguments that are words: they say how dims lie, so a signature is only about those that were seen."""
    call = learned[0].calls[0]
    return [
        a.name
        for a in compat.find_overload(call.op)._schema.arguments
        if str(a.type) in ("str", "Optional[str]")
        and any(isinstance(recording.value_of(c, a.name), str) for o in learned for c in o.calls)
    ]


def _several(given: Sequence[Any]) -> Any:
    distinct = tuple(dict.fromkeys(given))
    return distinct[0] if len(distinct) == 1 else distinct


def _telling(
    mine: Sequence[Call], others: Sequence[Call], words: Sequence[str]
) -> dict[str, Any] | None:
    """One argument that says which form a call has: whether a tensor is given, or a flag; {} where words say
    it already, None where nothing does. Numbers do not: they are sizes."""
    if not others:
        return {}
    for argument in compat.find_overload(mine[0].op)._schema.arguments:
        here, there = (
            {_token(recording.value_of(call, argument.name)) for call in calls}
            for calls in (mine, others)
        )
        if here & there or not {*here, *there} <= {
            GIVEN,
            None,
            True,
            False,
            *_strings(here, there),
        }:
            continue
        return {} if argument.name in words else {argument.name: _several(list(here))}
    return None


def _strings(*tokens: set[Any]) -> set[str]:
    return {token for some in tokens for token in some if isinstance(token, str)}


# --- in a child process --------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What ops to synthesise. `imports`: modules whose import registers them; `probe_files`: probes of
    one's own beside the built-in ones; `path` is put in front of sys.path. Operators and kernel ops are
    selected by glob (none: all). Ops in `known` have a signature already."""

    imports: tuple[str, ...] = ()
    probe_files: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    kernel_ops: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Refusal:
    """An op that operators reach and that has no signature, and why, in one sentence."""

    op: str
    why: str


@dataclass(frozen=True)
class Answer:
    """What was found, op by op; `fatal`: calls that ended the process, which are left out."""

    found: tuple[Synthesis, ...] = ()
    refused: tuple[Refusal, ...] = ()
    fatal: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Asked:
    request: Request
    fatal: tuple[str, ...] = ()


def for_operators(request: Request, log: Log = lambda text: None) -> Answer:
    """Synthesise the ops that the selected operators reach, in a child process.

    A call that ends the child is left out, and the child begins again. Raises UserError where that goes on,
    or where the child fails otherwise.
    """
    fatal: tuple[str, ...] = ()
    while True:
        answer = _in_child(_Asked(request, fatal))
        if isinstance(answer, Answer):
            return answer
        doing, how = answer
        log(f"{doing} {how}; it is left out")
        fatal = (*fatal, doing)
        if len(fatal) > ENDINGS:
            raise UserError(
                f"Nothing can be synthesised: {doing} {how}, after {ENDINGS} other calls."
            )


def _in_child(asked: _Asked) -> Answer | tuple[str, str]:
    """The answer; or what the child was doing when it ended, and how it ended."""
    with tempfile.TemporaryDirectory(prefix="attncheck-") as folder:
        question, answer = Path(folder, "asked"), Path(folder, "answer")
        question.write_bytes(pickle.dumps(asked))
        command = [sys.executable, "-m", "attncheck.fixes.synthesis", str(question), str(answer)]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
            how = f"ends the process (signal {-done.returncode})"
        except subprocess.TimeoutExpired:
            done, how = None, f"does not end within {TIMEOUT_SECONDS} s"
        if done is not None and done.returncode == 0:
            made = pickle.loads(answer.read_bytes())
            assert isinstance(made, Answer)
            return made
        doing = answer.read_text(encoding="utf-8") if answer.exists() else "starting"
        if done is not None and done.returncode == BAD_INPUT:
            raise UserError(done.stderr.strip().splitlines()[-1])
        if done is not None and done.returncode > 0:
            raise RuntimeError(f"Synthesis fails at {doing}:\n{done.stderr}")
        return doing.strip(), how


def _serve(asked: _Asked, doing: _Doing) -> Answer:
    request = asked.request
    torch.set_num_threads(1)  # the tensors are small, and threads wait for each other
    sys.path[:0] = request.path
    modules = _registered_by(request.imports, doing)
    found: list[Synthesis] = []
    refused: list[Refusal] = []
    fatal = list(asked.fatal)
    for op, calls in _calls(asked, doing).items():
        # Values of the second seed are never used to find anything.
        chosen, _ = choose([c for c in calls if f"seed {request.seed + 1}" not in c.label])
        held = [call for call in calls if not any(call is one for one in chosen)]
        work = partial(_work, op, chosen, held, modules.get(op, ""))
        made = work(Bench(doing)) if request.device != "cpu" else _in_forks(work, doing, fatal)
        if isinstance(made, Synthesis):
            found.append(made)
        else:
            refused.append(made)
    return Answer(tuple(found), tuple(refused), tuple(fatal))


Work = Callable[[Bench], "Synthesis | Refusal"]


def _work(
    op: str, chosen: Sequence[Call], held: Sequence[Call], imports: str, bench: Bench
) -> Synthesis | Refusal:
    try:
        return synthesise(op, chosen, held, bench=bench, imports=imports)
    except UserError as error:
        return Refusal(op, str(error))


def _in_forks(work: Work, doing: _Doing, fatal: list[str]) -> Synthesis | Refusal:
    """The work, in a fork of this process: a kernel that ends it costs no new start. What ended it is put
    into `fatal`, and what was found until then is kept. A call that does not end is ended by a signal."""
    with tempfile.TemporaryDirectory(prefix="attncheck-") as folder:
        answer, notes = Path(folder, "answer"), Path(folder, "notes")
        notes.touch()
        for _ in range(ENDINGS_IN_FORKS):
            known = dict(_notes(notes))
            child = os.fork()
            if child == 0:
                _end_with(work, doing, fatal, known, answer, notes)
            _, status = os.waitpid(child, 0)
            if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
                made: Synthesis | Refusal = pickle.loads(answer.read_bytes())
                return made
            if not os.WIFSIGNALED(status):
                raise RuntimeError(f"{doing.now()}: see above")
            fatal.append(doing.now())
    raise UserError(f"{doing.now()} ends the process, after {ENDINGS_IN_FORKS} other calls.")


def _end_with(
    work: Work,
    doing: _Doing,
    fatal: Sequence[str],
    known: Mapping[str, Row | str],
    answer: Path,
    notes: Path,
) -> NoReturn:
    try:
        with notes.open("ab") as file:

            def say(text: str) -> None:
                signal.alarm(CALL_SECONDS)
                doing(text)

            def remember(key: str, row: Row | str) -> None:
                pickle.dump((key, row), file)
                file.flush()

            made = work(Bench(say, fatal, known, remember))
        answer.write_bytes(pickle.dumps(made))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _notes(file: Path) -> Iterator[tuple[str, Row | str]]:
    """What was written before the process ended, perhaps in the middle of an entry."""
    with file.open("rb") as notes:
        while True:
            try:
                yield pickle.load(notes)
            except (EOFError, pickle.UnpicklingError):
                return


def _registered_by(imports: Sequence[str], doing: _Doing) -> dict[str, str]:
    """op -> the module whose import registered it."""
    modules: dict[str, str] = {}
    before = {_name(schema) for schema in compat.registered_schemas()}
    for module in imports:
        doing(f"importing {module}")
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:
            raise UserError(f"{module} does not import: {type(error).__name__}: {error}") from None
        after = {_name(schema) for schema in compat.registered_schemas()}
        modules.update(dict.fromkeys(after - before, module))
        before = after
    return modules


def _name(schema: Any) -> str:
    return f"{schema.name.replace('::', '.')}.{schema.overload_name or 'default'}"


def _calls(asked: _Asked, doing: _Doing) -> dict[str, list[Call]]:
    """op -> its calls, of the operators selected, with two seeds and in half precision too."""
    request = asked.request
    availability = Availability(request.device)
    out: dict[str, list[Call]] = {}

    def wanted(op: Any) -> bool:
        name = str(op)
        if name in request.kernel_ops:
            return True
        return (
            recording.is_custom(op)
            and name not in request.known
            and _matches(name, request.kernel_ops)
        )

    for operator in _operators(asked, doing):
        if not _matches(operator.name, request.operators):
            continue
        doing(f"making {operator.name} available")
        if availability.refusal(operator) is not None:
            continue
        settings = [s for s in operator.settings if not s.dropout and s.level != "full"]
        halves = [
            replace(s, name=f"{s.name} in half precision", dtype=dtype)
            for dtype in ("bfloat16", "float16")
            for s in settings[:3]
            if s.dtype == "float32"
        ]
        for seed in (request.seed, request.seed + 1):
            doing(f"running {operator.name}")
            for call in recording.record(
                operator, [*settings, *halves], seed, request.device, wanted
            ):
                out.setdefault(call.op, []).append(call)
    return out


def _operators(asked: _Asked, doing: _Doing) -> Iterator[Operator]:
    """Those of the probes, and those made of ops that imports have registered."""
    request = asked.request
    shelf = plugins.load_probes([Path(file) for file in request.probe_files])
    for path, sentence in shelf.errors:
        if str(path) in {str(Path(file).resolve()) for file in request.probe_files}:
            raise UserError(sentence)
    ops: tuple[RegisteredOp, ...] = ()
    if request.imports:
        names = {op for p in shelf.probes for o in p.operators for op in o.kernel_ops}
        look = Look(
            device=request.device,
            call=True,
            known=tuple(names | set(request.known)),
            fatal={
                text.split()[1]: "it ends the process"
                for text in asked.fatal
                if text.startswith("calling ")
            },
        )
        ops = inventory.look(look, doing.file).ops
        ops = tuple(op for op in ops if op.op.partition(".")[0] not in recording.OWN)
    for probe in shelf.probes:
        yield from plugins.with_discovered(probe, ops).operators


def _matches(name: str, globs: Sequence[str]) -> bool:
    return not globs or any(
        name == glob or fnmatch.fnmatchcase(name, glob.replace("[", "[[]")) for glob in globs
    )


class _Doing:
    """The file in which the child says what it does before it does it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._open = file.open("w+b", buffering=0)

    def __call__(self, text: str) -> None:
        data = text.encode()
        os.pwrite(self._open.fileno(), data, 0)
        self._open.truncate(len(data))

    def now(self) -> str:
        return self.file.read_text(encoding="utf-8")


def main() -> None:
    asked = pickle.loads(Path(sys.argv[1]).read_bytes())
    doing = _Doing(Path(sys.argv[2]))
    try:
        made = _serve(asked, doing)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(BAD_INPUT)
    doing.file.write_bytes(pickle.dumps(made))


if __name__ == "__main__":
    # What is pickled must be known by the name that the parent imports it by.
    from attncheck.fixes import synthesis

    synthesis.main()
