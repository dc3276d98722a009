"""A partial sum that is used as if it were the whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attncheck.audit.numeric.captured import Key
from attncheck.audit.numeric.readings import SUM, WHOLE
from attncheck.audit.numeric.recording import Override
from attncheck.audit.numeric.scene import Difference, Scene
from attncheck.audit.numeric.verdict import distance, tolerance

# How many tensors before the difference are looked at.
_NEAR = 6


def cause(scene: Scene, difference: Difference) -> str:
    """Runs the unsharded model with one rank's part in the place of the sum."""
    if difference.gradient:
        return ""
    captures = scene.captures(difference.key)
    for key, over in _partial(scene, difference):
        found = []
        for part, wrong in zip(scene.captures(key), captures, strict=True):
            if part is None or wrong is None:
                return ""
            record, _ = scene.unsharded.replay(scene.at, {key: _instead(part.local)})
            made = {each.key: each.captured.local for each in record.events}.get(difference.key)
            found.append(
                made is not None
                and made.shape == wrong.local.shape
                and distance(made.to(torch.float64), wrong.local.to(torch.float64))
                <= tolerance(difference.verdict)
            )
        if all(found):
            return (
                f"{key.path or 'the model'} gives a partial sum on each rank, and nobody added them up over "
                f"{over} before they were used"
            )
    return ""


def _instead(local: torch.Tensor) -> Override:
    return lambda whole: local.to(whole.device)


def _partial(scene: Scene, difference: Difference) -> Iterator[tuple[Key, str]]:
    """Plain tensors shortly before the difference that are right only as a sum over ranks."""
    for key in scene.keys[: scene.keys.index(difference.key)][-_NEAR:]:
        verdict = scene.judge(key)
        captures = scene.captures(key)
        plain = all(each is not None and each.placements is None for each in captures)
        if verdict is None or verdict.unequal or not plain or SUM not in verdict.how:
            continue
        over = [axis for axis, how in zip(scene.axes, verdict.how, strict=True) if how == SUM]
        if len(over) == sum(how != WHOLE for how in verdict.how):
            yield key, " and ".join(over)
