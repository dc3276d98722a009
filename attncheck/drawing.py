"""What placements mean for a tensor: which rank holds which part of it, ready to be drawn.

Formats draw what stands here; the words are for whoever cannot see a drawing. Imports no torch.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from attncheck.model import Case
from attncheck.probing import EXPLICIT
from attncheck.text import listing

MAX_RANKS = 32  # with more, pieces are too small to be told apart
DRAWN_DIMS = 2
TOLD_PIECES = 8
_SHARD = re.compile(r"S\((\d{1,3})\)")

Range = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """A part of a tensor and the ranks that hold it: [start, stop) along the dims that are cut."""

    ranks: tuple[int, ...]
    across: Range = (0, 1)
    down: Range = (0, 1)


@dataclass(frozen=True)
class Drawing:
    """One tensor of a case.

    `dims`: all of its dims in words; `placements`: one for each mesh axis (`tp=2: S(1)`); `text`: all that
    is drawn, in words. `across` and `down` name the dims that are cut, empty where none is, and `size` is
    how long they are: in elements, or where these are not known (not `to_scale`) in equal pieces.
    `partial`: what a rank holds is an addend; `plain`: it is an ordinary tensor. No `pieces`: not drawn.
    """

    tensor: str
    dims: str
    placements: tuple[str, ...]
    text: str
    across: str = ""
    down: str = ""
    size: Range = (1, 1)
    pieces: tuple[Piece, ...] = ()
    partial: bool = False
    plain: bool = False
    to_scale: bool = True


@dataclass(frozen=True)
class _Placed:
    """A tensor with all that decides how it is drawn; `roles` and `sizes` are empty where not known."""

    tensor: str
    texts: tuple[str, ...]
    mesh: tuple[tuple[str, int], ...]
    roles: tuple[str, ...]
    sizes: tuple[int, ...]
    pattern: str

    @property
    def ranks(self) -> tuple[int, ...]:
        """All ranks of the mesh; none where they are too many to be drawn."""
        counts = [size for _, size in self.mesh]
        few = all(0 < size <= MAX_RANKS for size in counts) and math.prod(counts) <= MAX_RANKS
        return tuple(range(math.prod(counts))) if few else ()

    @property
    def dims(self) -> str:
        """`batch=6, heads=4, dim2=3`."""
        named = enumerate(zip(self.roles, self.sizes, strict=False))
        return ", ".join(f"{f'dim{i}' if role == '-' else role}={n}" for i, (role, n) in named)

    def size(self, dim: int) -> int:
        """Elements along a dim; 0 where that is not known."""
        return self.sizes[dim] if dim < len(self.sizes) else 0

    def name(self, dim: int, cuts: Sequence[int | None]) -> str:
        """`heads (dim 1)`: by its role or, where roles are not known, by the pattern that cuts it."""
        patterns = self.pattern.split(",")
        role = self.roles[dim] if dim < len(self.roles) else ""
        if not self.roles and len(patterns) == len(cuts):
            role = patterns[cuts.index(dim)]
        return f"dim {dim}" if role in ("", "-", EXPLICIT) else f"{role} (dim {dim})"


def drawings(case: Case) -> tuple[Drawing, ...]:
    """One for each tensor, for any case that a report can hold."""
    return tuple(
        _drawing(
            _Placed(
                tensor=tensor,
                texts=tuple(texts),
                mesh=tuple(case.mesh.items()),
                roles=tuple(case.tensor_dims.get(tensor, ())),
                sizes=tuple(case.tensor_sizes.get(tensor, ())),
                pattern=case.placement,
            )
        )
        for tensor, texts in case.placements.items()
    )


@functools.lru_cache(maxsize=4096)  # thousands of cases have dozens of drawings
def _drawing(placed: _Placed) -> Drawing:
    tensor, texts, dims, ranks = placed.tensor, placed.texts, placed.dims, placed.ranks
    head = f"{tensor} ({dims})" if dims else tensor
    if texts == ("plain",):
        text = f"{head}: an ordinary tensor, the same on every rank."
        whole = (Piece(ranks),) if ranks else ()
        return Drawing(tensor, dims, texts, text, pieces=whole, plain=True)
    cuts = _cuts(texts)
    if len(texts) != len(placed.mesh) or cuts is None or not ranks:
        return Drawing(tensor, dims, texts, f"{head}: {', '.join(texts) or 'not placed'}.")
    labels = tuple(
        f"{axis}={size}: {text}" for (axis, size), text in zip(placed.mesh, texts, strict=True)
    )
    head = f"{head}, {'; '.join(labels)}"
    cut = list(dict.fromkeys(dim for dim in cuts if dim is not None))
    if len(cut) > DRAWN_DIMS:
        return Drawing(tensor, dims, labels, f"{head}.")
    counts = [size for _, size in placed.mesh]
    known = [placed.size(dim) for dim in cut]
    to_scale = all(size > 0 for size in known)
    lengths = known if to_scale else [_pieces_along(dim, cuts, counts) for dim in cut]
    pieces = _pieces(cuts, cut, counts, lengths)
    names = [placed.name(dim, cuts) for dim in cut]
    partial = any(text.startswith("P(") for text in texts)
    return Drawing(
        tensor=tensor,
        dims=dims,
        placements=labels,
        text=f"{head}: {_told(pieces, names, partial, to_scale)}.",
        across=names[0] if names else "",
        down=names[1] if len(names) > 1 else "",
        size=(lengths[0] if lengths else 1, lengths[1] if len(lengths) > 1 else 1),
        pieces=pieces,
        partial=partial,
        to_scale=to_scale,
    )


def _cuts(texts: Sequence[str]) -> tuple[int | None, ...] | None:
    """The dim that each mesh axis cuts, None for one that cuts none; None for what cannot be drawn."""
    cuts: list[int | None] = []
    for text in texts:
        shard = _SHARD.fullmatch(text)
        if shard is None and text != "R" and not text.startswith("P("):
            return None
        cuts.append(int(shard[1]) if shard else None)
    return tuple(cuts)


def _pieces_along(dim: int, cuts: Sequence[int | None], sizes: Sequence[int]) -> int:
    return math.prod(size for cut, size in zip(cuts, sizes, strict=True) if cut == dim)


def _pieces(
    cuts: Sequence[int | None], cut: Sequence[int], sizes: Sequence[int], lengths: Sequence[int]
) -> tuple[Piece, ...]:
    """Cut as DTensor does, one mesh axis after the other; ranks that hold the same share a piece."""
    held: dict[tuple[Range, ...], list[int]] = {}
    for rank, place in enumerate(itertools.product(*map(range, sizes))):
        ranges: list[Range] = [(0, length) for length in lengths]
        for dim, index, size in zip(cuts, place, sizes, strict=True):
            if dim is not None:
                at = cut.index(dim)
                ranges[at] = _chunk(ranges[at], index, size)
        held.setdefault(tuple(ranges), []).append(rank)
    return tuple(Piece(tuple(ranks), *ranges) for ranges, ranks in held.items())


def _chunk(whole: Range, index: int, parts: int) -> Range:
    """The part of a range that `torch.chunk` gives: as long as the first, until nothing is left."""
    start, stop = whole
    length = -(-(stop - start) // parts)
    return min(start + index * length, stop), min(start + (index + 1) * length, stop)


def _told(pieces: Sequence[Piece], names: Sequence[str], partial: bool, to_scale: bool) -> str:
    told = []
    for piece in pieces:
        who = (
            f"rank {piece.ranks[0]} holds"
            if len(piece.ranks) == 1
            else f"each of the ranks {', '.join(map(str, piece.ranks))} holds"
        )
        ranges = list(zip(names, (piece.across, piece.down), strict=False))
        if any(start == stop for _, (start, stop) in ranges):
            told.append(f"{who} nothing")
            continue
        what = " and ".join(
            _range(*named) if to_scale else f"a piece of {named[0]}" for named in ranges
        )
        told.append(f"{who} {'an addend of ' * partial}{what or 'all of it'}")
    return listing(told, TOLD_PIECES)


def _range(name: str, between: Range) -> str:
    start, stop = between
    role = name.partition(" (")[0]
    return f"{role} {start}" if stop == start + 1 else f"{role} {start} to {stop - 1}"
