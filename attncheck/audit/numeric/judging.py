"""Comparing what the ranks left with the unsharded model, call by call."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from attncheck.audit.comparing import Answer
from attncheck.audit.numeric import causes, weights
from attncheck.audit.numeric.causes import reduction
from attncheck.audit.numeric.folder import Folder
from attncheck.audit.numeric.places import first_backward, first_forward
from attncheck.audit.numeric.running import Record
from attncheck.audit.numeric.scene import Scene
from attncheck.audit.numeric.subjects import OUTPUT, Subject, averaged, gradients, outputs
from attncheck.audit.numeric.unsharded import Unsharded, whole_values
from attncheck.audit.numeric.verdict import judge as judged
from attncheck.audited import Numeric, Uncompared, Unequal
from attncheck.runner.drift import Expected


def judge(unsharded: Unsharded, folder: Folder, failure: str) -> Answer:
    """`failure`: why the ranks came to no end; what they left before is compared all the same."""
    asked = unsharded.users.asked
    scenes = [
        Scene(at, call, asked.mesh, records, unsharded)
        for at, call in unsharded.calls.items()
        if (records := _records(folder, asked.ranks, at)) is not None
    ]
    told = _Told(dict(unsharded.uncompared))
    notes = list(unsharded.notes)
    if scenes:
        if error := _other_inputs(scenes[0]):
            return Answer(error=error)
        failure = failure or _other_weights(scenes[0], told)
    if scenes and not failure.startswith(_WEIGHTS):
        for scene in scenes:
            told.tell(scene)
    everything = [*unsharded.own.values(), *(r for scene in scenes for r in scene.records)]
    if unsharded.dropout or any(record.dropout for record in everything):
        notes.insert(0, "Dropout is off in both models: no two draw alike.")
    if told.means:
        notes.append(
            "Each rank is called with a part of the inputs: gradients are compared as means over these "
            "parts, as data parallelism has them."
        )
    if any(record.full for record in everything):
        notes.append("The model is too large to record all of its modules; give a smaller build.")
    numeric = Numeric(
        asked.ranks,
        unsharded.how,
        compared=told.compared,
        unequal=tuple(told.unequal),
        uncompared=tuple(Uncompared(name, why) for name, why in told.uncompared.items()),
        failure=failure,
        notes=tuple(notes),
    )
    return Answer(numeric)


def _records(folder: Folder, ranks: int, at: int) -> list[Record] | None:
    """Of all ranks; None where one did not come to the end of this call."""
    files = [folder.record(rank, at) for rank in range(ranks)]
    if not all(file.exists() for file in files):
        return None
    # Written by attncheck's own processes a moment ago: not files from elsewhere.
    return [torch.load(file, weights_only=False) for file in files]


# --- whether there is anything to compare --------------------------------------------------------

_WEIGHTS = "the weights are not the same: "


def _other_inputs(scene: Scene) -> str:
    """Both models must be called with the same values."""
    name = scene.unsharded.users.asked.inputs
    want = scene.unsharded.own[scene.at].given
    if any(len(record.given) != len(want) for record in scene.records):
        return f"{name} gives another number of tensors for the parallel model than for the unsharded one."
    for number, plain in enumerate(want):
        expected = Expected(plain.local.to(torch.float64), plain.local)
        verdict = judged([record.given[number] for record in scene.records], expected, scene.mesh)
        if verdict.unread or verdict.unequal:
            return (
                f"{name}: tensor {number} for the parallel model is neither the unsharded one on each rank "
                "nor cut along a dim: it must give the same values for every mesh (attncheck seeds torch "
                "before it is called)."
            )
    return ""


def _other_weights(scene: Scene, told: _Told) -> str:
    """What the ranks hold of weights that could not be given to them, if it is not the unsharded model's."""
    first = scene.records[0]
    whole = weights.named(scene.unsharded.models[0])
    for name, why in first.refused.items():
        captures = [record.parts.get(name) for record in scene.records]
        if any(each is None for each in captures):
            told.uncompared[name] = why
            continue
        held = whole_values(whole[name])
        verdict = judged(captures, Expected(held.to(torch.float64), held), scene.mesh)
        if verdict.unread or verdict.unequal:
            return f"{_WEIGHTS}{name} is a plain tensor, {why}, and no part of the one there"
    if first.refused.keys() >= whole.keys():
        return f"{_WEIGHTS}the parallel model has none of the unsharded model's names"
    return ""


# --- what differs --------------------------------------------------------------------------------


@dataclass
class _Told:
    """What is said of all calls. What differs in one is not said again of a later one."""

    uncompared: dict[str, str]
    unequal: list[Unequal] = field(default_factory=list)
    compared: int = 0
    means: bool = False

    def tell(self, scene: Scene) -> None:
        known = {each.subject for each in self.unequal}
        place = _Place(scene)
        means = averaged(scene)
        self.means = self.means or means
        for subject in (*outputs(scene), *gradients(scene, means)):
            verdict = subject.verdict
            if verdict.unread:
                self.uncompared.setdefault(subject.name, verdict.unread)
                continue
            self.compared += 1
            if verdict.unequal and subject.name not in known:
                module, cause = place.of(subject)
                mode = scene.call.mode
                self.unequal.append(
                    Unequal(mode, subject.name, module, verdict.error, verdict.bound, cause)
                )


class _Place:
    """Where the values of one call part, and why; looked for when the first of them is asked for."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self._found: dict[tuple[bool, float], tuple[str, str] | None] = {}

    def of(self, subject: Subject) -> tuple[str, str]:
        """(module, likely cause)"""
        verdict = subject.verdict
        if subject.expected is None:
            found = None if subject.cause else self._first(False, verdict.factor)
            return found or ("" if subject.name == OUTPUT else _owner(subject.name), subject.cause)
        cause = reduction.of(subject.captures, subject.expected, verdict, self.scene.axes)
        if cause:
            return _owner(subject.name), cause
        found = self._first(False, verdict.factor) or self._first(True, verdict.factor)
        return found or (_owner(subject.name), "")

    def _first(self, gradient: bool, factor: float) -> tuple[str, str] | None:
        if (gradient, factor) not in self._found:
            difference = (first_backward if gradient else first_forward)(self.scene, factor)
            self._found[gradient, factor] = (
                None
                if difference is None
                else (difference.module, causes.likely(self.scene, difference))
            )
        return self._found[gradient, factor]


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
