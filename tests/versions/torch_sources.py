"""The Python sources of a torch release, fetched through pip into attncheck's cache: 67 to 140 MB to download
each, about 50 MB kept. A mirror that pip knows of is used."""

from __future__ import annotations

import os
import sys
import tempfile
import zipfile
from pathlib import Path

from attncheck import installer, provision
from attncheck.errors import UserError

# Their wheels have the same Python sources (the first two held against each other for 2.6.0, 2.9.1, 2.15.0);
# the first is the smallest. A mirror may have one alone.
PLATFORMS = ("macosx_14_0_arm64", "manylinux_2_28_aarch64", "manylinux_2_28_x86_64", "win_amd64")
DOWNLOAD_SECONDS = 1800.0


def sources_of(version: str) -> Path:
    """The folder `torch` of that release. Raises UserError, which says why, where it cannot be had."""
    folder = provision.cache_root() / "torch-sources" / version
    marker = {"torch": version}
    if not installer.complete(folder, marker):
        what = f"the sources of torch {version}"
        with (
            installer.filled_atomically(folder, marker, what) as new,
            tempfile.TemporaryDirectory(dir=new.parent) as downloads,
        ):
            _unpack(_download(version, Path(downloads)), new)
    return folder / "torch"


def _download(version: str, folder: Path) -> Path:
    refusals = []
    for platform in PLATFORMS:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
        ]
        command += ["--no-input", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
        command += ["--python-version", "3.11", "--platform", platform, "-d", str(folder)]
        command += [f"torch=={version}"]
        try:
            installer.run(command, f"torch {version}", os.environ, timeout=DOWNLOAD_SECONDS)
        except UserError as error:
            refusals.append(f"{platform}: {error}")
            continue
        return next(folder.glob("*.whl"))
    raise UserError(f"The sources of torch {version} cannot be had. {' '.join(refusals)}")


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [
            n for n in archive.namelist() if n.startswith("torch/") and n.endswith((".py", ".pyi"))
        ]
        archive.extractall(folder, names)
