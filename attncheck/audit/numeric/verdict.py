"""How far what the ranks hold is from the unsharded model's tensor, and how far it may be.

The bound is that of a scan (`runner.drift`): err <= 2 * err_unsharded + atol(dtype, ranks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attncheck.audit.numeric.captured import Captured
from attncheck.audit.numeric.readings import SUM, How, Reading, Together, readings, together
from attncheck.runner.drift import WRONG_FACTOR, Expected, atol, largest_value

# Of what differs, this share may be left where a likely cause is said to explain it; where rounding is large
# (bfloat16), no more than a quarter.
LEFT = 0.02
LEFT_OF_ROUNDING = 0.25


@dataclass(frozen=True)
class Verdict:
    """`error`: the largest absolute difference, under the reading that fits best; `bound`: what rounding
    explains. `fault`: the ranks contradict each other; `unread`: it could not be compared, and why."""

    error: float = 0.0
    bound: float = 0.0
    fault: str = ""
    unread: str = ""
    how: How = ()

    @property
    def unequal(self) -> bool:
        return not self.unread and not self.error <= self.bound

    @property
    def close(self) -> bool:
        return not (self.unread or self.unequal)

    @property
    def wrong(self) -> bool:
        """Beyond what rounding that grew explains (see runner.drift)."""
        return self.beyond(WRONG_FACTOR)

    def beyond(self, factor: float) -> bool:
        return not self.unread and not self.error <= factor * self.bound

    @property
    def factor(self) -> float:
        """By how much a tensor on the way must be beyond its bound to be where this comes from: what is far
        off does not come from what rounding has moved a little."""
        return next((each for each in (WRONG_FACTOR, 4.0) if self.beyond(2 * each)), 1.0)


def judge(
    captures: Sequence[Captured | None],
    expected: Expected,
    mesh: Sequence[int],
    sums: bool = False,
    among: float = 0.0,
) -> Verdict:
    """`captures`: of each rank; `sums`: partial sums are all right; `among`: see `drift.error_stat`."""
    held = together(captures)
    limit = bound(expected, captures, among)
    if held.fault:
        return Verdict(math.inf, limit, fault=held.fault)
    if held.unread:
        return Verdict(unread=held.unread)
    best = nearest(held, expected.reference, mesh, sums)
    if best is None:
        shape = tuple(held.values[0].shape)
        if _placed(captures):
            why = f"it has shape {shape}, {tuple(expected.reference.shape)} in the unsharded model"
            return Verdict(math.inf, limit, fault=why)
        return Verdict(
            unread=f"plain parts of shape {shape} do not make up one of {tuple(expected.reference.shape)}"
        )
    error, reading = best
    if held.gap > limit and held.gap > error:
        error = held.gap
    return Verdict(error, limit, how=reading.how)


def _placed(captures: Sequence[Captured | None]) -> bool:
    return any(each is not None and each.placements is not None for each in captures)


def nearest(
    held: Together, reference: torch.Tensor, mesh: Sequence[int], sums: bool = False
) -> tuple[float, Reading] | None:
    """The reading with the smallest error, and that error. A partial sum is read only where nothing plainer
    fits better."""
    found = [
        (max(distance(whole, reference) for whole in reading.wholes), reading)
        for reading in readings(held.values, reference.shape, mesh, sums)
    ]
    if not found:
        return None
    return min(found, key=lambda each: (each[0], sum(choice == SUM for choice in each[1].how)))


def distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest absolute difference; infinite where one is not finite and the other not the same."""
    if not value.numel():
        return 0.0
    apart = torch.where(value == reference, 0.0, (value - reference).abs())
    return float(torch.nan_to_num(apart, nan=math.inf, posinf=math.inf).max())


def bound(expected: Expected, captures: Sequence[Captured | None], among: float = 0.0) -> float:
    """In the coarsest dtype that takes part, as a plan may compute in one of its own."""
    dtypes = [expected.unsharded.dtype, *(c.local.dtype for c in captures if c is not None)]
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    if not floating:
        return 0.0  # whole numbers
    dtype = max(floating, key=lambda each: torch.finfo(each).eps)
    own = distance(expected.unsharded.to(torch.float64), expected.reference)
    scale = largest_value(expected.reference)
    rounded = among if scale < torch.finfo(dtype).eps * among else scale
    return 2 * own + atol(dtype, max(rounded, torch.finfo(dtype).tiny), max(1, len(captures)))


def explains(
    captures: Sequence[Captured | None],
    hypothesis: torch.Tensor,
    verdict: Verdict,
    mesh: Sequence[int],
    sums: bool = False,
) -> bool:
    """Whether what the ranks hold is what a likely cause would give: nearly nothing of the difference is
    left."""
    held = together(captures)
    if held.fault or held.unread or not verdict.unequal:
        return False
    best = nearest(held, hypothesis.cpu().to(torch.float64), mesh, sums)
    return best is not None and best[0] <= tolerance(verdict)


def tolerance(verdict: Verdict) -> float:
    if not math.isfinite(verdict.error):
        return 4 * verdict.bound
    return min(max(2 * verdict.bound, LEFT * verdict.error), LEFT_OF_ROUNDING * verdict.error)
