"""Ranks that contradict each other about one tensor: its global shape, its placements, its shards."""

from __future__ import annotations

from attncheck.audit.numeric.readings import together
from attncheck.audit.numeric.scene import Difference, Scene
from attncheck.audit.numeric.watching import FROM_LOCAL


def cause(scene: Scene, difference: Difference) -> str:
    if not difference.gradient:
        for same in zip(*scene.sightings(difference, FROM_LOCAL), strict=False):
            fault = together([each.captured for each in same]).fault
            if fault:
                return _said(
                    fault, f" of the DTensor made at {same[0].line}" if same[0].line else ""
                )
    return _said(difference.verdict.fault, "")


def _said(fault: str, of: str) -> str:
    if "global shape" not in fault:
        return fault
    told = fault.replace("its global shape", f"the global shape{of}")
    return f"{told}; from_local takes shards for even ones unless it is given shape and stride"
