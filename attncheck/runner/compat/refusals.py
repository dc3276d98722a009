"""What DTensor says when it refuses an op, in the words of 2.6 to 2.15."""

from __future__ import annotations

import re

# The wording is the same in 2.6 to 2.15.
_NO_STRATEGY = re.compile(r"Operator (\S+) does not have a sharding strategy registered")
# Up to 2.9 Python says "<op>: got mixed ..."; from 2.10 on C++ says it first, without the colon.
_MIXED = re.compile(r"([\w.]+):? got mixed torch\.Tensor and DTensor")
# A higher-order op (flex_attention) has no strategy to register: DTensor needs a rule of its own for it.
_NO_RULE = re.compile(
    r"There was no rule registered for HOP (\w+) and subclass <class '[\w.]*DTensor'>"
)
# Whatever propagation raises, but for a missing strategy, is wrapped in this: from 2.9 on. There the wrapping
# says nothing of its cause; from 2.10 on the cause's text comes first. The schema that follows begins with
# `Op(op=` up to 2.9.
_PROPAGATION = re.compile(r"Sharding propagation failed for (?:Op\(op=)?([\w.]+)")
# An op without a Meta kernel fails in propagation for the same want of a strategy (flash-attn 3).
_NO_META_CAUSES = ("UnsupportedOperatorException", "NotImplementedError")


def refusal(error: BaseException) -> tuple[str, str | None] | None:
    """What DTensor refused: (`strategy` | `mixed` | `propagation`, op name in the text if any), or None.

    `propagation` is an op whose strategy could not be asked because it cannot run on Meta tensors.
    """
    text = str(error)
    if match := _NO_STRATEGY.search(text):
        return "strategy", match[1]
    if match := _MIXED.search(text):
        return "mixed", match[1]
    if match := _NO_RULE.search(text):
        return "strategy", f"higher_order.{match[1]}"
    if _PROPAGATION.search(text):
        cause = error.__cause__
        while cause is not None:
            if type(cause).__name__ in _NO_META_CAUSES:
                return "propagation", None
            cause = cause.__cause__
    if _is_bare_propagation(error):
        return "propagation", None
    return None


def refusal_sentence(error: BaseException) -> str:
    """What DTensor says of the op it refuses, without what torch.compile puts around it."""
    text = str(error)
    for pattern in (_NO_STRATEGY, _MIXED, _NO_RULE):
        if match := pattern.search(text):
            # torch.compile quotes the exception it met as `got RuntimeError('...')`.
            return re.split(r"""["']\)|\n""", text[match.start() :], maxsplit=1)[0]
    # PyTorch's own first line is the op's name alone.
    failed = _PROPAGATION.search(text)
    if failed or _is_bare_propagation(error):
        return (
            f"Sharding propagation failed for {failed[1] if failed else text.strip()}: it has no Meta "
            "kernel, and DTensor runs an op on meta tensors before it asks for a sharding strategy"
        )
    return text.strip().split("\n", 1)[0]


def error_text(error: BaseException) -> str:
    """What an exception says, with its cause where PyTorch's own wrapping leaves that out (2.9)."""
    text = str(error).strip()
    cause = error.__cause__
    if cause is not None and _PROPAGATION.match(text):
        text = f"{str(cause).strip() or type(cause).__name__}\n\n{text}"
    return text or type(error).__name__


def _is_bare_propagation(error: BaseException) -> bool:
    return type(error).__name__ == "UnsupportedOperatorException"  # unwrapped up to 2.8
