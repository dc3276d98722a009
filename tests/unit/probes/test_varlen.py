"""The varlen probe: every setting on whole tensors against its reference, a real scan, the verdicts of torch
2.13.0 on a CPU, and what older versions lack."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import real_scan
import torch
from real_scan import Outcomes

from attncheck import standins
from attncheck.model import Reason
from attncheck.plan import Selection, plan
from attncheck.plugins import load_probe_file
from attncheck.probing import OTHER, Operator, Probe, Setting
from attncheck.runner import case as cases
from attncheck.runner.inputs import DTYPES

varlen = pytest.importorskip("torch.nn.attention.varlen")

PROBE_FILE = Path(__file__).parents[3] / "probes" / "varlen.py"
NO_STRATEGY = "does not have a sharding strategy registered."


def load() -> Probe:
    return load_probe_file(PROBE_FILE)


def operator(name: str) -> Operator:
    return next(o for o in load().operators if o.name == name)


def pairs() -> list[tuple[Operator, Setting]]:
    return [(o, setting) for o in load().operators for setting in o.settings]


def test_loads_without_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from attncheck.plugins import load_probe_file; "
        f"load_probe_file(Path({str(PROBE_FILE)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_default_level_has_its_size() -> None:
    default = plan((load(),), {"tp": 2}, Selection())
    assert 25 <= len(default) <= 35
    out = [case for case in default if case.operator == "varlen_attn_out"]
    assert {case.direction for case in out} == {"forward"}


@pytest.mark.parametrize(("chosen", "setting"), pairs(), ids=lambda x: x.name)
def test_sizes_hide_nothing(chosen: Operator, setting: Setting) -> None:
    """No two dims of q have the same size or the same half: a wrong split cannot fit by chance."""
    q = next(t for t in chosen.tensors(setting) if t.name == "q")
    sizes = [s for role, s in zip(q.dims, q.sizes, strict=True) if role != OTHER]
    assert len(set(sizes)) == len(sizes)
    assert len({-(-s // 2) for s in sizes}) == len(sizes)


@pytest.mark.parametrize(("chosen", "setting"), pairs(), ids=lambda x: x.name)
def test_whole_tensors_agree_with_the_reference(chosen: Operator, setting: Setting) -> None:
    """Output, log-sum-exp and gradients: within 1e-5 in float32, within a few roundings in half."""
    standins.provide("varlen_attn")
    prepared = cases.prepare(chosen, setting, seed=5, device="cpu")
    assert prepared.refused is None
    reference = cases.run_reference(prepared, seed=5)
    assert reference.keys() == prepared.unsharded.keys()
    bound = max(1e-5, 4 * torch.finfo(DTYPES[setting.dtype]).eps)
    for name, exact in reference.items():
        scale = max(1.0, float(exact.abs().max()))
        error = float((prepared.unsharded[name].double() - exact).abs().max())
        assert error <= bound * scale, name


def test_a_torch_without_the_module_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for chosen in load().operators:
        assert chosen.missing is not None
        assert chosen.missing() == ""
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "torch.nn.attention.varlen", None)
            assert chosen.missing().endswith("has no torch.nn.attention.varlen")


def test_a_torch_without_the_function_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = operator("varlen_attn_out").missing
    assert missing is not None
    monkeypatch.delattr(varlen, "varlen_attn_out")
    assert missing().endswith("has no varlen_attn_out")


@pytest.fixture
def as_in_2_10(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signature of torch 2.10: a causal flag; no windows, scale or grouped queries."""
    new: Callable[..., Any] = varlen.varlen_attn

    def varlen_attn(
        query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int,
        is_causal: bool = False, return_aux: Any = None,
    ) -> Any:  # fmt: skip
        return new(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux=return_aux,
            window_size=(-1, 0) if is_causal else (-1, -1),
        )  # fmt: skip

    varlen_attn.__module__ = "torch.nn.attention.varlen"
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)


@pytest.mark.usefixtures("as_in_2_10")
def test_an_older_signature_runs_what_it_can_and_refuses_the_rest() -> None:
    standins.provide("varlen_attn")
    chosen = operator("varlen_attn")
    refused = {}
    for setting in chosen.settings:
        prepared = cases.prepare(chosen, setting, seed=5, device="cpu")
        if prepared.refused is not None:
            refused[setting.name] = prepared.refused
    assert {"window", "gqa", "scale"} <= refused.keys()
    assert not {"plain", "causal", "lse", "uneven_heads", "bfloat16"} & refused.keys()
    assert {reason for reason, _ in refused.values()} == {Reason.SETTING_REFUSED}
    assert "varlen_attn of torch" in refused["window"][1]
    assert refused["window"][1].endswith("has no window_size")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """By operator, setting, placement and direction."""
    folder = tmp_path_factory.mktemp("varlen")
    return real_scan.outcomes(real_scan.scan(folder, "--operator", "varlen_attn*"))


def test_nothing_is_unavailable_or_unknown(outcomes: Outcomes) -> None:
    statuses = {outcome["status"] for outcome in outcomes.values()}
    assert not statuses & {"unknown", "unavailable", "wrong", "crash", "hang", "diverged"}
    assert all("torch.nn.attention.varlen" in o["standins"][0] for o in outcomes.values())


@pytest.mark.skipif(not torch.__version__.startswith("2.13.0"), reason="verdicts of torch 2.13.0")
@pytest.mark.parametrize(
    ("key", "status", "missing"),
    [
        (("varlen_attn", "plain", "replicate", "forward"), "missing_strategy", 1),
        (("varlen_attn", "plain", "heads", "backward"), "missing_strategy", 2),
        (("varlen_attn", "plain", "sequence", "backward"), "missing_strategy", 2),
        (("varlen_attn", "plain", "query", "forward"), "missing_strategy", 1),
        (("varlen_attn", "causal", "heads", "forward"), "missing_strategy", 1),
        (("varlen_attn", "gqa_uneven_kv", "heads", "backward"), "missing_strategy", 2),
        (("varlen_attn", "cu_seqlens_plain", "heads", "forward"), "mixed_tensor", 1),
        (("varlen_attn", "cu_seqlens_plain", "heads", "backward"), "mixed_tensor", 2),
        (("varlen_attn_out", "plain", "heads", "forward"), "missing_strategy", 1),
    ],
)
def test_verdicts(
    outcomes: Outcomes,
    key: tuple[str, str, str, str],
    status: str,
    missing: int,
) -> None:
    outcome = outcomes[key]
    assert outcome["status"] == status
    ops = [
        "_varlen_attn_out" if key[0] == "varlen_attn_out" else "_varlen_attn",
        "_varlen_attn_backward",
    ]
    assert [m["op"] for m in outcome["missing_ops"]] == [
        f"torch_attn.{op}.default" for op in ops[:missing]
    ]
    if status == "missing_strategy":
        assert outcome["message"].endswith(NO_STRATEGY)
        # Beyond it nothing else stands in the way; the caller's own output keeps its placement.
        own = {"heads": ["S(1)"]}.get(key[2], ["R"]) if key[0] == "varlen_attn_out" else ["R"]
        assert outcome["outputs"]["out"] == own
