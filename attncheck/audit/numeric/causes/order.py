"""The right values in the wrong places."""

from __future__ import annotations

import torch

from attncheck.audit.numeric.readings import readings, together
from attncheck.audit.numeric.scene import Difference, Scene
from attncheck.audit.numeric.verdict import distance, tolerance


def cause(scene: Scene, difference: Difference) -> str:
    expected = scene.expected(difference.key, difference.gradient)
    held = together(scene.captures(difference.key, difference.gradient))
    if expected is None or not held.values:
        return ""
    want, near = expected.reference, tolerance(difference.verdict)
    what = "gradient" if difference.gradient else "values"
    if want.numel() < 2:
        return ""
    ordered = want.flatten().sort().values
    found = [
        whole
        for reading in readings(held.values, want.shape, scene.mesh)
        for whole in reading.wholes
    ]
    for whole in [*found, *held.values]:
        if whole.numel() == want.numel() and _same(whole.flatten().sort().values, ordered, near):
            return f"the right {what} in the wrong places: a Shard dim or a layout that is not what is held"
    return ""


def _same(one: torch.Tensor, other: torch.Tensor, near: float) -> bool:
    # Sorted values of any two draws from one distribution are near each other, so that closer is asked.
    return distance(one, other) <= near / 10
