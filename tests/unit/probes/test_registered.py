"""Ops that nobody wrote a probe for: a real scan of a module that registers some, by --import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import real_scan

from attncheck.inventory import RegisteredOp, Signature
from attncheck.plan import Selection, plan
from attncheck.plugins import load_probe_file, with_discovered
from attncheck.probing import Probe

HERE = Path(__file__).parent
PROBE_FILE = HERE.parents[2] / "probes" / "registered.py"


def discovered(*signatures: Signature) -> Probe:
    ops = [RegisteredOp(f"a.op{i}.default", signature=s) for i, s in enumerate(signatures)]
    return with_discovered(load_probe_file(PROBE_FILE), ops)


def test_nothing_registered_is_nothing_to_scan() -> None:
    probe = load_probe_file(PROBE_FILE)
    assert probe.operators == ()
    assert with_discovered(probe, [RegisteredOp("a.b.default", uncalled="why")]).operators == ()


def test_settings_are_those_that_the_op_takes() -> None:
    probe = discovered(Signature("bhsd"), Signature("bshd", "", "bfloat16", "causal", grouped=True))
    few, many = probe.operators
    assert [s.name for s in few.settings] == ["square", "plain", "bfloat16"]
    assert [s.name for s in many.settings] == ["square", "plain", "causal", "gqa", "gqa_uneven_kv"]
    assert {s.dtype for s in many.settings} == {"bfloat16"}


def test_layout_decides_what_heads_means_and_gradients_what_is_run() -> None:
    probe = discovered(Signature("bhsd"), Signature("bshd", differentiable=True))
    cases = plan([probe], {"tp": 2}, Selection(placements=("heads",)))
    placed = {(c.operator, c.direction): c.placements["q"] for c in cases}
    assert placed == {
        ("registered.a.op0", "forward"): ("S(1)",),
        ("registered.a.op1", "forward"): ("S(2)",),
        ("registered.a.op1", "backward"): ("S(2)",),
    }


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("registered")
    document, stderr = real_scan.scan_and_stderr(
        folder, "--import", "registered_ops", "--operator", "registered.*",
        "--placement", "heads", PYTHONPATH=str(HERE),
    )  # fmt: skip
    assert "running the code of registered_ops" in stderr
    return document


def test_a_name_that_a_probe_knows_is_another_op_without_its_package(
    report: dict[str, Any],
) -> None:
    """flash-attn is not installed, so its op of this name is somebody else's: judged by its schema."""
    outcome = next(
        c["outcome"] for c in report["cases"] if c["operator"].endswith("._flash_attn_forward")
    )
    assert outcome["reason"] == "signature_unknown"
    assert "what its argument mode (int) is" in outcome["message"]


def test_called_on_dtensors(report: dict[str, Any]) -> None:
    """No strategy, and it is attncheck that says so before the user's job does."""
    ran = [c for c in report["cases"] if c["outcome"]["status"] != "unavailable"]
    assert {c["operator"] for c in ran} == {
        "registered.mine.attention",
        "registered._flash_attn.fwd",
        "registered.npu.npu_fusion_attention",
    }
    assert {c["outcome"]["status"] for c in ran} == {"missing_strategy"}
    mine = {c["direction"] for c in ran if c["operator"] == "registered.mine.attention"}
    assert mine == {"forward", "backward"}


def test_both_directions_are_named(report: dict[str, Any]) -> None:
    missing = {f["kernel_op"]: f["rule"] for f in report["findings"] if f["rule"] < "ATN103"}
    assert missing["mine.attention.default"] == "ATN101"
    assert missing["mine.attention_backward.default"] == "ATN102"
    assert "_flash_attn_9e27194.fwd.default" in missing


def test_what_nobody_can_call_is_listed(report: dict[str, Any]) -> None:
    listed = {c["operator"]: c["outcome"] for c in report["cases"]}
    for name, words in {
        "registered.sageattention_sm80.qk_int8_sv_f16": "what its tensor query_scale is",
        "registered.aiter.fmha_fwd": "off from softmax",
        "registered.natten.na1d": "it has no cpu kernel",
    }.items():
        assert listed[name]["status"] == "unavailable"
        assert listed[name]["reason"] == "signature_unknown"
        assert "has no sharding strategy. It is not scanned" in listed[name]["message"]
        assert words in listed[name]["message"]
    findings = [f for f in report["findings"] if f["rule"] == "ATN401"]
    assert len(findings) == 4
    assert all("attncheck new probe" in json.dumps(f["remedies"]) for f in findings)


def test_an_installed_package_that_does_not_import_is_in_the_report(tmp_path: Path) -> None:
    """No case can be made of it, but asking for it is no mistake."""
    (tmp_path / "aiter").mkdir()
    (tmp_path / "aiter" / "__init__.py").write_text("raise ImportError('undefined symbol: x')")
    info = tmp_path / "aiter-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: aiter\nVersion: 1.0\n")
    report = real_scan.scan(tmp_path, "--operator", "registered.*", PYTHONPATH=str(tmp_path))
    (case,) = report["cases"]
    assert case["operator"] == "registered.aiter"
    assert case["outcome"]["reason"] == "extension_not_loadable"
    assert "undefined symbol: x" in case["outcome"]["message"]
