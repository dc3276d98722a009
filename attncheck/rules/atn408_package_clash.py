"""ATN408: two installed packages take the same import name, or the same namespace of ops."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from attncheck.model import Finding, Remedy, Severity
from attncheck.rules import installs
from attncheck.rules.base import Rule, no_case

if TYPE_CHECKING:
    from attncheck import knowledge
    from attncheck.static.installed import Distribution, Installation

DOCS = """\
## What it does
Fires where the module that a package is imported by belongs to another package as well, or to nobody; and
where two packages register ops under one namespace with TORCH_LIBRARY.

## Why is this bad?
Of two packages that install one module, the files of the second lie over those of the first: which functions
`import` gives is chance, and uninstalling one breaks the other. Of two libraries that take one namespace,
PyTorch loads the first and kills the import of the second.

## Example
```python
import flash_attn_3._C  # of flash-attn-3
import xformers.ops  # brings a flash_attn_3 of its own
# RuntimeError: Only a single TORCH_LIBRARY can be used to register the namespace flash_attn_3
```

## What to do
Uninstall the one that you do not mean, then reinstall the other: its files may be gone with the first.
"""


def examine(installation: Installation) -> Iterator[Finding]:
    yield from _modules(installation)
    yield from _namespaces(installation)


def _modules(installation: Installation) -> Iterator[Finding]:
    from attncheck import ownership

    folders = tuple(map(str, installation.folders)) if installation.folders is not None else None
    told = set()
    for distribution in installation.distributions.values():
        if distribution.folder is None:
            continue
        # Without folders it is asked as `attncheck env` asks, which costs nothing the second time.
        asked = (distribution.name,) if folders is None else (distribution.name, folders)
        why = ownership.foreign(*asked)
        if why and why not in told:
            told.add(why)
            yield RULE.about(
                f"module {distribution.name}",
                f"{distribution} does not have its import name for itself",
                message=[why[0].upper() + why[1:] + "."],
                remedies=[_keep(distribution)],
            )


def _namespaces(installation: Installation) -> Iterator[Finding]:
    from attncheck import knowledge

    taken: list[tuple[Distribution, knowledge.Registers]] = []
    for distribution in installation.distributions.values():
        package = knowledge.of(distribution.name)
        if package and package.knows(distribution.version):
            lines = [line for line in package.registers if line.applies_to(distribution.version)]
            taken += [(distribution, line) for line in lines]
    for (first, one), (second, other) in itertools.combinations(taken, 2):
        if one.namespace == other.namespace:
            yield RULE.about(
                f"namespace {one.namespace} {first.name} {second.name}",
                f"{first} and {second} both register the ops of {one.namespace}",
                message=[
                    "Whichever is imported second raises: only a single TORCH_LIBRARY can be used to "
                    f"register the namespace {one.namespace}.",
                    f"Source: {one.source}, {other.source}",
                ],
                remedies=[
                    installs.remedy("Uninstall one of them.", f"pip uninstall {first.name}"),
                ],
            )


def _keep(distribution: Distribution) -> Remedy:
    from attncheck import knowledge

    package = knowledge.of(distribution.name)
    build = package.build if package else ""
    again = build or "pip install --force-reinstall --no-deps"
    return installs.remedy(
        f"Uninstall the other one, then install {distribution.name} afresh.",
        f"{again} {distribution.name}=={distribution.version.partition('+')[0]}",
    )


RULE = Rule(
    id="ATN408",
    name="package-clash",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=no_case,
    examine=examine,
)
