"""What the user names: `package.module:function`, or `file.py:function`. Torch-free."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
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
        path = Path(module_name).resolve()
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        if path.stem in sys.modules:
            module = sys.modules[path.stem]
        else:
            module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
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
        functions = [n for n, value in vars(module).items() if callable(value)]
        raise unknown(f"function in {module_name}", function, functions)
    if not callable(found):
        raise UserError(f"{option} {text!r} is a {type(found).__name__}, expected a function.")
    return found  # type: ignore[no-any-return]
