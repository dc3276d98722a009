"""attncheck's own code, where other environments can import it and nothing else of this one.

The folder that attncheck lies in here may be a site-packages with another torch beside it. So its files are
copied, once for each state of them: a checkout that is edited while a matrix runs does not mix into it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import attncheck
from attncheck import installer, plugins, provision
from attncheck.matrix import outcomes


def copy() -> Path:
    """The folder to put on PYTHONPATH, with the package `attncheck` and its probes in it."""
    package, probes = Path(attncheck.__file__).resolve().parent, plugins.builtin_dir("probes")
    files = {
        **_files(package, "", without=("probes", "reports")),
        **_files(probes, "probes/"),
    }
    digest = outcomes.digest_of(files)
    root = provision.cache_root() / "matrix"
    folder = root / f"attncheck-{digest}"
    marker = {"package": "attncheck", "version": digest}
    if not installer.complete(folder, marker):
        with installer.filled_atomically(folder, marker, "a copy of attncheck") as target:
            for name, file in files.items():
                place = target / "attncheck" / name
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
    return folder


def _files(folder: Path, prefix: str, without: Sequence[str] = ()) -> dict[str, Path]:
    """The files in a folder, by their path in it."""
    names = {file: file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()}
    left_out = {"__pycache__", *without}
    return {
        prefix + name.as_posix(): file
        for file, name in names.items()
        if not left_out.intersection(name.parts[:1] + name.parts[-2:-1])
    }


def placed(file: Path, copied: Path) -> Path:
    """Where a probe file lies for the workers: a built-in one in the copy, the user's where it is."""
    if file.parent == plugins.builtin_dir("probes"):
        return copied / "attncheck" / "probes" / file.name
    return file
