"""The signature of an op that nobody described, found by calling it on pieces and comparing with the whole.

1. Dims of equal size in every call at hand belong together. Each set of them that can be cut at once is
   tried, on 2 and 3 ranks, and what holds becomes a row: where the arguments lie, where each output does.
   Where the combinations are few, all others are tried too, so that what the notation cannot say is known.
2. What comes of it is a `Signature`, and its layouts are held against calls that were not used to find it:
   other shapes (odd, uneven), dtypes, settings, flags and seeds. A way that fails one is not emitted. Queries
   are offered where the arguments are such that it held.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from attncheck.errors import UserError
from attncheck.fixes import recording
from attncheck.fixes.notation import BATCH, HEADS, KV_HEADS, QUERIES, Signature
from attncheck.fixes.packages.reasons import SHARED_MASKS
from attncheck.fixes.recording import Bench, Call
from attncheck.fixes.synthesis.checking import check
from attncheck.fixes.synthesis.description import Form, Rejected, describe_form, refuse_unfakeable
from attncheck.fixes.synthesis.dims import Dim, classes, float_tensors, form_key, shapes_of
from attncheck.fixes.synthesis.forms import told_apart
from attncheck.fixes.synthesis.search import Search
from attncheck.fixes.synthesis.variations import (
    broadcast,
    divisible,
    grouped,
    one_kv_head,
    unbroadcast,
    variations,
    without_integers,
)
from attncheck.runner import compat

# Rows that the notation cannot say, of which so many are told.
TOLD = 12
Log = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """What was tried: rows, those of them that held, checks on calls that were held out, and the time."""

    tried: int
    valid: int
    held_out: int
    calls: int
    seconds: float


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
    signatures, untold = told_apart(op, learned)
    because = SHARED_MASKS if needs else ""
    signatures = tuple(
        replace(s, needs=needs, because=because, imports=imports, fake=fake) for s in signatures
    )
    if fake:
        for one in learned:
            refuse_unfakeable(op, one)
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
        dtypes = [t.dtype for t in float_tensors(same[0]).values()]
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
            shapes = [shapes_of(one) for one in mine]
            if len(mine) < 2 and shapes_of(call) not in shapes:
                mine.append(call)
        found += mine
    return found, [call for call in calls if not any(call is one for one in found)]


def _main_dtype(call: Call) -> torch.dtype:
    return next((t.dtype for t in float_tensors(call).values()), torch.float32)


def _distinct(call: Call) -> int:
    return len({size for t in float_tensors(call).values() for size in t.shape})


def _teaches(found: Sequence[Call], call: Call) -> bool:
    """Whether a call has tensors, or differences between sizes, that those before have not."""
    before, after = classes(found), classes([*found, call])
    if before != after:
        return True
    seen = {name for one in found for name in one.outputs}
    return bool(set(call.outputs) - seen)


def _refuse_unfit(op: str, calls: Sequence[Call], bench: Bench) -> None:
    overload = compat.find_overload(op)
    if overload is None:
        raise UserError(f"{op} is not registered in this process.")
    if not calls:
        raise UserError(f"{op} cannot be described: no operator of the probes calls it.")
    for argument in compat.schema_of(overload).arguments:
        if "Tensor[]" in str(argument.type) or "List[Tensor]" in str(argument.type):
            raise UserError(
                f"{op} takes a list of tensors ({argument.name}), for which signatures have no words."
            )
    for call in calls[:3]:
        first, second = (_seeded(bench, call, seed) for seed in (1, 2))
        if first is None or second is None:
            continue
        if not bench.same(first, second):
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
    if not bench.same(first, other):
        raise UserError(
            f"{op} changes its argument {', '.join(call.written)}, and what it gives depends on what that "
            "held before: it is state and no output buffer, which no strategy may move."
        )


def _needs(calls: Sequence[Call], bench: Bench) -> dict[str, Any]:
    """Arguments that must stay 0, because with others the op is random."""
    declared = compat.schema_of(compat.find_overload(calls[0].op)).arguments
    needs: dict[str, Any] = {}
    for argument in declared:
        if str(argument.type) not in ("float", "Optional[float]"):
            continue
        if any(recording.value_of(call, argument.name) != 0.0 for call in calls):
            continue
        call = recording.with_positional(calls[0], argument.name)
        call = replace(call, arguments={**call.arguments, argument.name: 0.5})
        first, second = (_seeded(bench, call, seed) for seed in (1, 2))
        random = first is not None and second is not None and not bench.same(first, second)
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
    op = compat.find_overload(call.op)
    try:
        with compat.fake_mode() as mode:
            given = {
                k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
                for k, v in call.arguments.items()
            }
            items = list(given.items())
            op(*(v for _, v in items[: call.positional]), **dict(items[call.positional :]))
    except Exception:
        return False
    return True


def _learn(found: Sequence[Call], held: Sequence[Call], fake: bool, bench: Bench, log: Log) -> Form:
    wide, ones = unbroadcast(found, bench)
    found = [*found, *wide]
    found += without_integers(found, bench)
    found += broadcast(found, bench)
    search = _searched(found, bench, ones)
    letters = search.letters()
    heads = next((one for one, name in letters.items() if name == HEADS), None)
    if heads is not None and KV_HEADS not in letters.values():
        more = grouped(found, heads, bench)
        if more:
            search = _searched([*found, *more], bench, ones)
            letters = search.letters()
    found = search.calls
    held = [*held, *variations(found, search.classes, bench)]
    out = Form([*found, *held], fake, tried=search.tried, valid=search.valid)
    while True:
        describe_form(out, search, letters, found)
        wrong = check(out, found, held, bench, letters)
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


def _searched(found: Sequence[Call], bench: Bench, ones: frozenset[Dim]) -> Search:
    found = [*found, *one_kv_head(found, bench)]
    return Search([*found, *divisible(found, bench)], bench, ones)
