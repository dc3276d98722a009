"""How the rules about what is installed say what to do: commands for pip, and nothing that was run."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from attncheck.model import Remedy

if TYPE_CHECKING:
    from attncheck import knowledge
    from attncheck.static.installed import Distribution, Installation


def remedy(text: str, *commands: str) -> Remedy:
    return Remedy(
        "install", f"{text} Nothing of this was run.", "".join(f"{c}\n" for c in commands)
    )


def pip(*requirements: str) -> str:
    """
    >>> pip("torch==2.9.1", "flash-attn>=2.7")
    "pip install torch==2.9.1 'flash-attn>=2.7'"
    """
    return f"pip install {shlex.join(requirements)}"


def reinstall(installation: Installation, name: str, version: str) -> list[Remedy]:
    """Another build of the same version: its maintainers' wheel for this PyTorch, where there is one, and
    a build from source."""
    # To import it takes longer than all rules, and `attncheck explain` needs none of it. So below.
    from attncheck import knowledge
    from attncheck.static import wheels

    package = knowledge.of(name)
    plain = version.partition("+")[0]
    found = []
    if package and (address := wheels.address(installation, package, version)):
        command = f"pip install --no-deps --force-reinstall {address}"
        found.append(
            remedy("Install the wheel that is built for exactly this environment.", command)
        )
    build = package.build if package else ""
    if build:
        text = f"Build {name} from source against the PyTorch that is here; it takes a CUDA toolkit and time."
        found.append(remedy(text, f"{build} {name}=={plain}"))
    return found


def mend(installation: Installation, distribution: Distribution) -> list[Remedy]:
    """What to do about a compiled part that does not load: the release that fits the PyTorch that is here,
    or another build of the same one."""
    name, torch = distribution.name, installation.torch
    found = reinstall(installation, name, distribution.version)
    version = fitting(installation, name) if torch else ""
    if version and version != distribution.version:
        text = f"Install the newest {name} that is known to go with {torch} and what else is here."
        found.insert(0, remedy(text, pip(f"{name}=={version}")))
    if not found:
        text = f"Install {name} afresh, built for the PyTorch, CUDA and Python that are here."
        plain = distribution.version.partition("+")[0]
        found.append(remedy(text, f"pip install --force-reinstall --no-deps {name}=={plain}"))
    return found


def fitting(installation: Installation, name: str) -> str:
    """The newest release of `name` that is known to go with all else that is there; '' where none is, or
    where nothing is known of what its releases ask for."""
    from attncheck import knowledge

    known = knowledge.of(name)
    for release in reversed(known.releases if known else ()):
        needs = [
            (need, other)
            for need in (known.needs if known else ())
            if need.applies_to(release.version) and (other := installation.get(need.package))
        ]
        if needs and all(need.met_by(other.version) for need, other in needs):
            return release.version
    return ""


def either_way(installation: Installation, name: str, package: str, requires: str) -> list[Remedy]:
    """Two ways out of `name` asking for another version of `package` than the one that is there: change
    the one, or the other."""
    from attncheck import knowledge

    found = []
    other = installation.get(package)
    if other and (version := fitting(installation, name)):
        text = f"Install the newest {name} that is known to go with {other} and what else is here."
        found.append(remedy(text, pip(f"{name}=={version}")))
    known, wanted = knowledge.of(package), f"{package}{requires}"
    text = f"Install {wanted}, which {name} asks for."
    if known and (address := _wheel(installation, known, requires)):
        found.append(remedy(text, f"pip install --no-deps {address}"))
    elif known and known.build:
        found.append(remedy(text, pip("--no-build-isolation", wanted)))
    else:
        found.append(remedy(text, pip(wanted)))
    return found


def _wheel(installation: Installation, package: knowledge.Package, requires: str) -> str:
    """The address of the newest prebuilt wheel in a range that is for this environment; '' for none."""
    from attncheck import knowledge
    from attncheck.static import wheels

    for release in reversed(package.releases):
        if knowledge.contains(requires, release.version) and (
            address := wheels.address(installation, package, release.version)
        ):
            return address
    return ""
