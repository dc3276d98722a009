"""What the ranks hold, put together: DTensors by their word, plain tensors as whatever fits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attncheck.audit.numeric.captured import Captured
from attncheck.audit.numeric.readings import SUM, WHOLE, readings, together
from attncheck.audit.numeric.weights import axis_order, plain_shard
from attncheck.runner.placements import coordinates, local_bounds, shard

MESHES = st.sampled_from([(2,), (3,), (2, 2), (2, 3)])


@st.composite
def placed(draw: st.DrawFn) -> tuple[torch.Tensor, tuple[int, ...], tuple[str, ...]]:
    """(whole, mesh, placements)"""
    mesh = draw(MESHES)
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    texts = ["R", "P(sum)", *(f"S({dim})" for dim in range(len(shape)))]
    placements = tuple(draw(st.sampled_from(texts)) for _ in mesh)
    whole = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(shape)
    return whole, mesh, placements


def captured(
    whole: torch.Tensor, mesh: tuple[int, ...], placements: tuple[str, ...]
) -> list[Captured]:
    return [
        Captured(
            shard(whole, placements, mesh, coordinate),
            tuple(whole.shape),
            placements,
            mesh,
            tuple(range(math.prod(mesh))),
        )
        for coordinate in coordinates(mesh)
    ]


@given(placed())
def test_a_dtensor_is_put_together_by_its_word(
    case: tuple[torch.Tensor, tuple[int, ...], tuple[str, ...]],
) -> None:
    whole, mesh, placements = case
    held = together(captured(whole, mesh, placements))
    assert held.fault == held.unread == ""
    assert held.gap == 0
    assert len(held.values) == math.prod(mesh)
    for value in held.values:
        torch.testing.assert_close(value, whole)


def test_a_strided_shard_comes_after_the_axis_to_its_right() -> None:
    """FSDP over TP: rows go to tp first, then each rank's rows to dp."""
    whole = torch.arange(8.0, dtype=torch.float64)
    # (dp, tp) = (0, 0), (0, 1), (1, 0), (1, 1)
    rows = [whole[0:2], whole[4:6], whole[2:4], whole[6:8]]
    captures = [Captured(part, (8,), ("_S(0, 2)", "S(0)"), (2, 2), (0, 1, 2, 3)) for part in rows]
    assert axis_order(("_S(0, 2)", "S(0)")) == [1, 0]
    assert axis_order(("S(0)", "S(0)")) == [0, 1]
    assert plain_shard("_StridedShard(dim=0, sf=2)") == "S(0)"
    assert all(torch.equal(value, whole) for value in together(captures).values)


def test_each_mesh_of_a_submesh_is_put_together_by_itself() -> None:
    """DTensors on the tp axis alone: what dp rank 0 has is not what dp rank 1 has."""
    first, second = torch.zeros(4), torch.ones(4)
    captures = [
        Captured(whole[at * 2 : at * 2 + 2], (4,), ("S(0)",), (2,), ranks)
        for whole, ranks in ((first, (0, 1)), (second, (2, 3)))
        for at in range(2)
    ]
    values = together(captures).values
    assert [float(value.sum()) for value in values] == [0, 0, 4, 4]


def replicated(*values: torch.Tensor) -> list[Captured]:
    ranks = tuple(range(len(values)))
    return [Captured(v, tuple(v.shape), ("R",), (len(values),), ranks) for v in values]


def test_replicas_that_differ_have_a_gap() -> None:
    assert together(replicated(torch.zeros(3), torch.full((3,), 0.5))).gap == 0.5


@pytest.mark.parametrize(
    ("captures", "words"),
    [
        ([Captured(torch.zeros(5), (10,), ("S(0)",), (2,), (0, 1)),
          Captured(torch.zeros(4), (8,), ("S(0)",), (2,), (0, 1))],
         "global shape: (10,) on rank 0, (8,) on rank 1"),
        ([Captured(torch.zeros(4), (4,), ("R",), (2,), (0, 1)),
          Captured(torch.zeros(4), (4,), ("S(0)",), (2,), (0, 1))],
         "placements: [R] on rank 0, [S(0)] on rank 1"),
        ([Captured(torch.zeros(4), (4,), ("R",), (2,), (0, 1)), Captured(torch.zeros(4), (4,))],
         "a DTensor on some ranks"),
        ([Captured(torch.zeros(4), (4,)), None], "rank 1 has none"),
        ([Captured(torch.zeros(3), (4,), ("S(0)",), (2,), (0, 1))] * 2, "rank 0 holds (3,)"),
    ],
)  # fmt: skip
def test_ranks_that_contradict_each_other(captures: list[Captured | None], words: str) -> None:
    assert words in together(captures).fault


def test_a_placement_that_nobody_can_add_up_is_unread() -> None:
    captures = [Captured(torch.zeros(4), (4,), ("P(max)",), (2,), (0, 1))] * 2
    assert "P(max)" in together(captures).unread


# --- plain tensors -----------------------------------------------------------------------------------------


@given(placed())
def test_plain_parts_of_any_placement_are_found_again(
    case: tuple[torch.Tensor, tuple[int, ...], tuple[str, ...]],
) -> None:
    whole, mesh, placements = case
    locals_ = [shard(whole, placements, mesh, at) for at in coordinates(mesh)]
    found = readings(locals_, whole.shape, mesh, sums=True)
    assert any(all(torch.allclose(each, whole) for each in reading.wholes) for reading in found)


@given(placed())
def test_every_reading_has_the_asked_shape_and_the_plainest_is_first(
    case: tuple[torch.Tensor, tuple[int, ...], tuple[str, ...]],
) -> None:
    whole, mesh, placements = case
    locals_ = [shard(whole, placements, mesh, at) for at in coordinates(mesh)]
    found = readings(locals_, whole.shape, mesh, sums=True)
    assert all(each.shape == whole.shape for reading in found for each in reading.wholes)
    sums = [reading.how.count(SUM) for reading in found]
    assert sums == sorted(sums)
    assert not any(SUM in r.how for r in readings(locals_, whole.shape, mesh))


def test_wholes_that_differ_are_all_held_against_the_reference() -> None:
    (only,) = readings([torch.zeros(2), torch.ones(2)], (2,), (2,))
    assert only.how == (WHOLE,)
    assert len(only.wholes) == 2


def test_a_part_of_another_length_fits_nothing() -> None:
    assert readings([torch.zeros(3), torch.zeros(3)], (5,), (2,), sums=True) == []
    assert readings([torch.zeros(3), torch.zeros(3)], (3, 1), (2,)) == []


def test_two_axes_that_cut_one_dim() -> None:
    whole = torch.arange(8.0)
    parts = [
        whole[slice(*local_bounds((8,), ("S(0)", "S(0)"), (2, 2), at)[0])]
        for at in itertools.product(range(2), range(2))
    ]
    found = readings(parts, (8,), (2, 2))
    assert any(torch.equal(reading.wholes[0], whole) for reading in found)
