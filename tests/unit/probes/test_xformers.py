"""The xformers probe: every setting on the real package, a real scan, and the verdicts of torch 2.13.0."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import real_scan
import torch
from real_scan import Outcomes

from attncheck import provision
from attncheck.plan import Selection, plan
from attncheck.plugins import load_probe_file
from attncheck.probing import OTHER, Operator, Probe, Setting

REPOSITORY = Path(__file__).parents[3]
PROBE_FILE = REPOSITORY / "probes" / "xformers.py"
REFUSED = {
    "xformers.memory_efficient_attention",
    "xformers.cutlass_blackwell",
    "xformers.ck",
    "xformers.triton_splitk",
}


def load() -> Probe:
    return load_probe_file(PROBE_FILE)


def pairs() -> list[tuple[Operator, Setting]]:
    return [(operator, setting) for operator in load().operators for setting in operator.settings]


def test_loads_without_torch_and_without_xformers() -> None:
    """Its file is called as the package is; it is loaded under another name."""
    code = (
        "import sys; from pathlib import Path; from attncheck.plugins import load_probe_file; "
        f"load_probe_file(Path({str(PROBE_FILE)!r})); "
        "sys.exit(bool({'torch', 'xformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_levels_have_their_sizes() -> None:
    def count(level: str) -> int:
        return len(plan((load(),), {"tp": 2}, Selection(level=level)))

    assert count("default") <= 50
    assert count("full") > 400


@pytest.mark.parametrize(("operator", "setting"), pairs(), ids=lambda x: x.name)
def test_sizes_hide_nothing(operator: Operator, setting: Setting) -> None:
    """No two dims have the same size or the same half: a wrong split cannot fit by chance."""
    for tensor in operator.tensors(setting):
        sizes = [s for role, s in zip(tensor.dims, tensor.sizes, strict=True) if role != OTHER]
        assert len(set(sizes)) == len(sizes)
        assert len({-(-s // 2) for s in sizes}) == len(sizes)


def test_placements_mean_the_right_dims() -> None:
    by_id = {case.id: case for case in plan((load(),), {"tp": 2}, Selection(level="default"))}

    def heads(setting: str) -> dict[str, tuple[str, ...]]:
        case = by_id[f"xformers/xformers.cutlass/{setting}/dtensor/tp=2/heads/forward"]
        return dict(case.placements)

    qkv = dict.fromkeys("qkv", ("S(2)",))
    assert heads("plain") == qkv
    assert heads("grouped") == qkv  # the groups
    assert heads("block_diagonal") == qkv
    assert heads("tensor_bias") == {**qkv, "bias": ("S(1)",)}
    assert heads("tensor_bias_plain") == {**qkv, "bias": ("plain",)}


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """{operator/setting: {tensor: [error, bound]} or why not} of the real package, unsharded."""
    folder = provision.ensure(provision.parse("xformers"), log=print)
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("xformers_errors.py"))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    report: dict[str, Any] = json.loads(run.stdout)
    return report


@pytest.mark.parametrize(("operator", "setting"), pairs(), ids=lambda x: x.name)
def test_every_setting_agrees_with_its_reference(
    measured: dict[str, Any], operator: Operator, setting: Setting
) -> None:
    errors = measured[f"{operator.name}/{setting.name}"]
    if operator.name in REFUSED:
        assert errors.startswith("setting_refused: ")
        assert "device=cpu" in errors
        return
    wanted = {f"grad.{t.name}" for t in operator.tensors(setting) if t.requires_grad}
    assert set(errors) == {"out", *wanted}
    for tensor, (error, bound) in errors.items():
        assert error <= bound, f"{tensor}: {error} above {bound}"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """By operator (without `xformers.`), setting, placement and direction."""
    folder = tmp_path_factory.mktemp("xformers")
    report = real_scan.scan(folder, "--with", "xformers", "--operator", "xformers.*")
    return real_scan.outcomes(report, "xformers.")


def test_a_refusal_comes_with_xformers_own_reasons_for_each_kernel(outcomes: Outcomes) -> None:
    refused = {key[0] for key, outcome in outcomes.items() if outcome["status"] == "unavailable"}
    assert refused == {name.removeprefix("xformers.") for name in REFUSED}
    for operator, kernel in (
        # A CPU build of PyTorch has no CUDA version: xformers then tries the kernels for ROCm.
        ("memory_efficient_attention", "cutlassF-pt" if torch.version.cuda else "ckF"),
        ("cutlass_blackwell", "cutlassF-blackwell"),
        ("ck", "ckF"),
        ("triton_splitk", "triton_splitKF"),
    ):
        message = outcomes[operator, "plain", "replicate", "forward"]["message"]
        assert f"`{kernel}` is not supported because:\n    device=cpu" in message


@pytest.mark.skipif(not torch.__version__.startswith("2.13.0"), reason="verdicts of torch 2.13.0")
@pytest.mark.parametrize(
    ("operator", "setting", "status", "forward", "backward"),
    [
        # cutlass' backward is handed two empty plain tensors for the random state.
        ("cutlass", "plain", "missing_strategy", "strategy", "mixed"),
        ("cutlass", "grouped", "missing_strategy", "strategy", None),
        ("cutlass", "tensor_bias_plain", "mixed_tensor", "mixed", "mixed"),
        ("cutlass", "block_diagonal", "mixed_tensor", "mixed", "mixed"),
        ("flash", "plain", "missing_strategy", "strategy", "strategy"),
        ("flash", "block_diagonal", "mixed_tensor", "mixed", "mixed"),
        ("flash3", "plain", "missing_strategy", "strategy", "strategy"),
        ("cutlass_flash", "plain", "missing_strategy", "strategy", "strategy"),
        ("cuda_dispatch", "plain", "missing_strategy", "strategy", "mixed"),
        ("cuda_dispatch", "bfloat16", "missing_strategy", "strategy", "strategy"),
    ],
)
def test_verdicts(
    outcomes: Outcomes,
    operator: str,
    setting: str,
    status: str,
    forward: str,
    backward: str | None,
) -> None:
    expected = next(o for o in load().operators if o.name == f"xformers.{operator}").kernel_ops
    if not expected:  # what dispatch picks
        name = "cutlass" if setting == "plain" else "flash3"
        expected = next(o for o in load().operators if o.name == f"xformers.{name}").kernel_ops
    wanted = [(expected[0], "forward", forward)]
    found = outcomes[operator, setting, "heads", "forward"]
    assert found["status"] == status
    assert [(m["op"], m["phase"], m["kind"]) for m in found["missing_ops"]] == wanted
    if backward is None:
        return
    wanted.append((expected[1], "backward", backward))
    found = outcomes[operator, setting, "heads", "backward"]
    assert [(m["op"], m["phase"], m["kind"]) for m in found["missing_ops"]] == wanted


@pytest.mark.skipif(not torch.__version__.startswith("2.13.0"), reason="verdicts of torch 2.13.0")
def test_a_bias_that_is_a_dtensor_is_refused_by_its_type(outcomes: Outcomes) -> None:
    found = outcomes["cutlass", "tensor_bias", "heads", "forward"]
    assert found["status"] == "error"
    assert "attn_bias type is <class 'torch.distributed.tensor.DTensor'>" in found["message"]
    assert "kernel_op" not in found  # xformers itself raises, before any op
