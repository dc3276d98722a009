"""The oracle: results of all ranks, replicas, placements; dropout masks by their distribution."""

from __future__ import annotations

import math

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from attncheck.runner.drift import Expected
from attncheck.runner.oracle import RankResult, judge_dropout, judge_values


def reference(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_not_finite_is_wrong_and_named() -> None:
    want = {"out": Expected(reference(), reference().float())}
    broken = reference()
    broken[0, 0, 0] = math.nan
    verdict = judge_values({"out": RankResult([broken, broken], (4, 5, 6), ("R",))}, want, (2,))
    assert {f.code for f in verdict.facts} >= {"nonfinite", "wrong_result"}
    assert verdict.errors["out"].max == math.inf


def test_a_gradient_that_never_came_is_a_fact() -> None:
    verdict = judge_values({}, {"grad.q": Expected(reference(), reference())}, (2,))
    assert [f.code for f in verdict.facts] == ["gradient_missing"]


def test_an_output_that_never_came_is_wrong() -> None:
    verdict = judge_values({}, {"lse": Expected(reference(), reference())}, (2,))
    assert [f.code for f in verdict.facts] == ["wrong_result"]


def test_equal_infinities_are_no_error_and_an_unequal_one_is() -> None:
    want = reference()
    want[0, 0, 0] = math.inf
    good = RankResult([want.float(), want.float()], (4, 5, 6), ("R",))
    expected = {"lse": Expected(want.float().double(), want.float())}
    assert judge_values({"lse": good}, expected, (2,)).facts == []
    assert judge_values({"lse": good}, expected, (2,)).errors["lse"].max == 0.0
    other = want.float().clone()
    other[0, 0, 0] = -math.inf
    bad = RankResult([other, other], (4, 5, 6), ("R",))
    facts = judge_values({"lse": bad}, expected, (2,)).facts
    assert {f.code for f in facts} >= {"nonfinite", "wrong_result"}


def test_replicas_and_values_are_judged_apart() -> None:
    want = reference().float().double()
    other = want.float().clone()
    other[0, 0, 0] = other[0, 0, 0].nextafter(other[0, 0, 0] + 1)
    verdict = judge_values(
        {"out": RankResult([want.float(), other], (4, 5, 6), ("R",))},
        {"out": Expected(want, want.float())},
        (2,),
    )
    assert [f.code for f in verdict.facts] == ["replicas_differ"]


def test_a_float32_result_of_a_sum_in_bfloat16_is_held_against_bfloat16() -> None:
    want = reference().float().double()
    expected = {"lse": Expected(want, want.float())}
    rounded = want.bfloat16().float()  # as after a partial sum of bfloat16 keys
    results = {"lse": RankResult([rounded, rounded], (4, 5, 6), ("R",))}
    assert judge_values(results, expected, (2,), torch.bfloat16).facts == []
    assert {f.code for f in judge_values(results, expected, (2,)).facts} == {"wrong_result"}


def mask_output(rate: float, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    keep = torch.rand(3, 4, 18, 16, generator=random, dtype=torch.float64) >= rate
    return keep / (16 * (1 - 0.25))


@given(st.integers(0, 2**16))
def test_honest_masks_pass(seed: int) -> None:
    parts = [mask_output(0.25, 2 * seed), mask_output(0.25, 2 * seed + 1)]
    assert judge_dropout(torch.cat(parts, 1), parts, sharded=True, rate=0.25) == []


@given(st.integers(0, 2**16))
@example(6754)  # a mask that is far from its rate, drawn once and seen twice
def test_shared_masks_and_wrong_rates_do_not(seed: int) -> None:
    part = mask_output(0.25, seed)
    facts = judge_dropout(torch.cat([part, part], 1), [part, part], sharded=True, rate=0.25)
    assert [f.code for f in facts] == ["dropout_shared"]
    parts = [mask_output(0.4, 2 * seed), mask_output(0.4, 2 * seed + 1)]
    facts = judge_dropout(torch.cat(parts, 1), parts, sharded=True, rate=0.25)
    assert [f.code for f in facts] == ["dropout_rate"]


def test_replicas_may_share_a_mask() -> None:
    part = mask_output(0.25, 1)
    assert judge_dropout(part, [part, part], sharded=False, rate=0.25) == []


def test_values_that_no_mask_gives() -> None:
    part = mask_output(0.25, 1) * 0.75
    assert "dropout_values" in {f.code for f in judge_dropout(part, [part], False, 0.25)}


def test_errors_on_one_shard_name_its_rank_and_errors_at_a_border_say_so() -> None:
    want = torch.randn(4, 12, 6, dtype=torch.float64).float().double()
    expected = {"out": Expected(want, want.float())}

    def facts(bad: torch.Tensor) -> dict[str, str]:
        parts = [part.clone().float() for part in bad.split(6, dim=1)]
        results = {"out": RankResult(parts, (4, 12, 6), ("S(1)",))}
        return {f.code: f.detail for f in judge_values(results, expected, (2,)).facts}

    on_one = want.clone()
    on_one[:, 7:10] += 1
    assert set(facts(on_one)) == {"wrong_result", "on_one_rank"}
    assert "those of rank 1" in facts(on_one)["on_one_rank"]
    at_border = want.clone()
    at_border[:, 5:7] += 1
    assert set(facts(at_border)) == {"wrong_result", "at_border"}
    assert "48 elements" in facts(at_border)["at_border"]
    assert "(17% of the tensor)" in facts(at_border)["at_border"]
    everywhere = want + 1
    assert set(facts(everywhere)) == {"wrong_result"}
