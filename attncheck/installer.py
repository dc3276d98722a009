"""Fill a folder with what pip (or uv) puts there: all of it or nothing, safe against interruption.

Torch-free (though a package's setup.py may import torch, which is why it runs under this interpreter).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from attncheck.errors import UserError

MARKER = "attncheck-provision.json"
INSTALL_TIMEOUT_SECONDS = 600
STALE_SECONDS = 24 * 3600


# --- folders --------------------------------------------------------------------------------------


def complete(folder: Path, marker: Mapping[str, object]) -> bool:
    """Whether `folder` was filled to the end, for just this `marker`."""
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(found == marker)


@contextlib.contextmanager
def filled_atomically(folder: Path, marker: Mapping[str, object], what: str) -> Iterator[Path]:
    """A fresh folder to fill; it becomes `folder` if the block succeeds, and is removed if not.

    Whoever comes second, of two processes that fill the same folder, throws its own away.
    """
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder.parent)
        temporary = Path(tempfile.mkdtemp(prefix="tmp-", dir=folder.parent))
        target = temporary / "new"
        target.mkdir()
        yield target
        (target / MARKER).write_text(json.dumps(marker), encoding="utf-8")
        if folder.exists() and not complete(folder, marker):
            os.replace(folder, temporary / "damaged")
        try:
            os.replace(target, folder)
        except OSError:
            if not complete(folder, marker):
                raise
    except OSError as error:
        raise UserError(
            f"Cannot store {what} in {folder.parent}: {error.strerror or error}; set "
            "ATTNCHECK_CACHE to a folder that can be written to."
        ) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _remove_stale(root: Path) -> None:
    """What killed processes left behind a day ago or longer."""
    for leftover in root.glob("tmp-*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


# --- the installer --------------------------------------------------------------------------------


def use_uv() -> bool:
    """Environments made by uv have no pip."""
    return importlib.util.find_spec("pip") is None and shutil.which("uv") is not None


def _installer() -> list[str]:
    if use_uv():
        return ["uv", "pip", "install", "--python", sys.executable]
    quiet = ["--disable-pip-version-check", "--no-input", "--retries", "2", "--timeout", "20"]
    return [sys.executable, "-m", "pip", "install", *quiet]


def install(
    arguments: Sequence[str],
    target: Path,
    what: str,
    shown_environment: Mapping[str, str] | None = None,
    hidden_environment: Mapping[str, str] | None = None,
) -> None:
    """Run the installer with --target; UserError with one sentence of what went wrong.

    `shown_environment` is part of the command that the sentence gives, `hidden_environment` is not.
    """
    if not use_uv() and importlib.util.find_spec("pip") is None:
        raise UserError(
            f"Cannot install {what}: {sys.executable} has no pip and there is no uv on PATH; run "
            f"`{shlex.quote(sys.executable)} -m ensurepip` or install uv."
        )
    command = [*_installer(), *arguments, "--target"]
    shown = " ".join(f"{k}={v}" for k, v in (shown_environment or {}).items())
    shown = f"{shown} {shlex.join([*command, 'DIR'])}".strip()
    environment = {
        **os.environ,
        "PIP_USER": "0",  # a pip.conf with `user = true` clashes with --target
        **(shown_environment or {}),
        **(hidden_environment or {}),
    }
    try:
        run = subprocess.run(
            [*command, str(target)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=INSTALL_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"Cannot install {what}: no end after {INSTALL_TIMEOUT_SECONDS} s of `{shown}`."
        ) from None
    if run.returncode != 0:
        reason = _relevant_line(run.stdout)
        raise UserError(f"Cannot install {what}: {reason} Reproduce with `{shown}`.")


# Best first. An unreachable index and a full disk are followed by lines that blame something else.
_CAUSES = (
    r"(?i)no space left on device",
    r"(?i)failed to establish a new connection|name resolution|connection refused|dns error"
    r"|connection timed out|failed to fetch|network is unreachable",
    r"^\s*\w*(Error|Exception): ",  # the end of a traceback in setup.py
    r"^\s*(ERROR|error):",
)


def _relevant_line(output: str) -> str:
    """The last line of the installer's output that says why, as a sentence."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for cause in _CAUSES:
        hits = [line for line in lines if re.search(cause, line)]
        if hits:
            return _sentence(hits[-1])
    return _sentence(lines[-1] if lines else "the installer failed and said nothing")


def _sentence(line: str) -> str:
    text = line if len(line) <= 300 else line[:297] + "..."
    return text if text.endswith(".") else text + "."
