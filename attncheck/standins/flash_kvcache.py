"""`fwd_kvcache` of flash-attn's compiled module, versions 2.6.1 to 2.8: decoding with a KV cache.

Forward only, and never a dispatcher op in any version. See `flash_attn_2_cuda` for how faithful
these stand-ins are.
"""

from __future__ import annotations

import torch

from attncheck.standins import flash_checks as checks
from attncheck.standins import flash_math, flash_pages

MAX_SPLITS = 128
ROTARY_MULTIPLE = 16
Q_SHAPE = "batch_size, seqlen_q, num_heads, head_size_og"
CACHE_SHAPE = "batch_size_c, seqlen_k, num_heads_k, head_size_og"
NEW_SHAPE = "batch_size, seqlen_knew, num_heads_k, head_size_og"

Maybe = torch.Tensor | None


@torch.no_grad()
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
    leftpad_k_: Maybe,
    block_table_: Maybe,
    alibi_slopes_: Maybe,
    out_: Maybe,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    is_rotary_interleaved: bool,
    num_splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, softmax_lse) of q (batch, seqlen_q, heads, head_dim) over the cache, which gets the new
    keys and values first, in place.

    The cache is (batch_c, seqlen_k, kv_heads, head_dim), row `cache_batch_idx_[i]` (default i) for
    sequence i; with `block_table_` (batch, blocks) it is (blocks, 256 * n, kv_heads, head_dim). A
    sequence holds `seqlens_k_[i]` keys (default all), without the first `leftpad_k_[i]`; `k_`, `v_`
    (batch, seqlen_knew, kv_heads, head_dim) go behind them. `rotary_*` (seqlen_ro, rotary_dim / 2)
    turn the new keys at their positions in the cache, and q from position seqlens_k on under
    causal or a window, else all of it at position seqlens_k. `num_splits` is a matter of speed
    only. softmax_lse: float32 (batch, heads, seqlen_q), +inf where there is no key. RuntimeError
    where the extension's own checks fail, and where its kernel would write behind the cache.
    """
    checks.check_inputs(q, k=kcache, v=vcache)
    batch, seqlen_q, heads, head_dim = q.shape
    kv_heads = kcache.shape[2]
    checks.check_sizes(batch, heads, kv_heads, -(-head_dim // 8) * 8, "forward")  # it pads
    checks.check_grid(heads, seqlen_q)
    checks.check(num_splits <= MAX_SPLITS, f"num_splits > {MAX_SPLITS} not supported")
    tables = _blocks_of_sequences(
        kcache, vcache, cache_batch_idx_, leftpad_k_, block_table_, batch, kv_heads, head_dim
    )
    seqlen_k = kcache.shape[1] * len(tables[0])
    lengths = _lengths("seqlens_k", seqlens_k_, batch, seqlen_k)
    leftpads = _lengths("leftpad_k", leftpad_k_, batch, 0)
    new = _check_new(q, k_, v_, seqlens_k_, seqlen_k, kv_heads)
    _check_rotary(q, k_, rotary_cos_, rotary_sin_, seqlen_k)
    checks.check_slopes(alibi_slopes_, batch, heads)
    if out_ is not None:
        checks.check_buffer("Output", out_, q.dtype, Q_SHAPE, tuple(q.shape))
    longest = max(lengths) + new
    checks.check(
        longest <= seqlen_k,
        f"the cache has {seqlen_k} rows for a sequence and would need {longest}: the kernel reads "
        "or writes behind its end",
    )

    spec = flash_math.of_flash_attn_2(
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        0.0,
        q.dtype,
        seqlen_k,
    )
    moving = spec.causal or max(spec.window) >= 0
    out = torch.empty_like(q) if out_ is None else out_
    lse = torch.empty(batch, heads, seqlen_q, device=q.device)
    for i in range(batch):
        queries, length = q[i], lengths[i]
        if k_ is not None and v_ is not None:
            keys = k_[i]
            if rotary_cos_ is not None and rotary_sin_ is not None:
                turns = torch.arange(length, length + new, device=q.device)
                keys = _turned(keys, rotary_cos_, rotary_sin_, turns, is_rotary_interleaved)
                steps = torch.arange(seqlen_q, device=q.device) * int(moving)
                turns = (length + steps).clamp(max=rotary_cos_.shape[0] - 1)
                queries = _turned(queries, rotary_cos_, rotary_sin_, turns, is_rotary_interleaved)
            flash_pages.write(kcache, tables[i], length, keys)
            flash_pages.write(vcache, tables[i], length, v_[i])
        first, last = min(leftpads[i], length), length + new
        slopes = alibi_slopes_
        if slopes is not None and slopes.ndim == 2:
            slopes = slopes[i : i + 1]
        result = flash_math.forward(
            spec,
            _heads_first(queries),
            _heads_first(flash_pages.read(kcache, tables[i], first, last)),
            _heads_first(flash_pages.read(vcache, tables[i], first, last)),
            slopes,
            None,
        )
        out[i] = result.out[0].transpose(0, 1).to(out.dtype)
        lse[i] = result.lse[0]
    return out, lse


def _blocks_of_sequences(
    kcache: torch.Tensor,
    vcache: torch.Tensor,
    cache_batch_idx: Maybe,
    leftpad_k: Maybe,
    block_table: Maybe,
    batch: int,
    kv_heads: int,
    head_dim: int,
) -> list[torch.Tensor]:
    """For each sequence the blocks of the cache that hold it, in order."""
    if block_table is not None:
        what = "Paged KVcache does not support cache_batch_idx"
        checks.check(cache_batch_idx is None, what)
        checks.check(leftpad_k is None, flash_pages.NO_LEFTPAD)
        flash_pages.check_pages(kcache, vcache, block_table, batch, kv_heads, head_dim)
        return list(block_table)
    rows = kcache.shape[0]
    for name, cache in (("kcache", kcache), ("vcache", vcache)):
        checks.check_shape(name, cache, CACHE_SHAPE, (rows, kcache.shape[1], kv_heads, head_dim))
    if cache_batch_idx is None:
        # The kernel reads behind a cache that has fewer rows.
        checks.check(rows >= batch, f"the cache has {rows} rows for {batch} sequences")
        return list(torch.arange(batch, device=kcache.device).unsqueeze(1))
    checks.check(cache_batch_idx.dtype == torch.int32, "cache_batch_idx must have dtype int32")
    checks.check(cache_batch_idx.is_contiguous(), "cache_batch_idx must be contiguous")
    outside = bool(((cache_batch_idx < 0) | (cache_batch_idx >= rows)).any())
    checks.check(not outside, f"cache_batch_idx names rows that the cache of {rows} lacks")
    return list(cache_batch_idx.unsqueeze(1))


def _lengths(name: str, lengths: Maybe, batch: int, default: int) -> list[int]:
    if lengths is None:
        return [default] * batch
    checks.check(lengths.dtype == torch.int32, f"{name} must have dtype int32")
    checks.check(lengths.is_contiguous(), f"{name} must be contiguous")
    checks.check_shape(name, lengths, "batch_size", (batch,))
    return [int(length) for length in lengths.tolist()]


def _check_new(
    q: torch.Tensor, k: Maybe, v: Maybe, seqlens_k: Maybe, seqlen_k: int, kv_heads: int
) -> int:
    """How many keys are new."""
    if k is None:
        return 0
    checks.check(v is not None, "If key is supplied, value must also be passed in")
    checks.check(seqlens_k is not None, "If key is supplied, seqlens_k must also be passed in")
    checks.check(
        q.shape[1] <= seqlen_k,
        "If key is supplied, it must have seqlen <= the seqlen of the KV cache",
    )
    assert v is not None
    for name, tensor in (("Key", k), ("Value", v)):
        checks.check(tensor.dtype == q.dtype, f"{name} must have the same dtype as query")
        what = f"{name} tensor must have contiguous last dimension"
        checks.check(tensor.stride(-1) == 1, what)
        sizes = (q.shape[0], k.shape[1], kv_heads, q.shape[3])
        checks.check_shape(name[0].lower(), tensor, NEW_SHAPE, sizes)
    return int(k.shape[1])


def _check_rotary(q: torch.Tensor, k: Maybe, cos: Maybe, sin: Maybe, seqlen_k: int) -> None:
    if cos is None:
        return
    checks.check(
        k is not None,
        "If rotary cos/sin are provided, new key / value to be appended to KV cache must also be "
        "provided",
    )
    checks.check(sin is not None, "If rotary cos is provided, rotary sin must also be provided")
    assert sin is not None
    rotary_dim = 2 * cos.shape[1]
    checks.check(rotary_dim <= -(-q.shape[3] // 8) * 8, "rotary_dim must be <= headdim")
    checks.check(
        rotary_dim % ROTARY_MULTIPLE == 0,
        f"Only rotary dimensions divisible by {ROTARY_MULTIPLE} are currently supported",
    )
    what = "cos/sin seqlen must be at least the seqlen of KV cache"
    checks.check(cos.shape[0] >= seqlen_k, what)
    for name, tensor in (("rotary_cos", cos), ("rotary_sin", sin)):
        checks.check_shape(name, tensor, "seqlen_ro, rotary_dim / 2", tuple(cos.shape))
        checks.check(tensor.is_contiguous(), f"{name} must be contiguous")
        checks.check(tensor.dtype == q.dtype, "rotary_cos must have the same dtype as query")


def _turned(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool,
) -> torch.Tensor:
    """x (rows, heads, head_dim) with its first rotary_dim columns turned, in x's dtype.

    A pair is columns 2j and 2j + 1 if `interleaved`, else j and j + rotary_dim / 2.
    """
    half = cos.shape[1]
    c, s = (table[positions].to(torch.float32).unsqueeze(1) for table in (cos, sin))
    columns = torch.arange(half, device=x.device)
    one, other = (2 * columns, 2 * columns + 1) if interleaved else (columns, columns + half)
    a, b = x[..., one].to(torch.float32), x[..., other].to(torch.float32)
    out = x.clone()
    out[..., one] = (a * c - b * s).to(x.dtype)
    out[..., other] = (a * s + b * c).to(x.dtype)
    return out


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """(s, h, d) to float32 (1, h, s, d)."""
    return x.transpose(0, 1).unsqueeze(0).to(torch.float32)
