"""Names of groups of modules: each path is told once, and no name tells a module that did not do it."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attncheck.audit.folding import Folder, starred

WORDS = st.sampled_from(["blocks", "attn", "mlp", "norm1", "4d"])
NUMBERS = st.integers(0, 4).map(str)
PATHS = st.lists(st.one_of(NUMBERS, WORDS), max_size=4).map(".".join)


def told(name: str, known: set[str]) -> set[str]:
    """The paths that a name stands for: `*` is any number, `[0-2,5]` are these."""
    parts = []
    for part in re.split(r"\.", name):
        if part == "*":
            parts.append("(?:0|[1-9][0-9]*)")
        elif part.startswith("["):
            numbers: list[str] = []
            for run in part[1:-1].split(","):
                first, _, last = run.partition("-")
                numbers += map(str, range(int(first), int(last or first) + 1))
            parts.append(f"(?:{'|'.join(numbers)})")
        else:
            parts.append(re.escape(part))
    found = re.compile(r"\.".join(parts))
    return {path for path in known if found.fullmatch(path)}


@st.composite
def counted(draw: st.DrawFn) -> tuple[list[str], dict[str, int]]:
    """The modules of a model, and how often some of them did something."""
    paths = draw(st.lists(PATHS, max_size=30))
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    paths += [f"layers.{a}.experts.{b}" for a in range(grid[0]) for b in range(grid[1])]
    chosen = draw(st.lists(st.sampled_from(paths), unique=True))
    return paths, {path: draw(st.integers(1, 5)) for path in chosen}


@given(counted())
def test_each_path_is_told_once_and_no_other(model: tuple[list[str], dict[str, int]]) -> None:
    paths, counts = model
    folded = Folder(paths).fold(counts)
    times: Counter[str] = Counter()
    for name, count in folded:
        own = told(name, set(paths))
        assert count == sum(counts.get(path, 0) for path in own), name
        times.update(own)
    assert times == Counter(counts.keys())
    assert len({name for name, _ in folded}) == len(folded)


@given(counted())
def test_what_is_counted_over_the_same_paths_is_folded_alike(
    model: tuple[list[str], dict[str, int]],
) -> None:
    """Calls and bytes of collectives are folded one by one and put together."""
    paths, counts = model
    folder = Folder(paths)
    bytes_ = {path: count * 1024 for path, count in counts.items()}
    assert [(name, count * 1024) for name, count in folder.fold(counts)] == folder.fold(bytes_)


@given(st.lists(PATHS, max_size=5), st.dictionaries(PATHS, st.integers(1, 5), max_size=8))
def test_paths_that_the_model_does_not_have_are_told_too(
    paths: list[str], counts: dict[str, int]
) -> None:
    folded = Folder(paths).fold(counts)
    assert sum(count for _, count in folded) == sum(counts.values())
    everywhere = {*paths, *counts}
    assert Counter(path for name, _ in folded for path in told(name, everywhere) & {*counts}) == (
        Counter(counts.keys())
    )


def model(*sizes: int) -> list[str]:
    return [f"layers.{a}.blocks.{b}" for a, size in enumerate(sizes) for b in range(size)]


@pytest.mark.parametrize(
    ("paths", "did", "names"),
    [
        ([f"b.{n}" for n in range(40)], [f"b.{n}" for n in range(40)], ["b.*"]),
        ([f"b.{n}" for n in range(40)], [f"b.{n}" for n in range(39)], ["b.[0-38]"]),
        ([f"b.{n}" for n in range(4)], ["b.2"], ["b.2"]),
        (["b.0"], ["b.0"], ["b.0"]),
        # A model within a Sequential: the number that says the layer is the second one.
        ([f"0.b.{n}" for n in range(3)], [f"0.b.{n}" for n in range(3)], ["0.b.*"]),
        # Experts of all layers but the first, which has none.
        (
            ["l.0.mlp", *(f"l.{a}.mlp.experts.{b}" for a in (1, 2) for b in range(8))],
            [f"l.{a}.mlp.experts.{b}" for a in (1, 2) for b in range(8)],
            ["l.*.mlp.experts.*"],
        ),
        # Experts that some tokens chose, the same in all layers.
        (
            [f"l.{a}.e.{b}" for a in range(3) for b in range(8)],
            [f"l.{a}.e.{b}" for a in range(3) for b in (0, 5)],
            ["l.*.e.[0,5]"],
        ),
        (model(2, 2, 5), model(2, 2, 5), ["layers.*.blocks.[0-1]", "layers.2.blocks.[2-4]"]),
        (["h.01", "h.1", "h.2"], ["h.01", "h.1", "h.2"], ["h.01", "h.*"]),
        (["", "x"], [""], [""]),
    ],
)
def test_names(paths: list[str], did: list[str], names: list[str]) -> None:
    assert [name for name, _ in Folder(paths).fold(dict.fromkeys(did, 1))] == names


def test_layers() -> None:
    paths = [f"model.layers.{n}.attn.to_out.{part}" for n in range(32) for part in (0, 1)]
    layers = Folder(["", "model", "head.0", *paths]).layers()
    assert layers == {
        "model.layers.*.attn.to_out.0": 32,
        "model.layers.*.attn.to_out.1": 32,
    }
    assert Folder(["0.b.0.x", "0.b.1.x"]).layers() == {"0.b.*.x": 2}


def test_a_number_is_a_whole_part() -> None:
    assert starred("12.b3.c.4.5d.07") == "*.b3.c.*.5d.07"
