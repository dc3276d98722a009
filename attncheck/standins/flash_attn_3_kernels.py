"""What flash-attn 3's kernels compute, check and return, on the CPU in plain PyTorch.

`forward` and `backward` take the arguments of the raw ops by name (see flash_attn_3.py). Batched and
packed tensors go the same way: one sequence of one call at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attncheck.standins import flash_math
from attncheck.standins.flash_checks import DTYPES, check, check_shape

Maybe = torch.Tensor | None
Rows = int | slice

_UNSUPPORTED = {
    **dict.fromkeys(("k_new", "v_new", "cu_seqlens_k_new", "kv_batch_idx"), "kv cache"),
    **dict.fromkeys(("seqused_q", "seqused_k", "leftpad_k"), "partly used sequences"),
    **dict.fromkeys(("rotary_cos", "rotary_sin", "seqlens_rotary"), "rotary embedding"),
    **dict.fromkeys(("q_descale", "k_descale", "v_descale"), "fp8"),
    "page_table": "paged keys and values",
}


@dataclass(frozen=True)
class _Sizes:
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int


@torch.no_grad()
def forward(a: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, Maybe, Maybe]:
    """(out, softmax_lse, out_accum, softmax_lse_accum), the last two None unless num_splits is above 1.

    RuntimeError where the extension's own checks fail, NotImplementedError for what the stand-in lacks.
    """
    q, k, v, qv = a["q"], a["k"], a["v"], a["qv"]
    sizes = _checked(a, "FlashAttention only supports fp16, bf16, and fp8_e4m3 data type")
    check(sizes.head_dim <= 256, "FlashAttention forward only supports head dimension at most 256")
    _check_value_head_dim(sizes)
    out = q.new_empty(*q.shape[:-1], sizes.head_dim_v) if a["out"] is None else a["out"]
    check(out.dtype == q.dtype, "For FP16/BF16 input, output must have the same dtype as inputs.")
    check(out.stride(-1) == 1, "Output tensor must have contiguous last dimension")
    _check_shape("out", out, (*q.shape[:-1], sizes.head_dim_v))
    if qv is not None:
        _check_qv(qv, q, sizes)
    lse = q.new_empty(lse_shape(q), dtype=torch.float32)

    out.zero_()
    # Without any key the extension fills in +inf; a kernel that sees none of the keys writes -inf.
    lse.fill_(torch.inf if k.numel() == 0 else -torch.inf)
    spec = _spec(a)
    for queries, keys in _sequences(a, sizes.batch):
        q_i, k_i, v_i = _one(q, queries), _one(k, keys), _one(v, keys)
        if k_i.shape[2] == 0:
            continue
        if qv is not None:  # scores are q k^T + qv v^T
            q_i = torch.cat([q_i, _one(qv, queries)], dim=-1)
            k_i = torch.cat([k_i, v_i], dim=-1)
        hidden = _chunk_bias(a["attention_chunk"], q_i.shape[2], k_i.shape[2])
        done = flash_math.forward(spec, q_i, k_i, v_i, None, None, hidden)
        out[queries] = done.out[0].transpose(0, 1).to(out.dtype)
        _rows_of(lse, queries).copy_(torch.where(done.lse[0] == torch.inf, -torch.inf, done.lse[0]))
    return out, lse, *_accumulators(a["num_splits"], out, lse)


@torch.no_grad()
def backward(a: Mapping[str, Any]) -> tuple[Maybe, ...]:
    """(dq, dk, dv, softmax_d, softmax_lse_log2, dq_accum, dk_accum, dv_accum), from `out` and `softmax_lse`.

    Buffers that are passed in are written in place and returned. The last five are workspace: softmax_d
    and softmax_lse_log2 hold what their names say, the accumulators zeros (dk_accum and dv_accum are None
    where heads are not grouped).
    """
    q, k, v, out, dout, lse = (a[n] for n in ("q", "k", "v", "out", "dout", "softmax_lse"))
    sizes = _checked(a, "FlashAttention only support fp16 and bf16 data type")
    widest = max(sizes.head_dim, sizes.head_dim_v)
    check(widest <= 256, "FlashAttention forward only supports head dimension at most 256")
    deterministic_fits = not a["deterministic"] or widest <= 192
    check(deterministic_fits, "Deterministic backward not supported for hdim 256.")
    for name, tensor in (("out", out), ("dout", dout)):
        check(tensor.dtype == q.dtype, f"query and {name} must have the same dtype")
        check(tensor.stride(-1) == 1, f"{name} tensor must have contiguous last dimension")
        _check_shape(name, tensor, (*q.shape[:-1], sizes.head_dim_v))
    # The extension reads it through a bare pointer: too few numbers would be read past their end. Packed
    # sequences may come with a batch of one in front (xformers passes them so).
    check(
        lse.dtype == torch.float32
        and lse.is_contiguous()
        and tuple(lse.shape) in (lse_shape(q), (1, *lse_shape(q))),
        f"softmax_lse is {lse.dtype} {tuple(lse.shape)}, "
        f"the kernel reads it as float32 {lse_shape(q)}",
    )
    lse = lse.view(lse_shape(q))
    gradients = {}
    for name, like in (("dq", q), ("dk", k), ("dv", v)):
        buffer = torch.empty_like(like) if a[name] is None else a[name]
        check(buffer.dtype == q.dtype, f"{name} must have the same dtype as q")
        check(buffer.stride(-1) == 1, f"{name} must have contiguous last dimension")
        _check_shape(name, buffer, tuple(like.shape))
        gradients[name] = buffer.zero_()

    softmax_d = q.new_zeros(softmax_d_shape(a), dtype=torch.float32)
    lse_log2 = torch.zeros_like(softmax_d)
    spec = _spec(a)
    for index, (queries, keys) in enumerate(_sequences(a, sizes.batch)):
        lse_i = _rows_of(lse, queries)
        done = flash_math.backward(
            spec,
            _one(dout, queries),
            _one(q, queries),
            _one(k, keys),
            _one(v, keys),
            _one(out, queries),
            lse_i[None],
            None,
            None,
        )
        for name, rows, gradient in (
            ("dq", queries, done.dq),
            ("dk", keys, done.dk),
            ("dv", keys, done.dv),
        ):
            gradients[name][rows] = gradient[0].transpose(0, 1).to(q.dtype)
        padded = _padded_rows(a, queries, index)
        _rows_of(softmax_d, padded)[:, : lse_i.shape[1]] = done.row_dot[0]
        # As the preprocessing kernel leaves it: 0 for a query that sees no key.
        finite = torch.where(torch.isinf(lse_i), 0.0, lse_i)
        _rows_of(lse_log2, padded)[:, : lse_i.shape[1]] = finite * math.log2(math.e)
    return *gradients.values(), softmax_d, lse_log2, *_backward_accumulators(a, sizes, softmax_d)


def softmax_d_shape(a: Mapping[str, Any]) -> tuple[int, ...]:
    """Rounded up to the kernel's block of queries, as on Hopper: (b, h, rows), packed (h, rows)."""
    q, block = a["q"], _block_m(a)
    if a["cu_seqlens_q"] is None and a["cu_seqlens_k"] is None:
        return q.shape[0], q.shape[2], _round_up(q.shape[1], block)
    total = q.shape[:-2].numel()
    batch = q.shape[0] if a["cu_seqlens_q"] is None else a["cu_seqlens_q"].shape[0] - 1
    return q.shape[-2], _round_up(total + batch * block, block)


# --- one sequence at a time ----------------------------------------------------------------


def _sequences(a: Mapping[str, Any], batch: int) -> Iterator[tuple[Rows, Rows]]:
    """Where the queries and the keys of each sequence lie in dim 0."""
    starts = [None if a[n] is None else a[n].tolist() for n in ("cu_seqlens_q", "cu_seqlens_k")]
    for index in range(batch):
        queries, keys = (
            index
            if s is None
            else slice(s[index], s[index + 1])  # an entry, or rows of a packed tensor
            for s in starts
        )
        yield queries, keys


def _one(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """One sequence as float32 (1, heads, rows, head_dim)."""
    return x[rows].transpose(0, 1)[None].to(torch.float32)


def _rows_of(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """One sequence's (heads, rows) of a log-sum-exp, (b, h, s) or (h, total)."""
    return x[rows] if isinstance(rows, int) else x[:, rows]


def _padded_rows(a: Mapping[str, Any], queries: Rows, index: int) -> Rows:
    """Where a sequence's rows of softmax_d begin: on a multiple of the block."""
    if isinstance(queries, int) and a["cu_seqlens_k"] is None:
        return queries
    block = _block_m(a)
    first = queries * a["q"].shape[1] if isinstance(queries, int) else queries.start
    return slice((first + index * block) // block * block, None)


def _spec(a: Mapping[str, Any]) -> flash_math.Attention:
    scale = a["softmax_scale"]
    return flash_math.Attention(
        scale=a["q"].shape[-1] ** -0.5 if scale is None else scale,
        causal=a["causal"],
        window=(a["window_size_left"], a["window_size_right"]),
        softcap=a["softcap"],
        dropout=0.0,
        dtype=a["q"].dtype,
    )


def _chunk_bias(chunk: int, rows: int, columns: int) -> Maybe:
    """-inf outside the chunk of keys, counted from the first, that a query's own position lies in."""
    if chunk <= 0:
        return None
    i = torch.arange(rows)[:, None] + (columns - rows)
    j = torch.arange(columns)[None, :]
    first = i - i % chunk
    return torch.where((j >= first) & (j < first + chunk), 0.0, -torch.inf)


# --- workspace -----------------------------------------------------------------------------


def _accumulators(splits: int, out: torch.Tensor, lse: torch.Tensor) -> tuple[Maybe, Maybe]:
    """Partial results (splits, ..., h, s, dv) and (splits, ..., h, s). All keys count to the first split,
    as they do on a GPU while they fit one block."""
    if splits <= 1:
        return None, None
    out_accum = out.new_zeros(splits, *lse.shape, out.shape[-1], dtype=torch.float32)
    out_accum[0] = out.transpose(-3, -2)
    lse_accum = torch.full((splits, *lse.shape), -torch.inf)
    lse_accum[0] = lse
    return out_accum, lse_accum


def _backward_accumulators(
    a: Mapping[str, Any], sizes: _Sizes, softmax_d: torch.Tensor
) -> tuple[torch.Tensor, Maybe, Maybe]:
    width = _rounded_head_dim(max(sizes.head_dim, sizes.head_dim_v))
    dq_accum = softmax_d.new_zeros(*softmax_d.shape[:-1], softmax_d.shape[-1] * width)
    if sizes.heads == sizes.kv_heads:
        return dq_accum, None, None
    block = 128 if width <= 128 else 96 if width <= 192 else 80
    shape: tuple[int, ...]
    if softmax_d.ndim == 3:
        shape = (sizes.batch, sizes.kv_heads, _round_up(a["k"].shape[1], block) * width)
    else:
        total = a["k"].shape[:-2].numel()
        shape = (sizes.kv_heads, _round_up(total + sizes.batch * block, block), width)
    return dq_accum, softmax_d.new_zeros(shape), softmax_d.new_zeros(shape)


def _block_m(a: Mapping[str, Any]) -> int:
    """Queries to a block of the backward kernel on Hopper."""
    width = _rounded_head_dim(max(a["q"].shape[-1], a["v"].shape[-1]))
    left, right = a["window_size_left"], 0 if a["causal"] else a["window_size_right"]
    causal = left < 0 and right == 0
    if width <= 64:
        return 96 if causal and a["softcap"] > 0 else 128
    if width <= 96 or width > 128:
        return 64
    return 64 if left >= 0 or right >= 0 or a["softcap"] > 0 else 80


def _rounded_head_dim(head_dim: int) -> int:
    return next(width for width in (64, 96, 128, 192, 256) if head_dim <= width)


def _round_up(length: int, block: int) -> int:
    return -(-length // block) * block


# --- checks, with the extension's messages -------------------------------------------------


def _checked(a: Mapping[str, Any], wrong_dtype: str) -> _Sizes:
    """What forward and backward check alike. Returns the sizes."""
    for name, what in _UNSUPPORTED.items():
        if a.get(name) is not None:
            raise NotImplementedError(
                f"{name}: attncheck's stand-in for flash-attn 3 has no {what}"
            )
    q, k, v = a["q"], a["k"], a["v"]
    if q.dtype == torch.float8_e4m3fn:
        raise NotImplementedError("fp8: attncheck's stand-in for flash-attn 3 has no fp8")
    check(q.dtype in DTYPES, wrong_dtype)
    for name, tensor in (("key", k), ("value", v)):
        check(tensor.dtype == q.dtype, f"query and {name} must have the same dtype")
    for tensor in (q, k, v):
        check(tensor.stride(-1) == 1, "Input tensor must have contiguous last dimension")
    starts_q, starts_k = a["cu_seqlens_q"], a["cu_seqlens_k"]
    for side, starts in (("q", starts_q), ("k", starts_k)):
        if starts is None:
            continue
        check(starts.is_contiguous(), f"cu_seqlens_{side} must be contiguous")
        check(starts.dtype == torch.int32, f"cu_seqlens_{side} must have dtype torch.int32")
        check(
            a[f"max_seqlen_{side}"] is not None,
            f"max_seqlen_{side} must be provided if cu_seqlens_{side} is provided",
        )
    batch = q.shape[0] if starts_q is None else starts_q.numel() - 1
    batch_k = k.shape[0] if starts_k is None else starts_k.numel() - 1
    check(batch == batch_k, "batch_size must be equal to batch_size_k")
    sizes = _Sizes(batch, q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1])
    # What C++ makes of the modulo below, said in words instead of ending the process.
    check(
        sizes.kv_heads > 0,
        "num_heads_k is 0: the compiled extension divides by it and kills the process (SIGFPE)",
    )
    check(
        sizes.heads % sizes.kv_heads == 0,
        "Number of heads in key/value must divide number of heads in query",
    )
    check(q.ndim == (4 if starts_q is None else 3), f"q has {q.ndim} dimensions")
    _check_shape("k", k, (*k.shape[:-2], sizes.kv_heads, sizes.head_dim))
    _check_shape("v", v, (*k.shape[:-2], sizes.kv_heads, sizes.head_dim_v))
    check(sizes.head_dim % 8 == 0, "head_size should be a multiple of 8")
    check(sizes.head_dim_v % 8 == 0, "head_size_v should be a multiple of 8")
    return sizes


def _check_value_head_dim(sizes: _Sizes) -> None:
    narrow, wide = sizes.head_dim, sizes.head_dim_v
    check(
        narrow == wide
        or (128 < narrow <= 192 and 96 < wide <= 128)
        or (narrow <= 64 and wide <= 512),
        "If V headdim is different from Q/K dim, we only support Q/K headdim in (128, 192] and V headdim "
        "in (96, 128], or (Q/K <= 64 and V <= 512).",
    )


def _check_qv(qv: torch.Tensor, q: torch.Tensor, sizes: _Sizes) -> None:
    check(sizes.head_dim <= 64, "q_v is only supported for head_size <= 64")
    check(sizes.head_dim_v >= 256, "q_v is only supported for hdim_v >= 256.")
    check(qv.dtype == q.dtype, "q_v must have the same dtype as query")
    check(qv.stride(-1) == 1, "q_v tensor must have contiguous last dimension")
    _check_shape("q_v", qv, (*q.shape[:-1], sizes.head_dim_v))


# How the extension writes a shape: rows of a batch, rows when packed, and the rest.
_Q_ROWS, _K_ROWS = ("batch_size, seqlen_q", "total_q"), ("batch_size_k, seqlen_k", "total_k")
_SHAPES = {
    **dict.fromkeys(("out", "dout", "q_v"), (*_Q_ROWS, "num_heads, head_size_v")),
    "dq": (*_Q_ROWS, "num_heads, head_size"),
    **dict.fromkeys(("k", "dk"), (*_K_ROWS, "num_heads_k, head_size")),
    **dict.fromkeys(("v", "dv"), (*_K_ROWS, "num_heads_k, head_size_v")),
}


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    batched, packed, rest = _SHAPES[name]
    rows = batched if len(shape) == 4 else packed
    check_shape(name, tensor, f"{rows}, {rest}", shape)


def lse_shape(q: torch.Tensor) -> tuple[int, ...]:
    if q.ndim == 4:
        return q.shape[0], q.shape[2], q.shape[1]
    return q.shape[1], q.shape[0]
