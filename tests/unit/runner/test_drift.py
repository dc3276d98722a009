"""Tolerance and statistics: what is rounding, drift, wrong, and where an error lies."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attncheck.runner.drift import (
    WRONG_FACTOR,
    Expected,
    Layout,
    atol,
    classify,
    disagreement,
    error_stat,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reference(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 2**20))
def test_rounding_alone_is_ok(dtype: torch.dtype, seed: int) -> None:
    want = reference(seed)
    rounded = want.to(dtype)
    stat = error_stat(rounded.to(torch.float64), Expected(want, rounded), dtype)
    assert classify(stat) == "ok"
    assert stat.ratio <= 0.5
    assert stat.unsharded_ratio == 1
    assert 0 < stat.ulps <= 0.5
    assert stat.sign_bias == stat.size_bias == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 64])
@given(seed=st.integers(0, 2**20))
def test_a_reduction_over_ranks_stays_within_the_bound(
    dtype: torch.dtype, ranks: int, seed: int
) -> None:
    """The derivation of `atol`, run: parts that cancel, each rounded, added one by one in the dtype."""
    random = torch.Generator().manual_seed(seed)
    parts = torch.randn(ranks, 4, 5, 6, generator=random, dtype=torch.float64) / math.sqrt(ranks)
    want = parts.sum(0)
    total = torch.zeros(4, 5, 6, dtype=dtype)
    for part in parts:
        total = total + part.to(dtype)
    exact = Expected(want, want)  # an operator without any error of its own
    stat = error_stat(total.double(), exact, dtype, Layout(("P(sum)",), (ranks,)))
    assert classify(stat) == "ok", stat


def test_the_tolerance_on_two_ranks_is_four_roundings() -> None:
    assert atol(torch.float32, 3.0, ranks=2) == 4 * torch.finfo(torch.float32).eps * 3.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("factor", "state"), [(0.9, "ok"), (2.0, "drift"), (WRONG_FACTOR * 1.5, "wrong")]
)
def test_boundaries(dtype: torch.dtype, factor: float, state: str) -> None:
    want = reference()
    exact = Expected(want, want)
    bound = error_stat(want, exact, dtype).bound
    value = want.clone()
    value[1, 2, 3] += factor * bound
    stat = error_stat(value, exact, dtype)
    assert stat.ratio == pytest.approx(factor)
    assert stat.worst is not None
    assert stat.worst.index == (1, 2, 3)
    assert classify(stat) == state
    assert ("(1, 2, 3)" in stat.note) == (state != "ok")


def test_a_wrong_row_of_a_coarse_dtype_is_wrong_although_its_error_is_within_16_bounds() -> None:
    want = reference()
    value = want.clone()
    value[1, 2] *= 0.6
    stat = error_stat(value, Expected(want, want.bfloat16()), torch.bfloat16)
    assert 1 < stat.ratio < WRONG_FACTOR
    assert classify(stat) == "wrong"


def test_a_row_is_no_more_wrong_than_the_operator_is_there_on_whole_tensors() -> None:
    want = reference()
    own, value = want.clone(), want.clone()
    own[1, 2] *= 1.05  # a row in which the operator itself is bad, as after cancellation
    value[1, 2] *= 1.2
    stat = error_stat(value, Expected(want, own), torch.bfloat16)
    assert stat.ratio > 1
    assert classify(stat) == "drift"


def test_a_gradient_that_vanishes_is_held_against_the_largest_one() -> None:
    zero = torch.zeros(4, 5, 6, dtype=torch.float64)
    noise = 1e-7 * reference()
    exact = Expected(zero, zero.float())
    assert classify(error_stat(noise, exact, torch.float32)) == "wrong"
    assert classify(error_stat(noise, exact, torch.float32, among=3.0)) == "ok"
    assert classify(error_stat(noise * 1e5, exact, torch.float32, among=3.0)) == "wrong"
    # One that is only small is not excused by a large one beside it.
    small = Expected(noise * 1e3, noise.float() * 1e3)
    assert classify(error_stat(noise * 1e3 + 1e-5, small, torch.float32, among=3.0)) == "wrong"


def test_direction_of_what_sharding_changed() -> None:
    want = reference()
    unsharded = want.float()
    grown = error_stat(want * (1 + 1e-5), Expected(want, unsharded), torch.float32)
    assert grown.size_bias > 0.9
    assert abs(grown.sign_bias) < 0.5
    shifted = error_stat(want - 1e-5, Expected(want, unsharded), torch.float32)
    assert shifted.sign_bias < -0.9


def test_ulps_are_those_of_the_dtype() -> None:
    want = torch.tensor([1.0, -3.0, 100.0], dtype=torch.float64)
    value = want.clone()
    value[1] += 3 * 2.0**-22  # between 2 and 4 float32 numbers are 2^-22 apart
    stat = error_stat(value, Expected(want, want.float()), torch.float32)
    assert stat.ulps == 3
    assert stat.ulps_median == 0


@given(st.integers(0, 3), st.integers(0, 11), st.sampled_from([(2,), (3,), (4,), (2, 2)]))
def test_the_worst_element_is_found_where_it_was_put(
    batch: int, row: int, mesh: tuple[int, ...]
) -> None:
    want = torch.randn(4, 12, 6, dtype=torch.float64)
    value = want.clone()
    value[batch, row, 5] += 9
    placements = ("S(1)",) * len(mesh)
    stat = error_stat(value, Expected(want, want), torch.float32, Layout(placements, mesh))
    assert stat.worst is not None
    ranks = math.prod(mesh)
    rows = 12 // ranks
    assert stat.worst.index == (batch, row, 5)
    assert stat.worst.owners == (row // rows,)
    assert stat.worst.beyond == 1
    assert stat.worst.beyond_on == row // rows
    borders = [rows * r for r in range(1, ranks)]
    assert stat.worst.border == min(b - 1 - row if row < b else row - b for b in borders)


def test_a_scalar_and_an_empty_tensor_have_statistics_too() -> None:
    one = torch.tensor(2.0, dtype=torch.float64)
    assert classify(error_stat(one * 3, Expected(one, one.float()), torch.float32)) == "wrong"
    none = torch.zeros(0, 4, dtype=torch.float64)
    assert error_stat(none, Expected(none, none.float()), torch.float32).ratio == 0


def test_an_operator_that_is_not_its_reference_is_told() -> None:
    want = reference()
    assert disagreement("out", Expected(want, want.bfloat16())) == ""
    assert "out differs from its reference" in disagreement("out", Expected(want, want * 1.2))
