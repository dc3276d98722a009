"""Why the compiled parts of a distribution will not load, told from their files; nothing is loaded."""

from __future__ import annotations

import functools
import os
import platform
import re
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from attncheck import knowledge
from attncheck.static import elf, faults, symbols
from attncheck.static.faults import Cause, Fault
from attncheck.static.installed import Distribution, Installation

# Not built against PyTorch, loaded only where something calls for them, or too many to be worth the time.
PASSED_OVER = ("numpy", "triton")
_MODULE = re.compile(r"(?P<module>[^.]+)(?:\.(?P<tag>(?:cpython-|abi3|pypy)[^.]*))?\.so$")
_SYSTEM_FOLDERS = ("/lib64", "/usr/lib64", "/lib", "/usr/lib", "/usr/local/lib")
# Whose symbol versions say how new a system is.
_OF_THE_SYSTEM = ("libc.so.6", "libm.so.6", "libstdc++.so.6", "libpthread.so.0")


@functools.lru_cache(maxsize=64)
def of(installation: Installation, name: str) -> tuple[Fault, ...]:
    """The faults of one distribution; () where every part loads, or none can be read."""
    distribution = installation.get(name)
    if distribution is None or distribution.folder is None or not sys.platform.startswith("linux"):
        return ()
    if name in installation.hollow or name in PASSED_OVER or name.startswith("nvidia-"):
        return ()
    found = dict.fromkeys(_faults(installation, distribution))
    return tuple(found)


def held_against_torch(installation: Installation, name: str) -> bool:
    """Whether compiled parts of a distribution were there to be held against those of PyTorch."""
    distribution, torch = installation.get(name), installation.torch
    if distribution is None or torch is None or torch.lib is None or name in installation.hollow:
        return False
    files = [file for files in _modules(distribution).values() for file in files]
    return any(elf.read(file) is not None for file in files)


def _faults(installation: Installation, distribution: Distribution) -> Iterator[Fault]:
    assert distribution.folder is not None
    search = Search(installation)
    modules = _modules(distribution)
    package = knowledge.of(distribution.name)
    for wanted in package.extensions if package else ():
        if wanted.replace(".", "/") not in modules:
            text = f"{wanted}, without which it does not import, was left out of the build"
            yield Fault(Cause.NOT_BUILT, wanted, text)
    for files in modules.values():
        loaded = [file for file in files if _for_python(file, installation.python)]
        if not loaded:
            made_for = " and ".join(sorted(_python_of(file) for file in files))
            text = f"{files[0].name} is for {made_for}, and this is Python {installation.python}"
            yield Fault(Cause.OTHER_PYTHON, files[0].name, text)
        for file in loaded[:1]:
            library = elf.read(file)
            if library is not None:
                where = file.relative_to(distribution.folder).as_posix()
                for fault in _of_library(library, search, distribution.name == "torch"):
                    yield Fault(fault.cause, fault.subject, f"{where}: {fault.text}")


def _modules(distribution: Distribution) -> Mapping[str, list[Path]]:
    """Shared libraries by the path of the module that they are, without what names their Python."""
    found: dict[str, list[Path]] = {}
    if distribution.folder is None:
        return found
    for file in _libraries(distribution):
        if match := _MODULE.match(file.name):
            path = distribution.folder / file
            if path.is_file():
                found.setdefault((file.parent / match["module"]).as_posix(), []).append(path)
    return found


def _libraries(distribution: Distribution) -> Iterable[PurePosixPath]:
    """As the list of installed files has them; without such a list, the modules that are known."""
    listed = distribution.libraries
    if distribution.name == "torch":
        # What `import torch` loads; the rest is loaded by it, or for tests.
        return [f for f in listed if f.match("torch/lib/libtorch*") or f.match("torch/lib/libc10*")]
    if listed or distribution.folder is None:
        return listed
    package = knowledge.of(distribution.name)
    return [
        PurePosixPath(path.relative_to(distribution.folder).as_posix())
        for module in (package.extensions if package else ())
        for path in distribution.folder.glob(f"{module.replace('.', '/')}.*so")
    ]


def _tag(file: Path) -> str:
    match = _MODULE.match(file.name)
    return (match["tag"] or "") if match else ""


def _for_python(file: Path, python: str) -> bool:
    tag = _tag(file)
    return tag in ("", "abi3") or tag.startswith(f"cpython-{python.replace('.', '')}-")


def _python_of(file: Path) -> str:
    """
    >>> _python_of(Path("flash_attn_2_cuda.cpython-310-x86_64-linux-gnu.so"))
    'Python 3.10'
    """
    match = re.match(r"cpython-(\d)(\d+)", _tag(file))
    return f"Python {match[1]}.{match[2]}" if match else _tag(file)


def _of_library(library: elf.Library, search: Search, of_torch: bool) -> Iterator[Fault]:
    machine = platform.machine()
    if library.machine != machine:
        text = f"it is for {library.machine}, and this machine is {machine}"
        yield Fault(Cause.OTHER_MACHINE, library.machine, text)
        return
    torch = search.torch
    version, cuda = (torch.version, torch.cuda) if torch else ("", None)
    for name in library.needed:
        if search.find(name, library) is None and search.can_tell(name):
            yield faults.missing_library(name, version, cuda)
    for name, wanted in library.versions:
        if name in _OF_THE_SYSTEM and search.lacks(name, wanted):
            yield faults.newer_system(name, wanted)
    if not of_torch and torch is not None and torch.lib is not None:
        yield from _undefined(library, search, version)


def _undefined(library: elf.Library, search: Search, torch: str) -> Iterator[Fault]:
    wanted = {name for name in elf.undefined(library.file) if symbols.of_torch(name)}
    left = {name for name in wanted if search.has_cuda or not symbols.of_cuda(name)}
    for file in search.definers(library):
        left -= elf.defined(file, left)
        if not left:
            return
    # The one that says most: of a known PyTorch, or at least of a C++ ABI.
    first = min(
        left, key=lambda n: (not symbols.built_for([n]), symbols.cxx11abi(n) is None, len(n), n)
    )
    yield faults.undefined(first, symbols.built_for(wanted), len(left), torch)


class Search:
    """Where a library of one environment finds the others, as the loader and PyTorch's preloading do it."""

    def __init__(self, installation: Installation) -> None:
        self.torch = installation.torch
        lib = self.torch.lib if self.torch else None
        self._brought = {file.name: file for folder in _brought(lib) for file in _files(folder)}
        self._versions: dict[str, frozenset[str]] = {}

    @property
    def has_cuda(self) -> bool:
        return "libtorch_cuda.so" in self._brought

    def find(self, name: str, library: elf.Library) -> Path | None:
        if name in self._brought:
            return self._brought[name]
        own = [p.replace("$ORIGIN", str(library.file.parent)) for p in library.paths]
        own += os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
        for folder in [*filter(None, own), *_SYSTEM_FOLDERS, f"{sys.base_prefix}/lib"]:
            if Path(folder, name).is_file():
                return Path(folder, name)
        return _system_libraries().get(name)

    def can_tell(self, name: str) -> bool:
        """Without the loader's own index of this system, only what PyTorch brings can be missed."""
        return bool(_system_libraries()) or name.startswith(
            ("libcuda", "libcublas", "libc10", "libtorch")
        )

    def lacks(self, name: str, version: str) -> bool:
        """Whether a library of this system is too old to have a symbol version."""
        if name not in self._versions:
            file = _system_libraries().get(name)
            self._versions[name] = elf.version_names(file) if file else frozenset()
        return bool(self._versions[name]) and version not in self._versions[name]

    def definers(self, library: elf.Library) -> Iterator[Path]:
        """Libraries that may define its symbols: PyTorch's, and those that it asks for."""
        for name in sorted(self._brought):
            if name.startswith(("libc10", "libtorch")):
                yield self._brought[name]
        for name in library.needed:
            file = self.find(name, library)
            if file is not None and name not in self._brought and name not in _OF_THE_SYSTEM:
                yield file


def _brought(lib: Path | None) -> Iterator[Path]:
    """Folders of libraries that `import torch` loads: its own, and those of NVIDIA's wheels."""
    if lib is None:
        return
    yield lib
    site = lib.parent.parent
    yield from sorted(site.glob("nvidia/*/lib"))
    yield from sorted(site.glob("cusparselt/lib"))


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in folder.iterdir() if ".so" in file.name)


@functools.cache
def _system_libraries(cache: Path = Path("/etc/ld.so.cache")) -> Mapping[str, Path]:
    """The loader's own index (ldconfig): name -> file; empty where it has none that can be read."""
    try:
        data = cache.read_bytes()
    except OSError:
        return {}
    start = data.find(b"glibc-ld.so.cache1.1")
    if start < 0:
        return {}
    (count,) = struct.unpack_from("<I", data, start + 20)
    found: dict[str, Path] = {}
    for i in range(count):
        flags, key, value = struct.unpack_from("<III", data, start + 48 + 24 * i)
        if flags & 0xFF00 in (0x0300, 0x0A00):  # 64 bit: x86-64, aarch64
            name, file = (data[start + at : data.index(b"\0", start + at)] for at in (key, value))
            found.setdefault(name.decode(), Path(file.decode()))
    return found
