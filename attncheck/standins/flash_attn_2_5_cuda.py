"""CPU stand-in for `flash_attn_2_cuda` of flash-attn 2.5.7 to 2.5.9, by the one for 2.6.

There is no softcap and no left padding, and what belongs to the queries of packed sequences is padded:
log-sum-exp (batch, heads, max_seqlen_q) instead of (heads, total_q), and softmax_d likewise.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from attncheck.standins import flash_attn_2_6_cuda as newer
from attncheck.standins.flash_dropout import round_128

Maybe = torch.Tensor | None
NO_SOFTCAP = 0.0


def fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out_: Maybe,
    alibi_slopes: Maybe,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    return_softmax: bool,
    gen_: torch.Generator | None,
) -> newer.Eight:
    """As in 2.6."""
    spec = (alibi_slopes, p_dropout, softmax_scale, is_causal, window_size_left, window_size_right)
    return newer.fwd(q, k, v, out_, *spec, NO_SOFTCAP, return_softmax, gen_)


def bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq_: Maybe,
    dk_: Maybe,
    dv_: Maybe,
    alibi_slopes: Maybe,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    deterministic: bool,
    gen_: torch.Generator | None,
    rng_state: Maybe,
) -> newer.Four:
    """As in 2.6."""
    spec = (alibi_slopes, p_dropout, softmax_scale, is_causal, window_size_left, window_size_right)
    tensors = (dout, q, k, v, out, softmax_lse, dq_, dk_, dv_)
    return newer.bwd(*tensors, *spec, NO_SOFTCAP, deterministic, gen_, rng_state)


def varlen_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out_: Maybe,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqused_k: Maybe,
    block_table_: Maybe,
    alibi_slopes: Maybe,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    return_softmax: bool,
    gen_: torch.Generator | None,
) -> newer.Eight:
    """As in 2.6, with a log-sum-exp of (batch, heads, max_seqlen_q): +inf behind a sequence's end,
    where the extension leaves it unwritten (-inf with `zero_tensors`)."""
    packing = (cu_seqlens_q, cu_seqlens_k, seqused_k, None, block_table_)
    spec = (
        *(alibi_slopes, max_seqlen_q, max_seqlen_k, p_dropout, softmax_scale, zero_tensors),
        *(is_causal, window_size_left, window_size_right),
    )
    results = newer.varlen_fwd(q, k, v, out_, *packing, *spec, NO_SOFTCAP, return_softmax, gen_)
    behind = -torch.inf if zero_tensors else torch.inf
    starts = cu_seqlens_q.tolist()
    padded = _a_row_each(results[5], starts, _lengths(starts), max_seqlen_q, behind)
    return *results[:5], padded, *results[6:]


def varlen_bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq_: Maybe,
    dk_: Maybe,
    dv_: Maybe,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    alibi_slopes: Maybe,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    deterministic: bool,
    gen_: torch.Generator | None,
    rng_state: Maybe,
) -> newer.Four:
    """As in 2.6, from a log-sum-exp of (batch, heads, max_seqlen_q); softmax_d is (batch, heads,
    max_seqlen_q rounded up to 128)."""
    starts = cu_seqlens_q.tolist()
    lengths = _lengths(starts)
    lse = softmax_lse.new_full((q.shape[1], q.shape[0]), torch.inf)
    for index, length in enumerate(lengths):
        lse[:, starts[index] : starts[index] + length] = softmax_lse[index, :, :length]
    spec = (
        *(alibi_slopes, max_seqlen_q, max_seqlen_k, p_dropout, softmax_scale, zero_tensors),
        *(is_causal, window_size_left, window_size_right),
    )
    tensors = (dout, q, k, v, out, lse, dq_, dk_, dv_, cu_seqlens_q, cu_seqlens_k)
    dq, dk, dv, packed_d = newer.varlen_bwd(
        *tensors, *spec, NO_SOFTCAP, deterministic, gen_, rng_state
    )
    # 2.6 starts sequence i at 128 * i rows beyond its tokens: see there.
    firsts = [start + 128 * index for index, start in enumerate(starts)]
    return dq, dk, dv, _a_row_each(packed_d, firsts, lengths, round_128(max_seqlen_q), 0.0)


def fwd_kvcache(
    q: torch.Tensor,
    kcache: torch.Tensor,
    vcache: torch.Tensor,
    k_: Maybe,
    v_: Maybe,
    seqlens_k_: Maybe,
    rotary_cos_: Maybe,
    rotary_sin_: Maybe,
    cache_batch_idx_: Maybe,
    block_table_: Maybe,
    alibi_slopes_: Maybe,
    out_: Maybe,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    is_rotary_interleaved: bool,
    num_splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in 2.6."""
    return newer.fwd_kvcache(
        q,
        kcache,
        vcache,
        k_,
        v_,
        seqlens_k_,
        rotary_cos_,
        rotary_sin_,
        cache_batch_idx_,
        None,  # leftpad_k
        block_table_,
        alibi_slopes_,
        out_,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        NO_SOFTCAP,
        is_rotary_interleaved,
        num_splits,
    )


def _lengths(starts: list[int]) -> list[int]:
    return [last - first for first, last in pairwise(starts)]


def _a_row_each(
    packed: torch.Tensor, firsts: list[int], lengths: list[int], size: int, fill: float
) -> torch.Tensor:
    """(heads, rows) to (batch, heads, size): sequence i is `lengths[i]` rows from `firsts[i]` on."""
    out = packed.new_full((len(lengths), packed.shape[0], size), fill)
    for index, length in enumerate(lengths):
        out[index, :, :length] = packed[:, firsts[index] : firsts[index] + length]
    return out
