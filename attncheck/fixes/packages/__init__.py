"""Signatures of the kernel ops of attention, one file for each package that registers them."""

from __future__ import annotations

from collections.abc import Mapping

from attncheck.fixes.notation import Signature
from attncheck.fixes.packages import (
    flash_attn,
    flash_attn_3,
    functions_cuda_only,
    functions_flash_attn,
    functions_flash_attn_3,
    functions_xformers,
    npu,
    torch_kernels,
    torch_overrides,
    torch_sdpa,
    torch_varlen,
    torch_views,
    xformers,
)

# Ops that no strategy can be right for: why, and what to do instead.
NO_STRATEGY: Mapping[str, str] = {
    "flash_attn_3.bwd.default": (
        "it has no Meta kernel, and returns work space whose sizes its kernels choose: call the function "
        "around it on local shards, as the wrapper of flash_attn_interface.flash_attn_func does, or use "
        "flash-attn 3.0.0, whose custom ops have strategies"
    ),
}


def known() -> tuple[Signature, ...]:
    """All kernel ops that attncheck has signatures of; an op may have several forms."""
    return (
        *torch_sdpa.SIGNATURES,
        *torch_overrides.SIGNATURES,
        *torch_kernels.SIGNATURES,
        *torch_varlen.SIGNATURES,
        *torch_views.SIGNATURES,
        *flash_attn.SIGNATURES,
        *flash_attn_3.SIGNATURES,
        *xformers.SIGNATURES,
        *npu.SIGNATURES,
    )


def functions() -> tuple[Signature, ...]:
    """Functions that are no dispatcher ops, by their import path (`op`)."""
    return (
        *functions_flash_attn.FUNCTIONS,
        *functions_flash_attn_3.FUNCTIONS,
        *functions_cuda_only.FUNCTIONS,
        *functions_xformers.FUNCTIONS,
    )
