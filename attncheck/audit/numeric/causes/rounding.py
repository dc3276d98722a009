"""A difference that rounding may explain, if it grew."""

from __future__ import annotations

import math

from attncheck.audit.numeric.scene import Difference, Scene


def cause(scene: Scene, difference: Difference) -> str:
    verdict = difference.verdict
    if verdict.wrong or not math.isfinite(verdict.error):
        return ""
    times = verdict.error / verdict.bound
    return f"small enough to be rounding that grew: {times:.1f} times what it explains here"
