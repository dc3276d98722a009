"""The probe of PyTorch's CUDA attention ops: every setting against its reference, and what scans of
torch 2.13.0 on stand-ins find."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import real_scan
import torch
from real_scan import Outcomes

from attncheck import standins
from attncheck.plan import Selection, plan
from attncheck.plugins import load_probe_file
from attncheck.probing import OTHER, Operator, Setting
from attncheck.runner.case import prepare, run_reference

PROBE_FILE = Path(__file__).parents[3] / "probes" / "sdpa_cuda.py"
PROBE = load_probe_file(PROBE_FILE)
OPERATORS = {operator.name.removeprefix("sdpa_cuda."): operator for operator in PROBE.operators}
WITH_STRATEGY = ("flash", "efficient", "cudnn")
WITHOUT_STRATEGY = ("overrideable", "raw_flash", "raw_efficient", "raw_cudnn")
SCANNED = (
    "plain", "gqa", "gqa_12_3", "gqa_12_3_kv_replicated", "gqa_6_3", "mqa", "bias_sharded",
    "bias_bcast_heads", "bias_expanded", "bias_grad", "bias_grad_and_frozen", "dropout", "varlen",
)  # fmt: skip
FLASH = "aten._scaled_dot_product_flash_attention.default"
FLASH_BACKWARD = "aten._scaled_dot_product_flash_attention_backward.default"
EFFICIENT = "aten._scaled_dot_product_efficient_attention.default"
EFFICIENT_BACKWARD = "aten._scaled_dot_product_efficient_attention_backward.default"
CUDNN = "aten._scaled_dot_product_cudnn_attention.default"

on_2_13 = pytest.mark.skipif(
    not torch.__version__.startswith("2.13.0"), reason="verdicts of torch 2.13.0"
)
both_directions = pytest.mark.parametrize("direction", ["forward", "backward"])


def scan(folder: Path, *options: str) -> Outcomes:
    """By operator (without `sdpa_cuda.`), setting, placement and direction."""
    return real_scan.outcomes(real_scan.scan(folder, *options), "sdpa_cuda.")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    options = [o for name in SCANNED for o in ("--setting", name)]
    options += [o for name in ("replicate", "batch", "heads") for o in ("--placement", name)]
    return scan(tmp_path_factory.mktemp("sdpa_cuda"), "--operator", "sdpa_cuda.*", *options)


# --- the probe itself ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "setting"),
    [(operator, setting) for operator in PROBE.operators for setting in operator.settings],
    ids=lambda x: x.name,
)
def test_whole_tensors_agree_with_the_reference(operator: Operator, setting: Setting) -> None:
    """Output, log-sum-exp and gradients, within 16 roundings of the largest value (float32: about one
    for each product, exponential and sum that a gradient goes through)."""
    standins.provide("aten_attention")
    prepared = prepare(operator, setting, seed=3, device="cpu")
    assert prepared.refused is None
    if setting.dropout:
        return  # its values are random; what must hold of any mask is the oracle's business
    expected = run_reference(prepared, seed=3)
    results = prepared.unsharded
    layers = set() if setting.get("two_layers") else {"lse"}
    learned = {"grad.bias"} if setting.get("bias_grad") else set()
    assert {"out", *layers, *learned, "grad.q", "grad.k", "grad.v"} == set(results)
    for name, got in results.items():
        want = expected[name]
        assert got.shape == want.shape
        assert torch.equal(torch.isinf(got), torch.isinf(want))
        finite = torch.isfinite(want)
        eps = torch.finfo(got.dtype if name == "lse" else prepared.unsharded["out"].dtype).eps
        bound = 16 * eps * float(want[finite].abs().max())
        assert float((got.double() - want)[finite].abs().max()) <= bound, name


def test_loads_without_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from attncheck.plugins import load_probe_file; "
        f"load_probe_file(Path({str(PROBE_FILE)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_default_level_has_its_size_and_half_precision() -> None:
    """float32 is refused by the flash and cuDNN kernels of CUDA: there, half precision is what runs."""
    cases = plan((PROBE,), {"tp": 2}, Selection())
    assert 200 <= len(cases) <= 262
    for operator in PROBE.operators:
        names = {case.setting_name for case in cases if case.operator == operator.name}
        assert names >= {"plain", "bfloat16"}


@pytest.mark.parametrize("operator", PROBE.operators, ids=lambda o: o.name)
def test_sizes_hide_nothing(operator: Operator) -> None:
    for setting in operator.settings:
        q = operator.tensors(setting)[0]
        sizes = [s for role, s in zip(q.dims, q.sizes, strict=True) if role != OTHER]
        assert len(set(sizes)) == len(sizes)
        assert len({-(-size // 2) for size in sizes}) == len(sizes)


# --- what PyTorch 2.13 does ----------------------------------------------------------------


@on_2_13
@both_directions
@pytest.mark.parametrize("placement", ["replicate", "batch", "heads"])
@pytest.mark.parametrize("operator", WITH_STRATEGY)
def test_plain_attention_is_supported(
    outcomes: Outcomes, operator: str, placement: str, direction: str
) -> None:
    outcome = outcomes[operator, "plain", placement, direction]
    assert outcome["status"] == "supported"
    assert "collectives" not in outcome  # none at all
    assert outcome["standins"]
    reached = {op["op"] for op in outcome["kernel_ops"]}
    forward, backward = OPERATORS[operator].kernel_ops
    assert forward in reached
    assert (backward in reached) == (direction == "backward")
    shard = {"replicate": "R", "batch": "S(0)", "heads": "S(1)"}[placement]
    assert set(map(tuple, outcome["outputs"].values())) == {(shard,)}


@on_2_13
@both_directions
@pytest.mark.parametrize("operator", WITHOUT_STRATEGY)
def test_ops_without_a_strategy(outcomes: Outcomes, operator: str, direction: str) -> None:
    ours = {key: value for key, value in outcomes.items() if key[0] == operator}
    assert "plain" in {key[1] for key in ours}
    forward, backward = OPERATORS[operator].kernel_ops
    for key, outcome in ours.items():
        if key[3] == direction:
            missing = {(op["op"], op["kind"]) for op in outcome["missing_ops"]}
            wanted = {forward} | ({backward} if direction == "backward" else set())
            assert outcome["status"] == "missing_strategy"
            assert missing == {(op, "strategy") for op in wanted}


@on_2_13
@both_directions
@pytest.mark.parametrize(
    ("operator", "setting"),
    [("flash", "gqa_12_3"), ("flash", "gqa_12_3_kv_replicated"), ("cudnn", "gqa_12_3")],
)
def test_groups_cut_by_the_ranks_are_silently_wrong(
    outcomes: Outcomes, operator: str, setting: str, direction: str
) -> None:
    """12 query heads and 3 kv heads over 2 ranks: no error, no communication, wrong by a visible share."""
    outcome = outcomes[operator, setting, "heads", direction]
    assert outcome["status"] == "wrong"
    assert outcome["kernel_op"] == OPERATORS[operator].kernel_ops[0]
    assert "collectives" not in outcome  # none at all
    wrong = {fact["subject"] for fact in outcome["facts"] if fact["code"].startswith("wrong")}
    grads = {"grad.q", "grad.k", "grad.v"} if direction == "backward" else set()
    assert wrong == {"out", "lse"} | grads
    assert outcome["errors"]["out"]["max"] > 0.5
    assert outcomes[operator, "gqa", "heads", direction]["status"] == "supported"


@on_2_13
@both_directions
@pytest.mark.parametrize(
    ("operator", "text"),
    [
        ("flash", "Number of heads in key/value must divide number of heads in query"),
        (
            "cudnn",
            "number of heads for key and query must be a factor of number of heads for query",
        ),
    ],
)
def test_groups_that_only_one_rank_refuses(
    outcomes: Outcomes, operator: str, text: str, direction: str
) -> None:
    """6 and 3 over 2 ranks: rank 0 has 3 query heads and 2 kv heads, rank 1 has 3 and 1."""
    outcome = outcomes[operator, "gqa_6_3", "heads", direction]
    assert outcome["status"] == "diverged"
    assert outcome["kernel_op"] == OPERATORS[operator].kernel_ops[0]
    assert text in outcome["ranks"][0]["exception"]
    assert "exception" not in outcome["ranks"][1]


@on_2_13
def test_the_other_rank_then_waits_for_ever(tmp_path: Path) -> None:
    """With queries sharded over the sequence, PyTorch goes to heads by all-to-all, and back in backward."""
    outcomes = scan(
        tmp_path, "--operator", "sdpa_cuda.flash", "--setting", "gqa_6_3", "--placement", "query",
        "--direction", "backward",
    )  # fmt: skip
    (outcome,) = outcomes.values()
    assert outcome["status"] == "diverged"
    assert outcome["message"].startswith("one rank waits for a rank that has left the case")
    assert "must divide number of heads in query in " in outcome["message"]
    assert outcome["kernel_op"] == FLASH
    assert FLASH_BACKWARD in outcome["ranks"][1]["last_op"]


@on_2_13
@both_directions
@pytest.mark.parametrize("placement", ["replicate", "batch", "heads"])
def test_cudnn_refuses_every_bias_in_its_own_strategy(
    outcomes: Outcomes, placement: str, direction: str
) -> None:
    outcome = outcomes["cudnn", "bias_sharded", placement, direction]
    assert outcome["status"] == "error"
    assert outcome["kernel_op"] == CUDNN
    assert "input_specs(3) != strategies(4: 4 args + 0 kwargs)" in outcome["message"]
    assert outcomes["efficient", "bias_sharded", placement, direction]["status"] == "supported"


@on_2_13
@both_directions
@pytest.mark.parametrize(
    ("operator", "setting", "ops"),
    [
        ("efficient", "bias_bcast_heads", (EFFICIENT, EFFICIENT_BACKWARD)),
        ("flash", "mqa", (FLASH, FLASH_BACKWARD)),
    ],
)
def test_what_cannot_be_sharded_gathers_everything(
    outcomes: Outcomes, operator: str, setting: str, ops: tuple[str, str], direction: str
) -> None:
    """A bias of one head, or fewer kv heads than ranks: q, k and v are gathered, the output is whole."""
    outcome = outcomes[operator, setting, "heads", direction]
    assert outcome["status"] == "redistributed"
    assert outcome["outputs"]["out"] == ["R"]
    gathered = {(c["name"], c["kernel_op"], c["count"]) for c in outcome["collectives"]}
    assert gathered == {("all_gather", op, 3) for op in ops[: 2 if direction == "backward" else 1]}


@on_2_13
@both_directions
def test_an_expanded_bias_shards(outcomes: Outcomes, direction: str) -> None:
    """What F.scaled_dot_product_attention makes of a mask that broadcasts over heads."""
    outcome = outcomes["efficient", "bias_expanded", "heads", direction]
    assert outcome["status"] == "supported"
    assert outcome["outputs"]["out"] == ["S(1)"]


@on_2_13
def test_a_learned_bias_after_a_frozen_one_of_the_same_shape(outcomes: Outcomes) -> None:
    """The backward's grad_input_mask is not in the key of DTensor's propagation cache."""
    assert outcomes["efficient", "bias_grad", "heads", "backward"]["status"] == "supported"
    assert (
        outcomes["efficient", "bias_grad_and_frozen", "heads", "forward"]["status"] == "supported"
    )
    outcome = outcomes["efficient", "bias_grad_and_frozen", "heads", "backward"]
    assert outcome["status"] == "error"
    assert outcome["kernel_op"] == EFFICIENT_BACKWARD
    assert outcome["message"] == "output tensor should be scalar!"


@on_2_13
@both_directions
@pytest.mark.parametrize("placement", ["batch", "heads"])
@pytest.mark.parametrize("operator", WITH_STRATEGY)
def test_shards_share_one_dropout_mask(
    outcomes: Outcomes, operator: str, placement: str, direction: str
) -> None:
    outcome = outcomes[operator, "dropout", placement, direction]
    assert outcome["status"] == "wrong"
    assert {fact["code"] for fact in outcome["facts"]} == {"dropout_shared"}
