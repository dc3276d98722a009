"""Which versions of a package there are: of the index, or where it cannot be asked, as far as is known."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence

from packaging.version import InvalidVersion, Version

from attncheck import installer
from attncheck.errors import UserError

# What `pip index` takes of the options that `pip install` takes; each has a value, but for the last.
_INDEX_OPTIONS = ("--index-url", "--extra-index-url", "--find-links", "--no-index")


def between(
    package: str,
    oldest: str,
    newest: str,
    options: Sequence[str],
    known: Sequence[str],
    log: Callable[[str], None],
) -> tuple[str, ...]:
    """The final releases from `oldest` to `newest`, oldest first. `options` are those of the installer,
    `known` what is there as far as attncheck knows. Raises UserError where there is nothing between."""
    low, high = sorted((Version(oldest), Version(newest)))
    try:
        found = _asked(package, options)
    except UserError as error:
        log(f"{error} Going on with the releases of {package} that attncheck knows.")
        found = tuple(known)
    versions = {Version(text) for text in found}
    chosen = {v for v in versions if low <= v <= high and not v.is_prerelease and not v.local}
    return tuple(map(str, sorted({low, high, *chosen})))


def _asked(package: str, options: Sequence[str]) -> tuple[str, ...]:
    """What the index has. Raises UserError where it does not answer."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"There is no pip here to ask for the releases of {package}.")
    command = [sys.executable, "-m", "pip", "index", "versions", package, "--retries", "1"]
    said = installer.run(
        [*command, *_of_index(options)], f"the list of {package}'s releases", dict(os.environ)
    )
    match = re.search(r"^Available versions:(.*)$", said, re.M)
    versions = [text.strip() for text in match[1].split(",")] if match else []
    return tuple(text for text in versions if _is_version(text))


def _of_index(options: Sequence[str]) -> list[str]:
    kept: list[str] = []
    for at, option in enumerate(options):
        if option in _INDEX_OPTIONS:
            kept += options[at : at + 1 + (option != "--no-index")]
    return kept


def _is_version(text: str) -> bool:
    try:
        Version(text)
    except InvalidVersion:
        return False
    return True
