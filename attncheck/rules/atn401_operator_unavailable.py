"""ATN401: an operator could not be checked here, because something it needs is not there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from attncheck.model import CaseResult, Finding, Reason, Remedy, Severity
from attncheck.rules import remedies, unavailable, wording
from attncheck.rules.base import Group, Rule, operators

DOCS = """\
## What it does
Names operators that this scan could not run: a package, a kernel op or a device is missing, the
operator itself refuses the setting on whole tensors, before any distribution, or it is an op that
some package registered and nothing says how to call it.

## Why is this bad?
It is not, by itself. But nothing is known of the operator then, and a gap that is not written
down is read as a pass.

## Example
```python
import flash_attn
# ModuleNotFoundError: No module named 'flash_attn'
```

## What to do
For flash-attn run `attncheck scan --with flash-attn`, for xformers `--with xformers`; neither needs a
GPU. Install other packages; uninstall one of two that stand under the same import name; for a missing
device run the scan where the device is. A setting that the operator refuses needs nothing: it is listed
so that you know it was not judged.
"""

# A case without a reason is unavailable all the same. `not_run` is not among them: a scan that was
# cut short says nothing about the operator.
ABSENT = (
    Reason.PACKAGE_MISSING,
    Reason.PACKAGE_CLASH,
    Reason.OP_MISSING,
    Reason.DEVICE_MISSING,
    None,
)
REFUSED = (Reason.SETTING_REFUSED, Reason.SIGNATURE_UNKNOWN, Reason.NOT_SIMULATED)

_WORDS = {
    Reason.PACKAGE_MISSING: "a package is missing",
    Reason.PACKAGE_CLASH: "another package is installed under its import name",
    Reason.OP_MISSING: "its kernel op is not registered, or is another than expected",
    Reason.DEVICE_MISSING: "a device is missing",
    Reason.SETTING_REFUSED: "it refuses the setting on whole tensors",
    Reason.SIGNATURE_UNKNOWN: "nothing says how to call it",
    Reason.NOT_SIMULATED: "PyTorch's simulation of ranks does not run it",
    None: "no reason was given",
}
_REQUIREMENT = re.compile(
    r"([A-Za-z0-9][\w.\-]*(?:\s*[<>=!~]=?[\w.*,<>=!~]+)?)['`\"]? is not installed"
)
_MODULE = re.compile(r"No module named ['\"]([A-Za-z_]\w*)")


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    # What is absent is absent for a whole package: one finding a probe, not one an operator.
    absent = [
        replace(
            group, subject=f"probe {group.subject}"
        )  # operators may be called as their probe is
        for group in unavailable.by_probe(results, ABSENT)
    ]
    for group in [*absent, *unavailable.by_operator(results, REFUSED)]:
        reasons = {r.outcome.reason for r in group.results}
        why = "; ".join(words for reason, words in _WORDS.items() if reason in reasons)
        yield RULE.finding(
            group,
            f"{group.subject} is unavailable: {why} "
            f"({wording.count(len(group.results), 'case')} not judged)",
            message=[
                f"Operators: {operators(group.results)}.",
                unavailable.settings(group),
                *unavailable.texts(group),
            ],
            remedies=[
                *_package(group),
                *_clash(group),
                *_device(group),
                *_signature(group),
                *_processes(group),
            ],
        )


def _with_reason(group: Group, reason: Reason) -> list[CaseResult]:
    return [r for r in group.results if r.outcome.reason is reason]


def _package(group: Group) -> list[Remedy]:
    missing = _with_reason(group, Reason.PACKAGE_MISSING)
    if not missing:
        return []
    # To import it takes longer than all rules, and `attncheck explain` needs none of it.
    from attncheck.provision import PROVISIONABLE

    wanted = sorted({_requirement(r.outcome.message) for r in missing} - {""})
    named = {_bare(name) for name in wanted or [missing[0].case.probe]}
    if brought := [name for name in PROVISIONABLE if name in named]:
        text = f"Let attncheck bring {' and '.join(brought)} into its own environment; this needs no GPU."
        options = " ".join(f"--with {name}" for name in brought)
        return [remedies.untried("install", text, f"attncheck scan {options}\n")]
    if not wanted:
        return [remedies.untried("install", "Install the package that the message names.")]
    return [
        remedies.untried(
            "install",
            f"Install what is missing: {', '.join(wanted)}. A distribution may be called otherwise "
            "than its module.",
            "pip install " + " ".join(f"'{w}'" for w in wanted) + "\n",
        )
    ]


def _clash(group: Group) -> list[Remedy]:
    if not _with_reason(group, Reason.PACKAGE_CLASH):
        return []
    text = (
        "Uninstall the package that is not meant, then reinstall the other: they have files of the "
        "same name."
    )
    return [remedies.untried("install", text)]


def _signature(group: Group) -> list[Remedy]:
    if not _with_reason(group, Reason.SIGNATURE_UNKNOWN):
        return []
    text = "Say in a probe of your own how it is called; then it is scanned like the others."
    return [remedies.untried("report", text, "attncheck new probe my_kernel\n")]


def _processes(group: Group) -> list[Remedy]:
    if not _with_reason(group, Reason.NOT_SIMULATED):
        return []
    text = "Run it with a real process for each rank."
    return [remedies.untried("route", text, "attncheck scan --engine processes\n")]


def _requirement(message: str) -> str:
    """The missing distribution as pip takes it, as far as the message tells.

    >>> _requirement("flash-attn>=2.7 is not installed")
    'flash-attn>=2.7'
    >>> _requirement("No module named 'xformers.ops'")
    'xformers'
    """
    if found := _REQUIREMENT.search(message):
        return found[1].replace(" ", "")
    module = _MODULE.search(message)
    return module[1].replace("_", "-") if module else ""


def _bare(requirement: str) -> str:
    return re.split(r"[<>=!~\s]", requirement)[0].replace("_", "-").lower()


def _device(group: Group) -> list[Remedy]:
    if not _with_reason(group, Reason.DEVICE_MISSING):
        return []
    text = "Run the scan on a machine that has the device, and compare the two reports."
    return [remedies.untried("install", text)]


RULE = Rule(
    id="ATN401",
    name="operator-unavailable",
    since="0.1.0",
    severity=Severity.INFO,
    docs=DOCS,
    judge=judge,
)
