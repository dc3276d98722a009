"""ATN404: a probe file does not load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncheck.model import CaseResult, Finding, Reason, Severity
from attncheck.rules import unavailable, wording
from attncheck.rules.base import Rule

DOCS = """\
## What it does
Fires where a probe file raises on import, or defines no usable `PROBE`, in the workers.

## Why is this bad?
None of the operators it describes was checked.

## Example
```python
# my_kernel.py
import my_kernel_package  # at module level: the planner has no such package

PROBE = Probe(name="my_kernel", summary="...", operators=())
```

## What to do
Import the file by itself (`python my_kernel.py`) and mend what it raises. A probe must import
without torch and without the package it checks: import both inside `call`.
"""


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    for group in unavailable.by_probe(results, (Reason.PROBE_NOT_LOADABLE,)):
        yield RULE.finding(
            group,
            f"The probe {group.subject} does not load "
            f"({wording.count(len(group.results), 'case')} not judged)",
            message=unavailable.texts(group),
        )


RULE = Rule(
    id="ATN404",
    name="probe-not-loadable",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=judge,
)
