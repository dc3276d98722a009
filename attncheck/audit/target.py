"""What the user names: `package.module:function`, or `file.py:function`. Torch-free."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from attncheck.errors import UserError, unknown


def parse(text: str, option: str) -> tuple[str, str]:
    """(module or file, function). Raises UserError."""
    module, _, function = text.rpartition(":")
    is_name = all(part.isidentifier() for part in module.split("."))
    if not function.isidentifier() or not (is_name or module.endswith(".py")):
        raise UserError(
            f"{option} {text!r} names no function: expected package.module:function or file.py:function."
        )
    if module.endswith(".py") and not Path(module).is_file():
        raise UserError(f"{option} {text!r}: the file {module} does not exist.")
    return module, function


def load(text: str, option: str) -> Callable[..., Any]:
    """The function. Runs the user's module: raises what its import raises, and UserError for a name that is
    not there."""
    module_name, function = parse(text, option)
    if module_name.endswith(".py"):
        module = _from_file(Path(module_name).resolve())
    else:
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and (module_name + ".").startswith(error.name + "."):
                raise UserError(
                    f"{option} {text!r}: there is no module {error.name!r} here or among the installed "
                    "packages."
                ) from None
            raise
    found = getattr(module, function, None)
    if found is None:
        own = {name: value for name, value in vars(module).items() if callable(value)}
        made = [
            name
            for name, value in own.items()
            if getattr(value, "__module__", "") == module.__name__
        ]
        raise unknown(f"function in {module_name}", function, made or own)
    if not callable(found):
        raise UserError(f"{option} {text!r} is a {type(found).__name__}, expected a function.")
    return found  # type: ignore[no-any-return]


def _from_file(path: Path) -> ModuleType:
    """The file as a module of its own name, run once; of another name where that one is taken (`json.py`)."""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    name = path.stem
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) != str(path):
        name = f"attncheck_target_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # as import does
        raise
    return module
