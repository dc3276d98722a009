"""Strategies for DTensor: known, synthesised, verified and written as a module of their own.

`attncheck.fixes.register()` gives DTensor every strategy that attncheck knows for the ops of this process,
without a file; `attncheck fix` writes a module that does it without attncheck.
"""

from __future__ import annotations

import sys

from attncheck.fixes import local_calls, packages, strategies
from attncheck.fixes.notation import Signature
from attncheck.plan import matches


def register(*kernel_ops: str) -> dict[str, str]:
    """Register the known strategies of the ops that match these globs, or of all that are here, and wrap
    the functions of imported packages that no strategy mends.

    Globs are for names as PyTorch writes them (`flash_attn.*`). Before or after the ops' first use; twice is
    harmless. Returns what became of each: see `strategies.install`, `local_calls.patch`. Raises
    NotRegistered where a glob matches nothing known, or nothing that is in this process.
    """
    known = (*packages.known(), *packages.functions())
    for glob in kernel_ops:
        if not any(matches(s.op, (glob,)) for s in known):
            names = ", ".join(sorted({s.op for s in known}))
            raise strategies.NotRegistered(
                f"No known kernel op matches {glob!r}; known are {names}"
            )
    functions = [s for s in packages.functions() if matches(s.op, kernel_ops) and _is_imported(s)]
    ops = [s for s in packages.known() if matches(s.op, kernel_ops)]
    became = strategies.install(ops, required=False)
    became |= local_calls.patch(functions, required=False)
    if kernel_ops and all(state == strategies.ABSENT for state in became.values()):
        raise strategies.NotRegistered(
            f"Nothing that matches {', '.join(kernel_ops)} is in this process: import what registers it first"
        )
    return became


def unregister() -> None:
    """Put back what was there before `register`."""
    strategies.remove()
    local_calls.unpatch()


def _is_imported(function: Signature) -> bool:
    # Importing a package that nobody asked for takes seconds, and may fail.
    return function.op.partition(".")[0] in sys.modules
