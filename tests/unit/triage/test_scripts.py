"""What is written of a case: it compiles, imports what it uses and no attncheck, and is always the same."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from attncheck import plugins
from attncheck.plan import Selection, plan
from attncheck.probing import HEADS, OTHER, Setting, Tensor
from attncheck.triage import scripts
from attncheck.triage.claims import Claim, Kind
from attncheck.triage.scripts import Header
from attncheck.triage.subject import Call, NotWritten, Subject

SHELF = plugins.load_probes()
PERSONAL = Call(
    ("from flash_attn import flash_attn_func",),
    (),
    "flash_attn_func",
    ("q", "k", "v", "causal=True"),
    {"out": "[0]", "lse": "[1]"},
    "sdpa_kernel(SDPBackend.MATH)",
)
TAKEN_ALONG = Call(
    ("import math",),
    ("def attend(setting, t):\n    return t['q'] * math.pi", "setting = None"),
    "attend",
    ("setting, t",),
    {"out": '["out"]'},
    by_name=False,
)


def subject(kind: Kind, call: Call, placement: str = "heads", backward: bool = False) -> Subject:
    operator = next(o for p in SHELF.probes for o in p.operators if o.name == "flash_attn_func")
    setting = next(s for s in operator.settings if s.name == "plain")
    direction = "backward" if backward else "forward"
    mesh = {"dp": 2, "tp": 2} if "," in placement else {"tp": 2}
    selection = Selection((operator.name,), ("plain",), (placement,), (direction,), level="full")
    case = plan(SHELF.probes, mesh, selection)[0]
    claim = Claim(kind, "aten.bmm.default", "RuntimeError", backward=backward)
    specs = operator.tensors(setting)
    compiled = ("flash_attn_2_cuda",) if kind is Kind.NO_OP else ()
    return Subject(case, setting, specs, claim, call, "A title", compiled=compiled)


def subjects() -> Iterator[Subject]:
    for kind in Kind:
        single = replace(PERSONAL, picks={"out": ""})
        for call in (PERSONAL, TAKEN_ALONG, single):
            for backward in (False, True):
                one = subject(kind, call, backward=backward)
                yield one
                yield replace(one, own_device=True, stubs=("flash_attn_2_cuda",), leaves=True)
                if backward:
                    yield replace(one, claim=replace(one.claim, gradients=True))
    yield subject(Kind.REFUSED, PERSONAL, "partial")
    yield subject(Kind.WRONG, TAKEN_ALONG, "partial")
    yield subject(Kind.REFUSED, PERSONAL, "batch,partial")
    yield subject(Kind.WRONG, PERSONAL, "batch,heads")


def written() -> list[str]:
    out = []
    for one in subjects():
        try:
            text = scripts.script(one)
        except NotWritten:
            continue
        assert text == scripts.script(one)
        out.append(text)
    return out


def test_every_kind_of_script_is_sound(tmp_path: Path) -> None:
    texts = written()
    assert len(texts) > 100
    for at, text in enumerate(texts):
        tree = ast.parse(text)
        assert "attncheck" not in text
        assert (ast.get_docstring(tree) or "").startswith("A title")
        assert text.endswith(("sys.exit(int(bug))\n", "os._exit(int(bug))\n"))
        assert 'print("BUG" if bug else "ok", flush=True)' in text
        (tmp_path / f"script_{at}.py").write_text(text)
    # Names that are not there, imports that are not used.
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,E9", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout[-3000:]


def test_a_call_reads_as_a_person_writes_it() -> None:
    call = Call(
        (), (), "F.scaled_dot_product_attention", ("q", "k", "v", "is_causal=True"), {"out": ""}
    )
    text = scripts.script(subject(Kind.REFUSED, call))
    assert "\n    F.scaled_dot_product_attention(q, k, v, is_causal=True)\n" in text
    assert "import torch.nn.functional as F\n" in text
    assert (
        "# batch, sequence, heads, head_dim\n"
        "q = distribute_tensor(torch.randn(6, 18, 4, 16), mesh, [Shard(2)])\n"
    ) in text


def test_a_title_is_text() -> None:
    one = replace(
        subject(Kind.REFUSED, PERSONAL), title='"""\nimport os\nos.abort()\n"""\\ and `more`'
    )
    tree = ast.parse(scripts.script(one))
    assert isinstance(tree.body[0], ast.Expr)
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "abort"]


def test_partial_sums_add_up_to_the_whole() -> None:
    text = scripts.script(subject(Kind.REFUSED, PERSONAL, "partial"))
    assert "q = DTensor.from_local(torch.randn(6, 18, 4, 16) / 2, mesh, [Partial()])" in text
    text = scripts.script(subject(Kind.REFUSED, PERSONAL, "batch,partial"))
    assert "mesh, [Shard(0), Replicate()]).to_local(), mesh, [Shard(0), Partial()])" in text


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        (Tensor("x", (OTHER, OTHER), (3, 4), fill="weight"), "torch.randn(3, 4) / 4 ** 0.5"),
        (
            Tensor("x", (OTHER, OTHER), (3, 4), fill="bool_mask", dtype="bool"),
            "(torch.rand(3, 4) < 0.7) | (torch.arange(4) == 0)",
        ),
        (Tensor("x", (HEADS,), (4,), fill="slopes"), "torch.rand(4) + 0.05"),
        (Tensor("x", (HEADS,), (4,), fill="zeros"), "torch.zeros(4)"),
        (
            Tensor("x", (OTHER, OTHER), (2, 2), fill="values", values=(1, 0, 0, 1), dtype="bool"),
            "torch.tensor([[True, False], [False, True]], dtype=torch.bool)",
        ),
        (
            Tensor("x", ("-", HEADS, "kv_sequence", "head_dim"), (2, 3, 5, 4), fill="eye"),
            "torch.eye(5, 4).expand(2, 3, 5, 4).contiguous()",
        ),
    ],
)
def test_what_tensors_are_filled_with(spec: Tensor, code: str) -> None:
    one = subject(Kind.REFUSED, PERSONAL)
    case = replace(one.case, placements={"x": ("plain",)})
    text = scripts.script(replace(one, case=case, specs=(spec,)))
    assert f"x = {code}" in text


def test_code_that_would_hide_the_scripts_own_names_is_refused() -> None:
    call = replace(TAKEN_ALONG, definitions=("def whole(x):\n    return x",))
    with pytest.raises(NotWritten, match="defines whole"):
        scripts.script(subject(Kind.WRONG, call))


def test_other_memory_is_refused() -> None:
    one = subject(Kind.REFUSED, PERSONAL)
    with pytest.raises(NotWritten, match="sliced in memory"):
        scripts.script(replace(one, setting=Setting("x", {"batch": 1}, memory="sliced")))


def test_an_op_by_itself() -> None:
    op = {
        "op": "flash_attn._flash_attn_backward.default",
        "arguments": [
            {"name": "self", "size": [2, 3], "dtype": "torch.float32", "keyword": ""},
            {"code": "0.25"},
            {"name": "rng", "size": [2], "dtype": "torch.uint64", "keyword": "rng="},
        ],
    }
    text = scripts.of_an_op(Header("A title", 2, ("import flash_attn",)), op, (True, False))
    ast.parse(text)
    assert "\nx = torch.zeros(2, 3)\n" in text
    assert (
        "rng = DTensor.from_local(torch.zeros(2, dtype=torch.uint64), mesh, [Replicate()])" in text
    )
    assert "    torch.ops.flash_attn._flash_attn_backward(x, 0.25, rng=rng)\n" in text
    assert 'bug = "flash_attn._flash_attn_backward.default" in said' in text
