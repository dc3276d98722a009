"""Is the dispatcher op of this name the one we mean? Keyed on the schema, not on the name.

Two packages, or two versions of one, can register the same name with other arguments. Whoever calls such
an op, or puts a kernel behind it, must know which one it is.
"""

from __future__ import annotations

import re

import torch

# `(a!)`, `(a)`, `(a! -> b)`: which alias set is a matter of spelling, whether it is written to is not.
_ALIAS = re.compile(r"\(\w+(!?)[^)]*\)")


def registered_schema(op: str) -> str | None:
    """The schema of `namespace::name` or `namespace::name.overload` as PyTorch prints it, or None."""
    namespace, _, name = op.partition("::")
    packet, _, overload = name.partition(".")
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    except AttributeError:
        return None
    return str(found._schema)


def schema_difference(op: str, expected: str) -> str:
    """Why the op registered as `op` is not the one with the schema `expected`; '' where it is.

    Compared are the arguments' names, types, mutability and order, what is keyword only, and the types
    and mutability of the returns. Not compared: defaults, the names of alias sets, and `SymInt` against
    `int`, which take the same values.

    >>> schema_difference("aten::relu", "aten::relu(Tensor self) -> Tensor")
    ''
    """
    found = registered_schema(op)
    if found is None:
        return f"{op} is not registered"
    (want, want_returns), (have, have_returns) = _signature(expected), _signature(found)
    if want == have and want_returns == have_returns:
        return ""
    if want != have:
        at = next(
            (i for i, pair in enumerate(zip(want, have, strict=False)) if len(set(pair)) > 1), -1
        )
        if at >= 0:
            where = f"argument {at + 1} is `{have[at]}`, expected `{want[at]}`"
        else:
            where = f"it takes {len(have)} arguments, expected {len(want)}"
    else:
        where = f"it returns ({', '.join(have_returns)}), expected ({', '.join(want_returns)})"
    return f"{op} is registered with another schema: {where}; expected {expected}, found {found}"


def _signature(schema: str) -> tuple[list[str], list[str]]:
    """Arguments and returns, each as `type name` without default and alias names."""
    arguments, _, returns = schema.partition("(")[2].rpartition("->")
    arguments = arguments.rstrip().removesuffix(")")
    returns = returns.strip()
    if returns.startswith("("):
        returns = returns[1:-1]
    return [_plain(part) for part in _split(arguments)], [_plain(part) for part in _split(returns)]


def _plain(argument: str) -> str:
    without_default = argument.partition("=")[0]
    return " ".join(
        _ALIAS.sub(r"(\1)", without_default).replace("()", "").replace("SymInt", "int").split()
    )


def _split(text: str) -> list[str]:
    """The parts between commas that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [part for part in [*parts, text[start:]] if part.strip()]
