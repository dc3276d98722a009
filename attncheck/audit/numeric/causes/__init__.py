"""Likely causes. Each looks for one numeric mark in what the ranks hold, and says nothing where it is not
there."""

from __future__ import annotations

from collections.abc import Callable

from attncheck.audit.numeric.causes import (
    backward,
    flags,
    fused,
    kept,
    layout,
    masks,
    order,
    partial,
    reduction,
    replicas,
    ring,
    rounding,
    shapes,
)
from attncheck.audit.numeric.scene import Difference, Scene

Cause = Callable[[Scene, Difference], str]

# The surest first.
FORWARD: tuple[Cause, ...] = (
    shapes.cause,
    kept.cause,
    replicas.cause,
    layout.cause,
    fused.cause,
    partial.cause,
    masks.cause,
    flags.cause,
    masks.other,
    reduction.cause,
    order.cause,
    rounding.cause,
    kept.weaker,
)
# What a gradient of a tensor within the model shows.
BACKWARD: tuple[Cause, ...] = (
    shapes.cause,
    reduction.cause,
    order.cause,
    ring.cause,
    rounding.cause,
    backward.cause,
)


def likely(scene: Scene, difference: Difference) -> str:
    """The first that is found, in words; '' where none is."""
    causes = BACKWARD if difference.gradient else FORWARD
    said = next((said for cause in causes if (said := cause(scene, difference))), "")
    if said and difference.gradient:
        return f"{said} (seen in the gradient of {difference.what})"
    return said
