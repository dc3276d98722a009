"""The rows that hold on the calls at hand: where outputs lie when dims that belong together are cut.

Rows are told apart by what they cut: query, key and value along one dim (batch, or heads); two sizes of which
one may be smaller (heads and kv heads, where no group is torn); the query alone (queries).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from attncheck.fixes.notation import BATCH, HEADS, KV_HEADS, QUERIES
from attncheck.fixes.recording import INAPPLICABLE, SUM, Bench, Call, Placed
from attncheck.fixes.synthesis.dims import (
    Class,
    Dim,
    classes,
    cuts_of,
    first_tensor,
    float_tensors,
    main_tensors,
    output_names,
    size_of,
)
from attncheck.fixes.synthesis.variations import RANKS

# Combinations of placements up to which all are tried, and not only those that cut equal sizes together.
ALL_UP_TO = 700
# Heads and kv heads cut together, beside the letters of single rows.
HEADS_AND_KV = "hg"
Row = dict[str, Placed]


class Search:
    """The rows that hold on the calls at hand."""

    def __init__(self, calls: Sequence[Call], bench: Bench, ones: frozenset[Dim]) -> None:
        self.calls, self.bench, self.ones = list(calls), bench, ones
        self.first = first_tensor(calls[0])
        self.main = main_tensors(calls[0])
        self.tried = 0
        self.classes = classes(calls)
        self._table: dict[tuple[Class, ...], dict[tuple[int, int], Row | str]] = {}
        self._try_together()
        # Pieces that do not go together make an unchecked kernel read and write beyond its tensors.
        others = bench.apart(lambda: (self._try_all(), self.tried))
        self._other: list[tuple[dict[str, int], Row]] = []
        if others is not None:
            self._other, self.tried = others
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
        floats = {name for call in self.calls for name in float_tensors(call)}
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

    def _try_all(self) -> list[tuple[dict[str, int], Row]]:
        """Every other combination of placements of the first call, where there are few: those that hold."""
        call = self.calls[0]
        options = [
            [None, *(d for d, size in enumerate(t.shape) if size > 1)]
            for t in call.tensors.values()
        ]
        if math.prod(map(len, options)) > ALL_UP_TO:
            return []
        known = [cuts_of(call, cut) for cut in self._table]
        held = []
        for combination in itertools.product(*options):
            cuts = {
                name: dim
                for name, dim in zip(call.tensors, combination, strict=True)
                if dim is not None
            }
            if not cuts or cuts in known:
                continue
            self.tried += 1
            row = self.bench.cut(call, cuts, RANKS[0])
            if isinstance(row, dict) and self._holds_everywhere(cuts, row):
                held.append((cuts, row))
        return held

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
                own = tuple(d for d in one if cuts.get(d[0]) == d[2])
                if len(own) == len(cuts) < len(one):
                    at = self.classes.index(one)
                    self.classes[at : at + 1] = [own, tuple(d for d in one if d not in own)]
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
            many, few = (size_of(self.calls[at], c) for c in (heads, kv_heads))
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


def _text(call: Call, cuts: Mapping[str, int], row: Row) -> str:
    """`v S(3) -> out S(3), lse R`"""
    names = output_names(call)
    given = ", ".join(f"{name} S({dim})" for name, dim in cuts.items())
    made = ", ".join(
        f"{names[name]} {f'S({at})' if isinstance(at, int) else at}" for name, at in row.items()
    )
    return f"{given} -> {made}"
