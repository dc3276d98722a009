"""CPU stand-in for `flash_attn_2_cuda` of flash-attn 2.6.1 to 2.6.3, by the one for 2.7 and 2.8.

The arguments are the same. The forwards return eight values instead of four, and it is the extension,
not the Python in front of it, that pads a head_dim which is no multiple of 8.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from attncheck.standins import flash_attn_2_cuda as newer
from attncheck.standins import flash_checks as checks

Maybe = torch.Tensor | None
# out, q_padded, k_padded, v_padded, out_padded, softmax_lse, S_dmask or None, rng_state
Eight = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    Maybe,
    torch.Tensor,
]
Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

fwd_kvcache = newer.fwd_kvcache


@torch.no_grad()
def fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out_: Maybe, *options: Any) -> Eight:
    """`options` as in 2.7: alibi_slopes, p_dropout ... return_softmax, gen_."""
    q_padded, k_padded, v_padded = _padded(q), _padded(k), _padded(v)
    results = newer.fwd(q_padded, k_padded, v_padded, None, *options)
    return _eight(q, out_, (q_padded, k_padded, v_padded), results)


@torch.no_grad()
def varlen_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out_: Maybe, *options: Any
) -> Eight:
    """`options` as in 2.7: cu_seqlens_q, cu_seqlens_k ... return_softmax, gen_."""
    q_padded, k_padded, v_padded = _padded(q), _padded(k), _padded(v)
    results = newer.varlen_fwd(q_padded, k_padded, v_padded, None, *options)
    return _eight(q, out_, (q_padded, k_padded, v_padded), results)


@torch.no_grad()
def bwd(dout: torch.Tensor, q: torch.Tensor, *others: Any) -> Four:
    """`dout` as wide as the caller's head_dim, all else padded; so are the gradients' buffers, and
    the gradients that are returned are as wide as `dout`."""
    return _narrow(newer.bwd(_padded_to(dout, q), q, *others), dout)


@torch.no_grad()
def varlen_bwd(dout: torch.Tensor, q: torch.Tensor, *others: Any) -> Four:
    """As `bwd`."""
    return _narrow(newer.varlen_bwd(_padded_to(dout, q), q, *others), dout)


def _padded(x: torch.Tensor) -> torch.Tensor:
    extra = -x.shape[-1] % 8
    return F.pad(x, [0, extra]) if extra else x


def _padded_to(dout: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    padded = _padded(dout)
    checks.check(
        padded.shape[-1] == q.shape[-1],
        "head_size must be head_size_og rounded to a multiple of 8",
    )
    return padded


def _eight(
    q: torch.Tensor,
    out_: Maybe,
    padded: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    results: Four,
) -> Eight:
    out_padded, lse, s_dmask, rng_state = results
    out = out_padded[..., : q.shape[-1]]
    if out_ is not None:
        out_.copy_(out)
        out = out_
    return out, *padded, out_padded, lse, s_dmask if s_dmask.numel() else None, rng_state


def _narrow(gradients: Four, dout: torch.Tensor) -> Four:
    dq, dk, dv, softmax_d = gradients
    width = dout.shape[-1]
    return dq[..., :width], dk[..., :width], dv[..., :width], softmax_d
