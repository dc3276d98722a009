"""ATN402: a compiled extension is installed and does not load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncheck.model import CaseResult, Finding, Reason, Severity
from attncheck.rules import remedies, unavailable, wording
from attncheck.rules.base import Rule, operators

DOCS = """\
## What it does
Fires where a package is installed and its compiled extension cannot be loaded: an undefined
symbol, a shared library that is missing, a wrong ABI.

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
--force-reinstall --no-deps ...`).
"""

_HINTS = (
    (
        "undefined symbol",
        "an undefined symbol: it was built against another PyTorch or another C++ ABI",
    ),
    (
        "GLIBC",
        "a symbol version that this system's C library lacks: it was built on a newer system",
    ),
    ("cannot open shared object file", "a shared library that it needs is not found"),
    (
        "Symbol not found",
        "an undefined symbol: it was built against another PyTorch or another C++ ABI",
    ),
    ("DLL load failed", "a library that it needs is not found or does not fit"),
)


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    for group in unavailable.by_probe(results, (Reason.EXTENSION_NOT_LOADABLE,)):
        texts = unavailable.texts(group)
        why = next((words for key, words in _HINTS if any(key in text for text in texts)), "")
        text = "Reinstall the package, built for the PyTorch, CUDA and Python of this environment."
        yield RULE.finding(
            group,
            f"{group.subject}: the compiled extension does not load "
            f"({wording.count(len(group.results), 'case')} not judged)",
            message=[
                f"Operators: {operators(group.results)}.",
                *texts,
                f"The loader names {why}." if why else "",
            ],
            remedies=[remedies.untried("install", text)],
        )


RULE = Rule(
    id="ATN402",
    name="extension-not-loadable",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=judge,
)
