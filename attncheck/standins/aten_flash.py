"""`aten::_flash_attention_{forward,backward}` as torch 2.13 has them: flash-attention 2, on its stand-in.

Where CUDA is stricter: it refuses float32 and misaligned strides.
"""

from __future__ import annotations

import torch

from attncheck.standins import flash_attn_2_cuda as flash
from attncheck.standins.aten_common import Maybe, scale_of
from attncheck.standins.flash_checks import check


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: Maybe,
    cum_seq_k: Maybe,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Maybe = None,
    alibi_slopes: Maybe = None,
    block_table: Maybe = None,
    num_splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(output, log-sum-exp, rng_state, unused, debug mask); causal is aligned bottom right.

    Dense: q (batch, sequence, heads, head_dim), log-sum-exp (batch, heads, sequence). With `cum_seq_*`:
    q (tokens, heads, head_dim), log-sum-exp (heads, tokens). `num_splits` is a matter of speed only.
    """
    check(
        (cum_seq_q is None) == (cum_seq_k is None),
        "cumulative_sequence_length_q and cumulative_sequence_length_k must be both set or both not set",
    )
    window = _window(window_size_left), _window(window_size_right)
    scale = scale_of(query, scale)
    if cum_seq_q is None or cum_seq_k is None:
        out, lse, debug_mask, rng_state = flash.fwd(
            query, key, value, None, alibi_slopes, dropout_p, scale, is_causal, *window, 0.0,
            return_debug_mask, None,
        )  # fmt: skip
    else:
        out, lse, debug_mask, rng_state = flash.varlen_fwd(
            query, key, value, None, cum_seq_q, cum_seq_k, seqused_k, None, block_table, alibi_slopes,
            max_q, max_k, dropout_p, scale, False, is_causal, *window, 0.0, return_debug_mask, None,
        )  # fmt: skip
    return out, lse, *_returned(rng_state), debug_mask


def _returned(state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The state as the op returns it: whole, and an unused scalar; up to 2.6 a seed and an offset, scalars
    both, and DTensor refuses an op of that torch that returns them otherwise."""
    if torch.ops.aten._flash_attention_forward.default._schema.returns[2].name == "philox_seed":
        return state[0].clone(), state[1].clone()
    return state.to(torch.uint64), torch.zeros((), dtype=torch.uint64)


def backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: Maybe,
    cum_seq_k: Maybe,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: torch.Tensor,
    unused: torch.Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv). It takes neither ALiBi slopes nor `seqused_k`, as PyTorch's own does not."""
    window = _window(window_size_left), _window(window_size_right)
    scale = scale_of(query, scale)
    state = None
    if dropout_p > 0:  # without dropout a caller may pass no state at all: xformers does
        # Before 2.7 the two were a seed and an offset of their own.
        state = rng_state if rng_state.numel() == 2 else torch.stack([rng_state, unused])
        state = state.to(torch.int64)
    tensors = grad_out.contiguous(), query, key, value, out.contiguous(), logsumexp
    if cum_seq_q is None or cum_seq_k is None:
        dq, dk, dv, _ = flash.bwd(
            *tensors, None, None, None, None, dropout_p, scale, is_causal, *window, 0.0, False, None,
            state,
        )  # fmt: skip
    else:
        dq, dk, dv, _ = flash.varlen_bwd(
            *tensors, None, None, None, cum_seq_q, cum_seq_k, None, max_q, max_k, dropout_p, scale,
            False, is_causal, *window, 0.0, False, None, state,
        )  # fmt: skip
    return dq, dk, dv


def _window(size: int | None) -> int:
    return -1 if size is None else size
