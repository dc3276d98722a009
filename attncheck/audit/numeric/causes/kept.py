"""A call that does what an earlier one did, with the flags of that one."""

from __future__ import annotations

from attncheck.audit.numeric import calls
from attncheck.audit.numeric.scene import Difference, Scene
from attncheck.audit.numeric.verdict import explains


def cause(scene: Scene, difference: Difference) -> str:
    captures = scene.captures(difference.key)
    for at, call in scene.unsharded.calls.items():
        if at >= scene.at:
            continue
        events = scene.unsharded.own[at].events
        own = next((each.captured for each in events if each.key == difference.key), None)
        if own is not None and explains(captures, own.local, difference.verdict, scene.mesh, True):
            return (
                f"{_flags(scene)} it gives what is right {_flags(scene, call)}: something of "
                "an earlier call is kept that should depend on them"
            )
    return ""


def weaker(scene: Scene, difference: Difference) -> str:
    """Beside `cause`, where no other is known: it was right in the first call."""
    if scene.call.mode != "second call":
        return ""
    return "right in the first call and wrong in this one: something of an earlier call is kept"


def _flags(scene: Scene, call: calls.Call | None = None) -> str:
    call = call or scene.call
    given = calls.keywords(scene.unsharded.given.kwargs, call)
    said = ["in training" if call.training else "in evaluation"]
    said += [f"with {name}={given[name]}" for name in calls.flags(given)]
    return " ".join(said)
