"""The notation is read as it is written, and the layouts that follow are right by brute force.

Brute force: the rows of a call that each rank holds are sets of indices. Cut as a layout says, they have to
be the parts of one call: nobody has nothing, nobody has a query head without its kv head, each result has an
owner, and where ranks hold addends, together they are all of them, once.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from attncheck.fixes import notation
from attncheck.fixes.notation import (
    GIVEN,
    Dims,
    Layout,
    Refused,
    Signature,
    failing,
    form_of,
    layouts,
    read,
    results_shapes,
)

# --- reading -------------------------------------------------------------------------------------

letters = st.sampled_from(["b", "h", "g", "sq", "sk", "d", "t", "one", "8"])
forms = st.lists(st.lists(letters, min_size=1, max_size=4).map(tuple), min_size=1, max_size=3)


@given(
    forms,
    st.booleans(),
    st.lists(letters.filter(str.isalpha), max_size=3).map(tuple),
    st.sampled_from(["", "bias", "mask[3]"]),
    st.sampled_from(["", "float32", "bfloat16", "int64", "uint8"]),
    st.randoms(),
)
def test_what_is_written_is_read(
    forms: list[tuple[str, ...]],
    in_place: bool,
    summed: tuple[str, ...],
    only_if: str,
    dtype: str,
    random: object,
) -> None:
    parts = ["in place"] * in_place + [f"summed over {' '.join(summed)}"] * bool(summed)
    parts += [f"if {only_if}"] * bool(only_if) + [dtype] * bool(dtype)
    random.shuffle(parts)  # type: ignore[attr-defined]
    text = ", ".join([" | ".join(map(" ".join, forms)), *parts])
    expected = Dims(tuple(forms), in_place=in_place, summed=summed, only_if=only_if, dtype=dtype)
    assert read(text) == expected
    assert read(text.replace(" ", "  ").replace(",", " , ").replace("in  place", "in place")
                .replace("summed  over  ", "summed over ").replace("if  ", "if ")) == expected  # fmt: skip
    for form in forms:
        assert read(text).of(len(form)) == next(f for f in forms if len(f) == len(form))
    assert read(text).of(9) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", Dims(none=True)),
        ("replicated", Dims(replicated=True)),
        ("replicated, int64", Dims(replicated=True, dtype="int64")),
        ("like bias, summed over b h, if needed", Dims(like="bias", summed=("b", "h"), only_if="needed")),
    ],
)  # fmt: skip
def test_tensors_without_dims_of_their_own(text: str, expected: Dims) -> None:
    assert read(text) == expected


@pytest.mark.parametrize(
    "text", ["b h, summed", "b h, inplace", "b h, if", "b h, float", "b, sq, h, d"]
)
def test_what_nobody_wrote_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="nobody knows what"):
        read(text)


@pytest.mark.parametrize(
    ("wanted", "value", "meets"),
    [
        (False, False, True), (False, True, False), (False, 0, True), (0.0, 0, True), (0.0, 0.1, False),
        ((None, -1), None, True), ((None, -1), -1, True), ((None, -1), 3, False),
        (None, None, True), (None, 0, False), (GIVEN, 0, True), (GIVEN, None, False),
        ("BNSD", "BNSD", True), ("BNSD", "BSH", False), (False, None, False),
    ],
)  # fmt: skip
def test_conditions(wanted: object, value: object, meets: bool) -> None:
    assert (failing({"flag": wanted}, {"flag": value}) == "") is meets


# --- brute force ---------------------------------------------------------------------------------

# Forward and backward in one: what a result without sums and one with them look like.
ATTENTION = Signature(
    "mine.attention.default",
    takes={"q": "b sq h d", "k": "b sk g d", "v": "b sk g d", "bias": "b h sq sk"},
    gives={
        "out": "b sq h d",
        "lse": "b h sq",
        "dk": "b sk g d, summed over h sq",
        "dbias": "like bias, summed over b h sq",
    },
    queries={"causal": False},
)
Sizes = dict[str, int]
FREE = {"causal": False, "bias": "given"}


def shapes_of(sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(sizes.get(letter, 2) for letter in text.split())
        for name, text in ATTENTION.takes.items()
    }


calls = st.builds(
    lambda b, sq, g, group: {"b": b, "sq": sq, "h": g * group, "g": g},
    st.integers(1, 7), st.integers(1, 7), st.integers(1, 6), st.integers(1, 4),
)  # fmt: skip
meshes = st.lists(st.integers(1, 4), min_size=1, max_size=2).map(tuple)


def chunk(rows: Sequence[int], ranks: int, rank: int) -> Sequence[int]:
    """As DTensor splits: pieces of equal size, the last one smaller, then nothing."""
    size = -(-len(rows) // ranks)
    return rows[rank * size : (rank + 1) * size]


def held(
    dims: Sequence[str],
    placed: Sequence[Placement],
    sizes: Sizes,
    rank: Sequence[int],
    mesh: Sequence[int],
) -> dict[str, Sequence[int]]:
    """The indices of each named dim that a rank holds."""
    rows: dict[str, Sequence[int]] = {letter: range(sizes.get(letter, 2)) for letter in dims}
    for placement, at, ranks in zip(placed, rank, mesh, strict=True):
        if isinstance(placement, Shard):
            letter = dims[placement.dim]
            rows[letter] = chunk(rows[letter], ranks, at)
    return rows


Q, K, LSE = (read(text).forms[0] for text in ("b sq h d", "b sk g d", "b h sq"))
Addends = dict[tuple[int, int], Counter[tuple[int, int]]]


def computed(layout: Layout, sizes: Sizes, rank: Sequence[int], mesh: Sequence[int]) -> Addends:
    """By (batch row, kv head): the queries whose addends of dk a rank computes.

    AssertionError where what the rank holds is no call by itself.
    """
    q = held(Q, layout.takes["q"], sizes, rank, mesh)
    k = held(K, layout.takes["k"], sizes, rank, mesh)
    assert all(map(len, (*q.values(), *k.values()))), "a rank without rows"
    assert q["b"] == k["b"]
    assert layout.takes["k"] == layout.takes["v"]
    assert len(k["sk"]) == 2, "a part of the keys"
    ratio, rest = divmod(len(q["h"]), len(k["g"]))
    assert not rest, "a torn group"
    group = sizes["h"] // sizes["g"]
    out: Addends = {}
    for b, (at, h), sq in itertools.product(q["b"], enumerate(q["h"]), q["sq"]):
        g = k["g"][at // ratio]  # the kv head that the kernel takes
        assert g == h // group, "a torn group"
        out.setdefault((b, g), Counter())[h, sq] += 1
    return out


def put_together(parts: dict[tuple[int, ...], Addends], placed: Sequence[Placement]) -> Addends:
    for placement in reversed(placed):
        joined: dict[tuple[int, ...], Addends] = {}
        for rank, part in sorted(parts.items()):
            if rank[:-1] not in joined:
                joined[rank[:-1]] = {key: Counter(value) for key, value in part.items()}
                continue
            whole = joined[rank[:-1]]
            if isinstance(placement, Shard):
                assert not set(whole) & set(part), "two owners"
                whole.update(part)
            elif isinstance(placement, Partial):
                assert set(whole) == set(part)
                for key, value in part.items():
                    whole[key] += value
            else:
                assert whole == part, "replicas that differ"
        parts = joined
    return parts[()]


def check(layout: Layout, sizes: Sizes, mesh: Sequence[int]) -> None:
    """AssertionError where a layout is wrong."""
    ranks = list(itertools.product(*map(range, mesh)))
    parts = {rank: computed(layout, sizes, rank, mesh) for rank in ranks}
    group = sizes["h"] // sizes["g"]
    out, lse, dk, _ = layout.gives
    assert out is not None
    assert lse is not None
    assert dk is not None
    everything = {
        (b, g): Counter(itertools.product(range(g * group, (g + 1) * group), range(sizes["sq"])))
        for b, g in itertools.product(range(sizes["b"]), range(sizes["g"]))
    }
    assert put_together(parts, dk) == everything
    for rank in ranks:  # a rank's results are where its queries are
        q = held(Q, layout.takes["q"], sizes, rank, mesh)
        assert held(Q, out, sizes, rank, mesh) == q
        assert held(LSE, lse, sizes, rank, mesh) == {letter: q[letter] for letter in LSE}


@given(calls, meshes)
@example({"b": 1, "sq": 7, "h": 1, "g": 1}, (2, 3))  # 4 and 3 rows, and the 4 are 2, 2 and none
@example({"b": 4, "sq": 3, "h": 12, "g": 3}, (2,))  # 6 query heads, and 2 and 1 kv heads
@example({"b": 4, "sq": 3, "h": 5, "g": 5}, (2, 2))
@example({"b": 5, "sq": 3, "h": 4, "g": 1}, (2, 2))
@example({"b": 4, "sq": 3, "h": 24, "g": 6}, (2, 2))  # each axis divides, both do not
def test_no_rank_is_empty_no_group_is_torn_and_addends_are_all_there(
    sizes: Sizes, mesh: tuple[int, ...]
) -> None:
    made = layouts(ATTENTION, FREE, shapes_of(sizes), mesh)
    assert made[-1].ways == ("replicate",) * len(mesh)
    assert len({layout.ways for layout in made}) == len(made)
    for layout in made:
        check(layout, sizes, mesh)


@given(calls, st.lists(st.integers(2, 4), min_size=1, max_size=2).map(tuple))
def test_no_layout_that_is_right_is_left_out(sizes: Sizes, mesh: tuple[int, ...]) -> None:
    """Each way on each axis is tried without asking `_fits`; what is left out is wrong by brute force.

    But for groups that one axis keeps whole and another shares (`heads`, then `query heads`), and for uneven
    splits that happen to be between groups.
    """
    offered = {layout.ways for layout in layouts(ATTENTION, FREE, shapes_of(sizes), mesh)}
    dims = {name: read(text) for name, text in ATTENTION.takes.items()}
    shapes = shapes_of(sizes)
    known = {**sizes, "d": 2, "sk": 2}
    for ways in itertools.product(notation.WAYS, repeat=len(mesh)):
        layout = notation._layout(ATTENTION, dims, FREE, shapes, known, ways)
        if layout is None or ways in offered:
            continue
        ranks = math.prod(n for way, n in zip(ways, mesh, strict=True) if way == "heads")
        if {"heads", "query heads"} <= set(ways) or (
            sizes["h"] > sizes["g"] and sizes["g"] % ranks
        ):
            continue
        with pytest.raises(AssertionError):
            check(layout, sizes, mesh)


def test_the_brute_force_sees_torn_groups_and_empty_ranks() -> None:
    everywhere = {name: (Shard(2),) for name in ("q", "k", "v")}
    heads = Layout(("heads",), everywhere, ((Shard(2),), (Shard(1),), (Shard(2),), None))
    check(heads, {"b": 2, "sq": 2, "h": 8, "g": 2}, (2,))
    for sizes, why in (
        ({"b": 2, "sq": 2, "h": 12, "g": 3}, "torn"),
        ({"b": 2, "sq": 2, "h": 6, "g": 3}, "torn"),
        ({"b": 2, "sq": 2, "h": 1, "g": 1}, "without rows"),
    ):
        with pytest.raises(AssertionError, match=why):
            check(heads, sizes, (2,))
    whole = ((Shard(2),), (Shard(1),), (Replicate(),), None)
    one = {"q": (Shard(2),), "k": (Replicate(),), "v": (Replicate(),)}
    with pytest.raises(AssertionError, match="replicas that differ"):
        check(Layout(("query heads",), one, whole), {"b": 2, "sq": 2, "h": 4, "g": 1}, (2,))


@given(calls, st.integers(1, 4), st.integers(1, 4), st.sampled_from(list(notation.WAYS)))
def test_a_way_on_two_axes_is_that_way_on_as_many_ranks(
    sizes: Sizes, first: int, second: int, way: str
) -> None:
    names = notation.WAYS[way]
    ranks = first * second
    assume(all(sizes[name] % ranks == 0 for name in names if (way, name) != ("query heads", "g")))
    flat = {x.ways: x for x in layouts(ATTENTION, FREE, shapes_of(sizes), (ranks,))}.get((way,))
    mesh = {x.ways: x for x in layouts(ATTENTION, FREE, shapes_of(sizes), (first, second))}
    square = mesh.get((way, way))
    assert (flat is None) == (square is None)
    if flat is not None and square is not None:
        assert square.takes == {name: p * 2 for name, p in flat.takes.items()}
        assert square.gives == tuple(None if p is None else p * 2 for p in flat.gives)


@given(calls, meshes, st.permutations(range(2)))
def test_the_order_of_axes_does_not_matter_where_they_are_equal(
    sizes: Sizes, mesh: tuple[int, ...], order: list[int]
) -> None:
    ranks = mesh[0]
    made = {x.ways for x in layouts(ATTENTION, FREE, shapes_of(sizes), (ranks, ranks))}
    assert {tuple(ways[at] for at in order) for ways in made} == made


# --- forms, conditions, refusals -----------------------------------------------------------------


def ways(values: Mapping[str, object], **sizes: int) -> set[str]:
    shapes = shapes_of({"b": 4, "sq": 6, "h": 4, "g": 4, **sizes})
    return {layout.ways[0] for layout in layouts(ATTENTION, values, shapes, (2,))}


def test_queries_are_sharded_where_each_stands_alone() -> None:
    assert "queries" in ways({"causal": False})
    assert "queries" not in ways({"causal": True})
    never = Signature("x", ATTENTION.takes, ATTENTION.gives)
    made = layouts(never, {}, shapes_of({"b": 4, "sq": 6, "h": 4, "g": 4}), (2,))
    assert {layout.ways[0] for layout in made} == {"batch", "heads", "replicate"}


def test_one_kv_head_for_all_stays_whole_and_its_gradient_is_a_sum() -> None:
    shapes = shapes_of({"b": 4, "sq": 6, "h": 4, "g": 1})
    made = {x.ways[0]: x for x in layouts(ATTENTION, FREE, shapes, (2,))}
    assert "heads" not in made
    layout = made["query heads"]
    assert layout.takes == {"q": (Shard(2),), "k": (Replicate(),), "v": (Replicate(),),
                            "bias": (Shard(1),)}  # fmt: skip
    assert layout.gives[2] == (Partial("sum"),)


@pytest.mark.parametrize(
    ("bias", "placed", "gradient"),
    [
        ((4, 4, 6, 2), Shard(1), Shard(1)),
        ((4, 1, 6, 2), Replicate(), Partial("sum")),
        ((1, 4, 1, 2), Shard(1), Shard(1)),
    ],
)
def test_what_broadcasts_stays_whole(
    bias: tuple[int, ...], placed: Placement, gradient: Placement
) -> None:
    shapes = {**shapes_of({"b": 4, "sq": 6, "h": 4, "g": 4}), "bias": bias}
    made = {x.ways[0]: x for x in layouts(ATTENTION, FREE, shapes, (2,))}
    assert made["heads"].takes["bias"] == (placed,)
    assert made["heads"].gives[3] == (gradient,)


def test_buffers_are_laid_out_like_results() -> None:
    into = Signature(
        "x",
        takes={**ATTENTION.takes, "dk": "b sk g d, in place"},
        gives={"out": "b sq h d"},
        queries={},
    )
    sizes = {"b": 4, "sq": 6, "h": 4, "g": 1}
    shapes = {**shapes_of(sizes), "dk": (4, 2, 1, 2)}
    # A buffer that ranks add to is none that anybody made: no row for queries, nor for query heads.
    assert {x.ways[0] for x in layouts(into, {}, shapes, (2,))} == {"batch", "replicate"}


def test_the_form_is_told_by_the_arguments() -> None:
    dense = Signature("x", {"q": "b h"}, {}, when={"starts": None})
    packed = Signature("x", {"q": "t h"}, {}, when={"starts": GIVEN, "mode": (0, 1)})
    assert form_of((dense, packed), {}) is dense
    assert form_of((dense, packed), {"starts": object(), "mode": 1}) is packed
    with pytest.raises(Refused, match="x: nobody described this form of the call"):
        form_of((dense, packed), {"starts": object(), "mode": 2})


@pytest.mark.parametrize(
    ("shapes", "why"),
    [
        ({"q": (4, 6, 4, 2), "sinks": (4,)}, "nothing says what the dims of its tensor sinks are"),
        ({"q": (4, 6, 4)}, "q is described as 'b sq h d', and has 3 dims"),
        ({"q": (4, 6, 4, 2), "k": (3, 2, 4, 2)}, "the dim 'b' of k has size 3, and 4 elsewhere"),
    ],
)
def test_calls_that_are_not_as_described_are_refused(
    shapes: dict[str, tuple[int, ...]], why: str
) -> None:
    with pytest.raises(Refused, match=why):
        layouts(ATTENTION, FREE, shapes, (2,))


def test_what_a_signature_needs() -> None:
    needs = Signature("x", {"q": "b h"}, {}, needs={"p": 0.0}, because="masks are shared")
    assert layouts(needs, {"p": 0.0}, {"q": (4, 4)}, (2,))
    with pytest.raises(Refused, match=r"x with p=0\.25 has no right strategy: masks are shared"):
        layouts(needs, {"p": 0.25}, {"q": (4, 4)}, (2,))


def test_shapes_of_results() -> None:
    signature = Signature(
        "x",
        takes={"q": "b sq h d", "v": "b sk g dv", "starts": "replicated"},
        gives={
            "out": "b sq h dv",
            "lse": "b h sq 1, float32",
            "seed": "replicated, int64",
            "starts": "like starts, int32",
            "debug": "b h, if debug",
            "most": "none",
        },
    )
    shapes = {"q": (2, 3, 4, 5), "v": (2, 7, 2, 6), "starts": (3,)}
    assert list(results_shapes(signature, {"debug": False}, shapes)) == [
        ((2, 3, 4, 6), ""), ((2, 4, 3, 1), "float32"), ((), "int64"), ((3,), "int32"), None, None,
    ]  # fmt: skip
    unknown = Signature("x", takes={"q": "b h"}, gives={"d": "b padded"})
    with pytest.raises(Refused, match="no argument says how large 'padded' of d is"):
        list(results_shapes(unknown, {}, {"q": (2, 2)}))


def test_layouts_cover_a_mesh_of_three_axes() -> None:
    sizes = {"b": 4, "sq": 6, "h": 8, "g": 8}
    made = layouts(ATTENTION, FREE, shapes_of(sizes), (2, 2, 2))
    assert ("batch", "heads", "queries") in {x.ways for x in made}
    # 4 rows of a batch are not enough for three times 2 ranks, nor are 6 queries: 3, then 1, then none.
    assert len(made) == 4**3 - 2
    for layout in made:
        check(layout, sizes, (2, 2, 2))
