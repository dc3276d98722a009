"""`context_parallel`: where it lies, and the two switches it has no public way to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


def context_parallel_tools() -> Any:
    """The module that holds `context_parallel`, `context_parallel_unshard` and `set_rotate_method`.

    A package from 2.10 on, a module before (2.6 to 2.9). Raises ImportError where there is neither.
    """
    try:
        from torch.distributed.tensor.experimental import _context_parallel as tools
    except ImportError:
        from torch.distributed.tensor.experimental import (  # type: ignore[no-redef]
            _attention as tools,
        )
    return tools


@contextlib.contextmanager
def context_parallel_options(load_balance: bool, rotate: str) -> Iterator[None]:
    """What `context_parallel` reads from a global of its own; afterwards it is as before.

    `load_balance` has no public switch (2.6 to 2.15). `rotate`: `allgather` or `alltoall`.
    """
    tools = context_parallel_tools()
    options = tools._cp_options
    before = options.enable_load_balance, options.rotate_method
    options.enable_load_balance = load_balance
    try:
        tools.set_rotate_method(rotate)
        yield
    finally:
        options.enable_load_balance, options.rotate_method = before
