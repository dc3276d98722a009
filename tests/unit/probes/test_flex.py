"""The flex probe: every setting on whole tensors against its reference, a real scan, and the verdicts of
torch 2.13.0 on a CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import real_scan
import torch

from attncheck import standins
from attncheck.plan import Selection, plan
from attncheck.plugins import load_probe_file
from attncheck.probing import Operator, Probe, Setting
from attncheck.runner import case as cases
from attncheck.runner.inputs import DTYPES

PROBE_FILE = Path(__file__).parents[3] / "probes" / "flex.py"
HOP = "There was no rule registered for HOP flex_attention"
MIXED = "aten.index.Tensor got mixed"


def load() -> Probe:
    return load_probe_file(PROBE_FILE)


def operator(name: str) -> Operator:
    return next(o for o in load().operators if o.name == name)


def test_loads_without_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from attncheck.plugins import load_probe_file; "
        f"load_probe_file(Path({str(PROBE_FILE)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_levels_have_their_sizes() -> None:
    """Compiling takes half a minute: one case by default, so that the compiled form is seen."""
    default = plan((load(),), {"tp": 2}, Selection())
    ids = [case.id for case in default if case.operator != "flex_attention"]
    assert ids == ["flex/flex_attention[compiled]/plain/dtensor/tp=2/heads/forward"]
    assert 40 <= len(default) <= 50
    full = plan((load(),), {"tp": 2}, Selection(level="full"))
    compiled = [case for case in full if case.operator == "flex_attention[compiled]"]
    assert {case.direction for case in compiled} == {"forward"}
    assert {case.setting_name for case in compiled} == {
        "plain",
        "causal",
        "score_mod",
        "bias_plain",
    }


def assert_agrees(chosen: Operator, setting: Setting) -> None:
    """Output, log-sum-exp and gradients: within 1e-5 in float32, within a few roundings in half."""
    prepared = cases.prepare(chosen, setting, seed=5, device="cpu")
    assert prepared.refused is None
    reference = cases.run_reference(prepared, seed=5)
    assert reference.keys() == prepared.unsharded.keys()
    bound = max(1e-5, 4 * torch.finfo(DTYPES[setting.dtype]).eps)
    for name, exact in reference.items():
        scale = max(1.0, float(exact.abs().max()))
        error = float((prepared.unsharded[name].double() - exact).abs().max())
        assert error <= bound * scale, name


@pytest.mark.parametrize("setting", operator("flex_attention").settings, ids=lambda s: s.name)
def test_whole_tensors_agree_with_the_reference(setting: Setting) -> None:
    standins.provide("flex_attention")
    assert_agrees(operator("flex_attention"), setting)


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", operator("flex_attention[compiled]").settings, ids=lambda s: s.name
)
def test_compiled_whole_tensors_agree_with_the_reference(setting: Setting) -> None:
    assert_agrees(operator("flex_attention[compiled]"), setting)


def test_a_machine_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = operator("flex_attention[compiled]").missing
    assert missing is not None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "there is no no-such-compiler" in missing()
    monkeypatch.setenv("CXX", sys.executable)
    assert missing() == ""


def by_name(report: dict[str, Any]) -> dict[tuple[str, ...], dict[str, Any]]:
    return {key[1:]: outcome for key, outcome in real_scan.outcomes(report).items()}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("flex")
    names = ("plain", "causal", "document", "bias_plain", "bias_replicated", "bias_sharded")
    chosen = [word for name in names for word in ("--setting", name)]
    return real_scan.scan(
        folder, "--operator", "flex_attention", *chosen, "--placement", "replicate",
        "--placement", "heads",
    )  # fmt: skip


def test_nothing_is_unavailable_or_unknown(report: dict[str, Any]) -> None:
    assert len(report["cases"]) == 24
    statuses = {case["outcome"]["status"] for case in report["cases"]}
    assert not statuses & {"unknown", "unavailable", "wrong", "crash", "hang", "diverged"}
    assert all("flex_attention" in c["outcome"]["standins"][0] for c in report["cases"])


@pytest.mark.skipif(not torch.__version__.startswith("2.13.0"), reason="verdicts of torch 2.13.0")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("placement", ["replicate", "heads"])
@pytest.mark.parametrize(
    ("setting", "status", "words"),
    [
        ("plain", "missing_strategy", HOP),
        ("causal", "missing_strategy", HOP),
        ("bias_replicated", "missing_strategy", HOP),
        ("bias_sharded", "missing_strategy", HOP),
        ("bias_plain", "mixed_tensor", MIXED),
        ("document", "mixed_tensor", MIXED),
    ],
)
def test_verdicts(
    report: dict[str, Any],
    setting: str,
    placement: str,
    direction: str,
    status: str,
    words: str,
) -> None:
    outcome = by_name(report)[setting, placement, direction]
    assert outcome["status"] == status
    assert outcome["message"].startswith(words)


@pytest.mark.skipif(not torch.__version__.startswith("2.13.0"), reason="verdicts of torch 2.13.0")
def test_the_finding_says_how_a_higher_order_op_is_mended(report: dict[str, Any]) -> None:
    finding = next(f for f in report["findings"] if f["rule"] == "ATN101")
    assert finding["kernel_op"] == "higher_order.flex_attention"
    texts = [remedy["text"] for remedy in finding["remedies"]]
    assert any("torch.ops.higher_order.flex_attention.py_impl(DTensor)" in t for t in texts)
    assert any("`local_map`" in t and "positions in the shard" in t for t in texts)
    assert not any("register_sharding`, before" in t for t in texts)


@pytest.mark.slow
def test_compiled_ends_as_uncompiled_does(report: dict[str, Any], tmp_path: Path) -> None:
    compiled = by_name(
        real_scan.scan(
            tmp_path, "--operator", "flex_attention[compiled]", "--setting", "plain",
            "--setting", "bias_plain", "--placement", "replicate", "--placement", "heads",
        )
    )  # fmt: skip
    assert len(compiled) == 4
    eager = by_name(report)
    for key, outcome in compiled.items():
        assert (outcome["status"], outcome["message"]) == (
            eager[key]["status"],
            eager[key]["message"],
        )
