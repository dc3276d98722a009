"""ATN402: a compiled extension is installed and does not load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from attncheck.model import CaseResult, Finding, Reason, Severity
from attncheck.rules import installs, remedies, unavailable, wording
from attncheck.rules.base import Rule, operators

if TYPE_CHECKING:
    from attncheck.static.installed import Installation

DOCS = """\
## What it does
Fires where a package is installed and its compiled extension cannot be loaded, and says why: built
against another PyTorch or C++ ABI (and which, as far as its symbols tell), for another CUDA or another
Python, on a newer system, left out of the build, or in need of a library that is missing. A scan reads it
off what the loader says; `attncheck env --check` off the files, and loads nothing.

## Why is this bad?
`pip` calls the environment consistent, and `pip list` shows the package. The import fails in the
job. Most often the extension was built against another PyTorch than the one that is installed.

## Example
```python
import flash_attn_2_cuda
# ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2ENS_14SourceLocation...
```

## What to do
Install a build of the package for exactly this PyTorch, CUDA, Python and C++ ABI, or build it
from source in this environment (`pip install --no-build-isolation --no-cache-dir
--force-reinstall --no-deps ...`). `attncheck env --check` has the command.
"""


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    # To import it takes longer than all rules, and `attncheck explain` needs none of it.
    from attncheck.static import faults

    for group in unavailable.by_probe(results, (Reason.EXTENSION_NOT_LOADABLE,)):
        texts = unavailable.texts(group)
        found = dict.fromkeys(fault for text in texts if (fault := faults.told_by(text)))
        text = "Reinstall the package, built for the PyTorch, CUDA and Python of this environment."
        yield RULE.finding(
            group,
            f"{group.subject}: the compiled extension does not load "
            f"({wording.count(len(group.results), 'case')} not judged)",
            message=[
                f"Operators: {operators(group.results)}.",
                *texts,
                *(f"What this says: {fault.text}." for fault in found),
            ],
            remedies=[
                remedies.untried("install", text),
                remedies.untried(
                    "install",
                    "Read why off the files of this environment, with the command that mends it.",
                    "attncheck env --check\n",
                ),
            ],
        )


def examine(installation: Installation) -> Iterator[Finding]:
    from attncheck.static import extensions, wheels
    from attncheck.static.faults import WORDS, Cause

    for distribution in installation.distributions.values():
        found = extensions.of(installation, distribution.name)
        if not found:
            continue
        causes = list(dict.fromkeys(fault.cause for fault in found))
        # The driver is the machine's: nothing of the environment is to be mended.
        elsewhere = causes == [Cause.NO_DRIVER]
        tag = wheels.tag(distribution)
        # Of each kind the first speaks: the same build has the same fault in every file of it.
        lines = []
        for cause in causes:
            alike = [fault for fault in found if fault.cause is cause]
            more = f" ({len(alike) - 1} more like it)" if len(alike) > 1 else ""
            lines.append(f"{alike[0].text}{more}.")
        yield RULE.about(
            distribution.name,
            f"{distribution}: a compiled part does not load: "
            f"{', '.join(WORDS[cause] for cause in causes)}",
            message=[
                f"Here: {installation.torch or 'no torch'}, Python {installation.python}.",
                *lines,
                f"The wheel's name says {tag.text}." if tag else "",
            ],
            remedies=() if elsewhere else installs.mend(installation, distribution),
            severity=Severity.INFO if elsewhere else None,
        )


RULE = Rule(
    id="ATN402",
    name="extension-not-loadable",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=judge,
    examine=examine,
)
