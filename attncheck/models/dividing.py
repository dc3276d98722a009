"""Which degrees of tensor and context parallelism divide the attention calls of a model, and what becomes of
those that they do not. Arithmetic alone: whether an operator is right under them, only a run can say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from attncheck.errors import UserError
from attncheck.models.data import Call, Model

# The ways to distribute a call. `tensor`: heads over the tp axis. Over the cp axis, `ulysses`: heads, after
# an all-to-all; `ring`: the sequence; `usp`: both, one within the other.
TENSOR = "tensor"
ULYSSES = "ulysses"
RING = "ring"
USP = "usp"
WAYS = (TENSOR, ULYSSES, RING, USP)


class Verdict(str, Enum):
    """Best first."""

    WORKS = "works"
    REPLICATE_KV = "replicate_kv"
    UNEVEN = "uneven"
    IMPOSSIBLE = "impossible"

    @property
    def rank(self) -> int:
        return list(Verdict).index(self)


@dataclass(frozen=True)
class Split:
    """A dim of `size` over `ranks`; `first` and `last` are what the first and the last rank hold, as
    torch.chunk splits it."""

    dim: str
    size: int
    ranks: int
    first: int
    last: int


@dataclass(frozen=True)
class Division:
    """How one way splits a call: over `heads_ranks` by heads, over `sequence_ranks` by the sequence.

    `copies`: how many ranks hold each head of keys and values. `why`: one sentence.
    """

    call: str
    way: str
    heads_ranks: int
    sequence_ranks: int
    verdict: Verdict
    why: str
    splits: tuple[Split, ...] = ()
    copies: int = 1


@dataclass(frozen=True)
class WorkingDegrees:
    """The degrees of one way, by what they do to the worst of a model's calls."""

    way: str
    works: tuple[int, ...]
    replicate_kv: tuple[int, ...]
    uneven: tuple[int, ...]
    impossible: tuple[int, ...]


def chunks(size: int, axes: Sequence[int]) -> list[int]:
    """What each rank holds of a dim that mesh axes split one after the other, each as torch.chunk does.

    >>> chunks(10, [4]), chunks(10, [8]), chunks(7, [2, 3])
    ([3, 3, 3, 1], [2, 2, 2, 2, 2, 0, 0, 0], [2, 2, 0, 1, 1, 1])
    """
    sizes = [size]
    for parts in axes:
        sizes = [
            max(0, min(rows, one - at * rows))
            for one in sizes
            for rows in (-(-one // parts),)
            for at in range(parts)
        ]
    return sizes


def degrees(model: Model, tp: int, cp: int) -> tuple[Division, ...]:
    """Each attention call under each way that these degrees allow: `tensor` always, the others where cp > 1,
    `usp` once for each of its two degrees above 1. Raises UserError for a degree below 1.
    """
    for name, degree in (("tp", tp), ("cp", cp)):
        if degree < 1:
            raise UserError(f"{name} {degree}: expected a number of ranks, 1 or more.")
    return tuple(division for call in model.calls for division in _divisions(call, tp, cp))


def working_degrees(model: Model, upto: int = 64) -> tuple[WorkingDegrees, ...]:
    """Which degrees up to `upto` work, way by way, each with nothing else split; `usp` counts the better of
    its two orders and degrees. Raises UserError where `upto` is below 1."""
    if upto < 1:
        raise UserError(f"upto {upto}: expected a number of ranks, 1 or more.")
    found: dict[str, dict[Verdict, list[int]]] = {w: {v: [] for v in Verdict} for w in WAYS}
    for degree in range(1, upto + 1):
        for way in WAYS:
            tp, cp = (degree, 1) if way == TENSOR else (1, degree)
            if (verdict := _worst_call(model, way, tp, cp)) is not None:
                found[way][verdict].append(degree)
    return tuple(
        WorkingDegrees(way, *(tuple(found[way][verdict]) for verdict in Verdict)) for way in WAYS
    )


def _worst_call(model: Model, way: str, tp: int, cp: int) -> Verdict | None:
    """None where the way has no such degree: a prime one for `usp`."""
    verdicts = []
    for call in model.calls:
        ones = [d.verdict for d in _divisions(call, tp, cp, always=True) if d.way == way]
        if not ones:
            return None
        verdicts.append(min(ones, key=lambda verdict: verdict.rank))
    return max(verdicts, key=lambda verdict: verdict.rank)


def _divisions(call: Call, tp: int, cp: int, always: bool = False) -> Iterator[Division]:
    """`always`: the ways over a cp axis too where it has one rank, which splits nothing."""
    yield _division(call, TENSOR, (tp,), 1)
    if cp == 1 and not always:
        return
    yield _division(call, ULYSSES, (tp, cp), cp)
    yield _division(call, RING, (tp,), cp)
    if cp == 1:
        yield _division(call, USP, (tp,), 1)
    for ulysses in range(2, cp):
        if cp % ulysses == 0:
            yield _division(call, USP, (tp, ulysses), cp)


def _division(call: Call, way: str, head_axes: tuple[int, ...], cp: int) -> Division:
    """`cp`: over how many ranks the sequence lies, at least before and after the call."""
    if call.kind == "cross" and way != TENSOR:
        head_axes = head_axes[:1]
    heads = divide_heads(call.heads, call.kv_heads, head_axes)
    verdict, why, splits = heads.verdict, heads.why, heads.splits
    length_verdict, length_why, length_splits = divide_sequence(call, way, cp)
    if length_verdict.rank > verdict.rank or (verdict is Verdict.WORKS and length_why):
        verdict, why = length_verdict, length_why
    elif length_verdict is not Verdict.WORKS:
        why = f"{why}; {length_why}"
    return Division(
        call.name, way, math.prod(head_axes), cp, verdict, why, splits + length_splits, heads.copies
    )


# --- heads ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadsDivision:
    verdict: Verdict
    why: str
    splits: tuple[Split, ...]
    copies: int = 1


def divide_heads(heads: int, kv_heads: int, axes: tuple[int, ...]) -> HeadsDivision:
    """Heads, and the heads of keys and values that groups of them share, over mesh axes in this order."""
    ranks = math.prod(axes)
    q, kv = chunks(heads, axes), chunks(kv_heads, axes)
    splits = (
        Split("heads", heads, ranks, q[0], q[-1]),
        Split("kv_heads", kv_heads, ranks, kv[0], kv[-1]),
    )
    of, each = f"{heads} heads on {_ranks(ranks)}", f"{q[0]} to each"
    if ranks == 1:
        return HeadsDivision(Verdict.WORKS, f"all {heads} heads are on every rank", splits)
    if empty := q.count(0):
        why = f"{of}: {empty} of them would hold no head, and kernels have been seen to die of an empty shard"
        return HeadsDivision(Verdict.IMPOSSIBLE, why, splits)
    even = heads % ranks == 0
    unequal = _AFTER_EXCHANGE if heads % axes[0] == 0 else _WIDTHS
    if kv_heads == heads:
        if even:
            return HeadsDivision(Verdict.WORKS, f"{of}, {each}", splits)
        why = f"{of}: {q[0]} on the first and {q[-1]} on the last, {unequal}"
        return HeadsDivision(Verdict.UNEVEN, why, splits)
    if even and kv_heads % ranks == 0:
        why = f"{of}, {each} with {kv[0]} of the {kv_heads} heads of keys and values"
        return HeadsDivision(Verdict.WORKS, why, splits)
    if even and ranks % kv_heads == 0:
        copies = ranks // kv_heads
        why = (
            f"{kv_heads} heads of keys and values on {_ranks(ranks)}: {copies} must hold each of them, which "
            "no DTensor placement says; without it PyTorch gathers all heads on every rank"
        )
        return HeadsDivision(Verdict.REPLICATE_KV, why, splits, copies)
    if kv_heads == 1:
        why = f"{of}: {q[0]} on the first and {q[-1]} on the last, with all of keys and values, {unequal}"
        return HeadsDivision(Verdict.UNEVEN, why, splits, ranks)
    if even and kv_heads < ranks:
        why = (
            f"{kv_heads} heads of keys and values on {_ranks(ranks)}: the groups of "
            f"{heads // kv_heads} heads that share one lie across ranks, and no number of copies mends that"
        )
        return HeadsDivision(Verdict.IMPOSSIBLE, why, splits)
    if empty := kv.count(0):
        why = f"{kv_heads} heads of keys and values on {_ranks(ranks)}: {empty} of them would hold none"
        return HeadsDivision(Verdict.IMPOSSIBLE, why, splits)
    if all(local == heads // kv_heads * keys for local, keys in zip(q, kv, strict=True)):
        why = f"{of}: {q[0]} on the first and {q[-1]} on the last, in whole groups, {unequal}"
        return HeadsDivision(Verdict.UNEVEN, why, splits)
    return HeadsDivision(Verdict.UNEVEN, _groups_cut(heads, kv_heads, q, kv), splits)


# A projection is split by its width, which knows nothing of heads.
_WIDTHS = "and a projection that is split evenly by its width cuts through a head"
_AFTER_EXCHANGE = (
    "and an all-to-all of unequal parts is more than most of those who write one provide for"
)


def _groups_cut(heads: int, kv_heads: int, q: Sequence[int], kv: Sequence[int]) -> str:
    """Grouped queries whose groups lie across ranks: what PyTorch makes of that depends on local sizes."""
    of = f"{heads} heads that share {kv_heads} of keys and values, on {_ranks(len(q))}"
    sizes = f"{q[0]} and {kv[0]} on the first, {q[-1]} and {kv[-1]} on the last"
    if all(local % keys == 0 for local, keys in zip(q, kv, strict=True)):
        end = "each rank finds groups that fit, the wrong ones: PyTorch is wrong without an error"
    else:
        end = "the local heads fit no groups on some ranks, which raise while the others go on"
    return f"{of}: {sizes}; {end}"


# --- the sequence --------------------------------------------------------------------------------


def divide_sequence(call: Call, way: str, cp: int) -> tuple[Verdict, str, tuple[Split, ...]]:
    """The tokens of a call over `cp` ranks: the verdict, why (empty where nothing is split), the split."""
    if way == TENSOR or cp == 1:
        return Verdict.WORKS, "", ()
    if not call.sequence:
        return Verdict.WORKS, f"where {cp} divides the sequence, whose length is the request's", ()
    rows = chunks(call.sequence, (cp,))
    splits = (Split("sequence", call.sequence, cp, rows[0], rows[-1]),)
    if 0 in rows:
        why = f"{call.sequence} tokens on {_ranks(cp)}: {rows.count(0)} of them would hold none"
        return Verdict.IMPOSSIBLE, why, splits
    if call.sequence % cp:
        why = (
            f"{call.sequence} tokens on {_ranks(cp)}: {rows[0]} on the first and {rows[-1]} on the last, "
            "where rings and all-to-alls expect equal parts: pad the sequence"
        )
        return Verdict.UNEVEN, why, splits
    if call.kind == "cross":
        why = f"{rows[0]} queries on each of {_ranks(cp)}, with all keys on every one: nothing is exchanged"
    elif way == ULYSSES:
        why = f"{rows[0]} tokens of all heads on each of {_ranks(cp)}, all tokens of some heads in between"
    elif call.causal and call.sequence % (2 * cp):
        why = (
            f"{rows[0]} tokens on each of {_ranks(cp)}, but not in two equal parts, with which PyTorch's "
            "ring balances a causal mask"
        )
    else:
        why = f"{rows[0]} tokens on each of {_ranks(cp)}"
    return Verdict.WORKS, why, splits


def _ranks(number: int) -> str:
    return f"{number} rank" if number == 1 else f"{number} ranks"
