"""The arithmetic of flash-attn's kernels on one dense batch, in plain PyTorch.

All tensors here are (batch, heads, sequence, head_dim) in float32, the accumulator's dtype. What
the real kernels feed to the tensor cores in half precision (probabilities, score gradients) is
rounded to the input dtype first, so that errors have the size users know.

Source of the formulas: the FlashAttention-2 paper, section 3 (backward from the log-sum-exp and D =
rowsum(dout * out)); conventions (alignment, infinite log-sum-exp of an empty row, ALiBi bias under
causal) as flash-attn 2.7 and 2.8 document or show them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Attention:
    """What is computed, apart from the tensors.

    `window` is (left, right), -1 for unlimited. `dtype` is the dtype of the kernel's inputs.
    """

    scale: float
    causal: bool
    window: tuple[int, int]
    softcap: float
    dropout: float
    dtype: torch.dtype


def of_flash_attn_2(
    scale: float,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    dropout: float,
    dtype: torch.dtype,
    kv_length: int,
) -> Attention:
    """What flash-attn 2 makes of its arguments: a window side as long as all keys is unlimited.

    With more queries than keys that shows: `right` then hides nothing, though by its definition it
    hides keys from the first queries.
    """
    left = -1 if left >= kv_length else left
    right = -1 if right >= kv_length else right
    causal = causal or (left < 0 and right == 0)
    return Attention(scale, causal, (left, right), softcap, dropout, dtype)


@dataclass(frozen=True)
class Scores:
    """`value`: scores before softmax, -inf where hidden. `slope`: their derivative by scale * q k^T
    (1 without softcap)."""

    value: torch.Tensor
    visible: torch.Tensor
    slope: torch.Tensor | None


@dataclass(frozen=True)
class Forward:
    """`out` (b, h, sq, d), `lse` (b, h, sq), `probabilities` (b, h, sq, sk) before dropout."""

    out: torch.Tensor
    lse: torch.Tensor
    probabilities: torch.Tensor


@dataclass(frozen=True)
class Backward:
    """Gradients in the shapes of q, k, v (kv heads summed over their group), D (b, h, sq), and
    `d_scores` (b, h, sq, sk), which is the gradient of a bias of full size."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    row_dot: torch.Tensor
    d_scores: torch.Tensor


def forward(
    spec: Attention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor | None,
    keep: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> Forward:
    """Attention of q (b, h, sq, d) over k, v (b, h_kv, sk, d).

    `slopes`: ALiBi, (h,) or (b, h). `keep`: the dropout mask (b, h, sq, sk), True is kept. `bias`,
    which broadcasts to (b, h, sq, sk), is added to the scaled scores; -inf hides.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = _scores(spec, q, k, slopes, bias)
    if k.shape[2] == 0:
        lse = torch.full(q.shape[:3], torch.inf, dtype=q.dtype, device=q.device)
        return Forward(q.new_zeros(*q.shape[:3], v.shape[3]), lse, scores.value)
    top = scores.value.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(scores.value - top)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    # +inf makes exp(score - lse) zero for a row that sees no key.
    lse = torch.where(empty, torch.inf, top + torch.log(total)).squeeze(-1)
    total = torch.where(empty, 1.0, total)
    out = (_rounded(_dropped(weights, keep, spec), spec) @ v) / total
    return Forward(out, lse, weights / total)


def backward(
    spec: Attention,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    slopes: torch.Tensor | None,
    keep: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> Backward:
    """Gradients from the `out` and `lse` that are passed in: a wrong one gives wrong gradients."""
    kv_heads = k.shape[1]
    groups = q.shape[1] // kv_heads
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = _scores(spec, q, k, slopes, bias)
    probabilities = torch.exp(scores.value - lse[..., None]).masked_fill(~scores.visible, 0.0)
    row_dot = (dout * out).sum(-1)

    dv = _rounded(_dropped(probabilities, keep, spec), spec).transpose(-1, -2) @ dout
    d_probabilities = _dropped(dout @ v.transpose(-1, -2), keep, spec)
    d_scores = probabilities * (d_probabilities - row_dot[..., None])
    if scores.slope is not None:
        d_scores = d_scores * scores.slope
    d_scores = _rounded(d_scores, spec)
    dq = (d_scores @ k) * spec.scale
    dk = (d_scores.transpose(-1, -2) @ q) * spec.scale
    return Backward(dq, _group_sum(dk, kv_heads), _group_sum(dv, kv_heads), row_dot, d_scores)


def _scores(
    spec: Attention,
    q: torch.Tensor,
    k: torch.Tensor,
    slopes: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> Scores:
    value = (q @ k.transpose(-1, -2)) * spec.scale
    slope = None
    if spec.softcap > 0:
        capped = torch.tanh(value / spec.softcap)
        value, slope = capped * spec.softcap, 1 - capped.square()
    sq, sk = value.shape[-2:]
    i = torch.arange(sq, device=q.device)[:, None] + (sk - sq)
    j = torch.arange(sk, device=q.device)[None, :]
    left, right = spec.window
    if slopes is not None:
        # Under causal alone the kernel adds slope * j to all rows: softmax is the same, the
        # log-sum-exp is shifted by a constant per row.
        distance = j.expand(sq, sk) if spec.causal and left < 0 else -(i - j).abs()
        value = value + slopes[..., None, None] * distance.to(value.dtype)
    if spec.causal:
        right = 0
    visible = torch.ones(sq, sk, dtype=torch.bool, device=q.device)
    if bias is not None:
        value = value + bias
        visible = visible & (bias != -torch.inf)
    if left >= 0:
        visible = visible & (j >= i - left)
    if right >= 0:
        visible = visible & (j <= i + right)
    return Scores(value.masked_fill(~visible, -torch.inf), visible, slope)


def _dropped(x: torch.Tensor, keep: torch.Tensor | None, spec: Attention) -> torch.Tensor:
    return x if keep is None else torch.where(keep, x, 0.0) / (1.0 - spec.dropout)


def _rounded(x: torch.Tensor, spec: Attention) -> torch.Tensor:
    return x.to(spec.dtype).to(x.dtype)


def _group_sum(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(b, h, s, d) to (b, h_kv, s, d): query heads of a group add up."""
    batch, heads, rows, head_dim = x.shape
    return x.reshape(batch, kv_heads, heads // kv_heads, rows, head_dim).sum(2)
