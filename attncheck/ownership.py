"""Which distribution a module belongs to: flash-attn and flash-attn-triton both install a `flash_attn`.

Read off the lists of files that installers leave behind; nothing is imported, and torch never.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.utils import canonicalize_name

_TOP_LEVEL = re.compile(r"^([A-Za-z_]\w*)(?:/__init__)?\.py,", re.M)


@functools.cache
def foreign(distribution: str, folders: tuple[str, ...] | None = None) -> str:
    """Why the modules of an installed distribution are not, or not only, its own; '' where they are.

    `folders`: where the environment it is installed in looks for packages; this one's where None. Says
    nothing of namespace packages (flash-attn-4 lives inside `flash_attn`) and of distributions without a
    list of files (an editable install). Raises PackageNotFoundError.
    """
    own = next(iter(_distributions(folders, distribution)), None)
    if own is None:
        raise importlib.metadata.PackageNotFoundError(distribution)
    for module in sorted(set(_TOP_LEVEL.findall(own.read_text("RECORD") or ""))):
        file = _file(module, folders)
        if file is None:
            continue
        owners = _owners(file, folders)
        if _label(own) not in owners:
            whose = " and ".join(owners) or "no installed distribution"
            return f"`import {module}` takes {file}, which belongs to {whose}, not to {_label(own)}"
        if len(owners) > 1 and not _alike(owners.values()):
            return (
                f"{' and '.join(owners)} both install {module}, one over the other: whose functions "
                f"`import {module}` gives is chance; uninstall one, then reinstall the other"
            )
    return ""


def owner_of_module(module: str) -> str:
    """The distribution, with its version, that `import module` would take; '' if none is known."""
    file = _file(module)
    return " and ".join(_owners(file)) if file else ""


def _distributions(
    folders: tuple[str, ...] | None, name: str | None = None
) -> Iterable[importlib.metadata.Distribution]:
    path = sys.path if folders is None else list(folders)
    return importlib.metadata.distributions(name=name, path=path)


def _file(module: str, folders: tuple[str, ...] | None = None) -> Path | None:
    """What `import module` (a top-level name) would load, or None."""
    try:
        if folders is None:
            spec = importlib.util.find_spec(module)
        else:
            spec = importlib.machinery.PathFinder.find_spec(module, list(folders))
    except ValueError:  # a module made in memory: a stand-in
        return None
    # Not resolved: an installer may have linked each file to its cache, which is nobody's.
    return Path(spec.origin).absolute() if spec and spec.origin and spec.has_location else None


def _owners(file: Path, folders: tuple[str, ...] | None = None) -> dict[str, str]:
    """Who has the file in its list, and the digest that stands there ('' where none does)."""
    found = {}
    for distribution in _distributions(folders):
        root = Path(str(distribution.locate_file(""))).absolute()
        record = distribution.read_text("RECORD")
        if record and root in file.parents:
            _, listed, after = f"\n{record}".partition(f"\n{file.relative_to(root).as_posix()},")
            if listed:
                found[_label(distribution)] = after.partition(",")[0]
    return dict(sorted(found.items()))


def _alike(digests: Iterable[str]) -> bool:
    """Whether they are known to be one content: NVIDIA's wheels each had the same empty `nvidia`."""
    return len(unique := set(digests)) == 1 and "" not in unique


def _label(distribution: importlib.metadata.Distribution) -> str:
    return f"{canonicalize_name(distribution.metadata['Name'])} {distribution.version}"
