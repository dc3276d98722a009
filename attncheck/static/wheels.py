"""What a wheel's name says it was built for, and whether there is one for the PyTorch that is here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from attncheck import knowledge
from attncheck.static.installed import Distribution, Installation, Torch
from attncheck.static.symbols import abi_in_words

_TAG = re.compile(r"(?:cu(?P<cuda>\d+))?torch(?P<torch>\d+\.\d+)cxx11abi(?P<abi>true|false)", re.I)
_PYTHON = re.compile(r"-cp(\d)(\d+)-")


@dataclass(frozen=True)
class Tag:
    """`cu12torch2.6cxx11abiFALSE`: what flash-attn's wheels have behind their version. `cuda`: its major
    version; `python`: major.minor; '' where the name does not say."""

    text: str
    torch: str
    cuda: str
    cxx11abi: bool
    python: str = ""

    def differences(self, torch: Torch, python: str) -> list[str]:
        """In what this environment is another, in words."""
        found = []
        if self.torch != torch.minor:
            found.append(f"torch {self.torch}, and torch {torch.version} is here")
        if torch.cuda is not None and self.cuda and self.cuda != torch.cuda.partition(".")[0]:
            here = f"torch is built with CUDA {torch.cuda}" if torch.cuda else "torch has no CUDA"
            found.append(f"CUDA {self.cuda}, and {here}")
        if torch.cxx11abi is not None and self.cxx11abi != torch.cxx11abi:
            found.append(
                f"{abi_in_words(self.cxx11abi)}, and torch has {abi_in_words(torch.cxx11abi)}"
            )
        if self.python and self.python != python:
            found.append(f"Python {self.python}, and this is Python {python}")
        return found


def tag(distribution: Distribution) -> Tag | None:
    """The tag in its version, or in the name of the wheel that it was installed from."""
    for text in (distribution.version, distribution.origin):
        if match := _TAG.search(text):
            python = _PYTHON.search(distribution.origin)
            return Tag(
                text=match[0],
                torch=match["torch"],
                cuda=(match["cuda"] or "")[:2],
                cxx11abi=match["abi"].lower() == "true",
                python=f"{python[1]}.{python[2]}" if python else "",
            )
    return None


def described(package: knowledge.Package, version: str) -> knowledge.Wheels | None:
    """The wheels that are known of a version."""
    return next((w for w in package.wheels if w.applies_to(version)), None)


def lacking(wheels: knowledge.Wheels, torch: Torch, python: str) -> str:
    """What there is no wheel for, in words; '' where there is one, or where it cannot be told."""
    if torch.cuda == "":
        return "a PyTorch without CUDA"
    cuda = _cuda(wheels, torch)
    if torch.minor not in wheels.torch:
        return f"torch {torch.minor} ({_span(wheels.torch)})"
    if python not in wheels.python:
        return f"Python {python} ({_span(wheels.python)})"
    if torch.cuda is not None and not cuda:
        return f"CUDA {torch.cuda} ({', '.join(wheels.cuda)})"
    if any(_excluded(part, torch.minor, cuda, python) for part in wheels.without):
        return f"torch {torch.minor} with Python {python}"
    return ""


def address(installation: Installation, package: knowledge.Package, version: str) -> str:
    """Where the wheel of `version` for this environment lies; '' where there is none."""
    version, torch = version.partition("+")[0], installation.torch
    wheels = described(package, version)
    if wheels is None or torch is None or not torch.cuda or torch.cxx11abi is None:
        return ""
    if torch.cxx11abi not in wheels.cxx11abi or lacking(wheels, torch, installation.python):
        return ""
    return wheels.url.format(
        version=version,
        cuda=_cuda(wheels, torch),
        torch=torch.minor,
        abi=str(torch.cxx11abi).upper(),
        python=f"cp{installation.python.replace('.', '')}",
        platform=wheels.platform,
    )


def _cuda(wheels: knowledge.Wheels, torch: Torch) -> str:
    """The tag of the wheels for torch's CUDA: those of one major version serve all of it."""
    major = (torch.cuda or "").partition(".")[0]
    return next((c for c in wheels.cuda if major and c.startswith(f"cu{major}")), "")


def _excluded(part: knowledge.Excluded, torch: str, cuda: str, python: str) -> bool:
    pairs = ((part.torch, torch), (part.cuda, cuda), (part.python, python))
    return all(wanted in ("", here) for wanted, here in pairs)


def _span(versions: tuple[str, ...]) -> str:
    return f"they are for {versions[0]} to {versions[-1]}"
