"""The xformers stand-in: the real package's kernels against float64 autograd, its dispatch, its refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from attncheck import provision

REPOSITORY = Path(__file__).parents[3]
SESSION = Path(__file__).with_name("xformers_session.py")
EXAMPLES = 60


def run(*arguments: str, requirements: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    folders = [str(provision.ensure(provision.parse(r), log=print)) for r in requirements]
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*folders, str(REPOSITORY)])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(
    scope="module", params=[("xformers",), ("xformers", "flash-attn")], ids=["alone", "flash-attn"]
)
def seen(request: pytest.FixtureRequest) -> Mapping[str, Any]:
    """What the session saw with these packages: flash's kernel is PyTorch's, or flash-attn's."""
    done = run(str(SESSION), str(EXAMPLES), requirements=request.param)
    assert done.returncode == 0, done.stderr[-4000:]
    return {**json.loads(done.stdout), "packages": request.param}


def test_every_pair_of_kernels_agrees_with_float64(seen: Mapping[str, Any]) -> None:
    assert set(seen["worst"]) == {"cutlass", "cutlass packed", "xformers_flash", "xformers_flash3"}
    assert sum(seen["examples"].values()) == 3 * EXAMPLES
    assert all(count >= 15 for count in seen["examples"].values())
    for pair, error in seen["worst"].items():
        assert 0 < error <= 1e-5, pair


def test_flash_takes_flash_attn_where_it_is_and_pytorchs_own_kernel_where_not(
    seen: Mapping[str, Any],
) -> None:
    assert seen["flash"].endswith("-pt") == (seen["packages"] == ("xformers",))
    assert seen["loaded"] == []  # what was put in the way of `find_spec` is gone


def test_dispatch_keeps_xformers_own_order(seen: Mapping[str, Any]) -> None:
    assert seen["chosen"] == {
        "float32": ["cutlass", "cutlass"],
        "bfloat16": ["flash3", "flash3"],
        "head_dim 32": ["flash3", "flash"],  # flash3 has no backward below 64
        "head_dim 16": ["flash", "flash"],
        "causal": ["flash3", "flash3"],
        "causal of unequal lengths": ["cutlass", "cutlass"],
        "tensor": ["cutlass", "cutlass"],
    }


def test_outside_the_cpu_is_refused_as_ever(seen: Mapping[str, Any]) -> None:
    scope = seen["scope"]
    assert scope["before"].startswith("NotImplementedError: No operator found")
    assert "device=cpu" in scope["before"]
    # PyTorch prints a set of dtypes: its order is no part of the refusal.
    assert sorted(scope["after"]) == sorted(scope["before"])
    assert scope["inside"] == ""
    assert scope["put back"]


def test_inside_every_other_reason_is_kept(seen: Mapping[str, Any]) -> None:
    scope = seen["scope"]
    assert "device=cpu" in scope["splitk"]  # no kernel of ours behind it
    for kernel in ("fa3F@pip_pkg", seen["flash"], "cutlassF-pt"):
        assert f"`{kernel}` is not supported because:\n    dtype=torch.float64" in scope["float64"]
    assert "device=" not in scope["float64"]


def test_backward_drops_what_forward_dropped(seen: Mapping[str, Any]) -> None:
    assert set(seen["dropout"]) == {"cutlass", "flash"}
    assert all(gap < 1e-3 for gap in seen["dropout"].values())  # bfloat16


def test_opcheck(seen: Mapping[str, Any]) -> None:
    found = dict(seen["opcheck"])
    if seen["packages"] == ("xformers",):
        # xformers' own fake kernel promises int64 for the random state; PyTorch's kernel has uint64.
        assert "uint64 and torch.int64" in found.pop("flash_fwd test_faketensor")
    assert set(found.values()) == {"SUCCESS"}


def test_what_cannot_be_used_is_said_in_one_sentence() -> None:
    code = (
        "from attncheck import standins\n"
        "try: standins.provide('xformers')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = run("-c", code, requirements=("xformers", "flash-attn==2.6.3"))
    assert done.stdout == (
        "UserError xformers refuses the flash-attn that is installed: "
        "Requires Flash-Attention version >=2.7.1,<=2.8.4 but got 2.6.3.\n"
    )
    done = run("-c", code, requirements=())
    assert done.stdout == "ModuleNotFoundError No module named 'xformers'\n"
