"""The marks by which causes are told, on made-up tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attncheck.audit.numeric.captured import Captured
from attncheck.audit.numeric.causes import fused, reduction, ring
from attncheck.audit.numeric.places import innermost
from attncheck.audit.numeric.verdict import judge
from attncheck.runner.drift import Expected

WHOLE = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
EXPECTED = Expected(WHOLE.double(), WHOLE)
SPLIT = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))


def cause(*values: torch.Tensor, axes: dict[str, int] | None = None) -> str:
    axes = axes or {"tp": len(values)}
    captures = [Captured(value, tuple(value.shape)) for value in values]
    verdict = judge(captures, EXPECTED, tuple(axes.values()))
    return reduction.of(captures, EXPECTED, verdict, axes)


def test_parts_that_nobody_added_up() -> None:
    assert "nobody added them up over tp" in cause(SPLIT, WHOLE - SPLIT)


def test_parts_over_one_axis_of_two() -> None:
    parts = (SPLIT, WHOLE - SPLIT)
    assert "over tp" in cause(*parts, *parts, axes={"dp": 2, "tp": 2})
    parts = (SPLIT, SPLIT, WHOLE - SPLIT, WHOLE - SPLIT)
    assert "over dp" in cause(*parts, axes={"dp": 2, "tp": 2})


def test_added_up_once_too_often() -> None:
    assert cause(WHOLE * 2, WHOLE * 2).startswith("it is 2 times the unsharded gradient")
    assert "8 times" in cause(*[WHOLE * 8] * 8, axes={"dp": 2, "tp": 4})


def test_a_mean_in_the_place_of_a_sum_is_no_lost_reduction() -> None:
    """Two halves add up to the whole, but they are the same."""
    assert cause(WHOLE / 2, WHOLE / 2).startswith("it is 1/2 of the unsharded gradient")


def test_elements_of_which_some_are_parts() -> None:
    first, second = WHOLE.clone(), WHOLE.clone()
    first[:3], second[:3] = SPLIT[:3], WHOLE[:3] - SPLIT[:3]
    assert cause(first, second).startswith("of some elements of this gradient")


def test_other_values_have_no_cause() -> None:
    assert cause(SPLIT, SPLIT) == ""
    assert cause(WHOLE * 1.7, WHOLE * 1.7) == ""
    assert cause(WHOLE, WHOLE) == ""


# --- fused projections -------------------------------------------------------------------------------------


@given(st.sampled_from([2, 3, 4]), st.sampled_from([(1, 1, 1), (4, 1, 1), (1, 1)]))
def test_columns_as_ranks_take_them(ranks: int, ratio: tuple[int, ...]) -> None:
    """Each rank cuts its own run of columns in the ratio; the unsharded parts are what all ranks take for
    them, one after the other."""
    parts = tuple(each * ranks * 2 for each in ratio)
    size = sum(parts)
    order = fused.taken_order(size, ranks, parts)
    assert sorted(order.tolist()) == list(range(size))
    by_rank = torch.arange(size).chunk(ranks)
    for number, mine in enumerate(order.split(parts)):  # type: ignore[no-untyped-call]
        own = [run.split([part // ranks for part in parts])[number] for run in by_rank]  # type: ignore[no-untyped-call]
        assert torch.equal(mine, torch.cat(own))


# --- a ring's backward -------------------------------------------------------------------------------------


def attention(causal: bool) -> tuple[ring.Attention, torch.Tensor]:
    """One attention of 2 heads and 12 tokens, and a gradient of what it gives."""
    generator = torch.Generator().manual_seed(3)
    q, k, v, grad = (
        torch.randn(1, 2, 12, 4, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    for each in (q, k, v):
        each.requires_grad_()
    counts = torch.ones(12, 12, dtype=torch.bool)
    counts = counts.tril() if causal else counts
    out = ((q @ k.transpose(-2, -1) * 0.3).masked_fill(~counts, -torch.inf)).softmax(-1) @ v
    return ring.Attention("", q, k, v, 0.3, counts, out), grad


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_with_the_right_keys_the_formula_is_the_gradient(ranks: int, causal: bool) -> None:
    one, grad = attention(causal)
    made = ring.gradients(one, grad, ranks, lambda r, j: j, lambda r, j: j)
    wanted = torch.autograd.grad(one.out, (one.q, one.k, one.v), grad)
    assert made is not None
    for own, want in zip(made, wanted, strict=True):
        torch.testing.assert_close(own, want)


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_hypothesis_gives_other_gradients(ranks: int) -> None:
    one, grad = attention(causal=False)
    right = ring.gradients(one, grad, ranks, lambda r, j: j, lambda r, j: j)
    assert right is not None
    for words, keys, values in ring.hypotheses(ranks):
        made = ring.gradients(one, grad, ranks, keys, values)
        assert made is not None
        assert any(not torch.allclose(a, b) for a, b in zip(made, right, strict=True)), words


def test_ranks_that_do_not_divide_the_sequence_have_no_chunks() -> None:
    one, grad = attention(causal=False)
    assert ring.gradients(one, grad, 5, lambda r, j: j, lambda r, j: j) is None


# --- whose gradient ----------------------------------------------------------------------------------------


def test_the_innermost_of_those_that_take_a_tensor() -> None:
    assert innermost(["", "block", "block.attn", "block.attn.q"]) == ("block.attn.q",)
    assert innermost(["block", "block.q", "block.k"]) == ("block.q", "block.k")
    assert innermost(["block.1", "block.10"]) == ("block.1", "block.10")
