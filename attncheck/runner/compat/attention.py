"""The ops that `F.scaled_dot_product_attention` chooses from on CUDA, by themselves."""

from __future__ import annotations

from typing import Any

import torch

_aten: Any = torch.ops.aten


def sdpa_flash(
    query: Any, key: Any, value: Any, dropout_p: float, is_causal: bool, scale: float
) -> Any:
    """(batch, heads, sequence, head_dim) each; head_dim a multiple of 8."""
    return _aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, False, scale=scale
    )[0]


def sdpa_efficient(
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    needs_gradient: bool,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Any:
    """`bias` is None or (batch, heads, sequence, kv_sequence), none of it broadcast."""
    return _aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, needs_gradient, dropout_p, is_causal, scale=scale
    )[0]


def sdpa_cudnn(
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    needs_gradient: bool,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Any:
    """As `sdpa_efficient`."""
    return _aten._scaled_dot_product_cudnn_attention(
        query, key, value, bias, needs_gradient, dropout_p, is_causal, False, scale=scale
    )[0]


def sdpa_math(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Any:
    """`mask` is added to the scores, whatever its dtype."""
    return _aten._scaled_dot_product_attention_math(
        query, key, value, mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]
