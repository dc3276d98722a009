"""A tensor that is taken for the same on all ranks, and is not."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attncheck.audit.numeric.captured import Captured
from attncheck.audit.numeric.readings import ranks_text, together
from attncheck.audit.numeric.scene import Difference, Scene
from attncheck.audit.numeric.watching import FROM_LOCAL, MIXED


def cause(scene: Scene, difference: Difference) -> str:
    if not difference.gradient:
        for same in zip(*scene.sightings(difference, MIXED), strict=False):
            ranks = _unlike([each.captured for each in same])
            if ranks:
                return (
                    f"{ranks_text(ranks)} hold different values of the plain tensor that meets DTensors in "
                    f"{same[0].name}{_at(same[0].line)}; DTensor takes it for the same on all ranks"
                )
        for same in zip(*scene.sightings(difference, FROM_LOCAL), strict=False):
            if together([each.captured for each in same]).gap > difference.verdict.bound:
                return (
                    f"ranks hold different values of the tensor that from_local{_at(same[0].line)} calls "
                    "replicated"
                )
    captures = scene.captures(difference.key, difference.gradient)
    if together(captures).gap > difference.verdict.bound:
        return "ranks hold different values of what its placements call replicated"
    return ""


def _at(line: str) -> str:
    return f" at {line}" if line else ""


def _unlike(captures: Sequence[Captured | None]) -> tuple[int, ...]:
    """Two ranks of one mesh whose plain tensors differ; () where none do."""
    for rank, each in enumerate(captures):
        if each is None:
            return ()
        first = each.ranks[0] if each.ranks else 0
        other = captures[first]
        if other is None or first == rank:
            continue
        if each.local.shape != other.local.shape or not torch.equal(each.local, other.local):
            return (first, rank)
    return ()
