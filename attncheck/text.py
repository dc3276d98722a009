"""Text as a report shows it: without control characters, on one line, counted, listed, in units people read.

Strings in, strings out. A report may come from elsewhere, and hold what a kernel printed. Imports nothing of
ours.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

T = TypeVar("T")

_ESCAPES = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # OSC: window titles, links
    r"|\x1b[P^_X][^\x1b]*\x1b\\"  # DCS, PM, APC, SOS
    r"|[\x1b\x9b]\[?[0-?]*[ -/]*[@-~]"  # CSI and two-byte sequences
)
# C0 and C1 controls, marks that reorder text (a line can read as another), lone surrogates.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def clean(text: str) -> str:
    """Text without escape sequences, control characters and bidi marks; newlines stay.

    >>> clean("\\x1b[31mred\\x1b[0m\\r\\nnext\\x07")
    'red\\nnext'
    """
    if text.isascii() and text.isprintable():
        return text  # nearly all of a report
    text = re.sub("\r\n?|[\x85\u2028\u2029]", "\n", text).expandtabs(4)
    return _CONTROLS.sub("", _ESCAPES.sub("", text))


def one_line(text: str, limit: int = 400) -> str:
    """Text on one line, cut to `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def count(number: int, noun: str) -> str:
    """
    >>> count(1, "case"), count(1200, "case")
    ('1 case', '1200 cases')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listing(names: Iterable[str], limit: int = 3) -> str:
    """Names in their order, cut after `limit`.

    >>> listing(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    names = list(names)
    if len(names) <= limit:
        return ", ".join(names)
    return f"{', '.join(names[:limit])} and {len(names) - limit} more"


def size(number: float) -> str:
    """
    >>> size(512), size(98304)
    ('512 B', '96 KiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"


def seconds(number: float) -> str:
    """
    >>> seconds(0.034), seconds(7.25), seconds(312)
    ('34 ms', '7.2 s', '5 min 12 s')
    """
    if number < 1:
        return f"{number * 1000:.0f} ms"
    if number < 100:
        return f"{number:.1f} s"
    return f"{int(number) // 60} min {int(number) % 60} s"


def clean_tree(value: T) -> T:
    """The same value with every string in it cleaned."""
    cleaned: Any = value
    kind: Any = type(value)
    if kind is str:
        cleaned = clean(cleaned)
    elif kind is tuple or kind is list:
        cleaned = kind(map(clean_tree, cleaned))
    elif isinstance(value, Mapping):
        cleaned = {clean_tree(k): clean_tree(v) for k, v in value.items()}
    elif dataclasses.is_dataclass(value):
        cleaned = kind(**{name: clean_tree(item) for name, item in vars(value).items()})
    return cast("T", cleaned)
