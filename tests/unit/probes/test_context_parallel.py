"""The context_parallel probe: a real scan of it, and the verdicts of torch 2.13.0 on CPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import real_scan
import torch

from attncheck import standins
from attncheck.plugins import load_probe_file
from attncheck.probing import Operator, Setting
from attncheck.runner import case as cases
from attncheck.runner import compat

PROBE_FILE = Path(__file__).parents[3] / "probes" / "context_parallel.py"
OPERATORS = load_probe_file(PROBE_FILE).operators


@pytest.mark.parametrize(
    ("operator", "setting"),
    [
        pytest.param(operator, setting, id=f"{operator.name}-{setting.name}")
        for operator in OPERATORS
        for setting in operator.settings
    ],
)
def test_whole_tensors_agree_with_the_reference(operator: Operator, setting: Setting) -> None:
    for name in operator.standins:
        standins.provide(name)
    prepared = cases.prepare(operator, setting, seed=4, device="cpu")
    assert prepared.refused is None
    expected = cases.run_reference(prepared, seed=4)
    assert prepared.unsharded.keys() == expected.keys() == {"out", "grad.q", "grad.k", "grad.v"}
    bound = 2e-2 if setting.dtype == "bfloat16" else 2e-6
    for name, value in prepared.unsharded.items():
        error = (value.double() - expected[name]).abs().max()
        assert error <= bound * expected[name].abs().max(), name


def test_options_hold_inside_and_are_put_back() -> None:
    options = compat.context_parallel_tools()._cp_options
    before = options.enable_load_balance, options.rotate_method
    with compat.context_parallel_options(load_balance=False, rotate="alltoall"):
        assert not options.enable_load_balance
        assert options.rotate_method != before[1]
    assert (options.enable_load_balance, options.rotate_method) == before
    with (
        pytest.raises(NotImplementedError, match="carousel"),
        compat.context_parallel_options(load_balance=False, rotate="carousel"),
    ):
        pass
    assert (options.enable_load_balance, options.rotate_method) == before


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], dict[str, Any]]:
    """By operator (what stands in its brackets), setting and direction."""
    folder = tmp_path_factory.mktemp("context_parallel")
    report = real_scan.scan(folder, "--operator", "context_parallel*")
    found = real_scan.outcomes(report, "context_parallel")
    return {
        (operator.strip("[]"), setting, direction): outcome
        for (operator, setting, _, direction), outcome in found.items()
    }


def test_every_case_has_a_verdict(outcomes: dict[tuple[str, ...], dict[str, Any]]) -> None:
    assert len(outcomes) >= 25
    statuses = {outcome["status"] for outcome in outcomes.values()}
    # What context parallelism sends is asked for.
    assert not statuses & {"unknown", "unavailable", "wrong", "crash", "hang", "redistributed"}


@pytest.mark.skipif(not torch.__version__.startswith("2.13.0"), reason="verdicts of torch 2.13.0")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("operator", "setting", "status", "words"),
    [
        ("", "causal", "missing_strategy", "_flash_attention_for_cpu.default does not have"),
        ("MATH", "plain", "supported", ""),
        ("MATH", "causal", "mixed_tensor", "aten.add.Tensor got mixed"),
        ("FLASH_ATTENTION", "causal", "supported", ""),
        ("FLASH_ATTENTION", "bfloat16_causal", "supported", ""),
        ("FLASH_ATTENTION", "gqa_causal", "supported", ""),
        # Not causal: refused, unless the sequence happens not to be balanced.
        ("FLASH_ATTENTION", "plain", "error", "Load balancing requires `is_causal=True`"),
        ("FLASH_ATTENTION", "plain_unbalanced", "supported", ""),
        ("FLASH_ATTENTION", "odd_parts", "supported", ""),
        # The kernel pads its log-sum-exp to 32 queries, the ring takes it as it is.
        (
            "EFFICIENT_ATTENTION",
            "causal",
            "error",
            "size of tensor a (32) must match the size of tensor b (16)",
        ),
        ("EFFICIENT_ATTENTION", "causal_aligned", "supported", ""),
        ("CUDNN_ATTENTION", "causal", "supported", ""),
    ],
)
def test_verdicts(
    outcomes: dict[tuple[str, ...], dict[str, Any]],
    operator: str,
    setting: str,
    direction: str,
    status: str,
    words: str,
) -> None:
    outcome = outcomes[operator, setting, direction]
    assert outcome["status"] == status
    assert words in outcome.get("message", "")


@pytest.mark.skipif(not torch.__version__.startswith("2.13.0"), reason="verdicts of torch 2.13.0")
@pytest.mark.parametrize(
    ("setting", "name"), [("causal", "all_gather"), ("causal_alltoall", "all_to_all")]
)
def test_the_kernel_op_goes_round_the_ring(
    outcomes: dict[tuple[str, ...], dict[str, Any]], setting: str, name: str
) -> None:
    """One exchange of k and v on 2 ranks: context_parallel's handler answered, not DTensor's own rule."""
    collectives = outcomes["FLASH_ATTENTION", setting, "forward"]["collectives"]
    op = "aten._scaled_dot_product_flash_attention.default"
    counts = Counter({c["name"]: c["count"] for c in collectives if c["kernel_op"] == op})
    # The output is put together after the op, which is the last one that dispatch has seen.
    assert counts - Counter({"all_gather": 1}) == Counter({name: 1})
