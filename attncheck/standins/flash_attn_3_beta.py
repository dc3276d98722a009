"""CPU stand-in for the module `flash_attn_interface` of flash-attn 3.0.0.b1, which calls the raw ops.

A module of its own, so that a wrapper can take the place of its functions as it does in the package's. Their
parameters are the beta's, in its order. 3.0.0 has `return_attn_probs` besides, and a custom op instead of
the function `_flash_attn_forward`: that tells the two apart where one process has the ops of both, as here.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from attncheck.standins import flash_attn_3
from attncheck.standins.flash_attn_3 import MODULE, SENTENCE, Maybe

__all__ = ["SENTENCE", "flash_attn_func", "flash_attn_varlen_func", "provide"]


def provide() -> None:
    """Register the ops, and be `flash_attn_interface` where it is not installed; twice is harmless."""
    flash_attn_3.provide()
    if not flash_attn_3.is_installed():
        sys.modules[MODULE] = sys.modules[__name__]


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Maybe = None,
    q_descale: Maybe = None,
    k_descale: Maybe = None,
    v_descale: Maybe = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Any:
    return flash_attn_3.interface("raw").flash_attn_func(**locals())


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Maybe = None,
    seqused_k: Maybe = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Maybe = None,
    q_descale: Maybe = None,
    k_descale: Maybe = None,
    v_descale: Maybe = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Any:
    return flash_attn_3.interface("raw").flash_attn_varlen_func(**locals())


def _flash_attn_forward(
    *args: Any, causal: bool = False, window_size: tuple[int, int] = (-1, -1), **kwargs: Any
) -> Any:
    """The raw op, as who brings a backward of their own calls it: everything up to the scale by position."""
    windows = {"window_size_left": window_size[0], "window_size_right": window_size[1]}
    return torch.ops.flash_attn_3.fwd(*args, is_causal=causal, **windows, **kwargs)
