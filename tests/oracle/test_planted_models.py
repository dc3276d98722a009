"""Are the planted models of tests/models/planted.py wrong where they should be, and are their twins right?

Each is run on two gloo ranks against the unsharded model with the same weights. Besides where each is wrong,
the marks by which a cause can be told are held fast: what the wrong values are equal to.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

REPOSITORY = Path(__file__).parents[2]
MODELS = REPOSITORY / "tests" / "models"

Answers = dict[str, list[dict[str, Any]]]

BOTH = ("weight", "bias")
# What an attention of other weights gets wrong. The biases of k, v and o do not see the weights, as long as
# those of a row add up to one.
SEES_WEIGHTS = frozenset({"q.weight", "q.bias", "k.weight", "v.weight", "o.weight"})


@dataclass(frozen=True)
class Wrong:
    """What differs in the last of `calls`; before it nothing does."""

    output: bool
    gradients: frozenset[str]
    calls: tuple[dict[str, Any], ...] = ({},)


EXPECTED: dict[str, Wrong] = {
    # Keys in a row come from heads of both ranks, so that a bias is no longer the same for all of them.
    "wrong_dim": Wrong(True, SEES_WEIGHTS | {"k.bias", "v.bias"}),
    "fused_qkv": Wrong(True, frozenset({"qkv.weight", "qkv.bias", "o.weight"})),
    "rank_mask": Wrong(True, SEES_WEIGHTS),
    "lost_reduction": Wrong(False, frozenset({"scale", "shift"})),
    "stale_keys": Wrong(False, frozenset(f"attn.{name}.{part}" for name in "qkv" for part in BOTH)),
    "uneven_shape": Wrong(True, frozenset({"embed.weight", "embed.bias", "out.weight"})),
    "dropped_mask": Wrong(True, SEES_WEIGHTS),
    "stale_flag": Wrong(True, SEES_WEIGHTS, ({"causal": False}, {"causal": True})),
    "stale_mode": Wrong(True, SEES_WEIGHTS, ({"train": True}, {"train": False})),
}

# What a plant computes instead, where an unsharded model can say it.
INSTEAD: dict[str, dict[str, Any]] = {
    "fused_qkv": {"reference": "planted:build_fused_qkv_as_cut"},
    "dropped_mask": {"reference_inputs": "planted:inputs_dropped_mask_without"},
    "stale_flag": {"reference_calls": [{"causal": False}] * 2},
    "stale_mode": {"reference_calls": [{"train": True}] * 2},
}


def target(name: str, suffix: str = "") -> dict[str, Any]:
    return {
        "name": name + suffix,
        "build": f"planted:build_{name}{suffix}",
        "inputs": f"planted:inputs_{name}",
        "calls": list(EXPECTED[name].calls),
    }


TWINS = [target(name, suffix) for name in EXPECTED for suffix in ("", "_healthy")]


def run(script: str, targets: list[dict[str, Any]]) -> Any:
    done = subprocess.run(
        [sys.executable, str(MODELS / script), "2", json.dumps({"targets": targets})],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def answers() -> Answers:
    instead = [
        {**target(name), "name": f"{name}_instead", **said} for name, said in INSTEAD.items()
    ]
    found: Answers = run("compared.py", TWINS + instead)
    return found


def unequal(call: dict[str, Any]) -> set[str]:
    """`output`, and names of parameters whose gradient differs."""
    assert "raised" not in call, call["raised"]
    for name, said in call.items():
        print(f"{name}: {said['error']:.2g} of {said['largest']:.2g}, {said['bound']:.2g} allowed")
    return {name for name, said in call.items() if said["error"] > said["bound"]}


def test_every_plant_is_expected_here() -> None:
    sys.path.insert(0, str(MODELS))
    try:
        import planted
    finally:
        sys.path.remove(str(MODELS))
    assert set(EXPECTED) == set(planted.NAMES)


@pytest.mark.parametrize("name", EXPECTED)
def test_wrong_where_it_should_be_and_nowhere_else(answers: Answers, name: str) -> None:
    *before, last = answers[name]
    assert not any(unequal(call) for call in before)
    wrong = EXPECTED[name]
    assert unequal(last) == wrong.gradients | ({"output"} if wrong.output else set())
    worst = max(said["error"] / said["bound"] for said in last.values())
    assert worst > 1e4  # no rounding


@pytest.mark.parametrize("name", EXPECTED)
def test_its_twin_equals_the_unsharded_model(answers: Answers, name: str) -> None:
    calls = answers[f"{name}_healthy"]
    assert len(calls) == len(EXPECTED[name].calls)
    assert not any(unequal(call) for call in calls)


@pytest.mark.parametrize("name", INSTEAD)
def test_what_it_computes_instead(answers: Answers, name: str) -> None:
    wrong = unequal(answers[f"{name}_instead"][-1])
    # The plant's weights lie as the model has them, and not as it takes them.
    assert wrong == ({"qkv.weight", "qkv.bias"} if name == "fused_qkv" else set())


def test_lost_gradients_are_there_in_the_sum_over_ranks(answers: Answers) -> None:
    (call,) = answers["lost_reduction"]
    for name in ("scale", "shift"):
        assert not call[name]["ranks_agree"]
        assert call[name]["sum_error"] <= call[name]["bound"]


def test_under_a_rank_dependent_mask_the_first_rank_s_heads_are_right(answers: Answers) -> None:
    (call,) = answers["rank_mask"]
    for name in ("q.weight", "q.bias", "k.weight", "v.weight"):
        assert call[name]["right_chunks"]["0"] == [0]
    assert call["o.weight"]["right_chunks"]["1"] == [0]


def test_ranks_that_disagree_about_a_shape_disagree_about_the_output(answers: Answers) -> None:
    (call,) = answers["uneven_shape"]
    assert not call["output"]["ranks_agree"]
    assert call["output"]["wrong_ranks"] == [0, 1]


def test_stale_keys_are_not_a_lost_reduction(answers: Answers) -> None:
    (call,) = answers["stale_keys"]
    for name in EXPECTED["stale_keys"].gradients:
        assert call[name]["ranks_agree"]
        assert call[name]["sum_or_own_error"] > 1e4 * call[name]["bound"]


@pytest.mark.skipif(
    Version(version("torch")) < Version("2.11"),
    reason="DTensor scatters parameters by an op that fake tensors do not know (2.6, 2.9)",
)
def test_all_of_them_run_on_fake_tensors_too() -> None:
    """As the first rank and as the last: forward and backward, for `attncheck audit`."""
    answers = run("faked.py", TWINS)
    for each in TWINS:
        for rank in answers[each["name"]]:
            assert "raised" not in rank, f"{each['name']}: {rank['raised']}"
            assert rank["odd"] == []
