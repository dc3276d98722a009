"""A value that each rank has a part of, or that was added up once too often."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch

from attncheck.audit.numeric.captured import Captured
from attncheck.audit.numeric.readings import SUM, readings
from attncheck.audit.numeric.scene import Difference, Scene
from attncheck.audit.numeric.verdict import Verdict, distance, tolerance
from attncheck.runner.drift import Expected


def cause(scene: Scene, difference: Difference) -> str:
    expected = scene.expected(difference.key, difference.gradient)
    assert expected is not None
    captures = scene.captures(difference.key, difference.gradient)
    what = "gradient" if difference.gradient else "value"
    return of(captures, expected, difference.verdict, scene.axes, what)


def of(
    captures: Sequence[Captured | None],
    expected: Expected,
    verdict: Verdict,
    axes: Mapping[str, int],
    what: str = "gradient",
) -> str:
    """`captures`: what each rank holds. Its local values count, whatever its placements say of replicas."""
    if not verdict.unequal or any(each is None for each in captures):
        return ""
    held = [each.local.to(torch.float64) for each in captures if each is not None]
    mesh, near = tuple(axes.values()), tolerance(verdict)
    want = expected.reference
    found = readings(held, want.shape, mesh, sums=True)
    for reading in found:
        if SUM not in reading.how or _alike(held):
            continue  # equal parts are no parts
        if all(distance(whole, want) <= near for whole in reading.wholes):
            over = " and ".join(
                axis for axis, how in zip(axes, reading.how, strict=True) if how == SUM
            )
            return (
                f"each rank has only its part of this {what}, and nobody added them up over {over}"
            )
    plain = [reading for reading in found if SUM not in reading.how]
    for times, over in _multiples(axes):
        for reading in plain:
            if all(distance(whole, want * times) <= near * times for whole in reading.wholes):
                return (
                    f"it is {times} times the unsharded {what}: added up over {over} where each rank has all "
                    "of it already"
                )
            if all(distance(whole, want / times) <= near for whole in reading.wholes):
                return (
                    f"it is 1/{times} of the unsharded {what}: averaged over {over}, not added up"
                )
    return _in_part(held, want, near, what, " and ".join(axes))


def _alike(held: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(each, held[0]) for each in held)


def _multiples(axes: Mapping[str, int]) -> list[tuple[int, str]]:
    named = [(axis, ranks) for axis, ranks in axes.items() if ranks > 1]
    return [
        (_product(chosen), " and ".join(axis for axis, _ in chosen))
        for size in range(1, len(named) + 1)
        for chosen in itertools.combinations(named, size)
    ]


def _product(chosen: Sequence[tuple[str, int]]) -> int:
    result = 1
    for _, ranks in chosen:
        result *= ranks
    return result


def _in_part(
    held: Sequence[torch.Tensor], want: torch.Tensor, near: float, what: str, over: str
) -> str:
    """What is used before a reduction and behind it: each element is all there, or a part of the sum."""
    if any(each.shape != want.shape for each in held):
        return ""
    total = torch.stack([*held]).sum(0)
    for own in held:
        nearer = torch.where((total - want).abs() < (own - want).abs(), total, own)
        if distance(nearer, want) > near:
            return ""
    return (
        f"of some elements of this {what} each rank has only its part, and nobody added them up over {over}; "
        "the others are complete"
    )
