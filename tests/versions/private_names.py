"""Finds the private names of torch that a Python source touches, without running it.

Seen are: imports (`from torch._ops import x`, `from torch import _C`), attributes of what was imported from
torch (`torch._C.x`, `DTensor._op_dispatcher`), private attributes of any other object that are none of
attncheck's own (`tensor._local_tensor`), the same by `getattr`, and modules imported by a string. Names of
ops are public (`torch.ops.aten._softmax`).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass

_BY_STRING = ("getattr", "hasattr", "setattr", "delattr")
_SELF = ("self", "cls")


@dataclass(frozen=True)
class Touched:
    """A private name, and the line that touches it."""

    name: str
    line: int


def touched(tree: ast.Module, own: frozenset[str] = frozenset()) -> list[Touched]:
    """The private names of torch in a source. `own`: private attributes that are attncheck's."""
    return sorted(set(_touched(tree, _imported(tree), own)), key=lambda one: (one.line, one.name))


def defined(tree: ast.Module) -> Iterator[str]:
    """The names that objects of a source's own classes have: methods, fields, what is set on `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from (n.name for n in node.body if isinstance(n, ast.FunctionDef))
            yield from (ast.unparse(n.target) for n in node.body if isinstance(n, ast.AnnAssign))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if ast.unparse(node.value) in _SELF else []


def _imported(tree: ast.AST) -> dict[str, str]:
    """Local name -> the dotted path that it was imported from."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.partition(".")[0]
                found[local] = alias.name if alias.asname else local
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def _touched(tree: ast.AST, imported: dict[str, str], own: frozenset[str]) -> Iterator[Touched]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _in_path(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield from _in_path(f"{node.module}.{alias.name}", node.lineno)
        elif isinstance(node, ast.Attribute):
            if _is_private(node.attr) and not _is_foreign(node.value, node.attr, imported, own):
                yield Touched(node.attr, node.lineno)
        elif isinstance(node, ast.Call):
            yield from _in_call(node, imported, own)


def _in_path(path: str, line: int) -> Iterator[Touched]:
    names = path.split(".")
    if names[0] == "torch":
        yield from (Touched(name, line) for name in names if _is_private(name))


def _in_call(node: ast.Call, imported: dict[str, str], own: frozenset[str]) -> Iterator[Touched]:
    # `DeviceMesh(..., _rank=0)`
    named = [(node.func, keyword.arg) for keyword in node.keywords if keyword.arg]
    called = getattr(node.func, "attr", getattr(node.func, "id", ""))
    strings = [str(a.value) for a in node.args if isinstance(a, ast.Constant)]
    if called in _BY_STRING:
        named += [(node.args[0], text) for text in strings]
    elif called == "import_module":
        for text in strings:
            yield from _in_path(text, node.lineno)
    for owner, name in named:
        if _is_private(name) and not _is_foreign(owner, name, imported, own):
            yield Touched(name, node.lineno)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _is_foreign(owner: ast.AST, name: str, imported: dict[str, str], own: frozenset[str]) -> bool:
    """Whether a private name of `owner` is not torch's: an op's, another module's, or attncheck's own."""
    text = ast.unparse(owner)
    root = text.split(".")[0].split("(")[0]
    path = imported.get(root, root) + text[len(root) :]
    parts = path.split(".")
    if parts[0] == "torch":
        return parts[1:2] == ["ops"] and len(parts) <= 3  # a namespace, or an op in it
    return root in _SELF or name in own or parts[0] in (*sys.stdlib_module_names, "attncheck")
