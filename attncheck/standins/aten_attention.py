"""CPU kernels for the attention ops that PyTorch has on CUDA (and, one of them, on devices out of tree).

The sharding rules, Meta kernels and autograd formulas of these ops are PyTorch's own and run unchanged;
what a GPU would compute comes from aten_flash, aten_efficient and aten_cudnn. An op that has a CPU kernel
already keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from attncheck.standins import aten_cudnn as cudnn
from attncheck.standins import aten_efficient as efficient
from attncheck.standins import aten_flash as flash
from attncheck.standins.aten_common import Maybe

SENTENCE = (
    "aten CUDA attention ops: CPU reference kernels by attncheck; PyTorch's own sharding rules, Meta "
    "kernels and autograd formulas run unchanged"
)

# The library unregisters its kernels when it dies.
_libraries: list[torch.library.Library] = []


def provide() -> None:
    """Register the CPU kernels, for each op that this PyTorch has; twice is harmless."""
    library = torch.library.Library("aten", "IMPL", "CPU")  # type: ignore[no-untyped-call]
    for name, kernel in KERNELS.items():
        packet = getattr(torch.ops.aten, name, None)
        if packet is not None and not packet.default.has_kernel_for_dispatch_key("CPU"):
            library.impl(name, kernel)  # type: ignore[no-untyped-call]
    _libraries.append(library)


# All tensors below are (batch, heads, sequence, head_dim).


def sdpa_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """Causal is aligned bottom right: F.scaled_dot_product_attention keeps unequal lengths away."""
    max_q, max_k = query.shape[2], key.shape[2]
    out, lse, rng_state, unused, debug_mask = flash.forward(
        _swap(query), _swap(key), _swap(value), None, None, max_q, max_k, dropout_p, is_causal,
        return_debug_mask, scale=scale,
    )  # fmt: skip
    return _swap(out), lse, None, None, max_q, max_k, rng_state, unused, debug_mask


def sdpa_flash_backward(
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
    philox_seed: torch.Tensor,
    philox_offset: torch.Tensor,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, ...]:
    grads = flash.backward(
        _swap(grad_out), _swap(query), _swap(key), _swap(value), _swap(out), logsumexp, cum_seq_q,
        cum_seq_k, max_q, max_k, dropout_p, is_causal, philox_seed, philox_offset, scale=scale,
    )  # fmt: skip
    return tuple(_swap(grad) for grad in grads)


def sdpa_efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: Maybe,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, ...]:
    """Causal is aligned top left."""
    out, lse, seed, offset, _, _ = efficient.forward(
        _swap(query), _swap(key), _swap(value), attn_bias, None, None, None, None, dropout_p, int(is_causal),
        compute_log_sumexp, scale=scale,
    )  # fmt: skip
    return _swap(out), lse, seed, offset


def sdpa_efficient_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: Maybe,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    philox_seed: torch.Tensor,
    philox_offset: torch.Tensor,
    dropout_p: float,
    grad_input_mask: list[bool],
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Maybe, ...]:
    dq, dk, dv, dbias = efficient.backward(
        _swap(grad_out), _swap(query), _swap(key), _swap(value), attn_bias, _swap(out), None, None,
        query.shape[2], key.shape[2], logsumexp, dropout_p, philox_seed, philox_offset, int(is_causal),
        grad_input_mask[3], scale=scale,
    )  # fmt: skip
    return _swap(dq), _swap(dk), _swap(dv), dbias


def sdpa_cudnn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: Maybe,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    return cudnn.forward(
        query, key, value, attn_bias, None, None, query.shape[2], key.shape[2], compute_log_sumexp,
        dropout_p, is_causal, return_debug_mask, scale=scale,
    )  # fmt: skip


def sdpa_overrideable(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: Maybe = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """What XPU and out-of-tree devices override: cuDNN's arguments and alignment, log-sum-exp without the
    last dim, and a gradient for the bias."""
    out, lse, *rest = cudnn.forward(
        query, key, value, attn_bias, None, None, query.shape[2], key.shape[2], True, dropout_p,
        is_causal, scale=scale,
    )  # fmt: skip
    assert lse is not None
    return out, lse.squeeze(-1), *rest


def sdpa_overrideable_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: Maybe,
    grad_input_mask: list[bool],
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: Maybe,
    cum_seq_k: Maybe,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: torch.Tensor,
    philox_offset: torch.Tensor,
    *,
    scale: float | None = None,
) -> tuple[Maybe, ...]:
    return cudnn.backward_with_bias(
        grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, None, None,
        dropout_p, is_causal, grad_input_mask[3], scale,
    )  # fmt: skip


def _swap(x: torch.Tensor) -> torch.Tensor:
    """(batch, heads, sequence, head_dim) to (batch, sequence, heads, head_dim), or back."""
    return x.transpose(1, 2)


KERNELS: Mapping[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention": sdpa_flash,
    "_scaled_dot_product_flash_attention_backward": sdpa_flash_backward,
    "_scaled_dot_product_efficient_attention": sdpa_efficient,
    "_scaled_dot_product_efficient_attention_backward": sdpa_efficient_backward,
    "_scaled_dot_product_cudnn_attention": sdpa_cudnn,
    "_scaled_dot_product_cudnn_attention_backward": cudnn.backward,
    "_scaled_dot_product_fused_attention_overrideable": sdpa_overrideable,
    "_scaled_dot_product_fused_attention_overrideable_backward": sdpa_overrideable_backward,
    "_flash_attention_forward": flash.forward,
    "_flash_attention_backward": flash.backward,
    "_efficient_attention_forward": efficient.forward,
    "_efficient_attention_backward": efficient.backward,
    "_cudnn_attention_forward": cudnn.forward,
    "_cudnn_attention_backward": cudnn.backward,
}
