"""Writing a fix: one module that needs torch alone, made of signatures and of the engine of this package.

The engine is not written a second time: the sources of notation.py, strategies.py and local_calls.py go into
the module as they are. So what was verified is what is shipped.
"""

from __future__ import annotations

import ast
import datetime
import hashlib
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from attncheck import __version__
from attncheck.errors import UserError
from attncheck.fixes import packages
from attncheck.fixes.notation import Signature

HERE = Path(__file__).resolve().parent
WIDTH = 100
MARK = "attncheck-fix:"

_USE = """\
    import {name}
    {name}.register()      # before or after the ops' first use; twice is harmless
    {name}.unregister()    # puts back what was there

The signatures below say what the dims of each op's tensors are, and the strategies follow: see `layouts`.
A strategy that torch has of its own is left alone, unless a signature says in which versions it is wrong.
"""

_USE_FUNCTIONS = """\
The functions under FUNCTIONS are no dispatcher ops, or mix plain tensors with DTensors. `register` puts a
wrapper in the place of each that calls it on local shards: import them by name after it, or call them by
their module.
"""

_REGISTER = '''
def register(required: bool = True) -> dict[str, str]:
    """Give DTensor these strategies{patched}. Returns what became of each op.

    Imports what registers an op that is not there yet. `required`: raise NotRegistered where an op is
    absent all the same, instead of passing it over.
    """
    became = install(SIGNATURES, required){patch}
    return became


def unregister() -> None:
    """Put back what was there before `register`."""
    remove(){unpatch}
'''


def module(
    signatures: Sequence[Signature],
    functions: Sequence[Signature] = (),
    evidence: Sequence[str] = (),
    name: str = "attncheck_fixes",
) -> str:
    """The text of a module that registers these. `evidence`: the lines that say what it was verified on."""
    today = datetime.date.today().isoformat()
    head = f"Sharding strategies for DTensor, written by attncheck {__version__} on {today}.\n\n"
    head += _USE.format(name=name) + (_USE_FUNCTIONS if functions else "")
    if evidence:
        head += "\n" + "\n".join(evidence) + "\n"
    head += f"\n{MARK} {{digest}}\n"
    parts = ["notation.py", "strategies.py", *(["local_calls.py"] if functions else [])]
    sources = [_Source(HERE / part) for part in parts]
    imports = _imports([node for source in sources for node in source.imports])
    tables = [_table("SIGNATURES", signatures)]
    if functions:
        tables.append(_table("FUNCTIONS", functions))
    body = [sources[0].text, *tables, *(source.text for source in sources[1:])]
    patches = {"patched": "", "patch": "", "unpatch": ""}
    if functions:
        patches = {
            "patched": ", and let these functions take DTensors",
            "patch": "\n    became.update(patch(FUNCTIONS, required))",
            "unpatch": "\n    unpatch()",
        }
    # Sentences of other people's exceptions stand in it.
    head = head.replace("\\", "/").replace('"""', "'")
    text = f'"""{head}"""\n\nfrom __future__ import annotations\n\n'
    text += "\n".join(imports) + "\n\n\n" + "\n\n".join(body) + "\n" + _REGISTER.format(**patches)
    return text.replace("{digest}", _digest(text), 1)


def is_ours(text: str) -> bool:
    """Whether attncheck wrote this, and nobody changed it since."""
    before, mark, rest = text.partition(MARK)
    digest, newline, after = rest.partition("\n")
    return bool(mark) and _digest(f"{before}{mark} {{digest}}{newline}{after}") == digest.strip()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def write_known(folder: Path) -> Path:
    """A module of all that attncheck knows, in a folder of its cache. Raises UserError."""
    text = module(packages.known(), packages.functions())
    path = folder / "fixes" / f"known_{_digest(text)[:12]}.py"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}.") from None
    return path


class _Source:
    """A file of the engine, taken apart: its imports but those of attncheck, and the text behind them."""

    def __init__(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        docs = ast.get_docstring(tree) or ""
        nodes = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
        self.imports = nodes
        last = max(n.end_lineno or 0 for n in nodes)
        rest = "\n".join(text.splitlines()[last:]).strip("\n")
        # The last paragraph says that the file is embedded.
        about = docs.rpartition("\n\n")[0] or docs
        self.text = f"{_heading(path.stem)}\n{_comment(about)}\n\n{rest}\n"


def _heading(name: str) -> str:
    return f"# --- {name} ".ljust(WIDTH - 1, "-")


def _comment(text: str) -> str:
    return "\n".join(f"# {line}".rstrip() for line in text.splitlines())


def _imports(nodes: Iterable[ast.Import | ast.ImportFrom]) -> list[str]:
    """Import lines for all of these but those of attncheck, one for each module, torch's behind a gap."""
    plain: set[str] = set()
    named: dict[str, set[str]] = {}
    for node in nodes:
        names = {ast.unparse(alias) for alias in node.names}
        if isinstance(node, ast.Import):
            plain |= names
        elif (node.module or "").partition(".")[0] not in ("attncheck", "__future__"):
            named.setdefault(node.module or "", set()).update(names)
    lines = [(name, f"import {name}") for name in plain]
    lines += [
        (name, f"from {name} import {', '.join(sorted(names, key=str.casefold))}")
        for name, names in named.items()
    ]
    lines.sort(key=lambda line: (line[1].startswith("from"), line[0]))
    ours = [text for name, text in lines if name.partition(".")[0] == "torch"]
    return [*(text for _, text in lines if text not in ours), "", *ours]


def _table(name: str, signatures: Iterable[Signature]) -> str:
    rows = "".join(textwrap.indent(show(s) + ",\n", "    ") for s in signatures)
    return f"{name}: tuple[Signature, ...] = (\n{rows})\n"


def show(signature: Signature) -> str:
    """The signature as source."""
    lines = [f"    {_value(signature.op)},"]
    for each in fields(signature):
        value = getattr(signature, each.name)
        if each.name == "op" or value == _default(each):
            continue
        lines.append(f"    {each.name}={_indented(value)},")
    return "Signature(\n" + "\n".join(lines) + "\n)"


def _default(each: Any) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()


def _indented(value: Any, indent: str = "    ") -> str:
    """The value in one line or, where that is long, an item a line."""
    short = _value(value)
    if len(short) <= WIDTH - 24:
        return short
    deeper = indent + "    "
    if isinstance(value, str):
        width = WIDTH - len(deeper) - 4
        parts = textwrap.wrap(value, width, drop_whitespace=False, break_on_hyphens=False)
        return "(\n" + "".join(f"{deeper}{_value(part)}\n" for part in parts) + f"{indent})"
    if isinstance(value, Mapping):
        rows = "".join(f"{deeper}{_value(k)}: {_indented(v, deeper)},\n" for k, v in value.items())
        return f"{{\n{rows}{indent}}}"
    rows = "".join(f"{deeper}{_indented(item, deeper)},\n" for item in value)
    return f"(\n{rows}{indent})"


def _value(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_value(k)}: {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_value, value))}{',' if len(value) == 1 else ''})"
    return repr(value)
