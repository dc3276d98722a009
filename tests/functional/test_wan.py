"""WAN with its published tensor-parallel plans: what its users met, what came after it, and both mended.

The models are in tests/models/wan.py; they run on real gloo ranks, with the real flash-attn in front of the
CPU stand-in. Equal to the unsharded model means: the output and the gradients of all 69 parameters have at
most twice the error against float64 that the unsharded model has, and a few roundings.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch_here

from attncheck import provision
from attncheck.fixes import emit

REPOSITORY = Path(__file__).parents[2]
MODELS = REPOSITORY / "tests" / "models"
MISSING = (
    "Operator flash_attn._flash_attn_forward.default does not have a sharding strategy registered"
)
# What the plain parameters that meet shards of the sequence are, or are made from.
LOST_IN_PLAN_2 = {
    *(f"time_{part}" for part in ("projection.1.weight", "projection.1.bias")),
    *(f"time_embedding.{n}.{part}" for n in (0, 2) for part in ("weight", "bias")),
    *(f"blocks.{n}.modulation" for n in (0, 1)),
}
PARAMETERS = 69

Answers = dict[str, Any]


def run(script: str, ranks: int, request: dict[str, Any]) -> Answers:
    folder = provision.ensure(provision.parse("flash-attn"), log=print)
    done = subprocess.run(
        [sys.executable, str(MODELS / script), str(ranks), json.dumps(request)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)])},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers: Answers = json.loads(done.stdout.splitlines()[-1])
    return answers


def small(build: str) -> dict[str, str]:
    """A target. flash-attn knows no float64, so the reference is the same model with SDPA."""
    return {
        "name": build,
        "build": f"wan:{build}",
        "inputs": "wan:inputs_small",
        "wide": "wan:build_small_sdpa",
    }


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def as_published(ranks: int) -> Answers:
    """Nothing registered, where flash-attn is called on DTensors and where it is called on local shards."""
    builds = (
        "build_small",
        "build_plan2",
        "build_small_fixed",
        "build_plan2_local",
        "build_plan2_fixed",
    )
    request = {"standins": ["flash_attn_2_cuda"], "targets": [small(build) for build in builds]}
    return run("compared.py", ranks, request)


@pytest.fixture(scope="module")
def with_fix(ranks: int, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """With the module that `attncheck scan --fix known` loads."""
    fix = emit.write_known(tmp_path_factory.mktemp("fix"))
    builds = ("build_small", "build_plan2")
    request = {
        "standins": ["flash_attn_2_cuda"],
        "fix": str(fix),
        "targets": [small(build) for build in builds],
    }
    return run("compared.py", ranks, request)


rotates = pytest.mark.xfail(
    torch_here.before("2.9.1"),
    reason="torch 2.6 conjugates wrongly where complex DTensors are multiplied backward, in rotary embedding",
    strict=True,
)


def unequal(answers: Answers, build: str) -> set[str]:
    (call,) = answers[build]
    assert len(call) == 1 + PARAMETERS, call
    for name, said in call.items():
        print(
            f"{build} {name}: {said['error']:.2g} of {said['largest']:.2g}, {said['bound']:.2g} allowed"
        )
    return {name for name, said in call.items() if said["error"] > said["bound"]}


@pytest.mark.parametrize("build", ["build_small", "build_plan2"])
def test_as_published_it_dies_at_its_first_attention(as_published: Answers, build: str) -> None:
    (call,) = as_published[build]
    assert MISSING in call["raised"]


@rotates
def test_with_the_strategies_registered_it_equals_the_unsharded_model(with_fix: Answers) -> None:
    assert not unequal(with_fix, "build_small")


@rotates
def test_within_local_map_it_needs_no_strategy(as_published: Answers) -> None:
    assert not unequal(as_published, "build_small_fixed")


@rotates
@pytest.mark.parametrize("attention", ["registered", "local_map"])
def test_the_second_plan_loses_gradients_whatever_attention_does(
    attention: str, as_published: Answers, with_fix: Answers
) -> None:
    registered = attention == "registered"
    answers = with_fix if registered else as_published
    build = "build_plan2" if registered else "build_plan2_local"
    assert unequal(answers, build) == LOST_IN_PLAN_2
    (call,) = answers[build]
    for n in (0, 1):
        said = call[f"blocks.{n}.modulation"]
        assert not said["ranks_agree"]
        assert said["error"] > 0.05 * said["largest"]
        # Shift and scale lack the tokens of other ranks; the gates, behind a gather, lack nothing.
        assert said["sum_or_own_error"] <= said["bound"]


@rotates
def test_the_second_plan_mended(as_published: Answers) -> None:
    assert not unequal(as_published, "build_plan2_fixed")


# --- 14 B parameters, on fake tensors ----------------------------------------------------------------------


def at_real_size(build: str, fix: str = "") -> Answers:
    """On 8 fake ranks, seen by the first and the last of them."""
    target = {"name": build, "build": f"wan:{build}", "inputs": "wan:inputs_real"}
    return run("faked.py", 8, {"standins": ["flash_attn_2_cuda"], "fix": fix, "targets": [target]})


fake = pytest.mark.skipif(
    torch_here.before("2.11.0"),
    reason="DTensor scatters parameters by an op that fake tensors do not know (2.6, 2.9)",
)
REAL = ("build_real", pytest.param("build_real_plan2", marks=pytest.mark.slow))


@fake
@pytest.mark.parametrize("build", REAL)
def test_at_real_size_it_dies_alike(build: str) -> None:
    first, last = at_real_size(build)[build]
    assert MISSING in first["raised"]
    assert MISSING in last["raised"]


@fake
@pytest.mark.parametrize("build", REAL)
def test_at_real_size_forward_and_backward_cost_no_memory(build: str, tmp_path: Path) -> None:
    answers = at_real_size(build, str(emit.write_known(tmp_path)))
    for rank in answers[build]:
        print(f"{rank['build_seconds']:.1f} s to build, {rank['seconds']:.1f} s in all")
        assert rank["output"] == [1, 32_760, 64]
        assert rank["parameters"] == 14_288_491_584
        assert rank["odd"] == []
    assert answers["peak_mib"] < 1024  # measured: 330, of which torch itself is 300
