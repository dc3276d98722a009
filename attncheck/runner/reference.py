"""The attention that every probe is judged against: differentiable, plain, from the formula.

    scores = softcap(scale * q k^T) + alibi + bias,   out = softmax(scores over visible keys) v

It computes in the dtype it is given; callers pass float64. A query that sees no key gives zeros and
sends back a gradient of zero (the flash-attention convention), never NaN.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

Layout = Literal["bhsd", "bshd", "thd"]
Causal = Literal["top_left", "bottom_right"]

UNLIMITED = (-1, -1)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    layout: str = "bhsd",
    scale: float | None = None,
    causal: str | None = None,
    window: tuple[int, int] = UNLIMITED,
    softcap: float = 0.0,
    bool_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
) -> torch.Tensor:
    """The output alone of `attention_lse`, which has the meaning of every argument."""
    out, _ = attention_lse(
        q,
        k,
        v,
        layout=layout,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        bool_mask=bool_mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    return out


def attention_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    layout: str = "bhsd",
    scale: float | None = None,
    causal: str | None = None,
    window: tuple[int, int] = UNLIMITED,
    softcap: float = 0.0,
    bool_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    empty_lse: float = -math.inf,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled dot product attention, in the layout and dtype of `q`, and its log-sum-exp.

    The log-sum-exp of each query's scores is (batch, heads, q_length), of `thd` (heads, total
    tokens), whatever else the layout; in the dtype of `q`, natural logarithm. `empty_lse` stands
    for a query that sees no key, and for tokens behind the last sequence: -inf by the formula, and
    +inf in flash-attention 2.

    Shapes: `bhsd` is (batch, heads, sequence, head_dim), `bshd` is (batch, sequence, heads,
    head_dim), `thd` is (total tokens, heads, head_dim) with int `cu_seqlens_*` (sequences + 1,).
    `k` and `v` may have fewer heads (grouped queries): query head h reads kv head h // (heads /
    kv_heads). `v` may have its own head_dim.

    `scale`: default 1 / sqrt(head_dim). `causal`: `top_left` (key j <= query i, PyTorch's
    `is_causal`) or `bottom_right` (j <= i + kv_length - q_length, flash-attention). `window` (left,
    right): keys within [i + kv_length - q_length - left, ... + right]; -1 is unlimited. `softcap`:
    above 0, scores become softcap * tanh(scores / softcap). `bool_mask`: True is visible; `bias` is
    added, -inf hides; both broadcast to (batch, heads, q_length, kv_length) whatever the layout.
    `alibi_slopes` (heads,) or (batch, heads): adds -slope * |i + kv_length - q_length - j|.

    Raises ValueError for an unknown layout or causal kind, heads that kv_heads do not divide,
    cu_seqlens without `thd` or the other way round, and masks with `thd`.
    """
    if layout not in ("bhsd", "bshd", "thd"):
        raise ValueError(f"layout {layout!r}: expected bhsd, bshd or thd")
    if causal not in (None, "top_left", "bottom_right"):
        raise ValueError(f"causal {causal!r}: expected None, top_left or bottom_right")
    packed = layout == "thd"
    if packed != (cu_seqlens_q is not None) or packed != (cu_seqlens_k is not None):
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k belong to the layout thd, and it needs both"
        )
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        if bool_mask is not None or bias is not None:
            raise ValueError("masks have no meaning in the layout thd")
        return _packed_attention(
            q,
            k,
            v,
            cu_seqlens_q.tolist(),
            cu_seqlens_k.tolist(),
            alibi_slopes,
            scale=scale,
            causal=causal,
            window=window,
            softcap=softcap,
            empty_lse=empty_lse,
        )
    if layout == "bshd":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out, lse = _dense_attention(
        q, k, v, scale, causal, window, softcap, bool_mask, bias, alibi_slopes, empty_lse
    )
    return (out.transpose(1, 2) if layout == "bshd" else out), lse


def _packed_attention(
    q_thd: torch.Tensor,
    k_thd: torch.Tensor,
    v_thd: torch.Tensor,
    starts_q: list[int],
    starts_k: list[int],
    alibi_slopes: torch.Tensor | None,
    *,
    scale: float | None,
    causal: str | None,
    window: tuple[int, int],
    softcap: float,
    empty_lse: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sequence on its own; tokens behind the last sequence give zeros."""
    if len(starts_q) != len(starts_k):
        raise ValueError(
            f"{len(starts_q)} entries in cu_seqlens_q, {len(starts_k)} in cu_seqlens_k"
        )
    parts, lse_parts = [], []
    for at in range(len(starts_q) - 1):
        q, k, v = (
            t[starts[at] : starts[at + 1]].transpose(0, 1).unsqueeze(0)
            for t, starts in ((q_thd, starts_q), (k_thd, starts_k), (v_thd, starts_k))
        )
        slopes = alibi_slopes
        if slopes is not None and slopes.ndim == 2:
            slopes = slopes[at : at + 1]
        out, lse = _dense_attention(
            q, k, v, scale, causal, window, softcap, None, None, slopes, empty_lse
        )
        parts.append(out.squeeze(0).transpose(0, 1))
        lse_parts.append(lse.squeeze(0))
    behind, heads = q_thd.shape[0] - starts_q[-1], q_thd.shape[1]
    parts.append(q_thd.new_zeros(behind, heads, v_thd.shape[2]))
    lse_parts.append(q_thd.new_full((heads, behind), empty_lse))
    return torch.cat(parts), torch.cat(lse_parts, dim=1)


def _dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    causal: str | None,
    window: tuple[int, int],
    softcap: float,
    bool_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    empty_lse: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, on (batch, heads, sequence, head_dim)."""
    heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} kv heads")
    k = k.repeat_interleave(heads // kv_heads, dim=1)
    v = v.repeat_interleave(heads // kv_heads, dim=1)
    if scale is None:
        scale = float(q.shape[-1]) ** -0.5

    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        distance = _offsets(scores).abs().to(scores.dtype)
        scores = scores - alibi_slopes.to(scores.dtype)[..., None, None] * distance
    visible = _visible(scores, causal, window)
    if bool_mask is not None:
        visible = visible & bool_mask
    if bias is not None:
        visible = visible & (bias != -torch.inf)
        scores = scores + bias
    probabilities, lse = _visible_softmax(scores, visible, empty_lse)
    return probabilities @ v, lse


def _offsets(scores: torch.Tensor) -> torch.Tensor:
    """(q_length, kv_length): key position minus query position, ends aligned (bottom right)."""
    q_length, kv_length = scores.shape[-2:]
    i = torch.arange(q_length, device=scores.device)[:, None]
    j = torch.arange(kv_length, device=scores.device)[None, :]
    return j - (i + kv_length - q_length)


def _visible(scores: torch.Tensor, causal: str | None, window: tuple[int, int]) -> torch.Tensor:
    """(q_length, kv_length), True where the query may see the key."""
    offsets = _offsets(scores)
    visible = torch.ones_like(offsets, dtype=torch.bool)
    if causal == "bottom_right":
        visible = visible & (offsets <= 0)
    elif causal == "top_left":
        visible = visible.tril()
    left, right = window
    if left >= 0:
        visible = visible & (offsets >= -left)
    if right >= 0:
        visible = visible & (offsets <= right)
    return visible


def _visible_softmax(
    scores: torch.Tensor, visible: torch.Tensor, empty_lse: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the visible keys, and the log of its denominator.

    A row without any visible key is zero, and so is its gradient; its log-sum-exp is `empty_lse`.
    """
    some = visible.any(-1, keepdim=True)
    scores = torch.where(visible, scores, -torch.inf)
    # A row of -inf alone would be 0 / 0: give softmax zeros there and drop what it makes of them.
    scores = torch.where(some, scores, 0.0)
    probabilities = torch.where(visible, torch.softmax(scores, dim=-1), 0.0)
    return probabilities, torch.where(some.squeeze(-1), torch.logsumexp(scores, -1), empty_lse)
