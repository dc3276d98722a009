"""ATN101: DTensor has no sharding strategy for a forward kernel op."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncheck.model import CaseResult, Finding, MissingOp, Severity
from attncheck.rules import missing, remedies
from attncheck.rules.base import Rule

DOCS = """\
## What it does
Names every kernel op that DTensor refuses in the forward pass because no sharding strategy is
registered for it, or because sharding propagation fails for want of one. All refused ops of a
call are named, not only the first that PyTorch raises on.

## Why is this bad?
The call raises on the first step. Worse, it hides what comes after: with one op mended the next
one raises, and the backward op only when training starts.

## Example
```python
mesh = init_device_mesh("cuda", (2,), mesh_dim_names=("tp",))
q, k, v = (distribute_tensor(x, mesh, [Shard(2)]) for x in (q, k, v))  # heads
flash_attn_func(q, k, v)
# NotImplementedError: Operator flash_attn._flash_attn_forward.default does not have a sharding
# strategy registered.
```

## What to do
`attncheck fix` writes a module that registers strategies for the op and for its backward, and
runs the finding's cases and their neighbours with it first. That mends it for every caller. By
hand it takes care: PyTorch's `register_sharding` leaves flags such as `causal` out of its cache
key, and serves a stale strategy.

Or use an operator that the finding lists as working, redistribute to a placement under which this
one works, or call it through `local_map`, so that DTensor never sees the op. The finding lists
the ways out by what they send in a call, as measured in the scan.

A higher-order op (`flex_attention`) takes functions besides tensors and no strategy: PyTorch says
that no rule was registered for it. What helps is `local_map`, or a rule of its own
(`torch.ops.higher_order.flex_attention.py_impl(DTensor)`).
"""


def _is_forward(op: MissingOp) -> bool:
    return op.phase != "backward"


def judge(results: Sequence[CaseResult]) -> Iterator[Finding]:
    for group, refusals in missing.groups(results, missing.STRATEGY, _is_forward):
        yield RULE.finding(
            group,
            f"{group.subject} has no sharding strategy: forward fails for {group.cases}",
            message=missing.details(group, refusals, results),
            remedies=remedies.instead_of_a_strategy(group, results),
        )


RULE = Rule(
    id="ATN101",
    name="missing-forward-strategy",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=judge,
)
