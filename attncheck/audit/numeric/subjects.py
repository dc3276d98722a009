"""What is compared of one call: every output, and every parameter's gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from attncheck.audit.numeric.captured import Captured
from attncheck.audit.numeric.scene import Scene, expect
from attncheck.audit.numeric.verdict import Verdict, bound, judge
from attncheck.runner.drift import Expected, largest_value

OUTPUT = "output"


@dataclass(frozen=True)
class Subject:
    """An output or a gradient. `captures` and `expected`: of a gradient; `cause`: what is known at once."""

    name: str
    verdict: Verdict
    captures: tuple[Captured | None, ...] = ()
    expected: Expected | None = None
    cause: str = ""


def outputs(scene: Scene) -> Iterator[Subject]:
    own, wide = scene.unsharded.own[scene.at], scene.unsharded.wide[scene.at]
    counts = {len(record.outputs) for record in scene.records}
    if counts != {len(own.outputs)}:
        returned = " or ".join(map(str, sorted(counts)))
        cause = (
            f"the parallel model returns {returned} tensors, the unsharded one {len(own.outputs)}"
        )
        yield Subject(OUTPUT, Verdict(math.inf), cause=cause)
        return
    for number, (mine, reference) in enumerate(zip(own.outputs, wide.outputs, strict=True)):
        expected = expect(reference, mine)
        if expected is not None:
            name = OUTPUT if len(own.outputs) == 1 else f"{OUTPUT} {number}"
            captures = [record.outputs[number] for record in scene.records]
            yield Subject(name, judge(captures, expected, scene.mesh))


def gradients(scene: Scene, means: bool) -> Iterator[Subject]:
    if not scene.call.backward or scene.unsharded.own[scene.at].no_backward:
        return
    skipped = next((r.no_backward for r in scene.records if r.no_backward), "")
    if skipped:
        yield Subject("gradients", Verdict(unread=skipped))
        return
    all_expected = _expected(scene)
    if means:
        all_expected = {name: _part(each, scene.shares) for name, each in all_expected.items()}
    among = max((largest_value(each.reference) for each in all_expected.values()), default=0.0)
    first = scene.records[0]
    for name, expected in all_expected.items():
        if name in first.refused and name not in first.parts:
            continue  # said already
        captures = tuple(record.gradients.get(name) for record in scene.records)
        if all(each is None for each in captures):
            size = largest_value(expected.reference)
            verdict = Verdict(size, bound(expected, captures, among))
            yield Subject(name, verdict, cause="no gradient reaches it")
            continue
        verdict = judge(captures, expected, scene.mesh, among=among)
        yield Subject(name, verdict, captures, expected)


def _expected(scene: Scene) -> dict[str, Expected]:
    """Of each parameter's gradient."""
    own, wide = scene.unsharded.own[scene.at], scene.unsharded.wide[scene.at]
    return {
        name: expected
        for name, mine in own.gradients.items()
        if (expected := expect(wide.gradients.get(name), mine)) is not None
    }


def averaged(scene: Scene) -> bool:
    """Whether gradients are means over ranks that were given different inputs, as data parallelism has them:
    more of them are that than the sum."""
    if scene.shares == 1:
        return False
    means = sums = 0
    for name, want in _expected(scene).items():
        captures = [record.gradients.get(name) for record in scene.records]
        means += judge(captures, _part(want, scene.shares), scene.mesh).close
        sums += judge(captures, want, scene.mesh).close
    return means > sums


def _part(expected: Expected, of: int) -> Expected:
    return Expected(expected.reference / of, expected.unsharded / of)
