"""What a process keeps between calls, and how it ends."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch.distributed.tensor import DTensor


def forget_compiled() -> None:
    """Start torch.compile afresh: what it met before (sizes that changed) decides what it does next."""
    if "torch._dynamo" in sys.modules:  # else nothing was compiled, and the import takes a second
        torch.compiler.reset()


def process_state() -> dict[str, Any]:
    """What a call can leave changed for every call after it, by name; compare two with `==`.

    PyTorch's own `context_parallel` does: where entering it raises, `F.scaled_dot_product_attention` stays
    replaced (seen in 2.13, without numpy).
    """
    import torch.nn.functional as F
    from torch.backends import cuda, mha

    handlers = getattr(DTensor._op_dispatcher, "_custom_op_handlers", {})
    state: dict[str, Any] = {
        "F.scaled_dot_product_attention": F.scaled_dot_product_attention,
        "DTensor's op handlers": frozenset(str(op) for op in handlers),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "nn.MultiheadAttention's fast path": mha.get_fastpath_enabled(),
    }
    for backend in ("flash", "mem_efficient", "math", "cudnn"):
        state[f"torch.backends.cuda.{backend}_sdp_enabled"] = getattr(
            cuda, f"{backend}_sdp_enabled"
        )()
    return state


def quiet_exit(code: int) -> None:
    """Leave without tearing gloo down: destroying the group aborts in about one run in five (2.13)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
