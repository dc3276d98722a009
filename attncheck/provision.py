"""Fetch a package once, into the user's cache: `scan --with flash-attn`, `--with xformers`.

The user's environment is not touched. What needs compiled kernels runs on attncheck's stand-ins: flash-attn's
source distribution installs without compiling anything when told to, xformers' wheel imports without its
extension. Torch-free.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from attncheck import installer
from attncheck.errors import UserError, unknown
from attncheck.installer import Installer

# Part of the folder's name: raise it when the way of installing changes, and old folders are left
# alone.
RECIPE = 1

Log = Callable[[str], None]


@dataclass(frozen=True)
class Provision:
    """A package at an exact version, to be provisioned."""

    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class Recipe:
    """How one package is provisioned.

    `module`: what it is imported as. `versions`: oldest first, each installed by this recipe; nothing
    older is taken, and the newest is the default. `torch`: the PyTorch that these versions ask for.
    `fill` installs a version into a folder, by the installer of another environment or that of this one.
    """

    module: str
    versions: tuple[str, ...]
    torch: str
    fill: Callable[[Provision, Path, Log, Installer | None], None]

    @property
    def default(self) -> str:
        return self.versions[-1]

    @property
    def oldest(self) -> Version:
        return Version(self.versions[0])


# --- flash-attn -----------------------------------------------------------------------------------

# What flash-attn's setup.py and its build need besides torch.
BUILD_REQUIREMENTS = ("setuptools", "wheel", "packaging", "ninja", "psutil")
# Imported by flash_attn itself; pure Python.
RUNTIME_REQUIREMENTS = ("einops",)
BUILD_ENVIRONMENT = {
    # Do not look for a prebuilt wheel (the look-up fails without CUDA), and compile nothing.
    "FLASH_ATTENTION_FORCE_BUILD": "TRUE",
    "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE",
}


def _fill_flash_attn(provision: Provision, target: Path, log: Log, by: Installer | None) -> None:
    hidden = {}
    # Other environments are made with what a build needs.
    build_folder = _build_requirements(log) if by is None else None
    if build_folder is not None:
        parts = [str(build_folder), os.environ.get("PYTHONPATH", "")]
        hidden["PYTHONPATH"] = os.pathsep.join(part for part in parts if part)
    arguments = [
        "--no-deps",
        "--no-build-isolation",
        f"--no-binary={provision.package}",
        # An installer keeps the wheels it builds. This one is hollow: kept, it would be what the
        # user's next real `pip install flash-attn` gets.
        "--no-cache" if (by or installer.here()).uv else "--no-cache-dir",
        str(provision),
    ]
    installer.install(arguments, target, str(provision), BUILD_ENVIRONMENT, hidden, by)
    installer.install(["--no-deps", *RUNTIME_REQUIREMENTS], target, str(provision), by=by)


def _build_requirements(log: Log) -> Path | None:
    """A folder with what the build imports, or None where this environment has it all."""
    missing = [name for name in BUILD_REQUIREMENTS if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    # ninja and psutil are compiled: one folder per interpreter and platform.
    platform = re.sub(r"\W+", "-", f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}")
    folder = cache_root() / f"build-requirements-{platform}-r{RECIPE}"
    marker = {"package": "build requirements", "version": platform, "recipe": RECIPE}
    if installer.complete(folder, marker):
        return folder
    what = "the build requirements of flash-attn"
    log(f"Installing {what} ({', '.join(missing)} missing here) into {folder} (once).")
    with installer.filled_atomically(folder, marker, what) as target:
        installer.install([*BUILD_REQUIREMENTS], target, what)
    return folder


# --- xformers -------------------------------------------------------------------------------------


def _fill_xformers(provision: Provision, target: Path, log: Log, by: Installer | None) -> None:
    # A wheel of 3 MiB; its sdist would be compiled. numpy, its other dependency, is imported by its
    # benchmarks only.
    arguments = ["--no-deps", f"--only-binary={provision.package}", str(provision)]
    installer.install(arguments, target, str(provision), by=by)


RECIPES: Mapping[str, Recipe] = {
    "flash-attn": Recipe(
        module="flash_attn",
        # The last releases before there were dispatcher ops (2.7.0), and every 2.7 and 2.8 release on
        # the package index.
        versions=(
            "2.5.9.post1",
            "2.6.3",
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
        ),
        torch="",
        fill=_fill_flash_attn,
    ),
    "xformers": Recipe(
        module="xformers",
        # Older ones pin torch to one version each (0.0.34: 2.10.0).
        versions=("0.0.35",),
        torch=">=2.10",
        fill=_fill_xformers,
    ),
}
PROVISIONABLE = tuple(RECIPES)


# --- which version --------------------------------------------------------------------------------


def parse(requirement: str) -> Provision:
    """`flash-attn`, `flash-attn==2.7.4.post1`, `flash-attn>=2.7,<2.8` to an exact version.

    An exact version is taken as given if it is no older than the oldest one known; other specifiers
    choose the newest known version that fits; none means the newest. Raises UserError.

    >>> parse("flash-attn>=2.7,<2.8")
    Provision(package='flash-attn', version='2.7.4.post1')
    """
    try:
        parsed = Requirement(requirement)
    except InvalidRequirement:
        example = PROVISIONABLE[0]
        raise UserError(
            f"{requirement!r} is not a requirement: expected one like {example} or "
            f"{example}=={RECIPES[example].default}."
        ) from None
    package = canonicalize_name(parsed.name)
    if package not in RECIPES:
        raise unknown("package to provision", package, PROVISIONABLE)
    recipe = RECIPES[package]
    if parsed.extras or parsed.url or parsed.marker:
        raise UserError(
            f"{requirement!r} has extras, a URL or a marker: expected a version only, as in "
            f"{package}=={recipe.default}."
        )
    return Provision(package, _choose_version(parsed, recipe))


def _choose_version(requirement: Requirement, recipe: Recipe) -> str:
    specifier = requirement.specifier
    if not specifier:
        return recipe.default
    exact = _exact_version(specifier)
    if exact is not None:
        if exact < recipe.oldest:
            raise _too_old(requirement, recipe)
        return str(exact)
    fitting = [v for v in recipe.versions if specifier.contains(v, prereleases=True)]
    if fitting:
        return fitting[-1]
    ceilings = [s for s in specifier if s.operator in ("<", "<=", "==", "~=")]
    if any(Version(s.version.removesuffix(".*")) <= recipe.oldest for s in ceilings):
        raise _too_old(requirement, recipe)
    raise UserError(
        f"No version that attncheck knows fits {requirement}: expected "
        f"{_versions(recipe)}, or an exact newer one with ==."
    )


def _exact_version(specifier: SpecifierSet) -> Version | None:
    specifiers = list(specifier)
    if len(specifiers) != 1 or specifiers[0].operator not in ("==", "==="):
        return None
    try:
        return Version(specifiers[0].version)
    except InvalidVersion:  # ==2.8.* is a range
        return None


def _too_old(requirement: Requirement, recipe: Recipe) -> UserError:
    return UserError(
        f"{requirement} cannot be provisioned: {recipe.oldest} is the oldest {requirement.name} that "
        f"attncheck's stand-in fits; expected {_versions(recipe)}."
    )


def _versions(recipe: Recipe) -> str:
    return f"{'one of ' if len(recipe.versions) > 1 else ''}{', '.join(recipe.versions)}"


# --- the folder -----------------------------------------------------------------------------------


def cache_root() -> Path:
    """Where everything provisioned lies: $ATTNCHECK_CACHE, or the user's cache folder."""
    override = os.environ.get("ATTNCHECK_CACHE")
    return Path(override) if override else Path(platformdirs.user_cache_dir("attncheck"))


def folder_of(provision: Provision) -> Path:
    """Where the package lies once it is provisioned."""
    return cache_root() / f"{provision.package}-{provision.version}-r{RECIPE}"


def ensure(provision: Provision, *, log: Log, by: Installer | None = None, torch: str = "") -> Path:
    """The folder that holds the package, to be put on the workers' PYTHONPATH; installs it if need
    be.

    Milliseconds and no network when it is there already. Safe against interruption and against
    other processes doing the same. `log` gets one sentence before anything is downloaded. `by` and
    `torch`: the installer and the PyTorch version of another environment, where it is for that one.
    Raises UserError when the PyTorch does not suit it, and when it cannot be installed, with the
    command to reproduce that and what the installer said.
    """
    recipe = RECIPES[provision.package]
    _check_torch(provision, recipe, torch or _torch_here())
    folder = folder_of(provision)
    marker = {"package": provision.package, "version": provision.version, "recipe": RECIPE}
    if installer.complete(folder, marker):
        return folder
    log(f"Installing the Python part of {provision} into {folder} (once; no compilation).")
    with installer.filled_atomically(folder, marker, str(provision)) as target:
        recipe.fill(provision, target, log, by)
        if not (target / recipe.module / "__init__.py").is_file():
            raise UserError(f"{provision} was installed but contains no {recipe.module}.")
    return folder


def _torch_here() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""  # the scan says so, in its own words


def _check_torch(provision: Provision, recipe: Recipe, torch: str) -> None:
    """--no-deps keeps a package from replacing the user's PyTorch, and from looking at it."""
    if torch and not SpecifierSet(recipe.torch).contains(torch, prereleases=True):
        raise UserError(
            f"{provision} needs torch{recipe.torch}, and torch {torch} is installed; scan in an "
            "environment that has it."
        )
