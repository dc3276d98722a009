"""Which distribution a module belongs to: flash-attn and flash-attn-triton both install a `flash_attn`.

Read off the lists of files that installers leave behind; nothing is imported, and torch never.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from pathlib import Path

from packaging.utils import canonicalize_name

_TOP_LEVEL = re.compile(r"^([A-Za-z_]\w*)(?:/__init__)?\.py,", re.M)


@functools.cache
def foreign(distribution: str) -> str:
    """Why the modules of an installed distribution are not, or not only, its own; '' where they are.

    Says nothing of namespace packages (flash-attn-4 lives inside `flash_attn`) and of distributions
    without a list of files (an editable install). Raises PackageNotFoundError.
    """
    own = importlib.metadata.distribution(distribution)
    for module in sorted(set(_TOP_LEVEL.findall(own.read_text("RECORD") or ""))):
        file = _file(module)
        if file is None:
            continue
        owners = _owners(file)
        if _label(own) not in owners:
            whose = " and ".join(owners) or "no installed distribution"
            return f"`import {module}` takes {file}, which belongs to {whose}, not to {_label(own)}"
        if len(owners) > 1:
            return (
                f"{' and '.join(owners)} both install {module}, one over the other: whose functions "
                f"`import {module}` gives is chance; uninstall one, then reinstall the other"
            )
    return ""


def owner_of_module(module: str) -> str:
    """The distribution, with its version, that `import module` would take; '' if none is known."""
    file = _file(module)
    return " and ".join(_owners(file)) if file else ""


def _file(module: str) -> Path | None:
    """What `import module` (a top-level name) would load, or None."""
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # a module made in memory: a stand-in
        return None
    return Path(spec.origin).resolve() if spec and spec.origin and spec.has_location else None


def _owners(file: Path) -> tuple[str, ...]:
    found = set()
    for distribution in importlib.metadata.distributions():
        root = Path(str(distribution.locate_file(""))).resolve()
        record = distribution.read_text("RECORD")
        if record and root in file.parents:
            listed = f"\n{file.relative_to(root).as_posix()},"
            if listed in f"\n{record}":
                found.add(_label(distribution))
    return tuple(sorted(found))


def _label(distribution: importlib.metadata.Distribution) -> str:
    return f"{canonicalize_name(distribution.metadata['Name'])} {distribution.version}"
