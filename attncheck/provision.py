"""Fetch the Python part of a package, once, into the user's cache: `scan --with flash-attn`.

The user's environment is not touched. flash-attn's source distribution installs without compiling
anything when told to; attncheck's stand-in then takes the place of the compiled module. Torch-free
(though flash-attn's own setup.py imports torch, which is why it runs under this interpreter).
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
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from attncheck.errors import UserError, unknown

# Every 2.7 and 2.8 release on the package index, oldest first; each has been installed by this
# recipe.
FLASH_ATTN_VERSIONS = (
    "2.7.0.post2",
    "2.7.1.post4",
    "2.7.2.post1",
    "2.7.3",
    "2.7.4.post1",
    "2.8.0.post2",
    "2.8.1",
    "2.8.2",
    "2.8.3",
    "2.8.3.post1",
    "2.8.3.post2",
)
FLASH_ATTN_DEFAULT = "2.8.3.post2"
FLASH_ATTN_OLDEST = Version("2.7.0")
PROVISIONABLE = ("flash-attn",)

# Part of the folder's name: raise it when the way of installing changes, and old folders are left
# alone.
RECIPE = 1
MARKER = "attncheck-provision.json"

# What flash-attn's setup.py and its build need besides torch.
BUILD_REQUIREMENTS = ("setuptools", "wheel", "packaging", "ninja", "psutil")
# Imported by flash_attn itself; pure Python.
RUNTIME_REQUIREMENTS = ("einops",)
BUILD_ENVIRONMENT = {
    # Do not look for a prebuilt wheel (the look-up fails without CUDA), and compile nothing.
    "FLASH_ATTENTION_FORCE_BUILD": "TRUE",
    "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE",
    "PIP_USER": "0",  # a pip.conf with `user = true` clashes with --target
}
INSTALL_TIMEOUT_SECONDS = 600
STALE_SECONDS = 24 * 3600

Log = Callable[[str], None]


@dataclass(frozen=True)
class Provision:
    """A package at an exact version, to be provisioned."""

    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.package}=={self.version}"


def parse(requirement: str) -> Provision:
    """`flash-attn`, `flash-attn==2.7.4.post1`, `flash-attn>=2.7,<2.8` to an exact version.

    An exact version is taken as given if it is 2.7 or newer; other specifiers choose the newest
    version of FLASH_ATTN_VERSIONS that fits; none means FLASH_ATTN_DEFAULT. Raises UserError.

    >>> parse("flash-attn>=2.7,<2.8")
    Provision(package='flash-attn', version='2.7.4.post1')
    """
    try:
        parsed = Requirement(requirement)
    except InvalidRequirement:
        raise UserError(
            f"{requirement!r} is not a requirement: expected one like {PROVISIONABLE[0]} or "
            f"{PROVISIONABLE[0]}=={FLASH_ATTN_DEFAULT}."
        ) from None
    package = canonicalize_name(parsed.name)
    if package not in PROVISIONABLE:
        raise unknown("package to provision", package, PROVISIONABLE)
    if parsed.extras or parsed.url or parsed.marker:
        raise UserError(
            f"{requirement!r} has extras, a URL or a marker: expected a version only, as in "
            f"{package}=={FLASH_ATTN_DEFAULT}."
        )
    return Provision(package, _choose_version(parsed))


def _choose_version(requirement: Requirement) -> str:
    specifier = requirement.specifier
    if not specifier:
        return FLASH_ATTN_DEFAULT
    exact = _exact_version(requirement)
    if exact is not None:
        if exact < FLASH_ATTN_OLDEST:
            raise _too_old(str(requirement))
        return str(exact)
    fitting = [v for v in FLASH_ATTN_VERSIONS if specifier.contains(v, prereleases=True)]
    if fitting:
        return fitting[-1]
    ceilings = [s for s in specifier if s.operator in ("<", "<=", "==", "~=")]
    if any(Version(s.version.removesuffix(".*")) <= FLASH_ATTN_OLDEST for s in ceilings):
        raise _too_old(str(requirement))
    raise UserError(
        f"No version that attncheck knows fits {requirement}: expected one of "
        f"{', '.join(FLASH_ATTN_VERSIONS)}, or an exact newer one with ==."
    )


def _exact_version(requirement: Requirement) -> Version | None:
    specifiers = list(requirement.specifier)
    if len(specifiers) != 1 or specifiers[0].operator not in ("==", "==="):
        return None
    try:
        return Version(specifiers[0].version)
    except InvalidVersion:  # ==2.8.* is a range
        return None


def _too_old(requirement: str) -> UserError:
    return UserError(
        f"{requirement} cannot be provisioned: flash-attn has dispatcher ops, which DTensor and "
        f"the stand-in need, from {FLASH_ATTN_OLDEST} on; expected one of "
        f"{', '.join(FLASH_ATTN_VERSIONS)}."
    )


def cache_root() -> Path:
    """Where everything provisioned lies: $ATTNCHECK_CACHE, or the user's cache folder."""
    override = os.environ.get("ATTNCHECK_CACHE")
    return Path(override) if override else Path(platformdirs.user_cache_dir("attncheck"))


def ensure(provision: Provision, *, log: Log) -> Path:
    """The folder that holds the package, to be put on the workers' PYTHONPATH; installs it if need
    be.

    Milliseconds and no network when it is there already. Safe against interruption and against
    other processes doing the same. `log` gets one sentence before anything is downloaded. Raises
    UserError when it cannot be installed, with the command to reproduce that and what the installer
    said.
    """
    folder = cache_root() / f"{provision.package}-{provision.version}-r{RECIPE}"
    marker = {"package": provision.package, "version": provision.version, "recipe": RECIPE}
    if _complete(folder, marker):
        return folder
    log(f"Installing the Python part of {provision} into {folder} (once; no compilation).")
    with _filled_atomically(folder, marker, str(provision)) as target:
        _install_flash_attn(provision, target, log)
        package = target / provision.package.replace("-", "_") / "__init__.py"
        if not package.is_file():
            raise UserError(f"{provision} was installed but contains no {package.parent.name}.")
    return folder


def _install_flash_attn(provision: Provision, target: Path, log: Log) -> None:
    environment = {**os.environ, **BUILD_ENVIRONMENT}
    build_folder = _build_requirements(log)
    if build_folder is not None:
        parts = [str(build_folder), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(part for part in parts if part)
    arguments = [
        "--no-deps",
        "--no-build-isolation",
        f"--no-binary={provision.package}",
        # An installer keeps the wheels it builds. This one is hollow: kept, it would be what the
        # user's next real `pip install flash-attn` gets.
        "--no-cache" if _use_uv() else "--no-cache-dir",
        str(provision),
    ]
    _install(arguments, target, environment, str(provision), BUILD_ENVIRONMENT)
    _install(["--no-deps", *RUNTIME_REQUIREMENTS], target, environment, str(provision))


def _build_requirements(log: Log) -> Path | None:
    """A folder with what the build imports, or None where this environment has it all."""
    missing = [name for name in BUILD_REQUIREMENTS if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    # ninja and psutil are compiled: one folder per interpreter and platform.
    platform = re.sub(r"\W+", "-", f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}")
    folder = cache_root() / f"build-requirements-{platform}-r{RECIPE}"
    marker = {"package": "build requirements", "version": platform, "recipe": RECIPE}
    if _complete(folder, marker):
        return folder
    what = "the build requirements of flash-attn"
    log(f"Installing {what} ({', '.join(missing)} missing here) into {folder} (once).")
    with _filled_atomically(folder, marker, what) as target:
        environment = {**os.environ, "PIP_USER": "0"}
        _install([*BUILD_REQUIREMENTS], target, environment, what)
    return folder


# --- folders
# ---------------------------------------------------------------------------------------


def _complete(folder: Path, marker: dict[str, object]) -> bool:
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(found == marker)


@contextlib.contextmanager
def _filled_atomically(folder: Path, marker: dict[str, object], what: str) -> Iterator[Path]:
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
        if folder.exists() and not _complete(folder, marker):
            os.replace(folder, temporary / "damaged")
        try:
            os.replace(target, folder)
        except OSError:
            if not _complete(folder, marker):
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


# --- the installer
# ---------------------------------------------------------------------------------


def _use_uv() -> bool:
    """Environments made by uv have no pip."""
    return importlib.util.find_spec("pip") is None and shutil.which("uv") is not None


def _installer() -> list[str]:
    if _use_uv():
        return ["uv", "pip", "install", "--python", sys.executable]
    quiet = ["--disable-pip-version-check", "--no-input", "--retries", "2", "--timeout", "20"]
    return [sys.executable, "-m", "pip", "install", *quiet]


def _install(
    arguments: Sequence[str],
    target: Path,
    environment: dict[str, str],
    what: str,
    shown_environment: dict[str, str] | None = None,
) -> None:
    """Run the installer with --target; UserError with one sentence of what went wrong."""
    if not _use_uv() and importlib.util.find_spec("pip") is None:
        raise UserError(
            f"Cannot install {what}: {sys.executable} has no pip and there is no uv on PATH; run "
            f"`{shlex.quote(sys.executable)} -m ensurepip` or install uv."
        )
    command = [*_installer(), *arguments, "--target"]
    shown = " ".join(f"{k}={v}" for k, v in (shown_environment or {}).items())
    shown = f"{shown} {shlex.join([*command, 'DIR'])}".strip()
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
