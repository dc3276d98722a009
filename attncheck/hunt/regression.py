"""A find as a probe file of its own: readable, runnable, without the hunt."""

from __future__ import annotations

import json
import os
import re
import shlex
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from attncheck.errors import UserError
from attncheck.hunt import finds
from attncheck.hunt.finds import Find
from attncheck.plan import patterns_for
from attncheck.probing import EXPLICIT, Operator

_TEMPLATE = '''"""{told}

Found by `attncheck hunt` on {versions}, shrunk, and seen again by running it alone:

    {command}
"""

from __future__ import annotations
{imports}
from attncheck.plugins import derived
from attncheck.probing import Probe, Setting

SETTING = Setting(
{setting}
)

PROBE = Probe(
    name={probe},
    summary={summary},
    operators=(
        derived(
{derived}
        ),
    ),
)
'''
_WIDTH = 96


@dataclass(frozen=True)
class Saved:
    """A saved find: its file, the operator that it defines, how to run it."""

    file: Path
    operator: str
    command: str


def save(
    folder: Path,
    find: Find,
    operator: Operator,
    probe: Path | None,
    seed: int,
    versions: str,
    with_packages: Sequence[str] = (),
    taken: Collection[Path] = (),
) -> Saved:
    """Write the file. `probe`: the user's file that defines the operator, None for a built-in one; `taken`:
    names that were given before, to files that may be gone: a process loads a file of one name once.

    Raises UserError where it cannot be written.
    """
    slug = re.sub(r"\W+", "_", operator.name).strip("_").lower()
    status = find.outcome.status.value
    number = 1
    while (file := folder / f"{slug}_{status}_{number}.py").exists() or file in taken:
        number += 1
    name = f"hunted.{operator.name}.{status}_{number}"
    command = _command(file, name, find, seed, with_packages)
    arguments = [_text(operator.name), "SETTING", f"name={_text(name)}"]
    if probe is not None:
        place = os.path.relpath(probe.resolve(), folder.resolve())
        arguments.append(f"probe=Path(__file__).parent / {_text(place)}")
    paragraphs = [f"{title(find)}.", f"Case: {finds.in_words(find.asked)}."]
    paragraphs.append(f"Seen: {finds.seen(find)}")
    text = _TEMPLATE.format(
        told="\n\n".join(textwrap.fill(p, _WIDTH) for p in paragraphs).replace("\\", "\\\\"),
        versions=versions,
        command=command,
        imports="\nfrom pathlib import Path\n" if probe is not None else "",
        setting=_setting(find),
        probe=_text(f"hunted_{file.stem}"),
        summary=_text(title(find)),
        derived="\n".join(f"            {argument}," for argument in arguments),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot write {file}: {error.strerror}.") from None
    return Saved(file, name, command)


def title(find: Find) -> str:
    """`wrong: aten.bmm.default of sdpa[MATH] with heads sharded, uneven shards`."""
    operator, op = find.asked.case.operator, find.kind.op
    about = operator if op in ("", operator) else f"{op} of {operator}"
    causes = ", ".join(sorted(find.causes))
    return f"{find.outcome.status.value}: {about}" + (f" with {causes}" if causes else "")


def _setting(find: Find) -> str:
    setting, case = find.asked.setting, find.asked.case
    lines = [_text(setting.name), _value(dict(setting.sizes)), f"dtype={_text(setting.dtype)}"]
    if setting.options:
        lines.append(f"options={_value(dict(setting.options))}")
    lines.append('level="quick"')
    if case.placement != EXPLICIT:
        lines.append(f"placements={_value((case.placement,))}")
    if setting.dropout:
        lines.append(f"dropout={setting.dropout}")
    if setting.memory != "contiguous":
        lines.append(f"memory={_text(setting.memory)}")
    if setting.explicit:
        lines.append(f"explicit={_value(dict(setting.explicit))}")
    return "\n".join(f"    {line}," for line in lines)


def plannable(find: Find, operator: Operator) -> Find:
    """The find as the planner can make it: where no pattern of its own says so, each tensor is placed."""
    asked = find.asked
    names = {
        ",".join(names)
        for names in patterns_for(operator, asked.setting, "full", len(asked.case.mesh))
    }
    if asked.case.placement in names:
        return find
    given = {k: texts for k, texts in asked.case.placements.items() if texts != ("plain",)}
    setting = replace(asked.setting, explicit=given)
    case = replace(asked.case, placement=EXPLICIT)
    return replace(find, asked=replace(asked, setting=setting, case=case))


def _command(file: Path, name: str, find: Find, seed: int, with_packages: Sequence[str]) -> str:
    case = find.asked.case
    words = ["attncheck", "scan"]
    for package in with_packages:
        words += ["--with", package]
    try:
        shown = file.resolve().relative_to(Path.cwd())
    except ValueError:
        shown = file.resolve()
    words += ["--probe", str(shown), "--operator", name, "--mesh", finds.mesh_text(case.mesh)]
    words += ["--placement", case.placement, "--direction", case.direction, "--seed", str(seed)]
    return shlex.join(words)


def _text(value: str) -> str:
    """A string literal in double quotes."""
    return json.dumps(value)


def _value(value: object) -> str:
    """A literal of plain values, strings in double quotes."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(str(k))}: {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_value, value)) + ("," if len(value) == 1 else "") + ")"
    return repr(value)
