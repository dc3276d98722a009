"""Which distributions an environment has: read from its folders, or planned and not there yet."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from packaging.utils import canonicalize_name

from attncheck import knowledge
from attncheck.static import elf

NEW_ERROR = (
    "_ZN3c105ErrorC2ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"
)
OLD_ERROR = "_ZN3c105ErrorC2ENS_14SourceLocationESs"
_LIBRARY = re.compile(r'^"?([^,\n]+\.so)"?,', re.M)


@dataclass(frozen=True)
class Distribution:
    """`name`: normalised; `folder`: where it is installed, None where it is only planned."""

    name: str
    version: str
    folder: Path | None = None
    _files: importlib.metadata.Distribution | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def requires(self) -> tuple[str, ...]:
        """Requires-Dist, as it is written."""
        return tuple(self._files.requires or ()) if self._files else ()

    @property
    def libraries(self) -> tuple[PurePosixPath, ...]:
        """The shared libraries that it installed, relative to `folder`; () where it kept no list of its
        files (an editable install)."""
        record = self._files.read_text("RECORD") if self._files else None
        return tuple(PurePosixPath(match) for match in _LIBRARY.findall(record or ""))

    @property
    def origin(self) -> str:
        """The file that it was installed from, where it was named (a wheel by its address); '' else."""
        text = self._files.read_text("direct_url.json") if self._files else None
        try:
            url = json.loads(text or "{}").get("url", "")
        except ValueError:
            return ""
        return unquote(str(url)).rpartition("/")[2]


@dataclass(frozen=True)
class Torch:
    """`cuda`: the version that it was built with, '' for none, None where that is not known; `lib`: the
    folder of its libraries, None where it is only planned."""

    version: str
    cuda: str | None
    cxx11abi: bool | None
    lib: Path | None

    @property
    def minor(self) -> str:
        """`2.9` of 2.9.1+cu128."""
        return ".".join(self.version.split(".")[:2])

    def __str__(self) -> str:
        if self.cuda is None or "+" in self.version:
            return f"torch {self.version}"
        return f"torch {self.version} ({f'CUDA {self.cuda}' if self.cuda else 'no CUDA'})"


@dataclass(frozen=True, eq=False)
class Installation:
    """`python`: its version, major.minor; `folders`: where it looks for packages, in this order (None:
    this interpreter's path); `hollow`:
    distributions that were installed without their compiled part on purpose (something stands in);
    `looked_for`: names of which it is known whether they are there."""

    distributions: Mapping[str, Distribution]
    python: str
    folders: tuple[Path, ...] | None = None
    hollow: frozenset[str] = frozenset()
    looked_for: frozenset[str] = frozenset()

    def get(self, name: str) -> Distribution | None:
        return self.distributions.get(name)

    @functools.cached_property
    def torch(self) -> Torch | None:
        """None where PyTorch is neither installed nor planned."""
        found = self.get("torch")
        return _torch(found) if found else None


def read(
    names: Iterable[str],
    folders: Sequence[Path] | None = None,
    python: str = "",
    hollow: Iterable[str] = (),
) -> Installation:
    """Those of the distributions `names`, and of all that something is known of, that are in `folders` (of
    any environment; this interpreter's path where None). Of two of one name the first counts, as it does
    for Python."""
    wanted = frozenset(canonicalize_name(name) for name in (*names, *knowledge.known()))
    where = [p or "." for p in sys.path] if folders is None else [str(f) for f in folders]
    found: dict[str, Distribution] = {}
    for name in sorted(wanted):
        for files in importlib.metadata.distributions(name=name, path=where):
            if version := _version(files):
                found[name] = Distribution(name, version, Path(str(files.locate_file(""))), files)
                break
    python = python or f"{sys.version_info.major}.{sys.version_info.minor}"
    here = None if folders is None else tuple(folders)
    return Installation(found, minor(python), here, frozenset(hollow), wanted)


def _version(files: importlib.metadata.Distribution) -> str:
    """'' where an interrupted install left a folder without metadata."""
    try:
        return files.version or ""
    except (KeyError, AttributeError, importlib.metadata.PackageNotFoundError):
        return ""


def planned(versions: Mapping[str, str], python: str, hollow: Iterable[str] = ()) -> Installation:
    """An environment that does not exist yet: distributions and their exact versions."""
    named = {str(canonicalize_name(name)): version for name, version in versions.items()}
    found = {name: Distribution(name, version) for name, version in named.items()}
    return Installation(found, minor(python), None, frozenset(hollow))


def minor(version: str) -> str:
    """
    >>> minor("3.11.7")
    '3.11'
    """
    return ".".join(version.split(".")[:2])


def _torch(found: Distribution) -> Torch:
    lib = found.folder / "torch" / "lib" if found.folder else None
    package = knowledge.of("torch")
    release = package.release(found.version) if package else None
    abi = release.cxx11abi if release and "+" not in found.version else None
    if lib is None:
        return Torch(found.version, _cuda_of_tag(found.version, release), abi, None)
    c10 = elf.defined(lib / "libc10.so", (NEW_ERROR, OLD_ERROR))
    if c10:
        abi = NEW_ERROR in c10
    cuda = _cuda_of_build(lib.parent / "version.py")
    return Torch(found.version, cuda, abi, lib if lib.is_dir() else None)


def _cuda_of_tag(version: str, release: knowledge.Release | None) -> str | None:
    """`12.4` of 2.6.0+cu124; without a local part, what the wheel on PyPI is built with."""
    _, _, local = version.partition("+")
    if match := re.fullmatch(r"cu(\d+)(\d)", local):
        return f"{match[1]}.{match[2]}"
    if local == "cpu":
        return ""
    return release.cuda or None if release and not local else None


def _cuda_of_build(file: Path) -> str | None:
    """What torch/version.py says; None where it does not, or where it is a build for ROCm."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    if re.search(r"^(?:hip|rocm)\b[^=]*=\s*['\"]", text, re.M):
        return None
    match = re.search(r"^cuda\b[^=]*=\s*(?:['\"]([^'\"]*)['\"]|None)", text, re.M)
    return (match[1] or "") if match else None
