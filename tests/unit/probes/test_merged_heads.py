"""The merged-heads probe: a real scan of it, and the verdicts of torch 2.13.0 on CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import real_scan
import torch
from real_scan import Outcomes

from attncheck.plugins import load_probe_file

PROBE_FILE = Path(__file__).parents[3] / "probes" / "merged_heads.py"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """By operator (without `merged_heads.`), setting, placement and direction."""
    folder = tmp_path_factory.mktemp("merged_heads")
    report = real_scan.scan(folder, "--with", "flash-attn", "--operator", "merged_heads.*")
    return real_scan.outcomes(report, "merged_heads.")


def test_whole_tensors_agree_with_the_reference(outcomes: Outcomes) -> None:
    """A call that is refused or a broken reference would end so, whatever torch does with DTensors."""
    assert len(outcomes) == 40
    statuses = {outcome["status"] for outcome in outcomes.values()}
    assert not statuses & {"unknown", "unavailable", "wrong", "crash", "hang", "diverged"}


@pytest.mark.skipif(not torch.__version__.startswith("2.13.0"), reason="verdicts of torch 2.13.0")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("operator", "setting", "placement", "status", "words"),
    [
        (
            "sdpa",
            "causal",
            "heads",
            "missing_strategy",
            "_flash_attention_for_cpu.default does not",
        ),
        ("sdpa[MATH]", "plain", "heads", "supported", ""),
        ("sdpa[MATH]", "gqa", "heads", "supported", ""),
        ("sdpa[MATH]", "cut_heads", "replicate", "supported", ""),
        ("sdpa[MATH]", "cut_heads", "heads", "error", "output dimension 0 (size 5) is not evenly"),
        ("fused_qkv", "plain", "heads", "redistributed", "1 all_gather in aten.split.Tensor"),
        (
            "flash_attn_func",
            "plain",
            "heads",
            "missing_strategy",
            "_flash_attn_forward.default does",
        ),
        ("flash_attn_func", "cut_heads", "heads", "error", "Cannot unflatten unevenly sharded"),
    ],
)
def test_verdicts(
    outcomes: Outcomes,
    operator: str,
    setting: str,
    placement: str,
    direction: str,
    status: str,
    words: str,
) -> None:
    outcome = outcomes[operator, setting, placement, direction]
    assert outcome["status"] == status
    assert words in outcome.get("message", "")


def test_hidden_is_heads_times_head_dim() -> None:
    for operator in load_probe_file(PROBE_FILE).operators:
        for setting in operator.settings:
            for tensor in operator.tensors(setting):
                parts = 3 if tensor.name == "qkv" else 1
                heads = setting["kv_heads" if tensor.name in "kv" else "heads"]
                assert tensor.sizes[-1] == parts * heads * setting["head_dim"]
