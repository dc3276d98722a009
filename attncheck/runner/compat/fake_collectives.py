"""Collectives that write into their output, under a fake mode."""

from __future__ import annotations

import contextlib

from attncheck.runner.compat.ops import find_overload, has_own_kernel, schema_of


def fake_collectives() -> None:
    """Lets FSDP2 gather and scatter fake tensors.

    From 2.11 on `c10d._allgather_base_` and its like can be called on them. From 2.7 to 2.10 torch has what
    that takes in a module that its memory tracker imports, and in 2.6 not at all: there FSDP2 fails in its
    first gather.
    """
    if not has_own_kernel(schema_of(find_overload("c10d._allgather_base_.default")), "Meta"):
        with contextlib.suppress(ImportError):
            import torch.distributed._tools.fake_collectives  # noqa: F401
