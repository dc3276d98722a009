"""The module that is written: torch alone, the engine verbatim, ours until somebody edits it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from attncheck.fixes import emit, packages
from attncheck.fixes.notation import Signature

CPU = "aten._scaled_dot_product_flash_attention_for_cpu.default"


@pytest.fixture(scope="module")
def text() -> str:
    return emit.module([s for s in packages.known() if "for_cpu" in s.op], name="mine")


def test_a_signature_reads_back_as_it_was() -> None:
    for signature in (*packages.known(), *packages.functions()):
        assert eval(emit.show(signature), {"Signature": Signature}) == signature


def test_the_whole_of_what_is_known_is_valid_and_fits_the_line(text: str) -> None:
    whole = emit.module(packages.known(), packages.functions())
    assert ast.get_docstring(ast.parse(whole))
    assert "attncheck.fixes" not in whole
    code = whole.partition('"""\n\n')[2]
    assert max(map(len, code.splitlines())) <= 112  # comments that were docstrings are two wider


def test_depends_on_torch_alone(tmp_path: Path, text: str) -> None:
    """In a process that cannot find attncheck: registers, is idempotent, proves itself, and undoes."""
    (tmp_path / "mine.py").write_text(text)
    code = f"""
import json, sys
sys.path.insert(0, {str(tmp_path)!r})
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "attncheck":
            raise ImportError(name)
sys.meta_path.insert(0, Hidden())
import torch
from torch.distributed.tensor import DTensor
import mine
tables = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
before = dict(tables)
first, second = mine.register(), mine.register()
op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
registered = type(tables[op]).__name__
mine.unregister()
print(json.dumps([first, second, registered, tables == before]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second, registered, restored = json.loads(done.stdout)
    assert set(first.values()) == {"registered"}
    assert set(second.values()) == {"registered before"}
    assert CPU in first
    assert registered == "Strategy"
    assert restored


def test_ours_until_it_is_edited(text: str) -> None:
    assert emit.is_ours(text)
    assert not emit.is_ours(text.replace("b h sq d", "b sq h d", 1))
    assert not emit.is_ours("import torch\n")
    assert not emit.is_ours("")


def test_foreign_sentences_cannot_end_the_docstring() -> None:
    evil = ['""" + __import__("os").system("x") + """', "back\\slash \\"]
    made = ast.parse(emit.module([], evidence=evil))
    assert isinstance(made.body[0], ast.Expr)
    assert not any(
        isinstance(node, ast.Call) and getattr(node.func, "id", "") == "__import__"
        for node in ast.walk(made)
    )
