"""`aten::_efficient_attention_{forward,backward}` as torch 2.13 has them (cutlass, from xformers).

Backward computes from the output and the log-sum-exp that are passed in. Where CUDA is stricter: it
refuses misaligned strides, and wants a bias of full size (F.scaled_dot_product_attention expands it
first), where this one lets a dim of size 1 broadcast.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attncheck.standins import aten_common as common
from attncheck.standins import flash_dropout as dropout
from attncheck.standins import flash_math
from attncheck.standins.aten_common import Maybe, expect
from attncheck.standins.flash_checks import check

# The log-sum-exp is padded to a multiple of this many queries (kAlignLSE).
ALIGN_LSE = 32


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: Maybe,
    cu_seqlens_q: Maybe,
    cu_seqlens_k: Maybe,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float,
    custom_mask_type: int,
    compute_log_sumexp: bool = False,
    *,
    scale: float | None = None,
    seqlen_k: Maybe = None,
    window_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
    """(output, log-sum-exp, seed, offset, max_q, max_k).

    q (batch, sequence, heads, head_dim); with `cu_seqlens_*` batch is 1 and the sequence holds all
    tokens. log-sum-exp (sequences, heads, max_q rounded up to 32), +inf in the padding; (..., 0) if it is
    not asked for. `seqlen_k` (batch,): how many keys count. `window_size`: how many keys, the
    diagonal's included, a causal query sees.
    """
    max_q, max_k = _check_efficient(
        query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    )
    check(
        not window_size or custom_mask_type != common.NO_MASK,
        "window_size needs a causal custom_mask_type",
    )
    batch, rows, heads, _ = query.shape
    seed, offset, generator = common.draw(dropout_p)
    out = query.new_zeros(batch, rows, heads, value.shape[3])
    sequences = batch if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    lse = torch.full((sequences, heads, -(-max_q // ALIGN_LSE) * ALIGN_LSE), torch.inf)
    spec = common.spec(query, scale, dropout_p)
    for at, (qs, ks) in _parts(query, key, cu_seqlens_q, cu_seqlens_k):
        q, k, v = _heads_first(query[qs]), _heads_first(key[ks]), _heads_first(value[ks])
        if q.numel() == 0:
            continue
        mask = common.mask(q.shape[2], k.shape[2], custom_mask_type, window_size, seqlen_k, bias)
        keep = dropout.keep_mask((*q.shape[:3], k.shape[2]), dropout_p, generator)
        result = flash_math.forward(spec, q, k, v, None, keep, mask)
        out[qs] = result.out.transpose(1, 2).to(out.dtype)
        # A row that sees nothing: the kernel writes 0 (2.5 on), so that backward has no NaN.
        lse[at, :, : q.shape[2]] = torch.where(result.lse == torch.inf, 0.0, result.lse)
    return out, lse if compute_log_sumexp else lse[..., :0], seed, offset, max_q, max_k


def backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: Maybe,
    out: torch.Tensor,
    cu_seqlens_q: Maybe,
    cu_seqlens_k: Maybe,
    max_seqlen_q: int,
    max_seqlen_k: int,
    logsumexp: torch.Tensor,
    dropout_p: float,
    philox_seed: torch.Tensor,
    philox_offset: torch.Tensor,
    custom_mask_type: int,
    bias_requires_grad: bool,
    *,
    scale: float | None = None,
    num_splits_key: int | None = None,
    window_size: int | None = None,
    shared_storage_dqdkdv: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Maybe]:
    """(dq, dk, dv, dbias), dbias undefined unless it is required."""
    max_q, _ = _check_efficient(
        query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    )
    expect(query.shape[1:3] == grad_out.shape[1:3], "query.size(2) == grad_out_.size(2)")
    expect(value.shape[3] == grad_out.shape[3], "value.size(3) == grad_out_.size(3)")
    sequences = query.shape[0] if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    common.check_lse(logsumexp, (sequences, query.shape[2], -(-max_q // ALIGN_LSE) * ALIGN_LSE))
    generator = common.generator(dropout_p, philox_seed, philox_offset)
    dq, dk, dv = (torch.zeros_like(t) for t in (query, key, value))
    dbias = None
    spec = common.spec(query, scale, dropout_p)
    for at, (qs, ks) in _parts(query, key, cu_seqlens_q, cu_seqlens_k):
        q, k, v = _heads_first(query[qs]), _heads_first(key[ks]), _heads_first(value[ks])
        if q.numel() == 0 or k.numel() == 0:
            continue
        mask = common.mask(q.shape[2], k.shape[2], custom_mask_type, window_size, None, bias)
        keep = dropout.keep_mask((*q.shape[:3], k.shape[2]), dropout_p, generator)
        grads = flash_math.backward(
            spec, _heads_first(grad_out[qs]), q, k, v, _heads_first(out[qs]),
            logsumexp[at, :, : q.shape[2]], None, keep, mask,
        )  # fmt: skip
        dq[qs] = grads.dq.transpose(1, 2).to(dq.dtype)
        dk[ks] = grads.dk.transpose(1, 2).to(dk.dtype)
        dv[ks] = grads.dv.transpose(1, 2).to(dv.dtype)
        if bias is not None and bias_requires_grad:
            dbias = grads.d_scores.sum_to_size(bias.shape).to(bias.dtype)
    return dq, dk, dv, dbias


def _check_efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: Maybe,
    cu_seqlens_q: Maybe,
    cu_seqlens_k: Maybe,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> tuple[int, int]:
    """The longest query and key sequence. RuntimeError where the kernel's own checks fail."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        expect(tensor.ndim == 4, f"{name}.dim() == 4")
    expect(query.shape[0] == key.shape[0], "query.size(0) == key.size(0)")
    expect(query.shape[0] == value.shape[0], "query.size(0) == value.size(0)")
    expect(key.shape[1] == value.shape[1], "key.size(1) == value.size(1)")
    expect(query.shape[2] == key.shape[2], "query.size(2) == key.size(2)")  # no grouped queries
    expect(query.shape[2] == value.shape[2], "query.size(2) == value.size(2)")
    expect(query.shape[3] == key.shape[3], "query.size(3) == key.size(3)")
    expect(
        (cu_seqlens_q is None) == (cu_seqlens_k is None),
        "seqstart_q.has_value() == seqstart_k.has_value()",
    )
    if bias is not None:
        batch, rows, heads, _ = query.shape
        check(bias.dtype == query.dtype, "invalid dtype for bias - should match query's dtype")
        check(bias.ndim == 4, "Bias expected in BMHK format")
        check(bias.shape[0] in (1, batch), "attn_bias: wrong shape (batch dimension)")
        check(bias.shape[1] in (1, heads), "attn_bias: wrong shape (head dimension)")
        check(bias.shape[2] == rows, "attn_bias: wrong shape (seqlenQ dimension)")
        check(bias.shape[3] == key.shape[1], "attn_bias: wrong shape (seqlenKV dimension)")
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return query.shape[1], key.shape[1]
    check(bias is None, "cu seqlen + bias not supported")
    check(query.shape[0] == 1, "cu_seqlen only supports batch_size=1")
    for name, starts in (("seqstart_q", cu_seqlens_q), ("seqstart_k", cu_seqlens_k)):
        expect(starts.dtype == torch.int32, f"{name}->scalar_type() == at::ScalarType::Int")
    expect(len(cu_seqlens_q) == len(cu_seqlens_k), "seqstart_q->size(0) == seqstart_k->size(0)")
    expect(max_seqlen_q is not None, "max_seqlen_q_.has_value()")
    expect(max_seqlen_k is not None, "max_seqlen_k_.has_value()")
    assert max_seqlen_q is not None
    assert max_seqlen_k is not None
    return max_seqlen_q, max_seqlen_k


Part = tuple[slice, slice]  # of the batch and of the sequence


def _parts(
    query: torch.Tensor, key: torch.Tensor, cu_seqlens_q: Maybe, cu_seqlens_k: Maybe
) -> Iterator[tuple[slice, tuple[Part, Part]]]:
    """All at once, or each packed sequence: its rows in the log-sum-exp, its queries and its keys."""
    everything = slice(None)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        yield everything, ((everything, everything), (everything, everything))
        return
    pairs = zip(common.slices(cu_seqlens_q), common.slices(cu_seqlens_k), strict=True)
    for at, (queries, keys) in enumerate(pairs):
        yield slice(at, at + 1), ((everything, queries), (everything, keys))


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """(b, s, h, d) to float32 (b, h, s, d)."""
    return x.transpose(1, 2).to(torch.float32)
