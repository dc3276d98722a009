"""Which rank holds which part of a tensor: as DTensor cuts it, in numbers and in words."""

from __future__ import annotations

import dataclasses
import math

import pytest
import sample_report
from hypothesis import given
from hypothesis import strategies as st

from attncheck.drawing import MAX_RANKS, Drawing, Piece, drawings
from attncheck.model import Case

DIMS = ("batch", "heads", "sequence", "-")


def case(texts: tuple[str, ...], mesh: dict[str, int], sizes: tuple[int, ...] = ()) -> Case:
    first = sample_report.sample().cases[0].case
    return dataclasses.replace(
        first,
        mesh=mesh,
        placement="heads",
        placements={"q": texts},
        tensor_dims={"q": DIMS} if sizes else {},
        tensor_sizes={"q": sizes} if sizes else {},
    )


def drawn(texts: tuple[str, ...], mesh: dict[str, int], sizes: tuple[int, ...] = ()) -> Drawing:
    (drawing,) = drawings(case(texts, mesh, sizes))
    return drawing


def test_uneven_shards_are_cut_as_torch_chunk_cuts() -> None:
    drawing = drawn(("S(1)",), {"tp": 4}, (6, 7, 18, 16))
    assert [piece.across for piece in drawing.pieces] == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert (drawing.across, drawing.down, drawing.size) == ("heads (dim 1)", "", (7, 1))
    assert drawing.to_scale
    assert drawing.text.endswith("rank 2 holds heads 4 to 5, rank 3 holds heads 6.")


def test_a_rank_may_be_left_with_nothing() -> None:
    drawing = drawn(("S(1)",), {"tp": 4}, (6, 5, 18, 16))
    assert [piece.across for piece in drawing.pieces] == [(0, 2), (2, 4), (4, 5), (5, 5)]
    assert drawing.text.endswith("rank 3 holds nothing.")


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("length", [1, 3, 8, 18])
def test_against_torch(parts: int, length: int) -> None:
    torch = pytest.importorskip("torch")
    chunks = [len(chunk) for chunk in torch.arange(length).chunk(parts)]
    pieces = drawn(("S(2)",), {"tp": parts}, (6, 4, length, 16)).pieces
    held = {rank: b - a for piece in pieces for a, b in [piece.across] for rank in piece.ranks}
    assert held == dict(enumerate(chunks + [0] * (parts - len(chunks))))


def test_two_axes_on_two_dims() -> None:
    drawing = drawn(("S(0)", "S(1)"), {"dp": 2, "tp": 2}, (6, 4, 18, 16))
    assert drawing.pieces == (
        Piece((0,), (0, 3), (0, 2)),
        Piece((1,), (0, 3), (2, 4)),
        Piece((2,), (3, 6), (0, 2)),
        Piece((3,), (3, 6), (2, 4)),
    )
    assert (drawing.across, drawing.down) == ("batch (dim 0)", "heads (dim 1)")


def test_two_axes_on_one_dim_cut_one_after_the_other() -> None:
    pieces = drawn(("S(1)", "S(1)"), {"dp": 2, "tp": 2}, (6, 6, 18, 16)).pieces
    assert [piece.across for piece in pieces] == [(0, 2), (2, 3), (3, 5), (5, 6)]


def test_ranks_that_hold_the_same_share_a_piece() -> None:
    pieces = drawn(("R", "S(1)"), {"dp": 2, "tp": 2}, (6, 4, 18, 16)).pieces
    assert pieces == (Piece((0, 2), (0, 2)), Piece((1, 3), (2, 4)))


def test_whole_partial_and_plain_are_told_apart() -> None:
    whole = drawn(("R",), {"tp": 2}, (6, 4, 18, 16))
    partial = drawn(("P(sum)",), {"tp": 2}, (6, 4, 18, 16))
    plain = drawn(("plain",), {"tp": 2}, (6, 4, 18, 16))
    assert whole.pieces == partial.pieces == plain.pieces == (Piece((0, 1)),)
    assert [d.partial for d in (whole, partial, plain)] == [False, True, False]
    assert [d.plain for d in (whole, partial, plain)] == [False, False, True]
    assert "holds all of it" in whole.text
    assert "holds an addend of all of it" in partial.text
    assert "an ordinary tensor" in plain.text


def test_without_sizes_pieces_are_equal_and_said_to_be() -> None:
    drawing = drawn(("S(1)",), {"tp": 3})
    assert [piece.across for piece in drawing.pieces] == [(0, 1), (1, 2), (2, 3)]
    assert not drawing.to_scale
    assert drawing.across == "heads (dim 1)"  # by its pattern
    assert drawing.dims == ""


def test_a_dim_without_a_role_goes_by_its_number() -> None:
    assert drawn(("S(3)",), {"tp": 2}, (6, 4, 18, 16)).across == "dim 3"


@pytest.mark.parametrize(
    ("texts", "mesh"),
    [
        (("_S(1, 2)",), {"tp": 2}),  # strided
        (("S(1)", "R"), {"tp": 2}),  # a placement more than axes
        (("S(1)",), {"tp": MAX_RANKS + 1}),
        (("S(1)",), {"tp": 0}),
        (("S(1)",), {"tp": -1}),
        (("S(0)", "S(1)", "S(2)"), {"a": 2, "b": 2, "c": 2}),
        ((), {}),
        (("S(9999)",), {"tp": 2}),
    ],
)
def test_what_cannot_be_drawn_is_said(texts: tuple[str, ...], mesh: dict[str, int]) -> None:
    drawing = drawn(texts, mesh, (6, 4, 18, 16))
    assert drawing.pieces == () or texts == ()
    assert all(text in drawing.text for text in texts)


@given(
    texts=st.lists(
        st.sampled_from(["R", "S(0)", "S(1)", "S(3)", "S(9)", "P(sum)", "plain", "_S(0, 2)"]),
        max_size=3,
    ),
    counts=st.lists(st.integers(-1, 9), max_size=3),
    sizes=st.lists(st.integers(-1, 20), max_size=5),
)
def test_every_rank_holds_one_piece_within_the_tensor(
    texts: list[str], counts: list[int], sizes: list[int]
) -> None:
    mesh = {f"axis{i}": size for i, size in enumerate(counts)}
    drawing = drawn(tuple(texts), mesh, tuple(sizes))
    assert drawing.text.startswith("q")
    if drawing.pieces:
        ranks = sorted(rank for piece in drawing.pieces for rank in piece.ranks)
        assert ranks == list(range(math.prod(counts)))
    for piece in drawing.pieces:
        for (start, stop), length in zip((piece.across, piece.down), drawing.size, strict=True):
            assert 0 <= start <= stop <= length


def test_a_dim_that_the_tensor_lacks() -> None:
    drawing = drawn(("S(7)",), {"tp": 2}, (6, 4, 18, 16))
    assert (drawing.across, drawing.to_scale) == ("dim 7", False)
