"""Where a project pins a distribution: the file and line that a finding about its kernels is shown at.

Formats for CI (SARIF, workflow annotations) want a line, and the code at fault is not the project's own: what
the project decides is the version. Reads pyproject.toml, requirements and lock files of the project's folder
and of those above it in the same repository; a file that cannot be read or parsed says nothing. Torch-free.
"""

from __future__ import annotations

import itertools
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# A uv.lock of a project with torch and its CUDA wheels is under 1 MB.
MAX_BYTES = 8_000_000
# Requirement files of one folder; a repository can hold any number of files of such names.
MAX_FILES = 50
MAX_REQUIREMENTS = 2000  # of one pyproject.toml: each is looked for in all of its lines

PROJECT = "pyproject.toml"
BASELINE = "attncheck-baseline.json"
LOCK_FILES = ("uv.lock", "poetry.lock", "pdm.lock", "pylock.toml")
REQUIREMENTS = ("requirements*.txt", "constraints*.txt", "requirements/*.txt")

# Namespaces of dispatcher ops, and names of probes, that are not those of their distribution.
_DISTRIBUTIONS = {
    "aten": "torch",
    "prims": "torch",
    "c10d": "torch",
    "_c10d_functional": "torch",
    "higher_order": "torch",
    "sdpa": "torch",
    "flex": "torch",
    "varlen": "torch",
    "mha": "torch",
    "fallback": "torch",
    "context_parallel": "torch",
    "merged_heads": "torch",
    "flash_attn_kvcache": "flash-attn",
    "xformers_flash": "xformers",
    "xformers_flash3": "xformers",
    "xformers_python": "xformers",
}


@dataclass(frozen=True)
class Location:
    """A line, from 1 on, of a file; `path` is relative to the repository, with slashes."""

    path: str
    line: int


Named = Iterator[tuple[str, int, bool]]  # distribution, line, exact

# Where nothing says more: every Python project has one, or will.
NOWHERE = Location(PROJECT, 1)


@dataclass(frozen=True)
class Pin:
    """A line that names a distribution. `exact`: it alone decides the version."""

    distribution: str
    location: Location
    exact: bool


def distribution_of(subject: str) -> str:
    """The distribution of a kernel op, as PyTorch writes it, or of a probe.

    >>> distribution_of("flash_attn._flash_attn_forward.default"), distribution_of("aten.bmm.default")
    ('flash-attn', 'torch')
    """
    namespace = subject.partition(".")[0]
    return _DISTRIBUTIONS.get(namespace) or canonicalize_name(namespace.strip("_"))


def find(distribution: str, folder: Path) -> Location | None:
    """The line that pins a distribution in the project at `folder`; None where none names it."""
    return _find(distribution, pins(folder))


def locator(folder: Path | None) -> Callable[[str], Location]:
    """What tells for each distribution the line to show: its own pin, else that of torch, else where the
    project says what attncheck is to do. The files are read once. `folder`: None for no project."""
    if folder is None:
        return lambda distribution: NOWHERE
    known = pins(folder)
    fallback = _find("torch", known) or _configured(folder) or NOWHERE
    return lambda distribution: _find(distribution, known) or fallback


def _find(distribution: str, known: Iterable[Pin]) -> Location | None:
    """The line that alone decides the version, else the first that names it."""
    name = canonicalize_name(distribution)
    own = [pin for pin in known if pin.distribution == name]
    return next((pin.location for pin in own if pin.exact), own[0].location if own else None)


def pins(folder: Path) -> tuple[Pin, ...]:
    """Every line that names a distribution: the nearest folder first, what people write before lock files."""
    found: list[Pin] = []
    for place, root in _folders(folder):
        readers: list[tuple[Path, Callable[[str], Named]]] = [
            (place / PROJECT, _of_pyproject),
            *((path, _of_requirements) for path in _requirement_files(place)),
            *((place / name, _of_lock) for name in LOCK_FILES),
            (place / BASELINE, _of_baseline),
        ]
        for path, read in readers:
            shown = path.relative_to(root).as_posix()
            found += (
                Pin(name, Location(shown, line), exact) for name, line, exact in read(_text(path))
            )
    return tuple(found)


def _configured(folder: Path) -> Location | None:
    """The line of the attncheck table or dependency, else the first of the baseline or pyproject.toml."""
    for place, root in _folders(folder):
        for name, wanted in ((PROJECT, r"\[tool\.attncheck\b|.*[\"']attncheck\b"), (BASELINE, "")):
            shown = (place / name).relative_to(root).as_posix()
            for number, line in enumerate(_lines(_text(place / name)), 1):
                if re.match(wanted, line):
                    return Location(shown, number)
    for place, root in _folders(folder):
        if _text(place / PROJECT):
            return Location((place / PROJECT).relative_to(root).as_posix(), 1)
    return None


# --- files ---------------------------------------------------------------------------------------


def _folders(folder: Path) -> list[tuple[Path, Path]]:
    """The folder and those above it up to the root of the repository, each with that root.

    CI shows a path relative to the repository; where there is none, the folder itself is taken for it.
    """
    folder = folder.absolute()
    above = [folder, *folder.parents]
    depth = next((i for i, place in enumerate(above) if os.path.lexists(place / ".git")), 0)
    return [(place, above[depth]) for place in above[: depth + 1]]


def _requirement_files(folder: Path) -> list[Path]:
    try:
        found = [path for pattern in REQUIREMENTS for path in sorted(folder.glob(pattern))]
    except OSError:
        return []
    return found[:MAX_FILES]


def _text(path: Path) -> str:
    """The text of a regular file of ordinary size; else empty. (At symbolic links GitHub shows nothing.)"""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            return ""
        return path.read_bytes()[:MAX_BYTES].decode("utf-8", errors="replace")
    except (OSError, ValueError):
        return ""


def _lines(text: str) -> list[str]:
    """As editors and GitHub count them: `str.splitlines` breaks at form feeds and others, too."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n") if text else []


# --- what each file says -------------------------------------------------------------------------


def _of_pyproject(text: str) -> Named:
    document = _toml(text)
    lines = [line if not line.lstrip().startswith("#") else "" for line in _lines(text)]
    for written in itertools.islice(_requirement_strings(document), MAX_REQUIREMENTS):
        named = _requirement(written)
        # Up to the first double quote, which TOML may write with a backslash before it.
        quoted = re.compile("[\"']" + re.escape(written.split('"')[0].rstrip("'")))
        line = next((i for i, line in enumerate(lines, 1) if quoted.search(line)), 0)
        if named and line:
            yield named[0], line, named[1]
    yield from _of_poetry(document, lines)


def _requirement_strings(document: Mapping[str, Any]) -> Iterator[str]:
    """The requirements that a pyproject.toml lists, as they are written, without those of the build."""
    project = _table(document, "project")
    tool = _table(document, "tool")
    lists: list[Any] = [project.get("dependencies")]
    groups = (
        _table(project, "optional-dependencies"),
        _table(document, "dependency-groups"),
        _table(_table(tool, "pdm"), "dev-dependencies"),
    )
    for group in groups:
        lists += group.values()
    lists += (value for key, value in _table(tool, "uv").items() if key.endswith("dependencies"))
    for written in lists:
        if isinstance(written, list):
            yield from (item for item in written if isinstance(item, str))


def _of_poetry(document: Mapping[str, Any], lines: list[str]) -> Named:
    """Poetry has a table, name = "version" or { version = ... }, for each group."""
    poetry = _table(_table(document, "tool"), "poetry")
    groups = [_table(poetry, "dependencies"), _table(poetry, "dev-dependencies")]
    groups += [_table(group, "dependencies") for group in _table(poetry, "group").values()]
    for name, value in (item for group in groups for item in group.items()):
        key = re.compile(rf"\s*[\"']?{re.escape(name)}[\"']?\s*=\s*[\"'{{\[]")
        version = value.get("version", "") if isinstance(value, dict) else value
        inside = False
        for number, line in enumerate(lines, 1):
            if line.startswith("["):
                inside = line.startswith("[tool.poetry.") and "dependencies]" in line
            elif inside and key.match(line):
                exact = isinstance(version, str) and bool(
                    re.fullmatch(r"(==?)?\s*\d[\w.+]*", version)
                )
                yield canonicalize_name(name), number, exact
                break


def _of_requirements(text: str) -> Named:
    for number, line in enumerate(_lines(text), 1):
        # Options of one requirement (--hash) and comments follow a blank; a backslash goes on.
        written = re.split(r"\s+(?:#|--)", line.strip())[0].rstrip("\\ ")
        if written and not written.startswith(("#", "-")) and (named := _requirement(written)):
            yield named[0], number, named[1]


_LOCK_NAME = re.compile(r'name = "([^"]+)"\s*$')


def _of_lock(text: str) -> Named:
    """The line of the version, which is what a bump changes, of each `[[package]]`; else that of the name."""
    lines = _lines(text)
    for number, line in enumerate(lines, 1):
        if found := _LOCK_NAME.match(line):
            following = lines[number : number + 2]
            version = next((i for i, x in enumerate(following, 1) if x.startswith("version =")), 0)
            yield canonicalize_name(found[1]), number + version, True


def _of_baseline(text: str) -> Named:
    """A baseline says what it was written with; it decides nothing."""
    for number, line in enumerate(_lines(text), 1):
        if line.strip().startswith('"entries"'):
            return
        if found := re.match(r'\s+"([A-Za-z0-9][\w.-]*)": "', line):
            yield canonicalize_name(found[1]), number, False


def _requirement(written: str) -> tuple[str, bool] | None:
    """The distribution that a requirement names, and whether it pins one version; None where it is none.

    >>> _requirement("torch==2.13.0"), _requirement("torch>=2.6")
    (('torch', True), ('torch', False))
    """
    if re.match(r"(https?|file)://", written):
        try:
            name, _, _, _ = parse_wheel_filename(written.partition("#")[0].rpartition("/")[2])
        except InvalidWheelFilename:
            return None
        return name, True
    try:
        requirement = Requirement(written)
    except InvalidRequirement:
        return None
    operators = {s.operator for s in requirement.specifier}
    exact = bool(operators & {"==", "==="}) or requirement.url is not None
    return canonicalize_name(requirement.name), exact


def _toml(text: str) -> Mapping[str, Any]:
    try:
        document: Mapping[str, Any] = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError):
        return {}
    return document


def _table(document: Any, key: str) -> Mapping[str, Any]:
    value = document.get(key) if isinstance(document, Mapping) else None
    return value if isinstance(value, Mapping) else {}
