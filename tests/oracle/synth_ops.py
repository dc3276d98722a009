"""Ops that nobody described, each with something that synthesis must see. Importing this registers them.

Their kernels are plain Python on (batch, sequence, heads, head_dim) tensors; `attend` is right, the others
break it in one place.
"""

from __future__ import annotations

import math
import os
import signal

import torch
from torch import Tensor

QKV = "Tensor q, Tensor k, Tensor v"
library = torch.library.Library("synth", "DEF")


def attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The output like q, and the log-sum-exp (batch, heads, sequence). Query heads are grouped in order."""
    if q.shape[2] % k.shape[2]:
        raise RuntimeError("the kv heads do not divide the heads")
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v), scores.logsumexp(-1)


def define(schema: str, kernel: object, meta: object = None) -> None:
    """`meta` is None for an op that has no Meta kernel."""
    library.define(schema)
    name = schema.partition("(")[0]
    library.impl(name, kernel, "CPU")
    if meta is not None:
        library.impl(name, meta, "Meta")


def like_q(q: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(q)


def _lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1])


# --- healthy ------------------------------------------------------------------------------------


def _healthy(q, k, v, scale: float, causal: bool):
    return attend(q * (scale * q.shape[-1] ** 0.5), k, v, causal)


define(
    f"healthy({QKV}, float scale, bool causal) -> (Tensor, Tensor)",
    _healthy,
    lambda q, k, v, scale, causal: (torch.empty_like(q), _lse(q)),
)


def _equal_heads(q, k, v):
    if q.shape[2] != k.shape[2]:
        raise RuntimeError("query and key must have equally many heads")
    return attend(q, k, v)[0]


define(f"equal_heads({QKV}) -> Tensor", _equal_heads, like_q)
define(
    f"buffer({QKV}, Tensor(a!) out) -> ()",
    lambda q, k, v, out: (out.copy_(attend(q, k, v)[0]), None)[1],
    lambda q, k, v, out: None,
)
define(
    f"lse_by_heads({QKV}) -> (Tensor, Tensor)",
    lambda q, k, v: (attend(q, k, v)[0], attend(q, k, v)[1].transpose(1, 2).contiguous()),
    lambda q, k, v: (torch.empty_like(q), q.new_empty(q.shape[:3])),
)
define(
    f"no_meta({QKV}) -> (Tensor, Tensor, Tensor)",
    lambda q, k, v: (*attend(q, k, v), torch.zeros(2, dtype=torch.int64)),
)
define(
    f"masked({QKV}, Tensor? mask) -> Tensor",
    lambda q, k, v, mask: attend(q, k, v, mask=mask)[0],
    like_q,
)


def _mask_gradient(dout, q, k, v, mask):
    """The gradient of the mask alone: a sum where it broadcasts."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    p = (torch.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5 + mask).softmax(-1)
    dp = torch.einsum("bshd,bthd->bhst", dout, v)
    return (p * (dp - (p * dp).sum(-1, keepdim=True))).sum_to_size(mask.shape).contiguous()


define(
    f"mask_gradient(Tensor dout, {QKV}, Tensor mask) -> Tensor",
    _mask_gradient,
    lambda dout, q, k, v, mask: torch.empty_like(mask),
)


def _worded(q, k, v, layout: str):
    if layout == "bhsd":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = attend(q, k, v)[0]
    return (out.transpose(1, 2) if layout == "bhsd" else out).contiguous()


define(f"worded({QKV}, str layout) -> Tensor", _worded, like_q)


def _dropped(q, k, v, keep_out: float):
    out = attend(q, k, v)[0]
    return torch.nn.functional.dropout(out, keep_out) if keep_out else out


define(f"dropped({QKV}, float keep_out) -> Tensor", _dropped, like_q)


def _deadly(q, k, v):
    if q.shape[2] < k.shape[2]:  # a division by zero, as in the CPU kernel of flash attention
        os.kill(os.getpid(), signal.SIGFPE)
    return attend(q, k, v)[0]


define(f"deadly_attention({QKV}) -> Tensor", _deadly, like_q)

# --- with a mistake, or a trap ---------------------------------------------------------------------


def _coupled(q, k, v):
    return attend(q, k - k.mean(0, keepdim=True) * 0.5, v * k.std(0))[0]


define(f"coupled({QKV}) -> Tensor", _coupled, like_q)
define(f"always_causal({QKV}) -> Tensor", lambda q, k, v: attend(q, k, v, True)[0], like_q)
define(
    f"not_on_three({QKV}) -> Tensor",
    lambda q, k, v: attend(q, k, v)[0] * (1.5 if q.shape[0] == 2 else 1.0),
    like_q,
)
define(
    f"even_only({QKV}) -> Tensor",
    lambda q, k, v: attend(q, k, v)[0] * (1.5 if q.shape[0] % 2 else 1.0),
    like_q,
)


def _interleaved(q, k, v):
    """Head i has kv head i % kv_heads, not i // groups."""
    groups = q.shape[2] // k.shape[2]
    return attend(q, k.repeat(1, 1, groups, 1), v.repeat(1, 1, groups, 1))[0]


define(f"interleaved({QKV}) -> Tensor", _interleaved, like_q)
define(
    f"told_heads({QKV}, int heads) -> Tensor",
    lambda q, k, v, heads: attend(q.flatten(2).unflatten(2, (heads, -1)), k, v)[0],
    like_q,
)
define(f"random({QKV}) -> Tensor", lambda q, k, v: attend(q, k, v)[0] + torch.rand(()), like_q)
define(f"secretly_changes({QKV}) -> Tensor", lambda q, k, v: attend(q, k.mul_(1.01), v)[0], like_q)


def _cache(q, k, v, cache):
    cache[:, : k.shape[1]] = k
    return attend(q, cache[:, : k.shape[1]], v)[0]


define(
    f"cache({QKV}, Tensor(a!) cache) -> Tensor", _cache, lambda q, k, v, cache: torch.empty_like(q)
)
define(
    f"unknowable({QKV}) -> (Tensor, Tensor)",
    lambda q, k, v: (attend(q, k, v)[0], q.new_zeros(3 * q.shape[1] + 1)),
)
define("many(Tensor q, Tensor[] kv) -> Tensor", lambda q, kv: attend(q, *kv)[0], like_q)
