"""ATN407: a compiled wheel was made for another PyTorch, CUDA, Python or C++ ABI than the ones here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from attncheck.model import Finding, Severity
from attncheck.rules import installs
from attncheck.rules.base import Rule, no_case

if TYPE_CHECKING:
    from attncheck.static.installed import Installation

DOCS = """\
## What it does
Fires where the name of a wheel (`+cu12torch2.6cxx11abiFALSE`, as flash-attn's have it) says that it was
made for another PyTorch, CUDA, C++ ABI or Python than the ones in this environment. Where its files show
that it cannot load, ATN402 says so instead; where they show that every symbol is there, this is a warning.

## Why is this bad?
The name is not looked at by `pip`: a wheel for any PyTorch installs beside any other. What is compiled
against the insides of one release of PyTorch is undefined beside another, even where it loads.

## Example
```python
# pip install .../flash_attn-2.8.3+cu12torch2.8cxx11abiFALSE-cp311-cp311-linux_x86_64.whl, and torch 2.9.1
import flash_attn_2_cuda  # ImportError: undefined symbol: _ZN3c104cuda9SetDeviceEab
```

## What to do
Install the wheel whose name says what is here, or build the package from source in this environment. The
finding has the command.
"""


def examine(installation: Installation) -> Iterator[Finding]:
    from attncheck.static import extensions, wheels

    torch = installation.torch
    for distribution in installation.distributions.values():
        tag = wheels.tag(distribution)
        if tag is None or torch is None or extensions.of(installation, distribution.name):
            continue
        if differences := tag.differences(torch, installation.python):
            loads = extensions.held_against_torch(installation, distribution.name)
            yield RULE.about(
                distribution.name,
                f"{distribution} was built for another environment: {'; '.join(differences)}",
                message=[
                    f"The wheel's name says {tag.text}.",
                    "Every symbol that it needs of PyTorch is there all the same." if loads else "",
                ],
                remedies=installs.reinstall(installation, distribution.name, distribution.version),
                severity=Severity.WARNING if loads else None,
            )


RULE = Rule(
    id="ATN407",
    name="wheel-for-another-build",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=no_case,
    examine=examine,
)
