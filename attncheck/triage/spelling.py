"""The operator's call and its tensors in code, as a person would write them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from attncheck.probing import KV_SEQUENCE, OTHER, Tensor
from attncheck.triage.subject import NotWritten, Subject

WIDTH = 96

# --- the call ----------------------------------------------------------------------------------------


def called(function: str, arguments: Sequence[str], indent: str, after: str = "") -> list[str]:
    """`function(...)after`, on several lines where it would be too long; `indent` in front of each."""
    one = f"{indent}{function}({', '.join(arguments)}){after}"
    if len(one) <= WIDTH:
        return [one]
    inner = textwrap.wrap(", ".join(arguments) + ",", WIDTH - len(indent) - 4)
    return [f"{indent}{function}(", *(f"{indent}    {line}" for line in inner), f"{indent}){after}"]


def statement(subject: Subject, into: str, indent: str) -> list[str]:
    """`out = F.scaled_dot_product_attention(q, k, v)`, inside of its context where it has one."""
    call = subject.call
    lines = []
    if call.context:
        lines.append(f"{indent}with {call.context}:")
        indent += "    "
    text = called(call.function, call.arguments, indent, call.picks["out"])
    text[0] = indent + into + text[0].removeprefix(indent)
    return [*lines, *text]


def attend(subject: Subject) -> list[str]:
    """The call as a function of its tensors, which it returns the outputs of: one, or a dict of several."""
    call = subject.call
    parameters = ", ".join(spec.name for spec in subject.specs) if call.by_name else "**t"
    lines, indent = [f"def {subject.name_of_call}({parameters}):"], "    "
    if call.context:
        lines.append(f"{indent}with {call.context}:")
        indent += "    "
    text = called(call.function, call.arguments, indent)
    if len(call.picks) == 1:
        text = called(call.function, call.arguments, indent, call.picks["out"])
        text[0] = f"{indent}return {text[0].removeprefix(indent)}"
        return [*lines, *text]
    text[0] = f"{indent}returned = {text[0].removeprefix(indent)}"
    named = ", ".join(f'"{name}": returned{place}' for name, place in call.picks.items())
    return [*lines, *text, f"    return {{{named}}}"]


# --- tensors -----------------------------------------------------------------------------------------


def _whole(subject: Subject, spec: Tensor) -> str:
    """An expression that makes the whole tensor."""
    sizes = ", ".join(map(str, spec.sizes)) or "()"
    dtype = spec.dtype or subject.setting.dtype
    typed = "" if dtype == "float32" else f", dtype=torch.{dtype}"
    if subject.own_device and spec.dtype is None and dtype == "float32":
        typed = ", dtype=dtype"
    if spec.fill == "normal" or spec.fill == "float_mask":
        return f"torch.randn({sizes}{typed})"
    if spec.fill == "weight":
        return f"torch.randn({sizes}{typed}) / {spec.sizes[-1]} ** 0.5"
    if spec.fill == "bool_mask":
        return f"(torch.rand({sizes}) < 0.7) | (torch.arange({spec.sizes[-1]}) == 0)"
    if spec.fill == "slopes":
        return f"torch.rand({sizes}{typed}) + 0.05"
    if spec.fill == "zeros":
        return f"torch.zeros({sizes}{typed})"
    if spec.fill == "values":
        return f"torch.tensor({_nested(spec)}, dtype=torch.{dtype})"
    if spec.fill == "eye":
        at = spec.dims.index(KV_SEQUENCE) if KV_SEQUENCE in spec.dims else len(spec.dims) - 2
        others = [size for dim, size in enumerate(spec.sizes[:-1]) if dim != at]
        rows, columns = spec.sizes[at], spec.sizes[-1]
        shape = ", ".join(map(str, [*others, rows, columns]))
        moved = "" if at == len(spec.dims) - 2 else f".movedim(-2, {at})"
        return f"torch.eye({rows}, {columns}{typed}).expand({shape}){moved}.contiguous()"
    raise NotWritten(f"{spec.name} is filled with {spec.fill}")


def _nested(spec: Tensor) -> str:
    values: list[Any] = list(spec.values)
    if spec.dtype == "bool":
        values = [bool(value) for value in values]
    if len(spec.sizes) == 2:
        rows, columns = spec.sizes
        values = [values[row * columns : (row + 1) * columns] for row in range(rows)]
    return repr(values)


def _placed(subject: Subject, spec: Tensor, whole: str) -> str:
    """An expression that makes the argument of `whole` as the case places it."""
    texts = subject.case.placements[spec.name]
    if texts == ("plain",):
        return whole
    placements = ", ".join(map(_placement, texts))
    if "P(sum)" not in texts:
        return f"distribute_tensor({whole}, mesh, [{placements}])"
    ranks = math.prod(
        n for n, text in zip(subject.case.mesh.values(), texts, strict=True) if text == "P(sum)"
    )
    part = f"{whole} / {ranks}"
    if set(texts) != {"P(sum)"}:
        others = ", ".join(_placement("R" if text == "P(sum)" else text) for text in texts)
        part = f"distribute_tensor({part}, mesh, [{others}]).to_local()"
    return f"DTensor.from_local({part}, mesh, [{placements}])"


def _placement(text: str) -> str:
    if text == "R":
        return "Replicate()"
    if text == "P(sum)":
        return "Partial()"
    return f"Shard({int(text[2:-1])})"


def _dims(spec: Tensor, told: set[str]) -> str:
    """What the dims are, as a comment, where no tensor before said the same."""
    named = [role.removeprefix("kv_") if role != OTHER else "..." for role in spec.dims]
    text = f"  # {', '.join(named)}"
    if text in told or set(named) == {"..."}:
        return ""
    told.add(text)
    return text


def arguments(subject: Subject) -> list[str]:
    """Each argument placed: as a variable, or in the dict `t`."""
    leaves = subject.claim.backward or subject.leaves
    lines: list[str] = []
    told: set[str] = set()
    for spec in subject.specs:
        whole = _whole(subject, spec)
        made = _placed(subject, spec, whole)
        if leaves and spec.requires_grad:
            made = f"({made})" if made == whole and "/" in whole else made
            made += ".requires_grad_()"
        by_name = subject.call.by_name
        line = f"{spec.name} = {made}" if by_name else f'    "{spec.name}": {made},'
        comment = _dims(spec, told)
        if comment and len(line + comment) > WIDTH:
            lines.append(("" if by_name else "    ") + comment.strip())
            comment = ""
        lines.append(line + comment)
    return lines if subject.call.by_name else ["t = {", *lines, "}"]


def whole_and_placed(subject: Subject) -> list[str]:
    lines, told = ["whole = {"], set[str]()
    for spec in subject.specs:
        comment = _dims(spec, told)
        lines.append(f'    "{spec.name}": {_whole(subject, spec)},{comment}')
    lines += ["}", "placed = {"]
    for spec in subject.specs:
        # A replicated DTensor would share the memory that the whole call writes into.
        one = f'whole["{spec.name}"]' + (".clone()" if spec.mutable else "")
        lines.append(f'    "{spec.name}": {_placed(subject, spec, one)},')
    lines.append("}")
    return lines
