"""An isolated environment for each version of torch, in the user's cache: made once, used by every cell.

It holds torch, numpy, what attncheck itself needs, and what flash-attn's build imports. Packages that are
judged (flash-attn, xformers) lie in folders of their own above it, and attncheck's code in front of it. What
was not made to the end, with a torch that imports, is never used: its marker is written last.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from packaging.requirements import Requirement

from attncheck import files, installer, provision
from attncheck.cache import ENVIRONMENTS, disk_bytes, lock_of
from attncheck.errors import UserError
from attncheck.installer import MARKER, Installer

Log = Callable[[str], None]

# Part of what an environment is known by: raise it when other things are put into one.
RECIPE = 1
# Without numpy torch warns, and context_parallel does not import.
BESIDE_TORCH = ("numpy",)
# 3 GB of CUDA libraries over a slow line.
TIMEOUT_SECONDS = 3600.0
# What a CUDA build of torch takes with its libraries, as far as is known before it is there.
EXPECTED_BYTES = 7 * 2**30

# With less free, whatever failed did so for want of room.
FULL_BYTES = 4 * 2**20

# What an environment says of itself, in its own interpreter.
_ASK = """
import json, platform, sys, sysconfig
import torch, torch.distributed, torch.distributed.tensor
print(json.dumps({
    "python": platform.python_version(),
    "site": sysconfig.get_path("purelib"),
    "torch": torch.__version__,
    "cuda": torch.version.cuda or "",
    "distributed": torch.distributed.is_available(),
}))
"""


@dataclass(frozen=True)
class Source:
    """Where environments come from. `python`: an interpreter or a version of one, '' for that which runs
    this; `options`: of pip and uv alike (`--index-url URL`, `--constraint FILE`, ...)."""

    python: str = ""
    options: tuple[str, ...] = ()

    def key(self) -> str:
        """What tells two sources apart; the content of files (constraints) is part of it."""
        parts = [self.python or os.path.realpath(sys.executable), platform.machine(), f"{RECIPE}"]
        for option in self.options:
            parts.append(option)
            if Path(option).is_file():
                parts.append(Path(option).read_text(encoding="utf-8", errors="replace"))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Environment:
    """An environment that is there. `torch` is the version it has (`2.13.0+cpu`), `site` the folder of its
    packages, `fingerprint` changes with any of them; `cuda` is what torch was built for, or empty."""

    folder: Path
    python: Path
    version: str
    torch: str
    cuda: str
    site: Path
    fingerprint: str
    installer: Installer


def folder_of(torch: str, source: Source) -> Path:
    return root() / f"torch-{torch}-{source.key()}"


def root() -> Path:
    return provision.cache_root() / ENVIRONMENTS


@contextlib.contextmanager
def environment(
    torch: str, source: Source, log: Log, make_room: Callable[[int], None] = lambda wanted: None
) -> Iterator[Environment]:
    """The environment with this torch, made if need be, and kept from everybody else meanwhile: who wants it
    too waits, and nobody removes it.

    `make_room` is asked before anything is installed, for so many bytes. Raises UserError where it cannot be
    made, in one sentence.
    """
    folder = folder_of(torch, source)
    with locked(folder, log):
        if (found := _complete(folder, source)) is None:
            make_room(EXPECTED_BYTES)
            found = _made(folder, torch, source, log)
        _touch(folder)
        yield found


@contextlib.contextmanager
def locked(folder: Path, log: Log) -> Iterator[None]:
    """Nobody else uses, makes or removes the folder meanwhile. A process that dies lets go of it."""
    lock = FileLock(lock_of(folder))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log(f"waiting for another attncheck that uses {folder}")
            lock.acquire()
    except OSError as error:
        raise UserError(
            f"Cannot use {folder.parent}: {error.strerror or error}; set ATTNCHECK_CACHE to a folder that "
            "can be written to."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _touch(folder: Path) -> None:
    with contextlib.suppress(OSError):  # a cache that others own may be read
        os.utime(folder / MARKER)


def _complete(folder: Path, source: Source) -> Environment | None:
    """What the marker says, if it is there and the interpreter still is."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        python = folder / marker["executable"]
        site = Path(marker["site"])
        if marker["recipe"] != RECIPE or not python.exists() or not site.is_dir():
            return None
        return Environment(
            folder,
            python,
            str(marker["python"]),
            str(marker["torch"]),
            str(marker["cuda"]),
            site,
            _fingerprint(site, str(marker["python"])),
            Installer(str(python), bool(marker["uv"]), source.options),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fingerprint(site: Path, python: str) -> str:
    """A digest of every package's list of files, which holds the hash of each of them."""
    digest = hashlib.sha256(f"{python} {platform.platform()}".encode())
    for info in sorted(site.glob("*.dist-info")):
        digest.update(info.name.encode())
        with contextlib.suppress(OSError):
            digest.update((info / "RECORD").read_bytes())
    return digest.hexdigest()[:16]


# --- making one ----------------------------------------------------------------------------------


def _made(folder: Path, torch: str, source: Source, log: Log) -> Environment:
    what = f"torch {torch}"
    uv = shutil.which("uv") is not None
    base = interpreter(source.python)
    log(f"making an environment with {what} in {folder} (once; its CUDA libraries are large)")
    _removed(folder)
    # Made beside it: what a killed attncheck leaves running writes there, and never into what comes after.
    for leftover in folder.parent.glob(f"tmp-{folder.name}-*"):
        _removed(leftover)
    temporary = folder.with_name(f"tmp-{folder.name}-{secrets.token_hex(3)}")
    executable = Path("Scripts" if os.name == "nt" else "bin") / "python"
    try:
        _venv(temporary, base, uv, what)
        requirements = [f"torch=={torch}", *BESIDE_TORCH, *requirements_of_attncheck()]
        requirements += provision.BUILD_REQUIREMENTS
        by = Installer(str(temporary / executable), uv, source.options)
        installer.install(requirements, None, what, by=by, timeout=TIMEOUT_SECONDS)
        os.replace(temporary, folder)
        python = folder / executable
        told = _ask(python, torch, what)
        marker = {"recipe": RECIPE, "uv": uv, "executable": str(executable), "made": time.time()}
        marker |= {**told, "bytes": disk_bytes(folder)}
        files.write_text(folder / MARKER, json.dumps(marker, indent=1))
    except BaseException as error:
        full = shutil.disk_usage(folder.parent).free < FULL_BYTES
        _removed(temporary)
        _removed(folder)
        if full and isinstance(error, UserError):
            raise UserError(
                f"Cannot install {what}: the disk that holds {folder.parent} is full."
            ) from None
        raise
    made = _complete(folder, source)
    assert made is not None, folder
    return made


def discard(environment: Environment) -> None:
    """Remove one that is in use here."""
    _removed(environment.folder)


def _removed(folder: Path) -> None:
    """Remove what an interrupted installation left; the marker goes first."""
    with contextlib.suppress(OSError):
        (folder / MARKER).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def interpreter(wanted: str) -> str:
    """The path of an interpreter that is asked for by its version or path. Raises UserError."""
    if not wanted:
        return sys.executable
    by_version = re.fullmatch(r"\d+(\.\d+)*", wanted)
    if found := shutil.which(f"python{wanted}" if by_version else wanted):
        return found
    if by_version and shutil.which("uv") is not None:
        with contextlib.suppress(UserError):
            said = installer.run(["uv", "python", "find", wanted], "it", dict(os.environ))
            return said.strip().splitlines()[-1]
    there = f"there is no python{wanted} on PATH" if by_version else "no such interpreter"
    raise UserError(
        f"--python {wanted}: {there}; expected a version that is installed (3.12), or a path."
    )


def _venv(folder: Path, python: str, uv: bool, what: str) -> None:
    command = ["uv", "venv", "--quiet", "--python", python] if uv else [python, "-m", "venv"]
    installer.run([*command, str(folder)], what, dict(os.environ))


def _ask(python: Path, torch: str, what: str) -> dict[str, object]:
    """What the new environment says of itself; UserError where its torch does not import."""
    try:
        said = installer.run([str(python), "-I", "-c", _ASK], what, dict(os.environ))
        told = json.loads(said.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise UserError(f"Cannot install {what}: it says nothing of itself.") from None
    # 2.9.1 asks for any build of it (2.9.1+cu128), 2.9.1+cpu for that one.
    if told["torch"] not in (torch, f"{torch}+{told['torch'].partition('+')[2]}"):
        raise UserError(f"Cannot use {what}: asked for torch {torch} and got {told['torch']}.")
    if not told.pop("distributed"):
        raise UserError(
            f"Cannot use {what}: it was built without torch.distributed, which DTensor needs."
        )
    return dict(told)


def requirements_of_attncheck() -> list[str]:
    """What attncheck itself imports, but for torch."""
    try:
        declared = importlib.metadata.requires("attncheck") or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "attncheck is not installed here, only its code is; run `pip install .` in its folder."
        ) from None
    requirements = map(Requirement, declared)
    return [
        str(r) for r in requirements if r.name != "torch" and "extra" not in str(r.marker or "")
    ]
