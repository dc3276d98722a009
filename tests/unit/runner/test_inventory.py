"""What is registered in a process, how it is called, and what DTensor has for it: in real children."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attncheck import inventory
from attncheck.errors import UserError
from attncheck.inventory import Look, RegisteredOp, operator_name, uncalled

PROBES = Path(__file__).parents[1] / "probes"  # registered_ops.py lies there


@pytest.fixture(scope="module")
def foreign() -> dict[str, RegisteredOp]:
    look = Look(imports=("registered_ops",), path=(str(PROBES),), only_new=True, call=True)
    found = inventory.take(look)
    assert found.problems == ()
    return {op.op: op for op in found.ops}


@pytest.fixture(scope="module")
def own() -> dict[str, RegisteredOp]:
    return {op.op: op for op in inventory.take(Look()).ops}


def test_only_what_the_import_registered(foreign: dict[str, RegisteredOp]) -> None:
    assert {op.partition(".")[0] for op in foreign} == {
        "mine", "_flash_attn_9e27194", "npu", "sageattention_sm80", "aiter", "natten",
        "flash_attn",
    }  # fmt: skip


def test_layout_scale_and_flags_are_found_by_calling(foreign: dict[str, RegisteredOp]) -> None:
    mine = foreign["mine.attention.default"].signature
    assert mine == inventory.Signature(
        "bshd", causal="is_causal", grouped=True, differentiable=True
    )
    buffer = foreign["_flash_attn_9e27194.fwd.default"].signature
    assert buffer == inventory.Signature("bhsd", causal="causal", grouped=True)
    word = foreign["npu.npu_fusion_attention.default"].signature
    assert word == inventory.Signature("bshd", word="BSND", grouped=True)


@pytest.mark.parametrize(
    ("op", "words"),
    [
        ("sageattention_sm80.qk_int8_sv_f16.default", "what its tensor query_scale is"),
        ("aiter.fmha_fwd.default", "off from softmax(q k^T) v by 0.5"),
        ("natten.na1d.default", "it has no cpu kernel"),
    ],
)
def test_what_cannot_be_called_says_why(
    foreign: dict[str, RegisteredOp], op: str, words: str
) -> None:
    assert foreign[op].signature is None
    assert words in foreign[op].uncalled


def test_a_backward_belongs_to_its_forward(foreign: dict[str, RegisteredOp]) -> None:
    assert foreign["mine.attention.default"].backward == "mine.attention_backward.default"
    names = [op.op for op in uncalled(foreign.values())]
    assert "mine.attention_backward.default" not in names
    assert "natten.na1d.default" in names


def test_strategy_decomposition_composite_or_none(own: dict[str, RegisteredOp]) -> None:
    strategies = {name: op.strategy for name, op in own.items()}
    assert strategies["aten.scaled_dot_product_attention.default"] == "composite"
    assert strategies["aten._scaled_dot_product_flash_attention.default"] == "registered"
    assert strategies["aten._flash_attention_forward.default"] == "none"
    assert strategies["higher_order.flex_attention"] == "none"
    assert "aten._fused_sdp_choice.default" not in strategies  # it computes nothing


@pytest.mark.skipif(not torch.__version__.startswith("2.13.0"), reason="verdicts of torch 2.13.0")
def test_a_decomposition_depends_on_the_call(own: dict[str, RegisteredOp]) -> None:
    op = own["aten._scaled_dot_product_flash_attention_for_cpu.default"]
    assert op.strategy == "decomposition"
    plain, causal, dropout = op.depends
    assert plain == "plain: found"
    assert causal.startswith("is_causal=True: none")
    assert dropout.startswith("dropout_p=0.5: none")
    assert own[op.backward].strategy == "none"


def test_names_do_not_depend_on_the_build() -> None:
    assert operator_name("_flash_attn_9e27194.fwd.default") == "registered._flash_attn.fwd"
    assert operator_name("aiter.fmha_fwd.default") == "registered.aiter.fmha_fwd"
    assert operator_name("aten.x.quantized") == "registered.aten.x.quantized"


BROKEN = {
    "undefined": ("raise ImportError('x.so: undefined symbol: _ZN3c10')", "ImportError: x.so"),
    "leaves": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "needs": ("import not_there_at_all", "No module named 'not_there_at_all'"),
}


def test_modules_that_do_not_import_are_problems(tmp_path: Path) -> None:
    for module, (text, _) in BROKEN.items():
        (tmp_path / f"{module}.py").write_text(text)
    look = Look(imports=(*BROKEN, "nowhere.at_all"), path=(str(tmp_path),), only_new=True)
    *broken, missing = inventory.take(look).problems
    assert [problem.module for problem in broken] == list(BROKEN)
    for problem in broken:
        assert problem.kind == "broken"
        assert problem.text.startswith(BROKEN[problem.module][1])
    assert (missing.kind, missing.text) == ("missing", "No module named 'nowhere'")


def test_an_import_that_kills_the_process_is_named(tmp_path: Path) -> None:
    (tmp_path / "killer.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(UserError, match=r"importing killer ends the process \(exit code -11\)"):
        inventory.take(Look(imports=("killer",), path=(str(tmp_path),)))


def test_a_call_that_kills_the_process_costs_no_other_op(tmp_path: Path) -> None:
    (tmp_path / "deadly.py").write_text(
        "import os, signal, torch\n"
        "lib = torch.library.Library('deadly', 'DEF')\n"
        "for name in ('attention_fwd', 'healthy_attention'):\n"
        "    lib.define(name + '(Tensor q, Tensor k, Tensor v) -> Tensor')\n"
        "lib.impl('attention_fwd', lambda q, k, v: os.kill(os.getpid(), signal.SIGSEGV), 'CPU')\n"
        "lib.impl('healthy_attention', lambda q, k, v: (q @ k.mT / 4).softmax(-1) @ v, 'CPU')\n"
    )
    look = Look(imports=("deadly",), path=(str(tmp_path),), only_new=True, call=True)
    killer, healthy = inventory.take(look).ops
    assert killer.signature is None
    assert killer.uncalled == ("called on small whole tensors, it ends the process (exit code -11)")
    assert healthy.signature == inventory.Signature("bhsd")
