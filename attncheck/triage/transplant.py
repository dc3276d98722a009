"""A probe's call as code that stands alone: its source, and that of what it uses from its own file.

For a call that is not one function with the case's tensors (attention written out, a module with its
weights): what a maintainer gets is then the probe's own code, without attncheck. Sources are read, not run.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attncheck.probing import Setting

# The one module of ours whose helpers a call may take along.
HELPERS = "attncheck.probing"

# What a call asks of its setting.
SETTING = '''\
@dataclass(frozen=True)
class Setting:
    """The sizes and options of the call."""

    sizes: dict
    options: dict
    dtype: str = "float32"
    dropout: float = 0.0

    def __getitem__(self, role):
        return self.sizes[role]

    def get(self, option, default=None):
        return self.options.get(option, default)'''


class NotTransplantable(Exception):
    """The call cannot stand alone: why."""


@dataclass(frozen=True)
class Transplant:
    """`imports` and `definitions` in their order, and the `expression` that calls it on a mapping of tensors.

    `tensors`: what the expression calls that mapping.
    """

    imports: tuple[str, ...]
    definitions: tuple[str, ...]
    expression: str
    tensors: str = "t"


def transplant(call: Callable[..., Any], setting: Setting) -> Transplant:
    """Raises NotTransplantable."""
    arguments: list[str] = []
    if isinstance(call, functools.partial):
        if call.keywords:
            raise NotTransplantable("its call is bound to keywords")
        arguments = [_literal(value) for value in call.args]
        call = call.func
    name = getattr(call, "__name__", "")
    try:
        file = Path(inspect.getsourcefile(call) or "")
        source = _Source(file.read_text(encoding="utf-8"))
    except (TypeError, OSError, SyntaxError):
        raise NotTransplantable("its source is not there") from None
    if getattr(call, "__closure__", None) or name not in source.defined:
        raise NotTransplantable("its call is made inside of another function")
    taken = _Taken()
    _take(name, source, taken)
    given = [
        f"sizes={_literal(dict(setting.sizes))}",
        f"options={_literal(dict(setting.options))}",
    ]
    if setting.dtype != "float32":
        given.append(f"dtype={_literal(setting.dtype)}")
    if setting.dropout:
        given.append(f"dropout={setting.dropout!r}")
    body = ",\n    ".join(given)
    return Transplant(
        ("from dataclasses import dataclass", *taken.imports),
        (SETTING, *taken.ordered(), f"setting = Setting(\n    {body},\n)"),
        f"{name}({', '.join([*arguments, 'setting', 't'])})",
    )


def _literal(value: Any) -> str:
    text = repr(value)
    try:
        same = ast.literal_eval(text) == value
    except (ValueError, SyntaxError):
        same = False
    if not same:
        raise NotTransplantable(f"it takes a {type(value).__name__}")
    # As the rest of the file quotes.
    return text if '"' in text or "\\" in text else text.replace("'", '"')


@dataclass
class _Taken:
    """What was taken along so far: import lines, and pieces of source by (file, line)."""

    imports: list[str] = field(default_factory=list)
    pieces: dict[tuple[int, int], str] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)

    def ordered(self) -> list[str]:
        return [self.pieces[key] for key in sorted(self.pieces)]


class _Source:
    """A module's text, and the statement that binds each of its top-level names."""

    def __init__(self, text: str, rank: int = 1) -> None:
        self.rank = rank  # pieces of lower rank come first
        self.data = text.encode()
        self.starts = [0]
        for line in self.data.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.defined: dict[str, ast.stmt] = {}
        for node in ast.parse(text).body:
            for name in _bound(node):
                self.defined[name] = node

    def at(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column

    def span(self, node: ast.AST) -> tuple[int, int]:
        place: Any = node
        first = min([place, *getattr(node, "decorator_list", ())], key=lambda n: n.lineno)
        start = (
            self.starts[first.lineno - 1]
            if first is not place
            else self.at(place.lineno, place.col_offset)
        )
        return start, self.at(place.end_lineno, place.end_col_offset)


def _bound(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))


def _take(name: str, source: _Source, taken: _Taken) -> None:
    if name in taken.names or name not in source.defined:
        return
    taken.names.add(name)
    node = source.defined[name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        _take_import(name, node, taken)
        return
    annotations = [*_annotations(node, source)]
    _refuse_ours(node)
    taken.pieces[source.rank, node.lineno] = _cut(source, node, annotations)
    skipped = {id(inner) for outer in _annotation_nodes(node) for inner in ast.walk(outer)}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and id(inner) not in skipped:
            _take(inner.id, source, taken)


def _take_import(name: str, node: ast.Import | ast.ImportFrom, taken: _Taken) -> None:
    alias = next(a for a in node.names if (a.asname or a.name).partition(".")[0] == name)
    bound = f" as {alias.asname}" if alias.asname else ""
    if isinstance(node, ast.Import):
        if alias.name.partition(".")[0] == "attncheck":
            raise NotTransplantable(f"it uses {alias.name}")
        taken.imports.append(f"import {alias.name}{bound}")
        return
    module = node.module or ""
    if module == "__future__":
        return
    if node.level or (module.partition(".")[0] == "attncheck" and module != HELPERS):
        raise NotTransplantable(f"it uses {'.' * node.level}{module}")
    if module != HELPERS:
        taken.imports.append(f"from {module} import {alias.name}{bound}")
        return
    if alias.name == "Setting":
        return  # its stand-in is there
    if alias.asname:
        raise NotTransplantable(f"it renames {alias.name} of {module}")
    taken.names.discard(name)
    _take(name, _helpers(), taken)


@functools.cache
def _helpers() -> _Source:
    spec = importlib.util.find_spec(HELPERS)
    assert spec is not None
    assert spec.origin is not None
    return _Source(Path(spec.origin).read_text(encoding="utf-8"), rank=0)


def _refuse_ours(node: ast.stmt) -> None:
    for inner in ast.walk(node):
        names: list[str] = []
        if isinstance(inner, ast.ImportFrom):
            names = ["." * inner.level + (inner.module or "")]
        elif isinstance(inner, ast.Import):
            names = [alias.name for alias in inner.names]
        for name in names:
            if name.startswith(".") or name.partition(".")[0] == "attncheck":
                raise NotTransplantable(f"it uses {name}")


# --- annotations: they name what is left behind ------------------------------------------------------


def _annotation_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.arg) and inner.annotation is not None:
            yield inner.annotation
        elif isinstance(inner, ast.FunctionDef) and inner.returns is not None:
            yield inner.returns
        elif isinstance(inner, ast.AnnAssign):
            yield inner.annotation


def _annotations(node: ast.AST, source: _Source) -> Iterator[tuple[int, int]]:
    """The spans of text to leave out."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.arg) and inner.annotation is not None:
            name_end = source.at(inner.lineno, inner.col_offset) + len(inner.arg.encode())
            yield name_end, source.span(inner.annotation)[1]
        elif isinstance(inner, ast.FunctionDef) and inner.returns is not None:
            start, end = source.span(inner.returns)
            arrow = source.data.rindex(b"->", 0, start)
            yield len(source.data[:arrow].rstrip()), end
        elif isinstance(inner, ast.AnnAssign) and inner.value is not None:
            yield source.span(inner.target)[1], source.span(inner.annotation)[1]


def _cut(source: _Source, node: ast.AST, spans: list[tuple[int, int]]) -> str:
    start, end = source.span(node)
    out = []
    for cut_start, cut_end in sorted(spans):
        out.append(source.data[start:cut_start])
        start = cut_end
    text = b"".join([*out, source.data[start:end]]).decode()
    return re.sub(r"[ ]*# (type: ignore|noqa)[^\n]*", "", text)
