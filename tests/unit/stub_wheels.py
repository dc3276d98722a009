"""Wheels that hold nothing but their names, and a torch that is the one of this environment.

`pip` and `uv` install them from a folder, without a network and in seconds: an environment of `attncheck
matrix` is then made by the real installers, and its workers run the real torch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sysconfig
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from attncheck import provision
from attncheck.matrix import environments


def wheel(
    folder: Path,
    name: str,
    version: str,
    files: Mapping[str, str] | None = None,
    entry_points: str = "",
) -> Path:
    """A wheel of these files, by their path in site-packages."""
    stem = f"{canonicalize_name(name).replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    contents = {
        **(files or {}),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    if entry_points:
        contents[f"{info}/entry_points.txt"] = entry_points
    record = "".join(f"{path},{_hash(text)},{len(text)}\n" for path, text in contents.items())
    contents[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in contents.items():
            archive.writestr(name, text)
    return path


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256={urlsafe_b64encode(digest).rstrip(b'=').decode()}"


def torch_here() -> str:
    return importlib.metadata.version("torch")


def wheelhouse(folder: Path, without: Iterable[str] = ()) -> Path:
    """A folder with all that an environment of a matrix asks for; torch is that of this environment."""
    folder.mkdir(parents=True, exist_ok=True)
    here = sysconfig.get_path("purelib")
    if "torch" not in without:
        # From 2.15 on torch finds its own backends (gloo) by its entry points.
        points = importlib.metadata.distribution("torch").read_text("entry_points.txt") or ""
        wheel(folder, "torch", torch_here(), {"torch_of_the_tests.pth": f"{here}\n"}, points)
    asked = [*environments.BESIDE_TORCH, *environments.requirements_of_attncheck()]
    for text in [*asked, *provision.BUILD_REQUIREMENTS]:
        name = Requirement(text).name
        if name not in without:
            wheel(folder, name, _version(name))
    return folder


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "999"  # nothing here imports it
