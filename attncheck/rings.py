"""What communication costs: the bytes that one rank sends, collectives going round their ranks in a ring."""

from __future__ import annotations

from collections.abc import Sequence


def ring_bytes(name: str, local_bytes: int, ranks: int) -> int:
    """Bytes one of `ranks` ranks sends for a collective on its input of `local_bytes` bytes.

    Raises KeyError for a collective without a formula here.
    """
    return {
        "all_gather": (ranks - 1) * local_bytes,
        "all_reduce": 2 * (ranks - 1) * local_bytes // ranks,
        "reduce_scatter": (ranks - 1) * local_bytes // ranks,
        "all_to_all": (ranks - 1) * local_bytes // ranks,
        "broadcast": local_bytes,
        "scatter": local_bytes,
    }[name]


def redistribution_bytes(
    whole_bytes: int, source: Sequence[str], target: Sequence[str], mesh: Sequence[int]
) -> int:
    """Bytes one rank sends to bring a tensor of `whole_bytes` bytes from placements to others, written as
    PyTorch prints them (`S(1)`, `R`, `P(sum)`), one for each mesh axis: an axis at a time, the last first.

    >>> redistribution_bytes(1024, ["S(1)"], ["R"], [4]), redistribution_bytes(1024, ["R"], ["S(1)"], [4])
    (768, 0)
    """
    local = whole_bytes
    for placement, ranks in zip(source, mesh, strict=True):
        local //= ranks if _is_shard(placement) else 1
    sent = 0
    for before, after, ranks in reversed([*zip(source, target, mesh, strict=True)]):
        if name := _collective(before, after):
            sent += ring_bytes(name, local, ranks)
        local *= ranks if _is_shard(before) else 1
        local //= ranks if _is_shard(after) else 1
    return sent


def _collective(before: str, after: str) -> str:
    if before == after or before == "R":
        return ""  # nothing to do, or to keep a part of what is here
    if _is_shard(before):
        return "all_to_all" if _is_shard(after) else "all_gather"
    return "reduce_scatter" if _is_shard(after) else "all_reduce"


def _is_shard(placement: str) -> bool:
    return placement.startswith(("S(", "_S("))
