"""Small attention ops and their strategies, as they were before a version bump and are after it.

`ATTNCHECK_GATE_DEMO` says which: `before` (default) or `after`. q, k, v: (batch, heads, sequence, head_dim).
No `from __future__ import annotations`: `custom_op` reads the schema off these.
"""

import os

import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

AFTER = os.environ.get("ATTNCHECK_GATE_DEMO") == "after"
WHOLE, BATCH, HEADS, QUERIES = Replicate(), Shard(0), Shard(1), Shard(2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(q, k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return torch.matmul(scores.softmax(dim=-1), v)


def define(name: str, strategy: tuple | None, kernel=attend):
    """An op, and what DTensor may do with it beside replicating: out, q, k, v, for each acceptable way."""

    @torch.library.custom_op(f"gated::{name}", mutates_args=())
    def op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return kernel(q, k, v).contiguous()

    op.register_fake(lambda q, k, v: torch.empty_like(q))
    if strategy is not None:
        ways = [(WHOLE,) * 4, *strategy]

        @register_sharding(getattr(torch.ops.gated, name).default)
        def _(q, k, v):
            return [([out], list(inputs)) for out, *inputs in ways]

    return getattr(torch.ops.gated, name)


def rounding_more(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Three quarters of what is tolerated is gone where heads are sharded: within the bound, and new."""
    return attend(q, k, v) * (1 + 5e-7) if q.shape[1] < 4 else attend(q, k, v)


by_heads = ((HEADS,) * 4,)
by_queries = ((QUERIES, QUERIES, WHOLE, WHOLE),)
# Each shard of queries attends to its own keys only: right shapes, wrong numbers, no error.
by_sequence = ((QUERIES,) * 4,)

same = define("same", by_heads)
unregistered = define("unregistered", None if AFTER else by_heads)
made_wrong = define("made_wrong", by_sequence if AFTER else by_queries)
gathering = define("gathering", ())
mended = define("mended", by_heads if AFTER else None)
rounding = define("rounding", by_heads, rounding_more if AFTER else attend)
unheard_of = define("unheard_of", None)
