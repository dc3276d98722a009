"""A module whose forward is right, and the gradient of what it gives too, but not what its backward makes of
it."""

from __future__ import annotations

from attncheck.audit.numeric.scene import Difference, Scene


def cause(scene: Scene, difference: Difference) -> str:
    if len(difference.users) != 1:
        return ""
    names = scene.records[0].functions.get(difference.users[0], ())
    own = f" of its autograd function {', '.join(names)}" if names else ""
    module = difference.users[0] or "the model"
    return (
        f"the forward of {module} is right, and so is the gradient of what it gives: the backward{own} is "
        "not that of the forward"
    )
