"""Strategies for DTensor: known, synthesised, verified and written as a module of their own.

`attncheck.fixes.register()` gives DTensor every strategy that attncheck knows for the ops of this process,
without a file; `attncheck fix` writes a module that does it without attncheck.
"""

from __future__ import annotations

import fnmatch

from attncheck.fixes import packages, strategies


def register(*kernel_ops: str) -> dict[str, str]:
    """Register the known strategies of the ops that match these globs, or of all that are here.

    Globs are for names as PyTorch writes them (`flash_attn.*`). Before or after the ops' first use; twice is
    harmless. Returns what became of each op: see `strategies.install`. Raises NotRegistered where a glob
    matches no known op, or none that is registered in this process.
    """
    known = packages.known()
    chosen = [s for s in known if not kernel_ops or any(_matches(s.op, g) for g in kernel_ops)]
    for glob in kernel_ops:
        if not any(_matches(s.op, glob) for s in chosen):
            names = ", ".join(sorted({s.op for s in known}))
            raise strategies.NotRegistered(
                f"No known kernel op matches {glob!r}; known are {names}"
            )
    became = strategies.install(chosen, required=False)
    if kernel_ops and all(state == strategies.ABSENT for state in became.values()):
        raise strategies.NotRegistered(
            f"None of {', '.join(became)} is registered in this process: import what registers them first"
        )
    return became


def unregister() -> None:
    """Put back what DTensor had before `register`."""
    strategies.remove()


def _matches(op: str, glob: str) -> bool:
    return fnmatch.fnmatchcase(op, glob)
