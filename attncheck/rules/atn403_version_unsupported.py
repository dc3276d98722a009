"""ATN403: an installed version is outside what the operator or the probe supports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncheck.model import CaseResult, Finding, Reason, Severity
from attncheck.rules import remedies, unavailable, wording
from attncheck.rules.base import Rule

DOCS = """\
## What it does
Fires where a package is installed in a version that the operator does not support, or that the
probe does not know how to call.

## Why is this bad?
Attention packages change their ops between minor versions: before 2.7 flash-attn has no
dispatcher ops at all, and a DTensor reaches its C extension with a null pointer. Nothing was
judged for this version.

## Example
```python
# flash-attn 2.6.3
flash_attn_func(q, k, v)  # DTensors: no op for them to see, a null pointer in the kernel
```

## What to do
Install a version that the message names as supported, or pass a probe of your own (`--probe`)
that knows how to call this one.
"""


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    for group in unavailable.by_operator(results, (Reason.VERSION_UNSUPPORTED,)):
        text = "Install a version that the message names as supported."
        yield RULE.finding(
            group,
            f"{group.subject} is installed in an unsupported version "
            f"({wording.count(len(group.results), 'case')} not judged)",
            message=[unavailable.settings(group), *unavailable.texts(group)],
            remedies=[remedies.untried("install", text)],
        )


RULE = Rule(
    id="ATN403",
    name="version-unsupported",
    since="0.1.0",
    severity=Severity.WARNING,
    docs=DOCS,
    judge=judge,
)
