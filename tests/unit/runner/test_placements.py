"""Placement algebra: properties over random shapes and meshes, and agreement with PyTorch's own split."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attncheck.runner.placements import (
    assemble,
    chunk_bounds,
    coordinates,
    local_shape,
    partial_weight,
    shard,
)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[torch.Tensor, tuple[str, ...], tuple[int, ...]]:
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    choices = ["R", "P(sum)", *(f"S({d})" for d in range(len(shape)))]
    placements = tuple(draw(st.sampled_from(choices)) for _ in mesh)
    seed = draw(st.integers(0, 2**16))
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return whole, placements, mesh


@given(layouts())
def test_round_trip(layout: tuple[torch.Tensor, tuple[str, ...], tuple[int, ...]]) -> None:
    whole, placements, mesh = layout
    locals_by_rank = [shard(whole, placements, mesh, c) for c in coordinates(mesh)]
    assembly = assemble(locals_by_rank, whole.shape, placements, mesh)
    assert assembly.shape_faults == ()
    assert assembly.replica_gap == 0
    assert assembly.whole is not None
    torch.testing.assert_close(assembly.whole, whole, rtol=1e-12, atol=1e-12)


@given(layouts())
def test_a_changed_element_is_seen(
    layout: tuple[torch.Tensor, tuple[str, ...], tuple[int, ...]],
) -> None:
    whole, placements, mesh = layout
    locals_by_rank = [shard(whole, placements, mesh, c) for c in coordinates(mesh)]
    locals_by_rank[-1] = locals_by_rank[-1] + 1.0
    assembly = assemble(locals_by_rank, whole.shape, placements, mesh)
    assert assembly.whole is not None
    changed = not torch.allclose(assembly.whole, whole, atol=1e-9)
    # A rank with an empty shard holds nothing that could be wrong.
    assert changed or assembly.replica_gap > 0.5 or locals_by_rank[-1].numel() == 0


@given(st.integers(0, 40), st.integers(1, 9))
def test_chunks_are_those_of_torch(size: int, parts: int) -> None:
    pieces = torch.arange(size).chunk(parts) if size else ()
    ours = [chunk_bounds(size, parts, i) for i in range(parts)]
    theirs = [(int(p[0]), int(p[-1]) + 1) for p in pieces]
    assert ours[: len(theirs)] == theirs
    assert all(a == b for a, b in ours[len(theirs) :])
    assert sum(b - a for a, b in ours) == size


@given(st.integers(1, 64))
def test_partial_weights_sum_to_one_and_differ(parts: int) -> None:
    weights = [partial_weight(parts, i) for i in range(parts)]
    assert sum(weights) == pytest.approx(1)
    assert len(set(weights)) == parts


def test_wrong_local_shape_names_rank_and_expectation() -> None:
    locals_by_rank = [torch.zeros(2, 3), torch.zeros(2, 3)]
    assembly = assemble(locals_by_rank, (4, 6), ("S(1)",), (2,))
    assert assembly.whole is None
    assert "rank 0 holds (2, 3)" in assembly.shape_faults[0]
    assert "(4, 3)" in assembly.shape_faults[0]


def test_replicas_that_differ_in_the_last_bit() -> None:
    a = torch.ones(3)
    assembly = assemble([a, a.nextafter(a + 1)], (3,), ("R",), (2,))
    assert 0 < assembly.replica_gap < 1e-6


def test_nan_on_one_replica_only() -> None:
    assembly = assemble([torch.zeros(2), torch.tensor([0.0, float("nan")])], (2,), ("R",), (2,))
    assert assembly.replica_gap == float("inf")


def test_two_axes_on_one_dim_split_left_to_right() -> None:
    assert [local_shape((6,), ("S(0)", "S(0)"), (2, 2), c) for c in coordinates((2, 2))] == [
        (2,),
        (1,),
        (2,),
        (1,),
    ]


def test_unknown_placement_is_refused() -> None:
    with pytest.raises(ValueError, match="P\\(max\\)"):
        assemble([torch.zeros(1)], (1,), ("P(max)",), (1,))


def test_an_average_is_the_sum_over_the_number_of_its_parts() -> None:
    parts = [torch.full((2, 3), value) for value in (1.0, 2.0, 6.0, 9.0)]
    assembly = assemble(parts, (2, 3), ("P(avg)",), (4,))
    assert assembly.whole is not None
    assert torch.equal(assembly.whole, torch.full((2, 3), 4.5, dtype=torch.float64))
    mixed = assemble(parts, (2, 3), ("P(avg)", "P(sum)"), (2, 2))
    assert mixed.whole is not None
    assert torch.equal(mixed.whole, torch.full((2, 3), 9.0, dtype=torch.float64))
