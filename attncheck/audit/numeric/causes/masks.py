"""A mask that is dropped, or another one than the unsharded model's."""

from __future__ import annotations

from typing import Any

import torch

from attncheck.audit.numeric.scene import Difference, Scene
from attncheck.audit.numeric.verdict import explains
from attncheck.audit.numeric.watching import ATTENTION, MASKED, SOFTMAX, Watch
from attncheck.runner.compat import tree_leaves

# Between shares of masked scores that are the same.
_SAME = 0.01


class Unmasked(Watch):
    """A replay in which nothing is masked: what would have put the mask in gives what it was put into."""

    def on_sdpa(self, given: dict[str, Any]) -> dict[str, Any]:
        return super().on_sdpa({**given, "attn_mask": None})

    def on_result(self, func: Any, out: Any, args: Any, kwargs: Any) -> Any:
        if not isinstance(out, torch.Tensor) or not out.is_floating_point() or not _hides(out):
            return out
        for leaf in tree_leaves((args, kwargs)):
            if (
                isinstance(leaf, torch.Tensor)
                and leaf.shape == out.shape
                and leaf.dtype == out.dtype
                and not _hides(leaf)
            ):
                return leaf
        return out


class NotCausal(Unmasked):
    def on_sdpa(self, given: dict[str, Any]) -> dict[str, Any]:
        return super().on_sdpa({**given, "is_causal": False})


def _hides(tensor: torch.Tensor) -> bool:
    return bool((tensor <= MASKED).any())


def cause(scene: Scene, difference: Difference) -> str:
    if difference.gradient:
        return ""
    want, own, line = _shares(scene, difference)
    captures = scene.captures(difference.key)
    if want is not None and want > 0 and own is not None and max(own) == 0:
        at = f" at {line}" if line else ""
        said = f"a mask is dropped: the unsharded model masks {want:.0%} of the scores{at}, no rank any"
        replayed = _replayed(scene, difference, Unmasked)
        if replayed is not None and explains(
            captures, replayed, difference.verdict, scene.mesh, True
        ):
            return f"{said}; without its mask it gives the same"
        return said
    for watch, what in ((Unmasked, "without its mask"), (NotCausal, "without is_causal and mask")):
        if not _masks(scene, difference):
            break
        replayed = _replayed(scene, difference, watch)
        if replayed is not None and explains(
            captures, replayed, difference.verdict, scene.mesh, True
        ):
            return f"a mask is dropped: {what} the unsharded model gives the same"
    return ""


def other(scene: Scene, difference: Difference) -> str:
    """Another mask than the unsharded model's."""
    want, own, _ = _shares(scene, difference)
    if want is None or own is None or abs(sum(own) / len(own) - want) <= _SAME:
        return ""
    shares = ", ".join(f"{share:.0%}" for share in own)
    return f"another mask: the unsharded model masks {want:.0%} of the scores, the ranks {shares}"


def _masks(scene: Scene, difference: Difference) -> bool:
    """Whether the unsharded model masks anything here."""
    return any(
        each.masked or each.flags.get("is_causal")
        for kind in (SOFTMAX, ATTENTION)
        for each in scene.unsharded_sightings(difference, kind)
    )


def _shares(scene: Scene, difference: Difference) -> tuple[float | None, list[float] | None, str]:
    """The share of scores that are masked, unsharded and on each rank, and the unsharded line; None where
    they cannot be held against each other, call by call."""
    for kind in (SOFTMAX, ATTENTION):
        want = scene.unsharded_sightings(difference, kind)
        by_rank = scene.sightings(difference, kind)
        if want and all(len(own) == len(want) for own in by_rank):
            mean = sum(each.masked for each in want) / len(want)
            own = [sum(each.masked for each in own) / len(own) for own in by_rank]
            return mean, own, want[0].line
    return None, None, ""


def _replayed(scene: Scene, difference: Difference, watch: type[Watch]) -> torch.Tensor | None:
    record, _ = scene.unsharded.replay(scene.at, watch=watch)
    found = (each.captured for each in record.events if each.key == difference.key)
    captured = next(found, None)
    return None if captured is None else captured.local
