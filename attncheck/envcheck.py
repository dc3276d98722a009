"""`attncheck env --check`: what is wrong with an environment, told from its files alone. Torch-free."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from attncheck import environment, knowledge, rules
from attncheck.model import Finding, Severity, to_json
from attncheck.static import installed
from attncheck.static.installed import Installation
from attncheck.text import clean, count

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Check:
    """`findings`: worst first, none has cases; `notes`: what could not be checked, or by old knowledge;
    `checked`: distributions that were looked at, with their versions."""

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    checked: tuple[str, ...]

    @property
    def failed(self) -> bool:
        return any(finding.severity is Severity.ERROR for finding in self.findings)


def check(
    folders: Sequence[Path] | None = None, python: str = "", hollow: Iterable[str] = ()
) -> Check:
    """Check an environment that is there.

    `folders`: its site-packages, and what lies over them, in the order in which Python searches (None: this
    interpreter's path); `python`: its version (``3.11``; '' for this one's); `hollow`: distributions that
    were installed without their compiled part on purpose. Nothing of it is imported.
    """
    return _checked(installed.read(environment.RELEVANT, folders, python, hollow))


def check_planned(versions: Mapping[str, str], python: str, hollow: Iterable[str] = ()) -> Check:
    """Check an environment that is only planned: exact versions by distribution, and the version of
    Python. A `torch` without a local part (`+cu126`) is taken for PyPI's Linux wheel."""
    return _checked(installed.planned(versions, python, hollow))


def _checked(installation: Installation) -> Check:
    names = tuple(map(str, installation.distributions.values()))
    return Check(rules.examine(installation), notes(installation, date.today()), names)


def notes(installation: Installation, today: date) -> tuple[str, ...]:
    """Where the knowledge of an installed package is old, or ends before the version that is installed."""
    told = []
    if not sys.platform.startswith("linux"):
        told.append("Compiled extensions were not looked at: only those of Linux can be read.")
    for distribution in installation.distributions.values():
        package = knowledge.of(distribution.name)
        if package is None:
            continue
        if not package.knows(distribution.version):
            newest = package.releases[-1].version
            told.append(
                f"{distribution} is newer than all that is known of {distribution.name} ({newest} is the "
                f"newest, as of {package.as_of}): what it goes with was not checked."
            )
        elif package.stale(today):
            told.append(
                f"What is known of {distribution.name} is of {package.as_of}: a newer attncheck may know "
                "better."
            )
    return tuple(told)


def render(result: Check) -> str:
    """What is wrong, why, and what to do: worst first, as plain text."""
    lines = []
    for finding in result.findings:
        lines.append(f"{finding.severity.value}: {finding.title} ({finding.rule})")
        lines += [f"  {line}" for line in finding.message.splitlines()]
        for i, remedy in enumerate(finding.remedies):
            said = remedy.text.removesuffix(" Nothing of this was run.")
            lines.append(f"  {'or' if i else 'do'}: {said}")
            lines += [f"      {command}" for command in remedy.code.splitlines()]
        lines.append("")
    lines += [f"note: {note}" for note in result.notes]
    lines += [""] if result.notes else []
    lines.append(_verdict(result))
    return clean("\n".join(lines) + "\n")


def _verdict(result: Check) -> str:
    looked = f"{count(len(result.checked), 'package')} looked at: {', '.join(result.checked)}"
    if not result.checked:
        return "Nothing to check: none of the packages that matter for attention is installed."
    if not result.findings:
        return f"Nothing wrong was found ({looked})."
    severities = [finding.severity for finding in result.findings]
    counts = [count(severities.count(s), s.value) for s in Severity if s in severities]
    rule = result.findings[0].rule
    return f"{', '.join(counts)} ({looked}). `attncheck explain {rule}` says more."


def as_json(described: Mapping[str, Any], result: Check | None) -> str:
    """One JSON document: the environment and, where it was checked, the findings as a report has them."""
    document: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "environment": dict(described)}
    if result is not None:
        document |= {
            "findings": to_json(result.findings),
            "notes": list(result.notes),
            "checked": list(result.checked),
        }
    return json.dumps(document, indent=2) + "\n"
