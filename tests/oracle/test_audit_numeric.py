"""Does `attncheck audit --numeric` find what is planted, name the first wrong module and the cause, and say
nothing of the healthy twin? On two gloo ranks, each model in processes of its own."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from attncheck.audit import comparing
from attncheck.audit.comparing import Comparing, compare
from attncheck.audited import Numeric
from attncheck.errors import UserError

TESTS = Path(__file__).parents[1]
PLANTED = TESTS / "models" / "planted.py"
OTHERS = TESTS / "oracle" / "numeric_models.py"
SEED = 11
TIMEOUT = 300.0


@dataclass(frozen=True)
class Found:
    """`module`: '' is the model itself; `words`: what the cause says; `forward`: outputs are wrong."""

    module: str
    words: tuple[str, ...]
    mode: str = "training"
    forward: bool = True


EXPECTED: dict[str, Found] = {
    "wrong_dim": Found("core", ("from_local at planted.py", "says [S(1)]", "fits", "[S(2)]")),
    "fused_qkv": Found("core", ("output of qkv", "without interleaving q, k and v")),
    "rank_mask": Found("core", ("ranks 0, 1 hold different values", "plain tensor", "planted.py")),
    "lost_reduction": Found("", ("only its part", "nobody added them up over tp"), forward=False),
    "stale_keys": Found("attn.core", ("backward of Ring", "stale keys", "rank + 1"), forward=False),
    "uneven_shape": Found(
        "enter", ("disagree about the global shape", "(1, 10, 32)", "shape and stride")
    ),
    "dropped_mask": Found("core", ("a mask is dropped", "no rank any", "gives the same")),
    "stale_flag": Found("core", ("with causal=True", "kept"), "second call"),
    "stale_mode": Found("core", ("in evaluation", "right in training", "kept"), "second call"),
}

OTHER: dict[str, Found] = {
    "mask": Found("core", ("a mask is dropped", "no rank any", "gives the same")),
    "causal": Found("core", ("is called with is_causal=True", "with is_causal=False")),
    "fused_gqa": Found("core", ("output of qkv", "(2 : 1 : 1)")),
    "unsummed": Found("", ("down gives a partial sum", "nobody added them up over tp")),
    "uncopied": Found("norm", ("only its part", "over tp"), forward=False),
    "doubled": Found("out", ("2 times the unsharded gradient", "over tp"), forward=False),
}


def run(
    target: str, inputs: str, mesh: dict[str, int] | None = None, file: Path = PLANTED
) -> Numeric:
    asked = Comparing(
        target=f"{file}:{target}", inputs=f"{file}:{inputs}", mesh=mesh or {"tp": 2}, seed=SEED
    )
    numeric = compare(asked, TIMEOUT)
    print(numeric)
    return numeric


def check_found(numeric: Numeric, found: Found) -> None:
    assert numeric.failure == ""
    assert numeric.unequal
    for each in numeric.unequal:
        assert each.mode == found.mode
        assert each.module == found.module
        assert all(word in each.cause for word in found.words), each.cause
        assert each.error > 1e3 * each.bound
    assert ("output" in {each.subject for each in numeric.unequal}) == found.forward


def check_silent(numeric: Numeric) -> None:
    assert numeric.failure == ""
    assert numeric.unequal == ()
    assert numeric.uncompared == ()
    assert numeric.compared > 10


def test_every_plant_is_expected_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PLANTED.parent))
    import planted

    assert tuple(EXPECTED) == planted.NAMES


@pytest.mark.parametrize("name", EXPECTED)
def test_a_plant_is_found(name: str) -> None:
    check_found(run(f"build_{name}", f"inputs_{name}"), EXPECTED[name])


@pytest.fixture(scope="module")
def twins() -> Numeric:
    """All of them as parts of one model, which costs the start of one."""
    numeric = run("build_twins", "inputs_twins", file=OTHERS)
    assert numeric.failure == ""
    assert numeric.uncompared == ()
    return numeric


@pytest.mark.parametrize("name", EXPECTED)
def test_its_twin_is_silent(name: str, twins: Numeric) -> None:
    number = [*EXPECTED].index(name)
    own = (f"output {number}.", f"each.{name}.")
    assert [each for each in twins.unequal if (each.subject + ".").startswith(own)] == []


def test_every_output_and_gradient_of_the_twins_is_compared(twins: Numeric) -> None:
    outputs = 4 * len(EXPECTED)
    assert twins.unequal == ()
    assert twins.compared > outputs + 3 * 50


@pytest.mark.parametrize("name", OTHER)
def test_another_mistake_is_found(name: str) -> None:
    check_found(run(f"build_{name}", "inputs", file=OTHERS), OTHER[name])


@pytest.mark.parametrize("name", ["fused_gqa", "by_hand"])
def test_its_healthy_form_is_silent(name: str) -> None:
    check_silent(run(f"build_healthy_{name}", "inputs", file=OTHERS))


@pytest.mark.skipif(
    Version(version("torch")) < Version("2.7"), reason="the FSDP2 of torch 2.6 runs on CUDA alone"
)
def test_weights_sharded_over_data_parallel_ranks_too() -> None:
    """On a mesh of two axes, with a part of the inputs on each rank of the first."""
    numeric = run("build_healthy_data_parallel", "inputs", {"dp": 2, "tp": 2}, OTHERS)
    check_silent(numeric)
    assert any("means" in note for note in numeric.notes)


def test_without_an_unsharded_build_a_mesh_of_one_rank_stands_in() -> None:
    numeric = run("build_needs_mesh", "inputs", file=OTHERS)
    check_silent(numeric)
    assert "mesh of 1 rank" in numeric.reference
    assert "AttributeError at numeric_models.py" in numeric.reference


# --- models that come to no end ----------------------------------------------------------------------------


def test_what_one_rank_raises_ends_all() -> None:
    failure = run("build_raises", "inputs", file=OTHERS).failure
    assert failure.startswith("in training, in stop, ValueError at numeric_models.py:")
    assert failure.endswith("rank 1 does not like this, on rank 1 of 2")


def test_what_all_ranks_raise_ends_that_call_alone() -> None:
    """What is called in evaluation is compared: without training it may be all that is wanted."""
    numeric = run("build_raises_in_training", "inputs", file=OTHERS)
    assert numeric.failure.startswith("in training, in stop, ValueError at numeric_models.py:")
    assert numeric.failure.endswith("no rank likes this")
    assert numeric.compared > 0
    assert numeric.unequal == ()


def test_a_rank_that_dies() -> None:
    failure = run("build_dies", "inputs", file=OTHERS).failure
    assert failure == "rank 1 died of exit code 3 in: forward of stop (training)"


def test_ranks_that_hang_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "STILL_SECONDS", 8.0)
    failure = run("build_hangs", "inputs", file=OTHERS).failure
    assert failure == "no rank moved for 8 s; ranks 0, 1: forward of stop (training)"


@pytest.mark.parametrize(
    ("build", "inputs", "said"),
    [
        ("build_mask", "inputs_of_no_seed", "the same values for every mesh"),
        (
            "build_mask",
            "inputs_that_raise",
            "inputs_that_raise raised KeyError at numeric_models.py:",
        ),
        ("build_that_raises", "inputs", "build_that_raises raised KeyError at numeric_models.py:"),
    ],
)
def test_what_the_user_s_functions_do_wrong(build: str, inputs: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        run(build, inputs, file=OTHERS)


def test_weights_that_are_no_part_of_the_unsharded_ones() -> None:
    numeric = run("build_other_weights", "inputs", file=OTHERS)
    assert numeric.failure.startswith("the weights are not the same: up.weight is a plain tensor")
    assert numeric.compared == 0
