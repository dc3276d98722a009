"""Which line of the user's code: neither torch's nor ours nor an installed package's. Torch-free.

Of a model that a package ships there is none: then which line of that package.
"""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path

_OURS = str(Path(__file__).resolve().parents[1])
_INSTALLED = [
    os.path.join(folder, "")
    for folder in (_OURS, *{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
]
_PACKAGES = ("site-packages", "dist-packages")


def add_installed(folder: str) -> None:
    """What lies in this folder is nobody's own code: a package that attncheck provisioned."""
    _INSTALLED.append(os.path.join(folder, ""))


def is_users(file: str) -> bool:
    return not file.startswith(("<", *_INSTALLED)) and not _in_packages(file).parts


def user_line() -> str:
    """`file.py:12` of the innermost line that runs; '' where none is the user's."""
    frame = sys._getframe(1)
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def line_of(error: BaseException) -> str:
    """The same, of where an exception came through."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if is_users(f.filename)]
    return lines[-1] if lines else ""


def line_here() -> str:
    """The user's line that runs, or where there is none, `transformers/models/llama/modeling_llama.py:12`:
    the innermost of the outermost package. '' where there is neither."""
    if users := user_line():
        return users
    frames: list[tuple[str, int]] = []
    frame = sys._getframe(1)
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    return _packages_line(frames[::-1])


def line_through(error: BaseException) -> str:
    """The same, of where an exception came through."""
    frames = traceback.extract_tb(error.__traceback__)
    return line_of(error) or _packages_line([(f.filename, f.lineno or 0) for f in frames])


def _packages_line(frames: Sequence[tuple[str, int]]) -> str:
    """`frames`: the innermost last."""
    owned = [(owner, file, line) for file, line in frames if (owner := _package(file))]
    lines = [(file, line) for owner, file, line in owned if owner == owned[0][0]]
    if not lines:
        return ""
    file, line = lines[-1]
    return f"{_in_packages(file).as_posix()}:{line}"


def _package(file: str) -> str:
    """The installed package that a file is of; '' for torch and attncheck, and for all that is none."""
    within = _in_packages(file)
    return (
        ""
        if file.startswith(_INSTALLED[0]) or within.parts[:1] in ((), ("torch",))
        else within.parts[0]
    )


@functools.cache
def _in_packages(file: str) -> Path:
    """Its path in a folder of installed packages, a user's own too; empty where it is in none."""
    parts = Path(file).parts
    at = max((at for at, part in enumerate(parts) if part in _PACKAGES), default=len(parts))
    return Path(*parts[at + 1 :])
