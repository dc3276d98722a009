"""Where the values part: the first tensor that differs, in the order of execution, forward or backward."""

from __future__ import annotations

from collections.abc import Sequence

from attncheck.audit.numeric.captured import GIVEN, OUTPUT, Key
from attncheck.audit.numeric.scene import Difference, Scene
from attncheck.runner.drift import largest_value


def first_forward(scene: Scene, factor: float) -> Difference | None:
    """The first tensor that is beyond its bound by this factor. What a module is given is its caller's
    doing."""
    before = None
    for key in scene.keys:
        verdict = scene.judge(key)
        if verdict is None:
            continue
        if verdict.beyond(factor):
            module = scene.caller(key.path) if key.kind == GIVEN else key.path
            return Difference(key, verdict, module, before)
        before = key
    return None


def first_backward(scene: Scene, factor: float) -> Difference | None:
    """The first gradient of what a module gives or takes. Each tensor is looked at where it was met first, as
    its gradient is complete only once all who use it have been through."""
    gradients = [scene.expected(key, gradient=True) for key in scene.keys]
    among = max(
        (largest_value(each.reference) for each in gradients if each is not None), default=0.0
    )
    uses: dict[int, list[Key]] = {}
    for key in scene.keys:
        uses.setdefault(id(scene.own[key].captured), []).append(key)
    before = None
    for key in reversed(scene.keys):
        own = uses[id(scene.own[key].captured)]
        verdict = scene.judge(key, gradient=True, among=among) if key == own[0] else None
        if verdict is None:
            continue
        if verdict.beyond(factor):
            users = innermost([each.path for each in own if each.kind != OUTPUT])
            return Difference(key, verdict, _blamed(scene, key, users), before, True, users)
        before = key
    return None


def innermost(paths: Sequence[str]) -> tuple[str, ...]:
    """Without those that contain another."""
    each = dict.fromkeys(paths)
    return tuple(p for p in each if not any(o != p and _inside(o, p) for o in each))


def _blamed(scene: Scene, key: Key, users: Sequence[str]) -> str:
    """Whose backward made a gradient: the one module's that uses the tensor, or of several the caller's."""
    if len(users) == 1:
        return users[0]
    path = scene.caller(users[0] if users else key.path)
    while not all(_inside(each, path) for each in users):
        path = scene.caller(path)
    return path


def _inside(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")
