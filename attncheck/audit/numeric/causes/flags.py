"""Attention that is called with other flags than in the unsharded model."""

from __future__ import annotations

from attncheck.audit.numeric.scene import Difference, Scene
from attncheck.audit.numeric.watching import ATTENTION, Sighting

# They follow from the shapes that a rank holds.
_LOCAL = ("dropout_p", "max_q", "max_k", "max_seqlen_q", "max_seqlen_k")


def cause(scene: Scene, difference: Difference) -> str:
    """Where as many calls were seen on every rank as in the unsharded model: a ring makes several of one."""
    want = scene.unsharded_sightings(difference, ATTENTION)
    by_rank = scene.sightings(difference, ATTENTION)
    if any(len(own) != len(want) for own in by_rank):
        return ""
    for call, *own in zip(want, *by_rank, strict=True):
        for mine in own:
            if mine.name == call.name and (said := _unlike(call, mine)):
                return said
    return ""


def _unlike(want: Sighting, own: Sighting) -> str:
    for name, value in want.flags.items():
        mine = own.flags.get(name)
        if name in _LOCAL or mine == value:
            continue
        at = f" at {own.line}" if own.line else ""
        return f"{own.name}{at} is called {_with(name, mine)}, {_with(name, value)} in the unsharded model"
    return ""


def _with(name: str, value: object) -> str:
    if name == "attn_mask":
        return "with a mask" if value else "without a mask"
    return f"with {name}={value}"
