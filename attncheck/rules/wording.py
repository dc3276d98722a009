"""How findings say things: counts, sizes, lists, first lines. Strings in, strings out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attncheck.text import count as count
from attncheck.text import size as size

LISTED = 6  # names in a list before it says "and N more"
TITLE_WIDTH = 110  # of quoted text in a one-line title


def listing(names: Iterable[str], limit: int = LISTED) -> str:
    """Sorted, without repeats, cut after `limit` names.

    >>> listing(["b", "a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    unique = sorted(set(names))
    shown = ", ".join(unique[:limit])
    return f"{shown} and {len(unique) - limit} more" if len(unique) > limit else shown


def first_line(text: str, width: int = 400) -> str:
    """The first line that says something, cut to `width` characters."""
    line = next((s for s in (part.strip() for part in text.splitlines()) if s), "")
    return line if len(line) <= width else line[: width - 3] + "..."


def number(value: float) -> str:
    return f"{value:.3g}"


def duration(milliseconds: float) -> str:
    """
    >>> duration(12.34), duration(7250)
    ('12.3 ms', '7.25 s')
    """
    if milliseconds < 1000:
        return f"{milliseconds:.3g} ms"
    return f"{milliseconds / 1000:.3g} s"


def mesh(axes: Mapping[str, int]) -> str:
    """
    >>> mesh({"dp": 2, "tp": 4})
    'dp=2 x tp=4'
    """
    return " x ".join(f"{axis}={size}" for axis, size in axes.items())
