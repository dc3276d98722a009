"""Several forms of a call, and the arguments that tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from attncheck.fixes import recording
from attncheck.fixes.notation import GIVEN, Signature, read
from attncheck.fixes.recording import Call
from attncheck.fixes.synthesis.checking import token_of
from attncheck.fixes.synthesis.description import Form, Rejected
from attncheck.runner import compat


def told_apart(op: str, learned: Sequence[Form]) -> tuple[tuple[Signature, ...], list[Rejected]]:
    """One signature for each form that arguments tell from the others; equal ones are one."""
    merged: list[Form] = []
    for one in sorted(learned, key=lambda o: -len(o.calls)):
        for other in merged:
            if _join(other, one):
                break
        else:
            merged.append(one)
    words = _words(learned)
    out: list[Signature] = []
    untold: list[Rejected] = []
    for one in merged:
        others = [call for other in merged if other is not one for call in other.calls]
        when = {
            name: _several([recording.value_of(call, name) for call in one.calls]) for name in words
        }
        telling = _telling(one.calls, others, words)
        if others and telling is None:
            if out:
                untold.append(
                    Rejected(
                        "another form of the call", f"no argument tells it: {one.calls[0].label}"
                    )
                )
                continue
            telling = {}
        out.append(replace(one.signature(), when={**when, **(telling or {})}))
    return tuple(out), untold


def _join(into: Form, one: Form) -> bool:
    """Put two forms together whose descriptions agree. A result has one form, an argument several."""
    if into.gives != one.gives or into.queries != one.queries:
        return False
    takes = dict(into.takes)
    for name, text in one.takes.items():
        mine, theirs = takes.get(name, ""), text
        if mine and mine != theirs:
            a, b = read(mine), read(theirs)
            known = {len(form): form for form in a.forms}
            if a.replicated or b.replicated or any(known.get(len(f), f) != f for f in b.forms):
                return False
            ending = ", in place" if a.in_place else ""
            forms = dict.fromkeys((*a.forms, *b.forms))
            theirs = " | ".join(" ".join(form) for form in forms) + ending
        takes[name] = theirs
    into.takes = takes
    into.calls = [*into.calls, *one.calls]
    return True


def _words(learned: Sequence[Form]) -> list[str]:
    """Arguments that are words: they say how dims lie, so a signature is only about those that were seen."""
    call = learned[0].calls[0]
    return [
        a.name
        for a in compat.find_overload(call.op)._schema.arguments
        if str(a.type) in ("str", "Optional[str]")
        and any(isinstance(recording.value_of(c, a.name), str) for o in learned for c in o.calls)
    ]


def _several(given: Sequence[Any]) -> Any:
    distinct = tuple(dict.fromkeys(given))
    return distinct[0] if len(distinct) == 1 else distinct


def _telling(
    mine: Sequence[Call], others: Sequence[Call], words: Sequence[str]
) -> dict[str, Any] | None:
    """One argument that says which form a call has: whether a tensor is given, or a flag; {} where words say
    it already, None where nothing does. Numbers do not: they are sizes."""
    if not others:
        return {}
    for argument in compat.find_overload(mine[0].op)._schema.arguments:
        here, there = (
            {token_of(recording.value_of(call, argument.name)) for call in calls}
            for calls in (mine, others)
        )
        if here & there or not {*here, *there} <= {
            GIVEN,
            None,
            True,
            False,
            *_strings(here, there),
        }:
            continue
        return {} if argument.name in words else {argument.name: _several(sorted(here, key=str))}
    return None


def _strings(*tokens: set[Any]) -> set[str]:
    return {token for some in tokens for token in some if isinstance(token, str)}
