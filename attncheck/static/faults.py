"""Why a compiled extension does not load: the kinds, and how to tell them from what a loader said."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from attncheck.static import symbols


class Cause(str, Enum):
    UNDEFINED_SYMBOL = "undefined_symbol"
    OTHER_CUDA = "other_cuda"
    MISSING_LIBRARY = "missing_library"
    OTHER_PYTHON = "other_python"
    NEWER_SYSTEM = "newer_system"
    OTHER_MACHINE = "other_machine"
    NOT_BUILT = "not_built"
    NO_DRIVER = "no_driver"


WORDS = {
    Cause.UNDEFINED_SYMBOL: "built against another PyTorch or another C++ ABI",
    Cause.OTHER_CUDA: "built for another CUDA",
    Cause.MISSING_LIBRARY: "a library that it needs is missing",
    Cause.OTHER_PYTHON: "built for another Python",
    Cause.NEWER_SYSTEM: "built on a newer system",
    Cause.OTHER_MACHINE: "built for another processor",
    Cause.NOT_BUILT: "it is not there",
    Cause.NO_DRIVER: "the NVIDIA driver is not on this machine",
}


@dataclass(frozen=True)
class Fault:
    """`subject`: the symbol, library or file that it is about; `text`: one sentence, without a full stop."""

    cause: Cause
    subject: str
    text: str


# Libraries of CUDA whose number is that of CUDA itself (libcufft.so.11 is of CUDA 12).
_CUDA = re.compile(r"(libcudart|libcublas|libcublasLt|libnvrtc)\.so\.(\d+)")
_TORCH_CUDA = re.compile(r"lib(?:c10|torch)_cuda\b")
_TORCH_HIP = re.compile(r"lib(?:(?:c10|torch)_hip|amdhip64)\b")
_TORCH = re.compile(r"lib(?:c10|torch\w*)\.so")


def missing_library(name: str, torch: str = "", cuda: str | None = None) -> Fault:
    """The fault of a library that is not found. `torch` (its version) and `cuda` (what it was built with,
    '' for none, None for unknown) are what is here."""
    here = f"torch {torch} here" if torch else "the installed torch"
    if match := _CUDA.match(name):
        has = f", and {here} brings CUDA {cuda}" if cuda else ", which is not found"
        has = f", and {here} is a build without CUDA" if cuda == "" else has
        return Fault(Cause.OTHER_CUDA, name, f"it needs {name} of CUDA {match[2]}{has}")
    if _TORCH_CUDA.match(name):
        text = f"it was built for CUDA: it needs {name}, and {here} is a build without CUDA"
        return Fault(Cause.OTHER_CUDA, name, text)
    if _TORCH_HIP.match(name):
        return Fault(Cause.OTHER_CUDA, name, f"it was built for ROCm: it needs {name}")
    if name.startswith("libcuda.so"):
        text = f"it needs {name}, which comes with the NVIDIA driver, and none is on this machine"
        return Fault(Cause.NO_DRIVER, name, text)
    if _TORCH.match(name):
        return Fault(Cause.MISSING_LIBRARY, name, f"it needs {name} of PyTorch, which is not there")
    return Fault(Cause.MISSING_LIBRARY, name, f"it needs {name}, which is not found")


def undefined(name: str, built_for: str = "", count: int = 1, torch: str = "") -> Fault:
    """The fault of `count` symbols that nothing defines, `name` among them. `built_for`: what the library as
    a whole was built for, where more than this symbol tells."""
    here = f"torch {torch}" if torch else "the installed torch"
    abi = symbols.cxx11abi(name)
    for_what = [built_for or symbols.built_for([name])]
    for_what += [symbols.abi_in_words(abi)] if abi is not None else []
    told = " and ".join(text for text in for_what if text)
    more = f" and {count - 1} more" if count > 1 else ""
    text = f"it needs {symbols.readable(name)}{more}, which {here} does not define"
    if not symbols.of_torch(name):
        text = f"it needs {symbols.readable(name)}{more}, which nothing defines"
    return Fault(Cause.UNDEFINED_SYMBOL, name, text + (f": built for {told}" if told else ""))


def newer_system(library: str, version: str) -> Fault:
    text = f"it needs {version}, which {library} of this system does not have"
    return Fault(Cause.NEWER_SYSTEM, version, f"{text}: it was built on a newer one")


_VERSION = re.compile(r"(\S*?([^/\s]+)): version [`']([^']+)' not found")
_UNDEFINED = re.compile(
    r"undefined symbol: ([\w.@]+)|[Ss]ymbol not found(?: in flat namespace)?:? '?_?(\w+)"
)
_NOT_OPENED = re.compile(r"([^\s/:]+\.so[\w.]*): cannot open shared object file")
_NO_MODULE = re.compile(r"No module named ['\"]([\w.]+)")


def told_by(message: str) -> Fault | None:
    """What the text of an ImportError or OSError says; None where it says none of it."""
    if match := _UNDEFINED.search(message):
        return undefined((match[1] or match[2]).partition("@")[0])
    if match := _VERSION.search(message):
        return newer_system(match[2], match[3])
    if match := _NOT_OPENED.search(message):
        return missing_library(match[1])
    if "wrong ELF class" in message or "invalid ELF header" in message:
        return Fault(Cause.OTHER_MACHINE, "", "its file is not for this processor")
    if match := _NO_MODULE.search(message):
        text = f"there is no {match[1]} for this Python: it was left out of the build, or built for another"
        return Fault(Cause.NOT_BUILT, match[1], text)
    if "DLL load failed" in message:
        return Fault(
            Cause.MISSING_LIBRARY, "", "a library that it needs is not found, or does not fit"
        )
    return None
