"""ATN104: the operator's kernel is no dispatcher op, so DTensor never gets to see it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncheck.model import BYPASSES_DISPATCHER, CaseResult, Finding, Remedy, Severity, Status
from attncheck.rules import remedies
from attncheck.rules.base import Rule, extent, group_by_op

NO_OP = "what it calls is no dispatcher op"

DOCS = """\
## What it does
Fires where a DTensor was about to be handed to a function that is no dispatcher op: a pybind
extension, a Triton or CuTe kernel. Where a probe names such functions, attncheck stands in front of
them and stops the call there. Where it does not, attncheck follows the call once on ordinary tensors:
an output that comes out of no dispatcher op was filled behind the dispatcher's back, and the function
is never called with DTensors. Either way nothing was read through the pointer.

## Why is this bad?
DTensor works by intercepting dispatcher ops. It cannot intercept this one, no sharding strategy can
be registered for it, and `DTensor.data_ptr()` is 0: the kernel reads from address 0, which ends the
process on a CPU and is an illegal memory access on a GPU.

## Example
```python
# flash-attn 2.6.3: flash_attn_func calls its compiled extension directly
flash_attn_func(q, k, v)  # q, k, v are DTensors: flash_attn_2_cuda.fwd gets a null pointer
```

## What to do
Hand it ordinary tensors. For functions that it knows (flash-attn's, also before 2.7, flash-attn 4's,
SageAttention's) `attncheck fix` writes and verifies a wrapper, which takes the function's place,
so that callers stay as they are, and gives it each rank's own shards. For others call it through
`local_map`. Or take a version that has a dispatcher op (flash-attn from 2.7.0 on), or another
operator.
"""


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    for group in group_by_op(results, applies):
        yield RULE.finding(
            group,
            f"{group.subject} is no dispatcher op: a DTensor would reach it as a null pointer "
            f"in {group.cases}",
            message=extent(group, results),
            remedies=remedies.on_local_shards(group, results, NO_OP, _newer(group.subject)),
        )


def applies(result: CaseResult) -> bool:
    outcome = result.outcome
    return outcome.status is Status.ERROR and outcome.exception_type == BYPASSES_DISPATCHER


def _newer(function: str) -> list[Remedy]:
    if not function.startswith("flash_attn_2_cuda.") or function.endswith("kvcache"):
        return []
    return [
        remedies.untried(
            "install",
            "Take flash-attn 2.7.0 or newer, where the kernel is a dispatcher op; it then needs a "
            "sharding strategy.",
            "attncheck scan --with flash-attn\n",
        )
    ]


RULE = Rule(
    id="ATN104",
    name="bypasses-dispatcher",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=judge,
)
