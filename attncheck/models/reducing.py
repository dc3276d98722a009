"""A deployment's numbers made small: a few ranks can run what many would, with the same difficulties."""

from __future__ import annotations

from collections.abc import Iterator

from attncheck.models.dividing import chunks

DIVIDES = "divides"
UNEVEN = "uneven"
FEWER = "fewer"


def status(heads: int, ranks: int) -> str:
    """How heads lie on ranks: they divide, they do not, or there are fewer of them than ranks."""
    if heads < ranks:
        return FEWER
    return UNEVEN if heads % ranks else DIVIDES


def reduce(heads: int, kv_heads: int, degree: int, ranks: int) -> tuple[int, int]:
    """Heads and kv_heads for `ranks` ranks that are to them what the given ones are to `degree` ranks.

    The status of both is kept, as is, where so many ranks allow it, whether queries share keys and values at
    all, and whether the first rank's heads fit the keys that it holds. Among those the ones are taken that
    come nearest to leaving each rank as many heads as it had: 40 heads on 8 ranks become 10 on 2.
    On one rank, and where nothing is split, few heads do as well as many.

    Shapes: kv_heads divide heads; so do those returned. 1 <= ranks <= degree, and ranks > 1 where degree is.
    """
    assert heads % kv_heads == 0, (heads, kv_heads)
    assert 1 <= ranks <= degree, (degree, ranks)
    assert (ranks > 1) == (degree > 1), (degree, ranks)
    if degree == 1:
        few = min(kv_heads, 4)
        return heads // kv_heads * few, few
    wanted = _traits(heads, kv_heads, degree)

    def badness(pair: tuple[int, int]) -> tuple[int, int, int]:
        lost = sum(a != b for a, b in zip(_traits(*pair, ranks), wanted, strict=True))
        return lost, abs(pair[0] * degree - heads * ranks), abs(pair[1] * degree - kv_heads * ranks)

    kept = [
        pair for pair in _candidates(heads, kv_heads, degree, ranks) if _kept(pair, ranks, wanted)
    ]
    return min(kept, key=badness)


def reduce_length(tokens: int, degree: int, ranks: int, like: int) -> int:
    """A sequence near `like` tokens that `ranks` ranks divide, once and into two parts each, exactly where
    `degree` ranks divide this one so.

    >>> reduce_length(32760, 8, 2, 48), reduce_length(126, 4, 2, 48), reduce_length(7, 1, 1, 48)
    (46, 47, 48)
    """
    if degree == 1:
        return like
    if tokens % degree:
        return like // ranks * ranks - 1
    parts = like // (2 * ranks) * 2
    return ranks * (parts if tokens % (2 * degree) == 0 else parts - 1)


def _traits(heads: int, kv_heads: int, ranks: int) -> tuple[object, ...]:
    """The first two have to be kept, the others while it is possible."""
    local, local_kv = chunks(heads, [ranks])[0], chunks(kv_heads, [ranks])[0]
    return (
        status(heads, ranks),
        status(kv_heads, ranks),
        heads == kv_heads,
        local % local_kv == 0,
    )


def _kept(pair: tuple[int, int], ranks: int, wanted: tuple[object, ...]) -> bool:
    return _traits(*pair, ranks)[:2] == wanted[:2]


def _candidates(heads: int, kv_heads: int, degree: int, ranks: int) -> Iterator[tuple[int, int]]:
    # One more than each rank had, and a group more, is more than is ever needed.
    most_kv = ranks * (-(-kv_heads // degree) + 1)
    for few in range(1, most_kv + 1):
        most = ranks * (-(-heads // degree) + 1) + few * ranks
        for many in range(few, most + 1, few):
            yield many, few
