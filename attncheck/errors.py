"""Errors that a user can mend, and the nearest-match sentence they share. Imports nothing of ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: one sentence that names the input and what was expected. Exit code 2."""


def unknown(kind: str, given: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest names that do (all, where they are few).

    >>> str(unknown("level", "fast", ["quick", "default", "full"]))
    "Unknown level 'fast'. Expected one of: default, full, quick."
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    if not near:
        lowered = given.lower().strip("*?")
        near = [n for n in names if lowered and lowered in n.lower()][:3]
    if 0 < len(names) <= 5:
        hint = f"Expected one of: {', '.join(names)}."
    elif near:
        hint = f"Did you mean {' or '.join(near)}?"
    else:
        hint = f"There are: {', '.join(names)}." if names else "None exist."
    return UserError(f"Unknown {kind} {given!r}. {hint}")
