"""How far is too far, and when a likely cause explains a difference."""

from __future__ import annotations

import math

import pytest
import torch

from attncheck.audit.numeric.captured import Captured
from attncheck.audit.numeric.verdict import Verdict, bound, distance, explains, judge
from attncheck.runner.drift import Expected, atol

REFERENCE = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
EXPECTED = Expected(REFERENCE, REFERENCE.float())
MESH = (2,)


def plain(*values: torch.Tensor) -> list[Captured]:
    return [Captured(value, tuple(value.shape)) for value in values]


def test_the_bound_is_that_of_a_scan() -> None:
    own = float((REFERENCE.float().double() - REFERENCE).abs().max())
    assert bound(EXPECTED, plain(*[REFERENCE.float()] * 2)) == 2 * own + atol(torch.float32, 1.0, 2)


def test_a_plan_that_computes_in_bfloat16_is_judged_in_bfloat16() -> None:
    held = plain(*[REFERENCE.bfloat16()] * 2)
    assert judge(held, EXPECTED, MESH).close
    assert judge(plain(*[REFERENCE.bfloat16().float()] * 2), EXPECTED, MESH).wrong


def test_a_gradient_that_vanishes_is_judged_by_the_others() -> None:
    none = Expected(torch.zeros(4, dtype=torch.float64), torch.zeros(4))
    held = plain(*[torch.full((4,), 1e-7)] * 2)
    assert judge(held, none, MESH).unequal
    assert judge(held, none, MESH, among=1.0).close


@pytest.mark.parametrize("sums", [False, True])
def test_a_partial_sum_is_right_only_within_a_model(sums: bool) -> None:
    parts = plain(REFERENCE.float() * 0.25, REFERENCE.float() * 0.75)
    assert judge(parts, EXPECTED, MESH, sums).close is sums


def test_one_wrong_rank_is_enough() -> None:
    assert judge(plain(REFERENCE.float(), REFERENCE.float() + 1), EXPECTED, MESH).wrong


def test_whole_numbers_are_equal_or_not() -> None:
    ids = torch.arange(6)
    expected = Expected(ids.double(), ids)
    assert judge(plain(ids, ids), expected, MESH).close
    assert judge(plain(ids, ids + 1), expected, MESH).unequal


def test_plain_parts_that_fit_nothing_are_not_compared() -> None:
    verdict = judge(plain(torch.zeros(7), torch.zeros(7)), EXPECTED, MESH)
    assert "do not make up" in verdict.unread
    assert not verdict.unequal


def test_a_dtensor_of_another_shape_is_a_fault() -> None:
    held = [Captured(torch.zeros(3), (6,), ("S(0)",), (2,), (0, 1))] * 2
    verdict = judge(held, Expected(torch.zeros(7, dtype=torch.float64), torch.zeros(7)), MESH)
    assert verdict.wrong
    assert "(6,), (7,)" in verdict.fault


def test_replicas_apart_are_an_error_though_the_first_is_right() -> None:
    held = [
        Captured(value, (3, 4), ("R",), (2,), (0, 1))
        for value in (REFERENCE.float(), REFERENCE.float() + 0.5)
    ]
    assert judge(held, EXPECTED, MESH).error == pytest.approx(0.5)


def test_what_is_not_a_number_is_infinitely_far_unless_both_are_infinite() -> None:
    infinite = torch.tensor([math.inf, 1.0], dtype=torch.float64)
    assert distance(infinite, infinite) == 0
    assert distance(torch.tensor([math.nan, 1.0]).double(), infinite) == math.inf


def test_an_explanation_leaves_nearly_nothing() -> None:
    wrong = plain(*[REFERENCE.float() * 2] * 2)
    verdict = judge(wrong, EXPECTED, MESH)
    assert explains(wrong, REFERENCE * 2, verdict, MESH)
    assert not explains(wrong, REFERENCE * 1.9, verdict, MESH)
    assert not explains(wrong, REFERENCE, verdict, MESH)


def test_where_rounding_is_large_an_explanation_must_be_much_nearer() -> None:
    """Within the bound is anything, where the error is hardly more."""
    held = plain(*[torch.full((4,), 2e-6)] * 2)
    verdict = Verdict(error=2e-6, bound=1e-6)
    assert not explains(held, torch.full((4,), 1.2e-6), verdict, MESH)
    assert explains(held, torch.full((4,), 1.8e-6), verdict, MESH)
    assert not explains(held, torch.full((4,), 2e-6), Verdict(error=9e-7, bound=1e-6), MESH)
