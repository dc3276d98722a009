"""Signatures of the kernel ops of attention, one file for each package that registers them."""

from __future__ import annotations

from attncheck.fixes.notation import Signature
from attncheck.fixes.packages import (
    flash_attn,
    flash_attn_3,
    functions_cuda_only,
    functions_flash_attn,
    functions_xformers,
    npu,
    torch_kernels,
    torch_overrides,
    torch_sdpa,
    torch_varlen,
    xformers,
)


def known() -> tuple[Signature, ...]:
    """All kernel ops that attncheck has signatures of; an op may have several forms."""
    return (
        *torch_sdpa.SIGNATURES,
        *torch_overrides.SIGNATURES,
        *torch_kernels.SIGNATURES,
        *torch_varlen.SIGNATURES,
        *flash_attn.SIGNATURES,
        *flash_attn_3.SIGNATURES,
        *xformers.SIGNATURES,
        *npu.SIGNATURES,
    )


def functions() -> tuple[Signature, ...]:
    """Functions that are no dispatcher ops, by their import path (`op`)."""
    return (
        *functions_flash_attn.FUNCTIONS,
        *functions_cuda_only.FUNCTIONS,
        *functions_xformers.FUNCTIONS,
    )
