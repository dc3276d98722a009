"""A DTensor made with a Shard dim other than the one along which its parts belong together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from attncheck.audit.numeric.captured import Captured, Key
from attncheck.audit.numeric.readings import together
from attncheck.audit.numeric.recording import Recorder
from attncheck.audit.numeric.scene import Difference, Scene
from attncheck.audit.numeric.verdict import distance
from attncheck.audit.numeric.watching import FROM_LOCAL, Watch
from attncheck.runner.placements import shard_dim

# Relative to the largest value: what the model computed on the way there may have rounded differently.
_SAME = 0.02


class Intermediate(Watch):
    """Keeps what functions return while the recorder is between two tensors."""

    def __init__(self, recorder: Recorder, first: int, last: int) -> None:
        super().__init__(recorder)
        self.first, self.last = first, last
        self.kept: list[torch.Tensor] = []

    def on_result(self, func: Any, out: Any, args: Any, kwargs: Any) -> Any:
        at = len(self.recorder.keys)
        if isinstance(out, torch.Tensor) and self.first <= at <= self.last:
            self.kept.append(out.detach().cpu().clone())
        return out


def cause(scene: Scene, difference: Difference) -> str:
    """Of what from_local makes near the difference, whether another Shard dim gives a tensor that the
    unsharded model has there, and the one that is claimed does not."""
    if difference.gradient:
        return ""
    own: list[torch.Tensor] | None = None
    for same in zip(*scene.sightings(difference, FROM_LOCAL), strict=False):
        captures = [each.captured for each in same if each.captured is not None]
        others = list(_others(captures)) if len(captures) == len(scene.records) else []
        if not others:
            continue
        own = _intermediate(scene, difference) if own is None else own
        if any(_among(value, own) for value in together(captures).values[:1]):
            continue  # as claimed, it is one of them
        for text, value in others:
            if _among(value, own):
                claimed = ", ".join(captures[0].placements or ())
                at = f" at {same[0].line}" if same[0].line else ""
                return (
                    f"from_local{at} says [{claimed}] of shape {captures[0].shape}; what the ranks hold fits "
                    f"the unsharded values as [{text}] of shape {tuple(value.shape)}"
                )
    captures = [each for each in scene.captures(difference.key) if each is not None]
    expected = scene.expected(difference.key)
    for text, value in _others(captures):
        if expected is not None and _among(value, [expected.reference]):
            claimed = ", ".join(captures[0].placements or ())
            return f"its placements say [{claimed}]; what the ranks hold fits as [{text}]"
    return ""


def _others(captures: Sequence[Captured]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same parts along another dim: (placements, whole)."""
    first = captures[0]
    if any(each.local.shape != first.local.shape for each in captures):
        return  # uneven: which of them ends where is no matter of one dim
    for axis, text in enumerate(first.placements or ()):
        dim = shard_dim(text)
        if dim is None:
            continue
        for other in range(len(first.shape)):
            if other == dim:
                continue
            placements = list(first.placements or ())
            placements[axis] = f"S({other})"
            moved = [_claimed(each, axis, other, placements) for each in captures]
            held = together(moved)
            if held.values:
                yield ", ".join(placements), held.values[0]


def _claimed(captured: Captured, axis: int, dim: int, placements: list[str]) -> Captured:
    """With another placement, and the global shape that follows from the local ones."""
    old = shard_dim((captured.placements or ())[axis])
    ranks = captured.mesh[axis]
    shape = list(captured.shape)
    assert old is not None
    shape[old] = captured.local.shape[old]
    shape[dim] = captured.shape[dim] * ranks
    return replace(captured, shape=tuple(shape), placements=tuple(placements))


def _intermediate(scene: Scene, difference: Difference) -> list[torch.Tensor]:
    places = {key: at for at, key in enumerate(scene.own)}
    first = places[difference.before] + 1 if difference.before else 0
    last = places[difference.key]
    _, watch = scene.unsharded.replay(
        scene.at, watch=lambda recorder: Intermediate(recorder, first, last)
    )
    assert isinstance(watch, Intermediate)
    known: list[Key] = [key for key, at in places.items() if first - 1 <= at < last]
    return [*watch.kept, *(scene.own[key].captured.local for key in known)]


def _among(value: torch.Tensor, candidates: Sequence[torch.Tensor]) -> bool:
    for each in candidates:
        if each.shape == value.shape and each.is_floating_point() and each.numel() > 1:
            largest = float(each.abs().max())
            if largest > 0 and distance(value, each.to(torch.float64)) <= _SAME * largest:
                return True
    return False
