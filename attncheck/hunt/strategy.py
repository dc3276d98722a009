"""What a hunt draws from: operator, options, sizes, dtype, memory, mesh, placements, direction.

Whatever is drawn from is ordered by plainness, and so shrinks to the plainest that still fails: few
ranks, small sizes, float32, contiguous tensors, replicated placements, forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hypothesis import reject
from hypothesis import strategies as st

from attncheck.model import Case, case_id
from attncheck.plan import DIRECTIONS, placement_texts
from attncheck.probing import (
    BATCH,
    EXPLICIT,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    KV_SEQUENCE,
    MEMORY,
    PATTERNS,
    SEQUENCE,
    Operator,
    Setting,
    Tensor,
)
from attncheck.runner.rundir import Asked

NAME = "hunted"  # of every setting that is drawn: values depend on it

LARGEST = {BATCH: 7, HEADS: 12, SEQUENCE: 21, KV_SEQUENCE: 21}
# 8 is the plainest: what most kernels want a multiple of.
HEAD_DIMS = (8, 16, 24, 40, 4, 12, 7, 1)
DTYPES = ("float32", "bfloat16", "float16")
# Rounding, memory and options are varied less often than what is sharded how.
OFTEN = 3


@dataclass(frozen=True)
class Space:
    """What may be drawn. `operators`: with the name of each one's probe; `meshes`: plainest first;
    `free`: also placements that no pattern gives, each tensor its own."""

    operators: tuple[tuple[str, Operator], ...]
    meshes: tuple[Mapping[str, int], ...]
    free: bool = True


def templates(operator: Operator) -> list[Setting]:
    """One setting for each set of options (and dropout rate), the fewest options first."""
    found: dict[str, Setting] = {}
    for setting in sorted(operator.settings, key=lambda s: (len(s.options), s.dropout)):
        found.setdefault(repr((sorted(setting.options.items(), key=str), setting.dropout)), setting)
    return list(found.values())


@st.composite
def asked(draw: st.DrawFn, space: Space) -> Asked:
    """A case and its setting. What its probe cannot make tensors of is rejected."""
    probe, operator = draw(st.sampled_from(space.operators))
    mesh = draw(st.sampled_from(space.meshes))
    direction = draw(st.sampled_from(DIRECTIONS))
    template = draw(st.sampled_from(templates(operator)))
    setting = Setting(
        NAME,
        draw(sizes(template)),
        draw(_mostly_first(_dtypes(operator))),
        template.options,
        level="quick",
        dropout=template.dropout,
        memory=draw(_mostly_first(tuple(MEMORY))),
    )
    try:
        tensors = operator.tensors(setting)
    except Exception:  # the probe's own, of whatever kind: these sizes do not go with its options
        reject()
    if not any(tensor.requires_grad for tensor in tensors):
        direction = DIRECTIONS[0]
    name, placements = draw(_placed(tensors, mesh, space.free))
    if name == EXPLICIT:
        given = {k: texts for k, texts in placements.items() if texts != ("plain",)}
        setting = replace(setting, explicit=given)
    return asking(probe, operator, setting, mesh, name, placements, direction)


def asking(
    probe: str,
    operator: Operator,
    setting: Setting,
    mesh: Mapping[str, int],
    name: str,
    placements: Mapping[str, tuple[str, ...]],
    direction: str,
) -> Asked:
    """The case of an operator in a setting of a hunt's own; `name` is that of its placements."""
    case = Case(
        id=case_id(probe, operator.name, NAME, "dtensor", mesh, name, direction),
        probe=probe,
        operator=operator.name,
        route="dtensor",
        setting=setting.to_dict(),
        mesh=dict(mesh),
        placement=name,
        placements=placements,
        direction=direction,
        function=operator.function,
        communicates=operator.communicates,
    )
    return Asked(case, setting)


def _mostly_first(values: Sequence[str]) -> st.SearchStrategy[str]:
    return st.sampled_from((values[0],) * (OFTEN * (len(values) - 1)) + tuple(values))


def _dtypes(operator: Operator) -> tuple[str, ...]:
    """Plainest first: float32, or what the operator's first setting has where none has that."""
    used = [setting.dtype for setting in operator.settings]
    first = DTYPES[0] if DTYPES[0] in used else used[0]
    return (first, *(dtype for dtype in DTYPES if dtype != first))


def kept_roles(template: Setting) -> set[str]:
    """Roles whose sizes the options speak of: lengths of packed sequences, page tables, paddings."""
    if template.dropout:
        return set(template.sizes)  # its mask is read off the output, which takes many draws
    listed = any(isinstance(value, (list, tuple)) for value in template.options.values())
    return {BATCH, SEQUENCE, KV_SEQUENCE} if listed else set()


@st.composite
def sizes(draw: st.DrawFn, template: Setting) -> dict[str, int]:
    """Sizes by role; those that the options speak of, and roles of the probe's own, stay as they are.

    The lengths of queries and keys are mostly equal, and so are the numbers of their heads: kernels and
    references disagree about little else as often.
    """
    # All are drawn, also those that then stay: else options that keep sizes would take fewer choices, and
    # hypothesis would take such a case for smaller than the plainest one.
    out = dict(template.sizes)
    for role, largest in LARGEST.items():
        if role in out and role != KV_SEQUENCE:
            out[role] = draw(st.integers(1, largest))
    if HEAD_DIM in out:
        out[HEAD_DIM] = draw(st.sampled_from(HEAD_DIMS))
    if {HEADS, KV_HEADS} <= out.keys():
        divisors = [n for n in range(out[HEADS], 0, -1) if out[HEADS] % n == 0]
        out[KV_HEADS] = draw(st.sampled_from(divisors))
    if {SEQUENCE, KV_SEQUENCE} <= out.keys():
        # Attention to a single key is none: its weight is 1, and the gradients of q and k vanish.
        least = 2
        differ = draw(st.booleans())
        drawn = draw(st.integers(least, LARGEST[KV_SEQUENCE])) if differ else out[SEQUENCE]
        out[KV_SEQUENCE] = max(drawn, least)
    return out | {role: template[role] for role in kept_roles(template) if role in template.sizes}


@st.composite
def _placed(
    draw: st.DrawFn, tensors: Sequence[Tensor], mesh: Mapping[str, int], free: bool
) -> tuple[str, dict[str, tuple[str, ...]]]:
    """The placement's name and what it means for each tensor."""
    if free and draw(st.booleans()):
        placements = {t.name: draw(_texts(t, len(mesh))) for t in tensors}
        return _named(tensors, placements, len(mesh)), placements
    roles = {role for t in tensors for role in t.dims}
    patterns = [p for p, shards in PATTERNS.items() if not shards or roles & set(shards)]
    names = [draw(st.sampled_from(patterns)) for _ in mesh]
    return ",".join(names), _by_pattern(tensors, names)


def _by_pattern(tensors: Sequence[Tensor], names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    return {t.name: placement_texts(t, names, first=i == 0) for i, t in enumerate(tensors)}


@st.composite
def _texts(draw: st.DrawFn, tensor: Tensor, axes: int) -> tuple[str, ...]:
    if tensor.wrap != "pattern":
        return placement_texts(tensor, ("replicate",) * axes, first=False)
    known = ["R", *(f"S({dim})" for dim in range(len(tensor.dims)))]
    if tensor.fill in ("normal", "weight") and tensor.dtype is None:
        known.append("P(sum)")
    return tuple(draw(st.sampled_from(known)) for _ in range(axes))


def _named(tensors: Sequence[Tensor], placements: Mapping[str, tuple[str, ...]], axes: int) -> str:
    """The pattern that gives these placements on every axis, or `explicit`."""
    for pattern in PATTERNS:
        if _by_pattern(tensors, (pattern,) * axes) == placements:
            return ",".join((pattern,) * axes)
    return EXPLICIT
