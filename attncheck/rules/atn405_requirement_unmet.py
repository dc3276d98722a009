"""ATN405: a package declares that it needs another version of a package than the one that is installed."""

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
Fires where a package that matters for attention declares (`Requires-Dist` in its metadata) a version of
another such package that is not the one installed. A warning where the other one is not installed at all,
and where it is one of NVIDIA's libraries, which people exchange on purpose (whether they are there at all
is read off the files of PyTorch: ATN402).

## Why is this bad?
The last `pip install` won, and `pip` said so in a line that scrolled by. A package that is compiled against
one PyTorch does not load with another, or falls back to slower kernels without an error.

## Example
```python
# xformers 0.0.29.post3 declares torch==2.6.0; torch 2.9.1 was installed after it
import xformers.ops  # WARNING: xFormers can't load C++/CUDA extensions
```

## What to do
Install the version that fits: of the package, or of what it needs. The finding has a command for each.
Give pip both in one command, or a constraints file, so that it cannot trade one for the other.
"""


def examine(installation: Installation) -> Iterator[Finding]:
    from attncheck.static import requirements

    for unmet in requirements.unmet(installation):
        who, package = unmet.distribution, unmet.package
        theirs = package.startswith("nvidia-")
        has = f"{package} {unmet.installed} is installed"
        if not unmet.installed:
            has = f"{package} is not installed"
        remedies = installs.either_way(installation, who.name, package, unmet.specifier)
        yield RULE.about(
            f"{who.name} {package}",
            f"{who} needs {package}{unmet.specifier}, and {has}",
            message=[f"It declares: Requires-Dist: {unmet.text}"],
            remedies=remedies if unmet.installed else remedies[-1:],
            severity=Severity.WARNING if theirs or not unmet.installed else None,
        )


RULE = Rule(
    id="ATN405",
    name="requirement-unmet",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=no_case,
    examine=examine,
)
