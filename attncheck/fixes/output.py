"""Where a fix goes: a file that is ours to write, a diff, or stdout; and what is said about it."""

from __future__ import annotations

import difflib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from attncheck.errors import UserError
from attncheck.files import write_text
from attncheck.fixes import emit

if TYPE_CHECKING:
    from attncheck.fixes.fixing import Fixed

EXIT_FIXED, EXIT_UNMENDED, EXIT_INCONCLUSIVE = 0, 1, 3


@dataclass(frozen=True)
class Target:
    """`file`: None for stdout; `write`: else its diff is shown; `backup`: keep what it holds beside it."""

    file: Path | None
    write: bool = False
    backup: bool = False

    @property
    def module_name(self) -> str:
        return self.file.stem if self.file is not None else "attncheck_fixes"

    def put(self, text: str) -> str:
        """Write the module where it belongs; returns what stdout gets. Raises UserError."""
        if not text or self.file is None:
            return text
        if not self.write:
            return _diff(_read(self.file), text, self.file)
        if self.backup:
            try:
                shutil.copy2(self.file, _backup(self.file))
            except OSError as error:
                raise UserError(f"Cannot keep {self.file}: {error.strerror}.") from None
        # Whole or not at all: a module that was cut short would be imported by somebody.
        write_text(self.file, text)
        return ""


def target(write: Path | None, diff: Path | None, force: bool) -> Target:
    """Checked before anything is run. Raises UserError where the file cannot or must not be written."""
    if write is not None and diff is not None:
        raise UserError("--write and --diff are both given: expected one of them.")
    file = write or diff
    if file is None:
        return Target(None)
    if file.suffix != ".py" or not file.stem.isidentifier():
        raise UserError(f"{file} cannot be imported: expected a name like attncheck_fixes.py.")
    if file.is_dir():
        raise UserError(f"Cannot write {file}: it is a folder.")
    if not file.parent.is_dir():
        raise UserError(f"Cannot write {file}: the folder {file.parent} does not exist.")
    if diff is not None:
        _read(file)
        return Target(file)
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f"Cannot write {file}: permission denied.")
    foreign = file.exists() and not _is_ours(file)
    if foreign and not force:
        raise UserError(
            f"{file} exists, and is not as attncheck wrote it: name another file, or give --force, which "
            f"keeps it as {_backup(file).name}."
        )
    return Target(file, write=True, backup=foreign)


def _is_ours(file: Path) -> bool:
    return emit.is_ours(_read(file))


def _read(file: Path) -> str:
    """What the file holds, '' where there is none."""
    try:
        return file.read_text(encoding="utf-8") if file.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {file}: {error}.") from None


def _backup(file: Path) -> Path:
    """A name beside it that is free."""
    names = (file.with_name(f"{file.name}.bak{n or ''}") for n in range(10_000))
    return next(name for name in names if not name.exists())


def _diff(before: str, after: str, file: Path) -> str:
    old = f"a/{file.as_posix().lstrip('/')}" if before else "/dev/null"
    lines = difflib.unified_diff(
        before.splitlines(keepends=True),
        after.splitlines(keepends=True),
        old,
        f"b/{file.as_posix().lstrip('/')}",
    )
    return "".join(lines)


def exit_code(fixed: Fixed) -> int:
    """0: whatever needs a strategy has a verified one; 1: something has none; 3: nothing ran."""
    if not any(r.outcome.status.ran for r in fixed.report.cases):
        return EXIT_INCONCLUSIVE
    missed = {e.op for e in fixed.evidence if not e.verified} - fixed.needless
    unmended = fixed.unmended or missed
    return EXIT_UNMENDED if unmended else EXIT_FIXED
