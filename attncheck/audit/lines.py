"""Which line of the user's code: neither torch's nor ours nor an installed package's. Torch-free."""

from __future__ import annotations

import os
import sys
import sysconfig
import traceback
from pathlib import Path

_OURS = str(Path(__file__).resolve().parents[1])
_INSTALLED = [
    os.path.join(folder, "")
    for folder in (_OURS, *{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
]


def add_installed(folder: str) -> None:
    """What lies in this folder is nobody's own code: a package that attncheck provisioned."""
    _INSTALLED.append(os.path.join(folder, ""))


def is_users(file: str) -> bool:
    return not file.startswith(("<", *_INSTALLED))


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
