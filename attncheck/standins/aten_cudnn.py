"""`aten::_cudnn_attention_{forward,backward}` as torch 2.13 has them.

Backward computes from the output and the log-sum-exp that are passed in. Where CUDA is stricter: it
refuses float32 and misaligned strides.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attncheck.standins import aten_common as common
from attncheck.standins import flash_dropout as dropout
from attncheck.standins import flash_math
from attncheck.standins.aten_common import Maybe
from attncheck.standins.flash_checks import check


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: Maybe,
    cum_seq_q: Maybe,
    cum_seq_k: Maybe,
    max_q: int,
    max_k: int,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, Maybe, Maybe, Maybe, int, int, torch.Tensor, torch.Tensor, Maybe]:
    """(output, log-sum-exp, cum_seq_q, cum_seq_k, max_q, max_k, seed, offset, undefined).

    Dense: q (batch, heads, sequence, head_dim), log-sum-exp (batch, heads, sequence, 1), as the Meta
    kernel has it. With `cum_seq_*`: q (tokens, heads, head_dim), log-sum-exp (tokens, heads, 1). Causal
    is aligned top left. A bias broadcasts to (batch, heads or 1, sequence, keys).
    """
    _check(query, key, value, attn_bias, cum_seq_q)
    seed, offset, generator = common.draw(dropout_p)
    out = query.new_zeros(*query.shape[:-1], value.shape[-1])
    lse = torch.full((*query.shape[:-1], 1), torch.inf)
    spec = common.spec(query, scale, dropout_p)
    for qs, ks in _parts(cum_seq_q, cum_seq_k):
        q, k, v = (_dense(t[part]) for t, part in ((query, qs), (key, ks), (value, ks)))
        if q.numel() == 0:
            continue
        mask = common.mask(q.shape[2], k.shape[2], int(is_causal), None, None, attn_bias)
        keep = dropout.keep_mask((*q.shape[:3], k.shape[2]), dropout_p, generator)
        result = flash_math.forward(spec, q, k, v, None, keep, mask)
        out[qs] = _undense(result.out, out[qs])
        lse[qs] = _undense(result.lse[..., None], lse[qs])
    starts_q, starts_k = (None if t is None else t.clone() for t in (cum_seq_q, cum_seq_k))
    stats = lse if compute_log_sumexp else None
    return out, stats, starts_q, starts_k, max_q, max_k, seed, offset, None


def backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    philox_seed: torch.Tensor,
    philox_offset: torch.Tensor,
    attn_bias: Maybe,
    cum_seq_q: Maybe,
    cum_seq_k: Maybe,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv): a bias gets no gradient."""
    dq, dk, dv, _ = backward_with_bias(
        grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q,
        cum_seq_k, dropout_p, is_causal, False, scale,
    )  # fmt: skip
    return dq, dk, dv


def backward_with_bias(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    philox_seed: torch.Tensor,
    philox_offset: torch.Tensor,
    attn_bias: Maybe,
    cum_seq_q: Maybe,
    cum_seq_k: Maybe,
    dropout_p: float,
    is_causal: bool,
    bias_requires_grad: bool,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Maybe]:
    """(dq, dk, dv, dbias), dbias undefined unless it is required."""
    _check(query, key, value, attn_bias, cum_seq_q)
    # Some versions hand the log-sum-exp on without its last dim.
    lse = logsumexp if logsumexp.ndim == query.ndim else logsumexp.unsqueeze(-1)
    common.check_lse(lse, (*query.shape[:-1], 1))
    generator = common.generator(dropout_p, philox_seed, philox_offset)
    dq, dk, dv = (torch.zeros_like(t) for t in (query, key, value))
    dbias = None
    spec = common.spec(query, scale, dropout_p)
    for qs, ks in _parts(cum_seq_q, cum_seq_k):
        q, k, v = (_dense(t[part]) for t, part in ((query, qs), (key, ks), (value, ks)))
        if q.numel() == 0 or k.numel() == 0:
            continue
        mask = common.mask(q.shape[2], k.shape[2], int(is_causal), None, None, attn_bias)
        keep = dropout.keep_mask((*q.shape[:3], k.shape[2]), dropout_p, generator)
        grads = flash_math.backward(
            spec, _dense(grad_out[qs]), q, k, v, _dense(out[qs]), _dense(lse[qs])[..., 0], None, keep,
            mask,
        )  # fmt: skip
        dq[qs] = _undense(grads.dq, dq[qs])
        dk[ks] = _undense(grads.dk, dk[ks])
        dv[ks] = _undense(grads.dv, dv[ks])
        if attn_bias is not None and bias_requires_grad:
            dbias = grads.d_scores.sum_to_size(attn_bias.shape).to(attn_bias.dtype)
    return dq, dk, dv, dbias


def _check(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Maybe, cum_seq_q: Maybe
) -> None:
    heads, kv_heads = query.shape[1], key.shape[1]
    check(
        kv_heads > 0 and heads % kv_heads == 0 and value.shape[1] == kv_heads,
        "For group-query attention, number of heads for key and query must be a factor of number of "
        "heads for query",
    )
    packed = cum_seq_q is not None
    # cuDNN reads all three by the query's batch size: another one would be read past its end.
    check(
        packed or query.shape[0] == key.shape[0] == value.shape[0],
        f"q, k and v have the batch sizes {query.shape[0]}, {key.shape[0]} and {value.shape[0]}",
    )
    if bias is None:
        return
    check(not packed, "attn_bias not yet supported with cuDNN Attention and NestedTensor")
    check(
        bias.ndim in (2, 3, 4),
        f"cuDNN SDPA expects either a 2D, 3D, or 4D attn_bias but got {bias.ndim}D",
    )
    # Raises where it does not fit, with expand's own message.
    bias_heads = bias.shape[1] if bias.ndim == 4 else 1
    bias.expand(query.shape[0], bias_heads, query.shape[2], key.shape[2])
    check(bias_heads in (1, heads), f"attn_bias has {bias_heads} heads, the query {heads}")


def _parts(cum_seq_q: Maybe, cum_seq_k: Maybe) -> Iterator[tuple[slice, slice]]:
    """All at once, or the tokens of each sequence."""
    if cum_seq_q is None or cum_seq_k is None:
        yield slice(None), slice(None)
    else:
        yield from zip(common.slices(cum_seq_q), common.slices(cum_seq_k), strict=True)


def _dense(part: torch.Tensor) -> torch.Tensor:
    """(b, h, s, d), or the (tokens, h, d) of one sequence, as float32 (b, h, s, d)."""
    dense = part if part.ndim == 4 else part.transpose(0, 1).unsqueeze(0)
    return dense.to(torch.float32)


def _undense(dense: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `_dense`, in the dtype of `like`."""
    part = dense if like.ndim == 4 else dense.squeeze(0).transpose(0, 1)
    return part.to(like.dtype)
