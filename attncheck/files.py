"""Files that are written whole or not at all. Imports nothing of ours but the error type."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from attncheck.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8: what was there stays until all of the new text is on disk.

    A temporary file in the same folder takes the old one's place. The mode of an existing file is kept; a
    symbolic link stays one, and what it points to is replaced; a device or a pipe (`/dev/stdout`) is simply
    written to. Raises UserError where that cannot be, and the old file is then untouched.
    """
    data = text.encode("utf-8")
    try:
        target = path.resolve()
        if target.exists() and not target.is_file():
            target.write_bytes(data)  # nothing to replace; a folder raises
        else:
            _replace(target, data)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        why = getattr(error, "strerror", None) or "its links go round in a circle"
        raise UserError(f"Cannot write {path}: {why}.") from None


def _replace(target: Path, data: bytes) -> None:
    if target.exists():
        # To replace a file asks nothing of the file itself: one that is read-only would not hold.
        with target.open("ab"):
            mode = stat.S_IMODE(target.stat().st_mode)
    else:
        mode = None
    temporary = target.with_name(f".attncheck-{secrets.token_hex(6)}")
    # 0o666 less the user's umask: the mode that any new file gets.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(handle, "wb") as file:
            if mode is not None:
                os.fchmod(handle, mode)
            file.write(data)
            file.flush()
            os.fsync(handle)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
