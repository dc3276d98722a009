"""Gradients of `flex_attention` on a CPU.

PyTorch has a dense implementation of the op and of its backward, plain PyTorch that runs on any device and
is what an uncompiled call runs on CUDA too. On a CPU a check in front of it refuses tensors that require a
gradient. Here that check alone is taken out; nothing is computed by attncheck.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

SENTENCE = (
    "flex_attention: PyTorch's refusal of gradients on a CPU is off; its own dense implementation "
    "computes them"
)
_LIFTED = "__attncheck_lifted__"


def provide() -> None:
    """Let CPU tensors that require a gradient through; twice is harmless. ImportError before torch 2.5."""
    module = importlib.import_module("torch.nn.attention.flex_attention")
    # A private name, in 2.5 to 2.15; where there is none, PyTorch itself says what it refuses.
    check = getattr(module, "_validate_device", None)
    if check is None or getattr(check, _LIFTED, False):
        return

    @functools.wraps(check)
    def lifted(query: Any, *others: Any) -> None:
        if query.device.type != "cpu":
            check(query, *others)

    setattr(lifted, _LIFTED, True)
    setattr(module, "_validate_device", lifted)
