"""CPU stand-in for flash-attn's compiled module `flash_attn_2_cuda`, versions 2.7 and 2.8.

Older versions have other signatures: `flash_attn_2_6_cuda` and `flash_attn_2_5_cuda` turn those
into calls of these functions. All are called positionally by flash_attn/flash_attn_interface.py;
argument order, return values, shapes and dtypes are the extension's (csrc/flash_attn/flash_api.cpp).
Differences: float32 is accepted besides float16 and bfloat16, tensors live on the CPU, and dropout
draws other random numbers than CUDA's Philox (the mask is a function of `rng_state`, as there).

Shapes: q, out (batch, seqlen_q, heads, head_dim); k, v (batch, seqlen_k, kv_heads, head_dim);
packed ("varlen") ones (total, heads, head_dim) with int32 cu_seqlens (batch + 1,). Log-sum-exp:
float32, (batch, heads, seqlen_q) or (heads, total_q).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from attncheck.standins import flash_checks as checks
from attncheck.standins import flash_dropout as dropout
from attncheck.standins import flash_math, flash_pages
from attncheck.standins.flash_kvcache import fwd_kvcache as fwd_kvcache

Q_SHAPE = "batch_size, seqlen_q, num_heads, head_size"
K_SHAPE = "batch_size, seqlen_k, num_heads_k, head_size"
PACKED_Q_SHAPE = "total_q, num_heads, head_size"
PACKED_K_SHAPE = "total_k, num_heads_k, head_size"

Maybe = torch.Tensor | None


@torch.no_grad()
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
    softcap: float,
    return_softmax: bool,
    gen_: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, softmax_lse, S_dmask, rng_state). RuntimeError where the extension's own checks fail.

    S_dmask is empty, or (batch, heads, seqlen_q, seqlen_k rounded up to 128), negative where
    dropped.
    """
    checks.check_inputs(q, k=k, v=v)
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads = k.shape[1:3]
    checks.check_sizes(batch, heads, kv_heads, head_dim, "forward")
    checks.check_grid(heads, seqlen_q)
    checks.check_softmax(p_dropout, softcap, return_softmax, gen_)
    for name, tensor in (("k", k), ("v", v)):
        checks.check_shape(name, tensor, K_SHAPE, (batch, seqlen_k, kv_heads, head_dim))
    checks.check_slopes(alibi_slopes, batch, heads)
    if out_ is not None:
        checks.check_buffer("Output", out_, q.dtype, Q_SHAPE, tuple(q.shape))

    spec = flash_math.of_flash_attn_2(
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        p_dropout,
        q.dtype,
        seqlen_k,
    )
    rng_state = dropout.draw_rng_state(p_dropout, gen_, q.device)
    keep = dropout.keep_mask(
        (batch, heads, seqlen_q, seqlen_k), p_dropout, dropout.generator_of(p_dropout, rng_state)
    )
    result = flash_math.forward(spec, _dense(q), _dense(k), _dense(v), alibi_slopes, keep)
    out = torch.empty_like(q) if out_ is None else out_
    out.copy_(result.out.transpose(1, 2))
    s_dmask = dropout.empty_s_dmask(q, (batch, heads, seqlen_q, seqlen_k), return_softmax)
    if return_softmax:
        dropout.write_s_dmask(s_dmask, result.probabilities, keep)
    return out, result.lse.contiguous(), s_dmask, rng_state


@torch.no_grad()
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
    softcap: float,
    deterministic: bool,
    gen_: torch.Generator | None,
    rng_state: Maybe,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv, softmax_d), from the `out` and `softmax_lse` that are passed in.

    Buffers that are passed in are written in place and returned. softmax_d is rowsum(dout * out),
    float32, (batch, heads, seqlen_q rounded up to 128). `deterministic` changes nothing here: the
    sums always run in one order.
    """
    checks.check_inputs(q, k=k, v=v, out=out, dout=dout)
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads = k.shape[1:3]
    checks.check_sizes(batch, heads, kv_heads, head_dim, "backward")
    checks.check_softmax(p_dropout, softcap, False, gen_)
    for name, tensor in (("k", k), ("v", v)):
        checks.check_shape(name, tensor, K_SHAPE, (batch, seqlen_k, kv_heads, head_dim))
    for name, tensor in (("out", out), ("dout", dout)):
        checks.check_shape(name, tensor, Q_SHAPE, tuple(q.shape))
    _check_lse(softmax_lse, (batch, heads, seqlen_q))
    checks.check_slopes(alibi_slopes, batch, heads)
    dq = _gradient_buffer("dq", dq_, q, Q_SHAPE)
    dk = _gradient_buffer("dk", dk_, k, K_SHAPE)
    dv = _gradient_buffer("dv", dv_, v, K_SHAPE)

    spec = flash_math.of_flash_attn_2(
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        p_dropout,
        q.dtype,
        seqlen_k,
    )
    if rng_state is None:
        rng_state = dropout.draw_rng_state(p_dropout, gen_, q.device)
    keep = dropout.keep_mask(
        (batch, heads, seqlen_q, seqlen_k), p_dropout, dropout.generator_of(p_dropout, rng_state)
    )
    grads = flash_math.backward(
        spec,
        _dense(dout),
        _dense(q),
        _dense(k),
        _dense(v),
        _dense(out),
        softmax_lse,
        alibi_slopes,
        keep,
    )
    dq.copy_(grads.dq.transpose(1, 2))
    dk.copy_(grads.dk.transpose(1, 2))
    dv.copy_(grads.dv.transpose(1, 2))
    softmax_d = torch.zeros(batch, heads, dropout.round_128(seqlen_q), device=q.device)
    softmax_d[..., :seqlen_q] = grads.row_dot
    return dq, dk, dv, softmax_d


@torch.no_grad()
def varlen_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out_: Maybe,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqused_k: Maybe,
    leftpad_k: Maybe,
    block_table: Maybe,
    alibi_slopes: Maybe,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen_: torch.Generator | None,
    num_splits: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of packed sequences; S_dmask per sequence, as in
    `fwd`.

    `seqused_k` (batch,): how many keys of each sequence count. `leftpad_k` (batch,): how many keys
    to leave out at the front. `block_table` (batch, blocks of a sequence), int32: k and v are pages
    (blocks, 256 * n, kv_heads, head_dim), and `cu_seqlens_k` gives lengths only. `num_splits`
    (after 2.8) is a matter of speed only. Tokens behind the last sequence: out 0, log-sum-exp +inf
    (the extension leaves them unwritten; with `zero_tensors`, 0 and -inf).
    """
    checks.check_inputs(q, k=k, v=v)
    checks.check_cu_seqlens(cu_seqlens_q, cu_seqlens_k)
    batch = cu_seqlens_q.numel() - 1
    total_q, heads, head_dim = q.shape
    kv_heads = k.shape[-2]
    checks.check_softmax(p_dropout, softcap, return_softmax, gen_)
    checks.check_sizes(batch, heads, kv_heads, head_dim, "forward")
    checks.check_grid(heads, max_seqlen_q)
    if block_table is None:
        for name, tensor in (("k", k), ("v", v)):
            checks.check_shape(name, tensor, PACKED_K_SHAPE, (k.shape[0], kv_heads, head_dim))
    else:
        flash_pages.check_pages(k, v, block_table, batch, kv_heads, head_dim)
        checks.check(leftpad_k is None, flash_pages.NO_LEFTPAD)
    for name, lengths in (("seqused_k", seqused_k), ("leftpad_k", leftpad_k)):
        if lengths is not None:
            checks.check(lengths.dtype == torch.int32, f"{name} must have dtype int32")
            checks.check_shape(name, lengths, "batch_size", (batch,))
    checks.check_slopes(alibi_slopes, batch, heads)
    if out_ is not None:
        checks.check_buffer("Output", out_, q.dtype, PACKED_Q_SHAPE, tuple(q.shape))

    spec = flash_math.of_flash_attn_2(
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        p_dropout,
        q.dtype,
        max_seqlen_k,
    )
    rng_state = dropout.draw_rng_state(p_dropout, gen_, q.device)
    generator = dropout.generator_of(p_dropout, rng_state)
    out = torch.empty_like(q) if out_ is None else out_
    out.zero_()
    behind = -torch.inf if zero_tensors else torch.inf
    lse = torch.full((heads, total_q), behind, device=q.device)
    s_dmask = dropout.empty_s_dmask(q, (batch, heads, max_seqlen_q, max_seqlen_k), return_softmax)
    for sequence in _sequences(cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k):
        qs, ks = sequence.queries, sequence.keys
        keep = dropout.keep_mask((1, heads, _length(qs), _length(ks)), p_dropout, generator)
        keys, values = (
            _packed(x, ks)
            if block_table is None
            else _in_order(flash_pages.read(x, block_table[sequence.index], 0, _length(ks)))
            for x in (k, v)
        )
        result = flash_math.forward(
            spec,
            _packed(q, qs),
            keys,
            values,
            _slopes_of(alibi_slopes, sequence.index),
            keep,
        )
        out[qs] = result.out[0].transpose(0, 1).to(out.dtype)
        lse[:, qs] = result.lse[0]
        if return_softmax:
            one = slice(sequence.index, sequence.index + 1)
            dropout.write_s_dmask(s_dmask[one], result.probabilities, keep)
    return out, lse, s_dmask, rng_state


@torch.no_grad()
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
    softcap: float,
    deterministic: bool,
    gen_: torch.Generator | None,
    rng_state: Maybe,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv, softmax_d) of packed sequences; see `bwd`.

    softmax_d is (heads, total_q + 128 * batch); sequence i starts at cu_seqlens_q[i] + 128 * i.
    Tokens behind the last sequence get zeros (the extension leaves them unwritten without
    `zero_tensors`).
    """
    checks.check_inputs(q, k=k, v=v, out=out, dout=dout)
    checks.check_cu_seqlens(cu_seqlens_q, cu_seqlens_k)
    batch = cu_seqlens_q.numel() - 1
    total_q, heads, head_dim = q.shape
    total_k, kv_heads = k.shape[:2]
    checks.check_sizes(batch, heads, kv_heads, head_dim, "backward")
    checks.check_softmax(p_dropout, softcap, False, gen_)
    for name, tensor in (("k", k), ("v", v)):
        checks.check_shape(name, tensor, PACKED_K_SHAPE, (total_k, kv_heads, head_dim))
    for name, tensor in (("out", out), ("dout", dout)):
        checks.check_shape(name, tensor, PACKED_Q_SHAPE, tuple(q.shape))
    _check_lse(softmax_lse, (heads, total_q))
    checks.check_slopes(alibi_slopes, batch, heads)
    dq = _gradient_buffer("dq", dq_, q, PACKED_Q_SHAPE)
    dk = _gradient_buffer("dk", dk_, k, PACKED_K_SHAPE)
    dv = _gradient_buffer("dv", dv_, v, PACKED_K_SHAPE)

    spec = flash_math.of_flash_attn_2(
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        p_dropout,
        q.dtype,
        max_seqlen_k,
    )
    if rng_state is None:
        rng_state = dropout.draw_rng_state(p_dropout, gen_, q.device)
    generator = dropout.generator_of(p_dropout, rng_state)
    for gradient in (dq, dk, dv):
        gradient.zero_()
    softmax_d = torch.zeros(heads, total_q + 128 * batch, device=q.device)
    for sequence in _sequences(cu_seqlens_q, cu_seqlens_k, None, None):
        qs, ks = sequence.queries, sequence.keys
        keep = dropout.keep_mask((1, heads, _length(qs), _length(ks)), p_dropout, generator)
        grads = flash_math.backward(
            spec,
            _packed(dout, qs),
            _packed(q, qs),
            _packed(k, ks),
            _packed(v, ks),
            _packed(out, qs),
            softmax_lse[:, qs].unsqueeze(0),
            _slopes_of(alibi_slopes, sequence.index),
            keep,
        )
        dq[qs] = grads.dq[0].transpose(0, 1).to(dq.dtype)
        dk[ks] = grads.dk[0].transpose(0, 1).to(dk.dtype)
        dv[ks] = grads.dv[0].transpose(0, 1).to(dv.dtype)
        start = qs.start + 128 * sequence.index
        softmax_d[:, start : start + _length(qs)] = grads.row_dot[0]
    return dq, dk, dv, softmax_d


@dataclass(frozen=True)
class _Sequence:
    index: int
    queries: slice
    keys: slice


def _sequences(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, seqused_k: Maybe, leftpad_k: Maybe
) -> Iterator[_Sequence]:
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for index in range(len(starts_q) - 1):
        first, last = starts_k[index], starts_k[index + 1]
        if seqused_k is not None:
            last = first + int(seqused_k[index])
        if leftpad_k is not None:
            first = min(first + int(leftpad_k[index]), last)
        yield _Sequence(index, slice(starts_q[index], starts_q[index + 1]), slice(first, last))


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """(b, s, h, d) to float32 (b, h, s, d)."""
    return x.transpose(1, 2).to(torch.float32)


def _packed(x: torch.Tensor, part: slice) -> torch.Tensor:
    """One sequence of (total, h, d) as float32 (1, h, s, d)."""
    return _in_order(x[part])


def _in_order(x: torch.Tensor) -> torch.Tensor:
    """(s, h, d) to float32 (1, h, s, d)."""
    return x.transpose(0, 1).unsqueeze(0).to(torch.float32)


def _slopes_of(slopes: Maybe, sequence: int) -> Maybe:
    return slopes[sequence : sequence + 1] if slopes is not None and slopes.ndim == 2 else slopes


def _check_lse(lse: torch.Tensor, shape: tuple[int, ...]) -> None:
    # The extension reads it through a bare pointer: a wrong shape would be read past its end.
    checks.check(
        lse.dtype == torch.float32 and tuple(lse.shape) == shape,
        f"softmax_lse is {lse.dtype} {tuple(lse.shape)}, the kernel reads it as float32 {shape}",
    )


def _gradient_buffer(
    name: str, buffer: Maybe, like: torch.Tensor, shape_names: str
) -> torch.Tensor:
    if buffer is None:
        return torch.empty_like(like)
    checks.check_buffer(name, buffer, like.dtype, shape_names, tuple(like.shape))
    return buffer
