"""What is known of packages beyond what they declare: one TOML file a package, each line with its source.

The files lie beside this one, under the name of their distribution; `knowledge.schema.json` describes them.
They grow old, and say so: `as_of` is the day on which somebody last held a file against its sources. Imports
nothing of ours but the error type.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Literal

import msgspec
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from attncheck.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent
# Half a year: two minor releases of PyTorch, and about as many of whatever is compiled against it.
STALE_DAYS = 180


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line of a file; `source` is the public page that it was read from."""

    source: str

    def __post_init__(self) -> None:
        if not self.source.startswith("https://"):
            raise ValueError(
                f"expected the https:// address of a public page, found {self.source!r}"
            )


class Release(_Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A final release on PyPI. `python`: the versions that it has Linux wheels for; `cuda`: what its x86-64
    Linux wheel is built with; `cxx11abi`: the C++ ABI of that wheel. Empty or None: not written down."""

    version: str
    python: tuple[str, ...] = ()
    cuda: str = ""
    cxx11abi: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        Version(self.version)


class Need(_Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What these `versions` ask of another package where that one is installed.

    `declared`: the package's own metadata says it, too. A `warning` is what the package copes with, by going
    another way than the one asked for; `why` says what happens.
    """

    versions: str
    package: str
    requires: str
    why: str
    severity: Literal["error", "warning"] = "error"
    declared: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        SpecifierSet(self.versions)
        SpecifierSet(self.requires)

    def applies_to(self, version: str) -> bool:
        return contains(self.versions, version)

    def met_by(self, version: str) -> bool:
        return contains(self.requires, version)


class Excluded(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A corner of a matrix of wheels that is not built: what is empty stands for all."""

    torch: str = ""
    cuda: str = ""
    python: str = ""


class Wheels(_Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The wheels that a package's maintainers build of these `versions`: every combination, less `without`.

    `torch` and `python` are major.minor; `cuda` is written as in the wheels' names (`cu12`, `cu123`); `url`
    has a field for each part of a name.
    """

    versions: str
    torch: tuple[str, ...]
    cuda: tuple[str, ...]
    python: tuple[str, ...]
    cxx11abi: tuple[bool, ...]
    platform: str
    url: str
    without: tuple[Excluded, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        SpecifierSet(self.versions)

    def applies_to(self, version: str) -> bool:
        return contains(self.versions, version)


class Registers(_Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A namespace that these `versions` take for themselves with TORCH_LIBRARY: no other library may."""

    versions: str
    namespace: str

    def __post_init__(self) -> None:
        super().__post_init__()
        SpecifierSet(self.versions)

    def applies_to(self, version: str) -> bool:
        return contains(self.versions, version)


class Symbol(_Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A symbol that only some PyTorch exports: none before `since`, none after `last` (major.minor).

    Bounds are on the safe side: where releases between two that were looked at were not, they are inside.
    """

    name: str
    since: str = ""
    last: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.since or self.last):
            raise ValueError(f"{self.name} has neither `since` nor `last`")
        for bound in (self.since, self.last):
            if bound:
                Version(bound)


class Package(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that is known of a distribution. `releases`: oldest first; `extensions`: compiled modules without
    which it does not import; `build`: how it is installed from source, the version behind it."""

    package: str
    as_of: date
    releases: tuple[Release, ...] = ()
    extensions: tuple[str, ...] = ()
    build: str = ""
    needs: tuple[Need, ...] = ()
    wheels: tuple[Wheels, ...] = ()
    registers: tuple[Registers, ...] = ()
    symbols: tuple[Symbol, ...] = ()

    def stale(self, today: date) -> bool:
        return (today - self.as_of).days > STALE_DAYS

    def knows(self, version: str) -> bool:
        """Whether it is no newer than the newest release that is written down (local parts aside)."""
        if not self.releases:
            return True
        try:
            return Version(Version(version).public) <= Version(self.releases[-1].version)
        except InvalidVersion:
            return False

    def release(self, version: str) -> Release | None:
        wanted = version.partition("+")[0]
        return next((r for r in self.releases if r.version == wanted), None)


def contains(specifier: str, version: str) -> bool:
    """Whether a version is in a range; one that is no version (PEP 440) is in none."""
    try:
        return SpecifierSet(specifier).contains(version, prereleases=True)
    except InvalidVersion:
        return False


@functools.cache
def known() -> Mapping[str, Package]:
    """Every file by the name of its distribution."""
    packages = (load(file) for file in sorted(FOLDER.glob("*.toml")))
    return {package.package: package for package in packages}


def of(distribution: str) -> Package | None:
    """What is known of a distribution, if anything is."""
    return known().get(canonicalize_name(distribution))


def releases(distribution: str) -> tuple[str, ...]:
    """The final releases that are known of a distribution, oldest first; () where none is."""
    package = of(distribution)
    return tuple(release.version for release in package.releases) if package else ()


def load(file: Path) -> Package:
    """One file, checked. Raises UserError, one sentence that names the file, the place and what was
    expected."""
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
        package = msgspec.convert(document, Package)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid TOML: {error}.") from None
    except msgspec.ValidationError as error:
        raise UserError(f"{file} is not what is known of a package: {error}.") from None
    if package.package != file.stem or canonicalize_name(file.stem) != file.stem:
        raise UserError(
            f"{file} is about {package.package!r}: expected the file and `package` to have one "
            "(normalised) name of a distribution."
        )
    ordered = [Version(release.version) for release in package.releases]
    if ordered != sorted(set(ordered)):
        raise UserError(f"{file}: expected releases to be there once each, oldest first.")
    return package
