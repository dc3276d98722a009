"""Fill a folder with what pip (or uv) puts there: all of it or nothing, safe against interruption.

Torch-free (though a package's setup.py may import torch, which is why it runs under an interpreter that has
it).
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
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
from dataclasses import dataclass
from pathlib import Path

from attncheck.children import END_WITH_PARENT
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


@dataclass(frozen=True)
class Installer:
    """What installs packages, and where from: pip of the interpreter `python`, or uv for it. `options` go
    to either of them as they are (`--index-url URL`)."""

    python: str
    uv: bool
    options: tuple[str, ...] = ()

    def command(self) -> list[str]:
        if self.uv:
            return ["uv", "pip", "install", "--python", self.python, *self.options]
        quiet = ["--disable-pip-version-check", "--no-input", "--retries", "2", "--timeout", "20"]
        return [self.python, "-m", "pip", "install", *quiet, *self.options]


def here() -> Installer:
    """That of this interpreter."""
    return Installer(sys.executable, use_uv())


def use_uv() -> bool:
    """Environments made by uv have no pip."""
    return importlib.util.find_spec("pip") is None and shutil.which("uv") is not None


def install(
    arguments: Sequence[str],
    target: Path | None,
    what: str,
    shown_environment: Mapping[str, str] | None = None,
    hidden_environment: Mapping[str, str] | None = None,
    by: Installer | None = None,
    timeout: float = INSTALL_TIMEOUT_SECONDS,
) -> None:
    """Install into the folder `target`, or into the environment of `by`; UserError with one sentence of what
    went wrong.

    `shown_environment` is part of the command that the sentence gives, `hidden_environment` is not.
    """
    other = by is not None
    if by is None:
        by = here()
        if not by.uv and importlib.util.find_spec("pip") is None:
            raise UserError(
                f"Cannot install {what}: {sys.executable} has no pip and there is no uv on PATH; run "
                f"`{shlex.quote(sys.executable)} -m ensurepip` or install uv."
            )
    command = [*by.command(), *arguments]
    environment = {
        **os.environ,
        "PIP_USER": "0",  # a pip.conf with `user = true` clashes with --target
        # What is not of the other environment must not be seen there.
        **({"PYTHONPATH": "", "PYTHONNOUSERSITE": "1"} if other else {}),
        **(shown_environment or {}),
        **(hidden_environment or {}),
    }
    shown = " ".join(f"{k}={v}" for k, v in (shown_environment or {}).items())
    folder = ([], []) if target is None else (["--target", str(target)], ["--target", "DIR"])
    shown = f"{shown} {shlex.join([*command, *folder[1]])}".strip()
    run([*command, *folder[0]], what, environment, shown, timeout)


def run(
    command: Sequence[str],
    what: str,
    environment: Mapping[str, str],
    shown: str = "",
    timeout: float = INSTALL_TIMEOUT_SECONDS,
) -> str:
    """What a step of an installation prints. UserError, one sentence, where it fails."""
    shown = redacted(shown or shlex.join(command))
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            preexec_fn=END_WITH_PARENT,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"Cannot install {what}: no end after {timeout:g} s of `{shown}`."
        ) from None
    except OSError as error:
        raise UserError(f"Cannot install {what}: {command[0]}: {error.strerror}.") from None
    if done.returncode != 0:
        reason = redacted(_relevant_line(done.stdout))
        raise UserError(f"Cannot install {what}: {reason} Reproduce with `{shown}`.")
    return done.stdout


_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def redacted(text: str) -> str:
    """Text without the user names and passwords of its URLs: it is printed, and pasted into issues.

    >>> redacted("--index-url https://me:secret@mirror.example/simple")
    '--index-url https://***@mirror.example/simple'
    """
    return _CREDENTIALS.sub("***", text)


# Best first. An unreachable index and a full disk are followed by lines that blame something else.
_CAUSES = (
    r"(?i)no space left on device",
    r"(?i)failed to establish a new connection|name resolution|connection refused|dns error"
    r"|connection timed out|failed to fetch|network is unreachable",
    r"^(cause: |[╰─▶ ]*)Because ",  # uv's resolver
    r"^The conflict is caused by:",  # pip's; what follows names the two
    r"^\s*\w*(Error|Exception): ",  # the end of a traceback in setup.py
    r"^\s*(ERROR|error):",
)


def _relevant_line(output: str) -> str:
    """The last line of the installer's output that says why, as a sentence."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for cause in _CAUSES:
        hits = [at for at, line in enumerate(lines) if re.search(cause, line)]
        if hits and lines[hits[-1]].startswith("The conflict is caused by"):
            return _sentence("; ".join(_conflict(lines[hits[-1] + 1 :])))
        if hits:
            return _sentence(lines[hits[-1]].removeprefix("cause: "))
    return _sentence(lines[-1] if lines else "the installer failed and said nothing")


def _conflict(lines: Sequence[str]) -> list[str]:
    """The lines of a conflict: what was asked for, and who depends on what."""
    return list(itertools.takewhile(lambda line: not line.startswith("To fix this"), lines))


def _sentence(line: str) -> str:
    text = line if len(line) <= 300 else line[:297] + "..."
    return text if text.endswith(".") else text + "."
