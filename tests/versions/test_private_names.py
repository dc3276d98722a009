"""Private names of torch are touched in one place, runner/compat, and where a file must stand alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from private_names import defined, touched
from torch_history import GUARDS, LASTING

ROOT = Path(__file__).resolve().parents[2]
COMPAT = "attncheck/runner/compat/"
# A module that `attncheck fix` writes has these in it and needs torch alone; stand-ins lie below the runner.
ELSEWHERE: dict[str, set[str]] = {
    "attncheck/fixes/strategies.py": {
        "_C",
        "_clear_DTensor_sharding_propagator_cache",
        "_collective_utils",
        "_custom_op_handlers",
        "_destroy",
        "_dtensor_spec",
        "_op_dispatcher",
        "_op_schema",
        "_schema",
    },
    "attncheck/fixes/local_calls.py": {"_functional_collectives", "_local_tensor", "_spec"},
    "attncheck/standins/aten_flash.py": {"_schema"},
    "attncheck/standins/flash_attn_3.py": {"_schema"},
    "attncheck/standins/flash_attn_package.py": {"_init_fn"},
    "attncheck/standins/flex_attention.py": {"_validate_device"},
    "attncheck/standins/schemas.py": {"_schema"},
    # The two that are no torch's are xformers' own.
    "attncheck/standins/xformers_ops.py": {"_dispatch_bw", "_dispatch_fw", "_init_fn"},
}
NOT_TORCH = {"_dispatch_bw", "_dispatch_fw"}


def sources() -> dict[str, ast.Module]:
    """attncheck's own files and those of both shelves, by path; a published fix is as it was written."""
    files = [
        file
        for folder in ("attncheck", "probes", "reports")
        for file in (ROOT / folder).rglob("*.py")
        if "published" not in file.parts
    ]
    return {
        file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
        for file in files
    }


@pytest.fixture(scope="module")
def found() -> dict[str, set[str]]:
    """The private names of torch that each file touches."""
    trees = sources()
    own = frozenset(name for tree in trees.values() for name in defined(tree))
    return {
        path: names
        for path, tree in trees.items()
        if (names := {one.name for one in touched(tree, own)})
    }


def test_no_private_name_of_torch_outside_compat(found: dict[str, set[str]]) -> None:
    outside = {path: names for path, names in found.items() if not path.startswith(COMPAT)}
    assert outside == ELSEWHERE


def test_each_private_name_is_accounted_for_in_the_history(found: dict[str, set[str]]) -> None:
    known = {name for entry in (*GUARDS, *LASTING) for name in entry.names} | NOT_TORCH
    used = {name for names in found.values() for name in names}
    assert used - known == set()


@pytest.mark.parametrize(
    ("planted", "name"),
    [
        ("from torch._ops import OpOverload", "_ops"),
        ("import torch.distributed._tensor", "_tensor"),
        ("from torch.distributed.tensor import _op_schema as schemas", "_op_schema"),
        ("import torch\ntorch._C._jit_get_all_schemas()", "_jit_get_all_schemas"),
        ("import torch as t\nt._dynamo.reset()", "_dynamo"),
        ("from torch.distributed.tensor import DTensor\nDTensor._op_dispatcher", "_op_dispatcher"),
        ("def f(tensor):\n    return tensor._local_tensor", "_local_tensor"),
        ("def f(op):\n    return getattr(op, '_init_fn', None)", "_init_fn"),
        ("import torch\nsetattr(torch.nn.attention, '_x', 1)", "_x"),
        ("import importlib\nimportlib.import_module('torch._inductor')", "_inductor"),
        (
            "from torch.distributed.device_mesh import DeviceMesh\nDeviceMesh('cpu', _rank=0)",
            "_rank",
        ),
    ],
)
def test_a_private_name_is_found(planted: str, name: str) -> None:
    assert name in {one.name for one in touched(ast.parse(planted))}


@pytest.mark.parametrize(
    "healthy",
    [
        "import torch\ntorch.ops.aten._softmax.default",
        "import torch\ntorch.__version__",
        "import os\nos._exit(0)",
        "class A:\n    def f(self):\n        return self._own",
        "from torch.distributed.tensor import DTensor\nDTensor.from_local(x)",
        "import torch\ngetattr(torch.ops.aten, '_softmax')",
    ],
)
def test_what_is_no_private_name_of_torch_is_not(healthy: str) -> None:
    assert touched(ast.parse(healthy)) == []


def test_an_attribute_that_attncheck_defines_is_its_own() -> None:
    text = "class A:\n    def f(self):\n        self._first = 1\ndef f(a):\n    return a._first"
    tree = ast.parse(text)
    assert [one.name for one in touched(tree)] == ["_first"]
    assert touched(tree, frozenset(defined(tree))) == []
