"""ATN409: there is no prebuilt wheel of a package for the PyTorch, CUDA and Python that are here."""

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
Says where the maintainers of a package build no wheel for the PyTorch, CUDA and Python of this environment.
It looks only at a package whose compiled part is not there yet, or is planned: one that was built here needs
no wheel.

## Why is this bad?
It is not, by itself. But `pip install` compiles from source then: it takes a CUDA toolkit, an hour, and
gigabytes of memory, and a wheel for a neighbouring PyTorch, taken instead, does not load.

## Example
```python
# torch 2.9.1: flash-attn 2.8.3 has wheels for torch 2.4 to 2.8
import flash_attn  # compiled for an hour, or built without flash_attn_2_cuda
```

## What to do
Build it from source in this environment, take a wheel of somebody whom you trust, or use a PyTorch that the
package has wheels for. To learn what DTensor does with it no wheel is needed: `attncheck scan --with
flash-attn`.
"""


def examine(installation: Installation) -> Iterator[Finding]:
    from attncheck import knowledge
    from attncheck.static import extensions, wheels

    torch = installation.torch
    for distribution in installation.distributions.values():
        package = knowledge.of(distribution.name)
        known = wheels.described(package, distribution.version) if package else None
        if torch is None or known is None or distribution.name in installation.hollow:
            continue
        faults = extensions.of(installation, distribution.name)
        if distribution.folder is not None and not faults:
            continue
        if lacking := wheels.lacking(known, torch, installation.python):
            yield RULE.about(
                distribution.name,
                f"{distribution} has no prebuilt wheel for {lacking}",
                message=[f"Source: {known.source} (as of {package.as_of if package else ''})"],
                remedies=installs.reinstall(installation, distribution.name, distribution.version),
            )


RULE = Rule(
    id="ATN409",
    name="no-prebuilt-wheel",
    since="0.1.0",
    severity=Severity.INFO,
    docs=DOCS,
    judge=no_case,
    examine=examine,
)
