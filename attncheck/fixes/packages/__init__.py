"""Signatures of the kernel ops of attention, one file for each package that registers them."""

from __future__ import annotations

from attncheck.fixes.notation import Signature
from attncheck.fixes.packages import torch_sdpa


def known() -> tuple[Signature, ...]:
    """All kernel ops that attncheck has signatures of; an op may have several forms."""
    return (*torch_sdpa.SIGNATURES,)


def functions() -> tuple[Signature, ...]:
    """Functions that are no dispatcher ops, by their import path (`op`)."""
    return ()
