"""`F.scaled_dot_product_attention` as a GPU would run it: by the op that CUDA would choose.

On a CPU it is another op, for which DTensor searches a decomposition, and under fake tensors that search does
not end. What is chosen here follows sdp_utils.cpp of torch 2.13 on A100 and its like: flash in half precision
without a mask, efficient with one or in float32, and math where neither takes the call, each only if it is
enabled (`torch.nn.attention.sdpa_kernel`); cuDNN where it is all that is left. (On H100 and B200, with one
newer than 9.15, it comes first.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from attncheck.runner import compat

FLASH, EFFICIENT, MATH, CUDNN = "flash", "efficient", "math", "cudnn"
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class AsOnCuda(TorchFunctionMode):
    """`chosen` counts which of the kernels stood for the calls. `attended(op, args, kwargs)` is told of those
    that are no op of their own any more where a dispatch mode sees them."""

    def __init__(self, attended: Callable[[str, Sequence[Any], Mapping[str, Any]], None]) -> None:
        super().__init__()
        self.chosen: dict[str, int] = {}
        self._attended = attended

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        kernel, out = attention(*args, **kwargs)
        if kernel == MATH:
            # The op takes the same arguments, in an order of its own behind the mask.
            given = dict(zip(_NAMES, args, strict=False)) | dict(kwargs)
            self._attended("aten._scaled_dot_product_attention_math.default", (), given)
        self.chosen[kernel] = self.chosen.get(kernel, 0) + 1
        return out


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[str, torch.Tensor]:
    """(which kernel, the output): (batch, heads, sequence, head_dim) each."""
    enabled: Any = torch.backends.cuda
    half = query.dtype in (torch.float16, torch.bfloat16)
    one_dtype = query.dtype == key.dtype == value.dtype
    # No fused kernel broadcasts.
    fused = one_dtype and query.ndim == 4 and query.shape[0] == key.shape[0] == value.shape[0]
    same_heads = query.shape[-3:-2] == key.shape[-3:-2]
    # Flash aligns a causal mask to the last query, F to the first.
    square = not is_causal or query.shape[-2] == key.shape[-2]
    wide = query.shape[-1] == value.shape[-1] <= 256
    takes_mask = attn_mask is None or not is_causal
    needs = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    grouped = fused and half and (same_heads or enable_gqa)
    if grouped and wide and square and attn_mask is None and enabled.flash_sdp_enabled():
        scale = scale if scale is not None else 1 / math.sqrt(query.shape[-1])
        q, k, v = (_padded(each) for each in (query, key, value))
        out = compat.sdpa_flash(q, k, v, dropout_p, is_causal, scale)
        # A slice that takes all would be an op, too (`aten.alias`, of which up to 2.9 DTensor knows nothing).
        return FLASH, out if q is query else out[..., : value.shape[-1]]
    mask = _added(attn_mask, query.dtype)
    # What its matrix multiplications need; F pads for flash alone.
    parts = 8 if half else 4
    aligned = query.shape[-1] % parts == value.shape[-1] % parts == 0
    single = half or query.dtype == torch.float32
    efficient = fused and single and same_heads and aligned and takes_mask
    if efficient and enabled.mem_efficient_sdp_enabled():
        bias = _expanded(mask, query, key)
        out = compat.sdpa_efficient(query, key, value, bias, needs, dropout_p, is_causal, scale)
        return EFFICIENT, out
    if enabled.math_sdp_enabled():
        out = compat.sdpa_math(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa)
        return MATH, out
    if grouped and aligned and takes_mask and enabled.cudnn_sdp_enabled():
        bias = _expanded(mask, query, key)
        out = compat.sdpa_cudnn(query, key, value, bias, needs, dropout_p, is_causal, scale)
        return CUDNN, out
    raise RuntimeError("No available kernel. Aborting execution.")  # as F does


def _padded(tensor: torch.Tensor) -> torch.Tensor:
    """Flash takes a head_dim that is a multiple of 8; F pads it."""
    missing = -tensor.shape[-1] % 8
    return F.pad(tensor, (0, missing)) if missing else tensor


def _added(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask as it is added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, 0.0, float("-inf")).to(dtype)


def _expanded(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor | None:
    if mask is None:
        return None
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
