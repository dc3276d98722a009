"""What `torch.compile` stands before in a model."""

from __future__ import annotations

import torch


def compiled_modules(model: torch.nn.Module) -> list[str]:
    """The paths of the modules that are compiled: wrapped (`torch.compile(module)`) or in place
    (`module.compile()`), as `named_modules` has them."""
    return [
        path
        for path, module in model.named_modules()
        if getattr(module, "_orig_mod", None) is not None
        or getattr(module, "_compiled_call_impl", None) is not None
    ]
