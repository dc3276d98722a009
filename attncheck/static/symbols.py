"""What the name of a C++ symbol says: of what it is, of which C++ ABI, and of which PyTorch."""

from __future__ import annotations

import re
from collections.abc import Iterable

from packaging.version import Version

from attncheck import knowledge

# Scopes of PyTorch's own libraries, as they stand in front of a mangled name; vtables and typeinfo, too.
_TORCH = re.compile(r"_Z(?:T[VTIS])?N?[KVRO]*(?:3c10|2at|5torch|6caffe2)")
# The stable C ABI (torch/csrc/stable, torch/csrc/inductor).
_STABLE = ("aoti_torch_", "torch_")
# A string type is the one of before C++11 where it is written Ss; the one since then has its tag in its name.
_NEW_STRING = ("__cxx11", "B5cxx11")
_CONSTRUCTORS, _DESTRUCTORS = re.compile("C[123]"), re.compile("D[012]")


def of_torch(name: str) -> bool:
    """Whether only PyTorch's own libraries can define it."""
    return name.startswith(_STABLE) or _TORCH.match(name) is not None


def of_cuda(name: str) -> bool:
    """Whether, of PyTorch's libraries, those of a CUDA build define it."""
    return "4cuda" in name or "CUDA" in name or (name.startswith(_STABLE) and "cuda" in name)


def readable(name: str) -> str:
    """The qualified name in a mangled one, without arguments; a name that is not mangled as it is.

    >>> readable("_ZN3c105ErrorC2ENS_14SourceLocationESs"), readable("PyList_New")
    ('c10::Error::Error', 'PyList_New')
    """
    match = re.match(r"_Z(?:T[VTIS])?(N?)[KVRO]*", name)
    if match is None:
        return name
    nested, at, parts = bool(match[1]), match.end(), list[str]()
    while at < len(name):
        if name.startswith("St", at):
            parts, at = [*parts, "std"], at + 2
        elif name[at].isdigit():
            length = re.compile(r"\d+").match(name, at)
            assert length is not None
            end = length.end() + int(length[0])
            parts, at = [*parts, name[length.end() : end]], end
        elif parts and _CONSTRUCTORS.match(name, at):
            parts, at = [*parts, parts[-1]], at + 2
        elif parts and _DESTRUCTORS.match(name, at):
            parts, at = [*parts, f"~{parts[-1]}"], at + 2
        else:
            break
        if not nested and parts[-1:] != ["std"]:
            break
    return "::".join(parts) or name


def cxx11abi(name: str) -> bool | None:
    """Of which C++ ABI a symbol is, by the string type in it; None where it has none.

    >>> cxx11abi("_ZN3c105ErrorC2ENS_14SourceLocationESs"), cxx11abi("_ZN3c104cuda9SetDeviceEa")
    (False, None)
    """
    if any(tag in name for tag in _NEW_STRING):
        return True
    return False if "Ss" in _without_names(name) else None


def _without_names(name: str) -> str:
    """A mangled name less its identifiers and back-references: the grammar between them."""
    kept, at = [], 0
    while at < len(name):
        if match := re.compile(r"S[0-9A-Z]*_").match(name, at):
            at = match.end()
        elif match := re.compile(r"\d+").match(name, at):
            at = match.end() + int(match[0])
        else:
            kept.append(name[at])
            at += 1
    return "".join(kept)


def built_for(names: Iterable[str]) -> str:
    """Which PyTorch a library was built for, by the symbols that it needs of it, in words; '' where they do
    not tell. Known bounds are those of `knowledge/torch.toml`.

    >>> built_for(["_ZN3c104cuda9SetDeviceEa", "_ZNK3c1011StorageImpl27throw_data_ptr_access_errorEv"])
    'torch 2.6 to 2.7'
    """
    names = set(names)
    torch = knowledge.of("torch")
    told = [s for s in (torch.symbols if torch else ()) if s.name in names]
    lowest = max((Version(s.since) for s in told if s.since), default=None)
    highest = min((Version(s.last) for s in told if s.last), default=None)
    if lowest is not None and highest is not None and lowest > highest:
        return ""
    if lowest == highest:
        return f"torch {lowest}" if lowest else ""
    if lowest is None or highest is None:
        return f"torch {lowest} or newer" if lowest else f"torch {highest} or older"
    return f"torch {lowest} to {highest}"


def abi_in_words(new: bool) -> str:
    return "the C++11 ABI (cxx11abiTRUE)" if new else "the C++ ABI of before C++11 (cxx11abiFALSE)"
