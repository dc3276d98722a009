"""What installed distributions declare that they need (Requires-Dist), held against what is installed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from attncheck import knowledge
from attncheck.static.installed import Distribution, Installation


@dataclass(frozen=True)
class Unmet:
    """`text`: the line as it is declared; `specifier`: of it, the range; `installed`: the version that is
    there, '' for none."""

    distribution: Distribution
    package: str
    specifier: str
    installed: str
    text: str


def unmet(installation: Installation) -> Iterator[Unmet]:
    """Requirements of the distributions of an installation among each other, extras left out.

    What is missing is told only of packages that were looked for: the rest may be anywhere.
    """
    environment: dict[str, str] = {key: str(value) for key, value in default_environment().items()}
    full = f"{installation.python}.0"
    environment |= {"python_version": installation.python, "python_full_version": full, "extra": ""}
    for distribution in installation.distributions.values():
        for text in distribution.requires:
            requirement = _parsed(text)
            if requirement is None or requirement.url:
                continue
            if requirement.marker is not None and not requirement.marker.evaluate(environment):
                continue
            name = canonicalize_name(requirement.name)
            if name not in installation.looked_for:
                continue
            other = installation.get(name)
            version, specifier = other.version if other else "", str(requirement.specifier)
            # NVIDIA's libraries may come with the system: that they are missing shows in PyTorch's files.
            if not version and name.startswith("nvidia-"):
                continue
            if not version or not knowledge.contains(specifier, version):
                yield Unmet(distribution, name, specifier, version, re.sub(r"\s+", " ", text))


def _parsed(text: str) -> Requirement | None:
    try:
        return Requirement(text)
    except InvalidRequirement:
        return None
