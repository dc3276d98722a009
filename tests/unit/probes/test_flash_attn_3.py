"""The flash-attn 3 probe: a real scan of it, every setting on whole tensors, and what it is told apart by."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import real_scan
import torch
from real_scan import Outcomes

from attncheck.plan import Selection, plan
from attncheck.plugins import load_probe_file
from attncheck.runner import case as cases
from attncheck.runner.available import Availability

PROBE_FILE = Path(__file__).parents[3] / "probes" / "flash_attn_3.py"
PROBE = load_probe_file(PROBE_FILE)
DIRECT = "flash_attn_3.custom_op_direct"
FORWARD = "Operator flash_attn_3._flash_attn_forward.default does not have a sharding strategy"
NO_META = "Sharding propagation failed for flash_attn_3.fwd.default: it has no Meta kernel"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("flash_attn_3")
    return real_scan.scan(folder, "--operator", "flash_attn_3.*")


@pytest.fixture(scope="module")
def outcomes(report: dict[str, Any]) -> Outcomes:
    """By operator (without `flash_attn_3.`), setting, placement and direction."""
    return real_scan.outcomes(report, "flash_attn_3.")


def test_nothing_went_wrong_beside_the_verdicts(outcomes: Outcomes) -> None:
    assert len(outcomes) == 72
    statuses = {outcome["status"] for outcome in outcomes.values()}
    assert statuses <= {"missing_strategy", "mixed_tensor", "unavailable"}
    for (operator, setting, _, _), outcome in outcomes.items():
        refused = (operator, setting) == ("custom_op_direct", "causal")
        assert (outcome["status"] == "unavailable") == refused
        # With the op replicated, forward and backward went through and named all that is missing.
        assert "beyond it" not in outcome["message"]


def test_reports_say_that_the_package_is_not_there(report: dict[str, Any]) -> None:
    for case in report["cases"]:
        if case["outcome"]["status"] != "unavailable":
            (sentence,) = case["outcome"]["standins"]
            assert "only the schemas of its ops" in sentence


@pytest.mark.skipif(not torch.__version__.startswith("2.13.0"), reason="verdicts of torch 2.13.0")
@pytest.mark.parametrize(
    ("operator", "setting", "placement", "status", "words"),
    [
        ("raw", "plain", "replicate", "missing_strategy", NO_META),
        ("raw", "gqa_uneven_kv", "heads", "missing_strategy", NO_META),
        ("raw_varlen", "plain", "heads", "missing_strategy", NO_META),
        ("raw_varlen", "cu_seqlens_plain", "heads", "mixed_tensor", "got mixed torch.Tensor"),
        ("custom_op", "plain", "replicate", "missing_strategy", FORWARD),
        ("custom_op", "lse", "heads", "missing_strategy", FORWARD),
        ("custom_op_varlen", "plain", "heads", "missing_strategy", FORWARD),
        ("custom_op_varlen", "cu_seqlens_plain", "heads", "mixed_tensor", "got mixed torch.Tensor"),
        ("custom_op_direct", "plain", "heads", "missing_strategy", FORWARD),
        ("custom_op_direct", "causal", "replicate", "unavailable", "incorrect number of gradients"),
    ],
)
def test_verdicts(
    outcomes: Outcomes,
    operator: str,
    setting: str,
    placement: str,
    status: str,
    words: str,
) -> None:
    surface = ("fwd", "bwd") if operator.startswith("raw") else (
        "_flash_attn_forward", "_flash_attn_backward",
    )  # fmt: skip
    names = [f"flash_attn_3.{name}.default" for name in surface]
    for direction, expected in (("forward", names[:1]), ("backward", names)):
        outcome = outcomes[operator, setting, placement, direction]
        assert outcome["status"] == status
        assert words in outcome["message"]
        if status == "unavailable":
            assert outcome["reason"] == "setting_refused"
        else:
            assert [op["op"] for op in outcome["missing_ops"]] == expected


@pytest.mark.slow
def test_wrapped_functions_of_the_beta_mend_it_beside_the_ops_of_3_0_0(tmp_path: Path) -> None:
    """Its backward can have no strategy. Functions of 3.0.0 are none of a wrapper's business."""
    chosen = [
        f"--operator=flash_attn_3.{name}" for name in ("raw", "raw_varlen", "custom_op_varlen")
    ]
    asked = (*chosen, "--setting=*plain", "--direction=backward", "--fix=known")
    mended = real_scan.outcomes(real_scan.scan(tmp_path, *asked), "flash_attn_3.")
    assert {key[:3]: outcome["status"] for key, outcome in mended.items()} == {
        ("raw", "plain", "replicate"): "supported",
        ("raw", "plain", "batch"): "supported",
        ("raw", "plain", "heads"): "supported",
        ("raw_varlen", "plain", "replicate"): "supported",
        ("raw_varlen", "plain", "heads"): "supported",
        ("raw_varlen", "cu_seqlens_plain", "heads"): "supported",
        ("custom_op_varlen", "plain", "replicate"): "supported",
        ("custom_op_varlen", "plain", "heads"): "supported",
        ("custom_op_varlen", "cu_seqlens_plain", "heads"): "mixed_tensor",
    }


def settings() -> list[Any]:
    return [
        pytest.param(o, s, id=f"{o.name}/{s.name}") for o in PROBE.operators for s in o.settings
    ]


@pytest.mark.parametrize(("operator", "setting"), settings())
def test_whole_tensors_agree_with_the_reference(operator: Any, setting: Any) -> None:
    """At most 16 roundings of the largest value, as in the tests of flash-attn 2."""
    assert Availability("cpu").refusal(operator) is None
    prepared = cases.prepare(operator, setting, seed=5, device="cpu")
    if (operator.name, setting.name) == (DIRECT, "causal"):
        assert prepared.refused is not None
        return
    assert prepared.refused is None
    reference = cases.run_reference(prepared, seed=5)
    wanted = {"out", "grad.q", "grad.k", "grad.v"} | ({"lse"} if setting.get("lse") else set())
    assert set(reference) == set(prepared.unsharded) == wanted
    for name, want in reference.items():
        got = prepared.unsharded[name]
        bound = 16 * torch.finfo(got.dtype).eps * float(want.abs().max())
        assert float((got.double() - want).abs().max()) <= bound, name


def test_the_default_level_is_within_its_budget() -> None:
    assert len(plan((PROBE,), {"tp": 2}, Selection())) <= 80
    assert not [s for o in PROBE.operators for s in o.settings if s.level == "quick"]


PACKAGE = """
import torch
library = torch.library.Library("flash_attn_3", "FRAGMENT")
from attncheck.standins.flash_attn_3 import CUSTOM_FORWARD, RAW_BACKWARD, RAW_FORWARD
library.define(RAW_FORWARD.removeprefix("flash_attn_3::"))
library.define(RAW_BACKWARD.removeprefix("flash_attn_3::").rpartition("->")[0] + RETURNS)
def flash_attn_func(q, k, v, **flags):
    return q
"""
ASK = """
import sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
import torch
from attncheck.plugins import load_probe_file
from attncheck.runner.available import Availability
probe = load_probe_file(Path(sys.argv[1]))
operators = {o.name: o for o in probe.operators}
for device, name in (DEVICES):
    print(Availability(device).refusal(operators["flash_attn_3." + name]))
if sys.argv[2:]:
    q = torch.empty(2, device="meta")
    operator = operators["flash_attn_3.raw"]
    print(operator.call(operator.settings[0], {"q": q, "k": q, "v": q}) is q)
"""


def ask(devices: str, *folders: Path) -> list[str]:
    """What `Availability` says of operators in a process of its own."""
    script = ASK.replace("DEVICES", devices)
    command = [sys.executable, "-c", script, str(PROBE_FILE), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_the_package_a_gpu_has_nothing() -> None:
    said = ask("('cuda', 'raw'), ('cuda', 'custom_op')")
    for line in said:
        assert line.startswith("(<Reason.PACKAGE_MISSING")
        assert "flash-attn 3 (module flash_attn_interface) is not there" in line
        assert "on no package index" in line


def test_on_a_gpu_the_package_itself_is_called(tmp_path: Path) -> None:
    returns = "-> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)"
    text = PACKAGE.replace("RETURNS", repr(returns))
    (tmp_path / "flash_attn_interface.py").write_text(text)
    raw, custom, called = ask("('cuda', 'raw'), ('cuda', 'custom_op')", tmp_path)
    assert raw == "None"
    assert "Reason.OP_MISSING" in custom
    assert "flash_attn_3::_flash_attn_forward is not registered" in custom
    assert called == "True"


def test_an_op_with_the_right_name_and_another_schema_is_unavailable(tmp_path: Path) -> None:
    """Raw ops of 3.0.0 under the name of the beta's, on a GPU, and loaded into a scan on a CPU."""
    text = PACKAGE.replace("RETURNS", repr("-> (Tensor, Tensor, Tensor, Tensor, Tensor)"))
    (tmp_path / "flash_attn_interface.py").write_text(text)
    lines = ask("('cuda', 'raw'), ('cpu', 'raw'), ('cpu', 'custom_op')", tmp_path)
    for line in lines[:2]:
        assert "Reason.OP_MISSING" in line
        assert "flash_attn_3::bwd is registered with another schema: it returns (Tensor, " in line
        assert "; expected flash_attn_3::bwd(" in line
        assert ", found flash_attn_3::bwd(" in line
    assert lines[2] == "None"
