"""One call as all sides saw it: the ranks, and the unsharded model in its own dtype and in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from attncheck.audit.numeric.calls import Call
from attncheck.audit.numeric.captured import OUTPUT, Captured, Key
from attncheck.audit.numeric.readings import WHOLE
from attncheck.audit.numeric.recording import Event
from attncheck.audit.numeric.running import Record
from attncheck.audit.numeric.unsharded import Unsharded
from attncheck.audit.numeric.verdict import Verdict, judge
from attncheck.audit.numeric.watching import Sighting
from attncheck.runner.drift import Expected


@dataclass(frozen=True)
class Difference:
    """The first tensor, in the order of execution, that differs; `before`: the last one before it that does
    not, where there is one. `module`: whose doing that is; `gradient`: it is that tensor's gradient that
    differs, and `users` are the modules that take the tensor."""

    key: Key
    verdict: Verdict
    module: str
    before: Key | None = None
    gradient: bool = False
    users: tuple[str, ...] = ()

    @property
    def what(self) -> str:
        """The tensor, in words."""
        if self.users:
            return f"what {' and '.join(self.users[:3])} take{'' if self.users[1:] else 's'}"
        return f"what {self.key.path or 'the model'} gives"


@dataclass(frozen=True)
class Scene:
    """`at`: the call's place in the sequence."""

    at: int
    call: Call
    axes: Mapping[str, int]
    records: Sequence[Record]
    unsharded: Unsharded

    @property
    def mesh(self) -> tuple[int, ...]:
        return tuple(self.axes.values())

    @cached_property
    def shares(self) -> int:
        """Into how many parts the ranks cut what the model is called with."""
        shares = 1
        for number, plain in enumerate(self.unsharded.own[self.at].given):
            captures = [record.given[number] for record in self.records]
            if any(each.placements is not None for each in captures):
                continue
            expected = Expected(plain.local.to(torch.float64), plain.local)
            how = judge(captures, expected, self.mesh).how
            parts = [n for choice, n in zip(how, self.mesh, strict=False) if choice != WHOLE]
            shares = max(shares, math.prod(parts))
        return shares

    @cached_property
    def own(self) -> dict[Key, Event]:
        return {event.key: event for event in self.unsharded.own[self.at].events}

    @cached_property
    def wide(self) -> dict[Key, Event]:
        return {event.key: event for event in self.unsharded.wide[self.at].events}

    @cached_property
    def by_rank(self) -> list[dict[Key, tuple[int, Event]]]:
        return [
            {event.key: (at, event) for at, event in enumerate(record.events)}
            for record in self.records
        ]

    @cached_property
    def keys(self) -> list[Key]:
        """What all sides have, in the unsharded model's order of execution."""
        return [
            key for key in self.own if key in self.wide and all(key in own for own in self.by_rank)
        ]

    def captures(self, key: Key, gradient: bool = False) -> list[Captured | None]:
        events = [own[key][1] for own in self.by_rank]
        return [event.gradient if gradient else event.captured for event in events]

    def expected(self, key: Key, gradient: bool = False) -> Expected | None:
        own, wide = self.own[key], self.wide[key]
        if gradient:
            return expect(wide.gradient, own.gradient)
        return expect(wide.captured, own.captured)

    def judge(self, key: Key, gradient: bool = False, among: float = 0.0) -> Verdict | None:
        """None where there is nothing to compare with. Within a model partial sums are no mistake."""
        expected = self.expected(key, gradient)
        captures = self.captures(key, gradient)
        if expected is None or all(each is None for each in captures):
            return None
        sums = gradient or key[:3] != ("", 0, OUTPUT)
        verdict = judge(captures, expected, self.mesh, sums, among)
        return None if verdict.unread else verdict

    def sightings(self, difference: Difference, kind: str) -> list[list[Sighting]]:
        """By rank: what was seen between the last tensor that is right and the first that is not."""
        found = []
        for record, own in zip(self.records, self.by_rank, strict=True):
            first = own[difference.before][0] + 1 if difference.before else 0
            found.append(_between(record.sightings, kind, first, own[difference.key][0]))
        return found

    def unsharded_sightings(self, difference: Difference, kind: str) -> list[Sighting]:
        places = {key: at for at, key in enumerate(self.own)}
        first = places[difference.before] + 1 if difference.before else 0
        record = self.unsharded.own[self.at]
        return _between(record.sightings, kind, first, places[difference.key])

    def caller(self, path: str) -> str:
        """The nearest module around this one that is called itself."""
        called = {key.path for key in self.own}
        while path:
            path = path.rpartition(".")[0]
            if path in called:
                return path
        return ""


def _between(sightings: Sequence[Sighting], kind: str, first: int, last: int) -> list[Sighting]:
    return [each for each in sightings if each.kind == kind and first <= each.at <= last]


def expect(wide: Captured | None, own: Captured | None) -> Expected | None:
    if wide is None or own is None or wide.shape != own.shape:
        return None
    return Expected(wide.local.to(torch.float64), own.local)
