"""The mha probe: whole tensors against its references, a real scan, the verdicts of torch 2.13.0 on CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import real_scan
import torch
from real_scan import Outcomes

from attncheck.plugins import load_probe_file
from attncheck.probing import Operator, Setting
from attncheck.runner import case as cases

PROBE_FILE = Path(__file__).parents[3] / "probes" / "mha.py"
OPERATORS = load_probe_file(PROBE_FILE).operators
EVERY_SETTING = [
    pytest.param(operator, setting, id=f"{operator.name}-{setting.name}")
    for operator in OPERATORS
    for setting in operator.settings
]


@pytest.mark.parametrize(("operator", "setting"), EVERY_SETTING)
def test_whole_tensors_agree_with_the_reference(operator: Operator, setting: Setting) -> None:
    """In eval the fused kernel against the formula, which no case judges where DTensor refuses it."""
    prepared = cases.prepare(operator, setting, seed=4, device="cpu")
    assert prepared.refused is None
    expected = cases.run_reference(prepared, seed=4)
    assert prepared.unsharded.keys() == expected.keys()
    bound = 3e-2 if setting.dtype == "bfloat16" else 2e-5
    for name, value in prepared.unsharded.items():
        error = (value.double() - expected[name]).abs().max()
        assert error <= bound * expected[name].abs().max(), name


@pytest.mark.parametrize(("operator", "setting"), EVERY_SETTING)
def test_training_asks_for_gradients_and_eval_for_none(
    operator: Operator, setting: Setting
) -> None:
    floating = [t for t in operator.tensors(setting) if t.dtype != "bool"]
    training = setting.options["mode"] == "train"
    assert all(tensor.requires_grad == training for tensor in floating)


@pytest.mark.parametrize(
    ("operator", "setting"), [p for p in EVERY_SETTING if p.values[1].get("need_weights")]
)
def test_scores_do_not_saturate(operator: Operator, setting: Setting) -> None:
    """A softmax with one key alone would hide wrong projections of q and k."""
    weights = cases.prepare(operator, setting, seed=4, device="cpu").unsharded["weights"]
    assert 0.05 < float(weights[:, -1].max()) < 0.95


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """By operator (without `nn.`), setting, placement and direction."""
    folder = tmp_path_factory.mktemp("mha")
    return real_scan.outcomes(real_scan.scan(folder, "--operator", "nn.*"), "nn.")


def test_every_case_has_a_verdict(outcomes: Outcomes) -> None:
    assert len(outcomes) >= 50
    statuses = {outcome["status"] for outcome in outcomes.values()}
    assert not statuses & {"unknown", "unavailable", "wrong", "crash", "hang", "diverged"}
    assert {key[3] for key in outcomes if key[1].startswith("eval")} == {"forward"}


UNFLATTEN = "Cannot unflatten unevenly sharded tensor: output dimension 0 (size 3)"
NO_STRATEGY = "Operator aten.{}.default does not have a sharding strategy registered."


@pytest.mark.skipif(not torch.__version__.startswith("2.13.0"), reason="verdicts of torch 2.13.0")
@pytest.mark.parametrize(
    ("operator", "setting", "placement", "direction", "status", "words"),
    [
        ("MultiheadAttention", "train", "replicate", "backward", "supported", ""),
        # The output's heads and batch lie in one dim behind the sequence when they are merged.
        (
            "MultiheadAttention",
            "train",
            "batch",
            "backward",
            "redistributed",
            "1 all_gather in aten._unsafe_view.default",
        ),
        ("MultiheadAttention", "train_no_weights_math", "batch", "backward", "supported", ""),
        # q, k and v lie one above the other in in_proj: 2 ranks cut k.
        ("MultiheadAttention", "train", "heads", "forward", "error", UNFLATTEN),
        (
            "MultiheadAttention",
            "train_cross",
            "heads",
            "forward",
            "redistributed",
            "2 all_gather in aten.split_with_sizes.default",
        ),
        (
            "MultiheadAttention",
            "train_no_weights",
            "replicate",
            "backward",
            "missing_strategy",
            NO_STRATEGY.format("_scaled_dot_product_flash_attention_for_cpu_backward"),
        ),
        (
            "MultiheadAttention",
            "train_causal_plain_mask",
            "batch",
            "forward",
            "mixed_tensor",
            "aten.baddbmm.default got mixed",
        ),
        (
            "MultiheadAttention",
            "train_plain_weights",
            "batch",
            "forward",
            "mixed_tensor",
            "aten.mm.default got mixed",
        ),
        (
            "MultiheadAttention",
            "eval",
            "replicate",
            "forward",
            "missing_strategy",
            NO_STRATEGY.format("_native_multi_head_attention"),
        ),
        # The way out of the one before, where the weights are whole.
        ("MultiheadAttention", "eval_no_fast_path", "batch", "forward", "redistributed", ""),
        ("TransformerEncoderLayer", "train_math", "batch", "backward", "supported", ""),
        (
            "TransformerEncoderLayer",
            "train_causal",
            "batch",
            "forward",
            "missing_strategy",
            NO_STRATEGY.format("_scaled_dot_product_flash_attention_for_cpu"),
        ),
        (
            "TransformerEncoderLayer",
            "eval",
            "batch",
            "forward",
            "missing_strategy",
            NO_STRATEGY.format("_transformer_encoder_layer_fwd"),
        ),
        (
            "TransformerEncoderLayer",
            "eval_no_fast_path_math",
            "batch",
            "forward",
            "supported",
            "",
        ),
        (
            "TransformerEncoder",
            "eval_padding",
            "batch",
            "forward",
            "missing_strategy",
            NO_STRATEGY.format("_nested_tensor_from_mask_left_aligned"),
        ),
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
