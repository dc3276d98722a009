"""Environments made up in a folder, as installers leave them, and tiny compiled extensions; none is loaded.

Names of C++ functions are written as C functions of the mangled name: to a linker they are the same.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

OLD_ERROR = "_ZN3c105ErrorC2ENS_14SourceLocationESs"
NEW_ERROR = (
    "_ZN3c105ErrorC2ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"
)
SET_DEVICE_OLD, SET_DEVICE_NEW = "_ZN3c104cuda9SetDeviceEa", "_ZN3c104cuda9SetDeviceEab"

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def install(
    site: Path, name: str, version: str, *files: str, requires: Sequence[str] = (), url: str = ""
) -> None:
    """A distribution's metadata, as pip writes it; `files` that are not there yet are made, empty."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {text}" for text in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    if url:
        (info / "direct_url.json").write_text(f'{{"url": "{url}", "archive_info": {{}}}}')
    for file in files:
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        if not (site / file).exists():
            (site / file).write_text("")
    (info / "RECORD").write_text(
        "".join(f"{file},,\n" for file in (*files, f"{info.name}/METADATA"))
    )


def compile_library(
    file: Path,
    defines: Iterable[str] = (),
    needs: Iterable[str] = (),
    links: Iterable[Path] = (),
    soname: str = "",
    version: str = "",
) -> Path:
    """A shared library that defines functions (under a symbol `version`), and calls others."""
    file.parent.mkdir(parents=True, exist_ok=True)
    source = file.with_suffix(".c")
    declared = "".join(f"void {name}(void);\n" for name in needs)
    called = "".join(f"  {name}();\n" for name in needs)
    own = "".join(f"void {name}(void) {{}}\n" for name in defines)
    source.write_text(f"{declared}{own}void entry_of_{abs(hash(file))}(void) {{\n{called}}}\n")
    command = ["cc", "-shared", "-fPIC", "-Wl,--no-as-needed", "-o", str(file), str(source)]
    command += [str(link) for link in links]
    if soname:
        command.append(f"-Wl,-soname,{soname}")
    if version:
        script = file.with_suffix(".map")
        script.write_text(f"{version} {{ global: *; }};\n")
        command.append(f"-Wl,--version-script,{script}")
    subprocess.run(command, check=True)
    source.unlink()
    return file


def torch(
    site: Path,
    version: str,
    *,
    cuda: str | None,
    defines: Iterable[str] = (NEW_ERROR,),
    cuda_defines: Iterable[str] = (),
) -> None:
    """A PyTorch of two libraries (three where it has CUDA), its build's record, and CUDA's runtime."""
    lib = site / "torch" / "lib"
    compile_library(lib / "libc10.so", defines, soname="libc10.so")
    compile_library(lib / "libtorch_cpu.so", soname="libtorch_cpu.so")
    files = ["torch/__init__.py", "torch/lib/libc10.so", "torch/lib/libtorch_cpu.so"]
    if cuda:
        for name in ("libtorch_cuda.so", "libc10_cuda.so"):
            compile_library(lib / name, cuda_defines if "c10" in name else (), soname=name)
            files.append(f"torch/lib/{name}")
        runtime = f"libcudart.so.{cuda.partition('.')[0]}"
        compile_library(site / "nvidia" / "cuda_runtime" / "lib" / runtime, soname=runtime)
    record = f"cuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n"
    (site / "torch" / "version.py").write_text(f"__version__ = {version!r}\n{record}")
    install(site, "torch", version, *files)
