"""ATN504: the call raised, and not for a missing strategy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncheck.model import CaseResult, Finding, Severity, Status
from attncheck.rules import atn104_bypasses_dispatcher, remedies, wording
from attncheck.rules.base import (
    Rule,
    exception_text,
    extent,
    group_by_op,
    most_common,
    uneven_line,
)

DOCS = """\
## What it does
Fires where a call on DTensors raised an exception that is neither a missing strategy, nor a mix of
ordinary tensors and DTensors, nor a kernel that bypasses the dispatcher, while the same call on whole
tensors works.

## Why is this bad?
The operator cannot be used under these placements, and the text rarely says why: a strategy
exists and is itself at fault, or a size does not divide.

## Example
```python
with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
    F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # all DTensors
# AssertionError: input_specs(3) != strategies(4)
```

## What to do
Use an operator or a placement that the finding lists as working. Where the finding says that the
ranks do not divide a size, choose a degree of parallelism that does.
"""


def _applies(result: CaseResult) -> bool:
    bypasses = atn104_bypasses_dispatcher.applies(result)
    return result.outcome.status is Status.ERROR and not bypasses


def _rest(results: Sequence[CaseResult], texts: Sequence[str], limit: int = 12) -> list[str]:
    """What follows the first line: an operator that refuses may give its reasons there (xformers)."""
    messages = most_common(r.outcome.message for r in results if exception_text(r.outcome) in texts)
    lines = messages[0].strip().splitlines()[1:] if messages else []
    return [line.rstrip() for line in lines if line.strip()][:limit]


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    for group in group_by_op(results, _applies):
        texts = most_common(exception_text(r.outcome) for r in group.results)
        raised = wording.first_line(texts[0], wording.TITLE_WIDTH) if texts else "an exception"
        yield RULE.finding(
            group,
            f"{group.subject} raises {raised} in {group.cases}",
            message=[
                *extent(group, results),
                *(f"Raised: {text}" for text in texts[:1]),
                *_rest(group.results, texts[:1]),
                *(f"Raised: {text}" for text in texts[1:3]),
                f"And {wording.count(len(texts) - 3, 'other text')}." if len(texts) > 3 else "",
                uneven_line(group.results),
            ],
            remedies=[*remedies.working(group, results), *remedies.local_map(group, results)],
        )


RULE = Rule(
    id="ATN504",
    name="unexpected-exception",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=judge,
)
