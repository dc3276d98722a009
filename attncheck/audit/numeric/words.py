"""What an exception says, in one sentence with the user's line."""

from __future__ import annotations

from attncheck.audit.lines import line_of
from attncheck.runner import compat


def why(error: BaseException) -> str:
    """`RuntimeError at wan.py:93: Operator ... does not have a sharding strategy registered`"""
    line = line_of(error)
    if compat.refusal(error) is not None:
        text = compat.refusal_sentence(error)
    else:
        text = compat.error_text(error).split("\n", 1)[0]
    said = f"{type(error).__name__}{f' at {line}' if line else ''}: {text[:300]}".rstrip(".")
    lowered = text.lower()
    if "can't allocate memory" in lowered or "out of memory" in lowered:
        return f"{said}; with real numbers it takes real memory: give a build of reduced size"
    return said
