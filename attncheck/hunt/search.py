"""The search: draw, run, and where something new fails let hypothesis shrink it; then go on.

A find is shrunk as what it is: while hypothesis looks for something smaller, only examples that fail in
the same way count, and not those that an earlier find explains. Each example is run once, so that
hypothesis never sees one answer differently, and a run is repeatable by its seed as far as the operators
are.
"""

from __future__ import annotations

import json
import random
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity
from hypothesis.errors import HypothesisWarning, NoSuchExample, Unsatisfiable

from attncheck.hunt import finds, strategy
from attncheck.hunt.finds import Find, Kind, Tally
from attncheck.hunt.strategy import Space
from attncheck.model import Outcome, Status, to_json
from attncheck.probing import Operator
from attncheck.runner.rundir import Asked

# Examples that a round may draw without a find, before the next begins with numbers of its own: few, for
# between rounds it is seen what share of the time is over.
ROUND = 60
# What shrinking one find may cost: examples, and among them those that end the workers.
SHRINK_RUNS = 300
SHRINK_DEAR_RUNS = 25
# Refusals are told by their kernel op; the smallest case says little more.
SHRINK_REFUSAL_RUNS = 25
# A find that ended the process as often again is believed: what is like it is not run any more.
BELIEVED = 4
# Until this share of the time is over, only placements that models use: q, k and v by one pattern.
USUAL_SHARE = 0.3


class Over(BaseException):
    """The time is up. Not an Exception: hypothesis lets it through."""


@dataclass
class Search:
    """State of a hunt.

    `execute` runs an example and may raise Over. `began` and `deadline` are of `time.monotonic`; the
    deadline may be moved while the search runs. `limit`: how many examples to run at most, None for as
    many as time allows. `simulated`: ranks are, and cannot wait for each other. `known`: what is not
    told again.
    """

    space: Space
    execute: Callable[[Asked], Outcome]
    seed: int
    began: float
    deadline: float
    limit: int | None = None
    simulated: bool = False
    known: frozenset[Kind] = frozenset()
    tally: Tally = field(default_factory=Tally)
    finds: list[Find] = field(default_factory=list)
    told: Callable[[str], None] = lambda line: None
    done: bool = False  # all that can be drawn was run
    _usual_done: bool = False
    _died: dict[int, int] = field(default_factory=dict)  # how often again, by position in `finds`
    _outcomes: dict[str, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._operators: dict[str, Operator] = {o.name: o for _, o in self.space.operators}

    def run(self) -> Iterator[Find]:
        """Each new find, shrunk, as soon as it is; ends when the time or the examples do."""
        number = 0
        while not self._over():
            find = self._round(number)
            number += 1
            if find is not None:
                self.finds.append(find)
                yield find

    def _over(self) -> bool:
        if self.done:
            return True
        spent = self.limit is not None and self.tally.run >= self.limit
        return spent or time.monotonic() >= self.deadline

    def _share(self) -> float:
        """Of the examples, or of the time, that is spent."""
        if self.limit is not None:
            return self.tally.run / max(self.limit, 1)
        return (time.monotonic() - self.began) / max(self.deadline - self.began, 1e-9)

    def _round(self, number: int) -> Find | None:
        free = self.space.free and (self._usual_done or self._share() >= USUAL_SHARE)
        pursuit = Pursuit(self)
        before = self.tally.run
        settings = hypothesis.settings(
            max_examples=ROUND,
            database=None,
            deadline=None,
            derandomize=False,
            verbosity=Verbosity.quiet,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        complete = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", HypothesisWarning)
                smallest = hypothesis.find(
                    strategy.asked(replace(self.space, free=free)),
                    pursuit,
                    settings=settings,
                    random=random.Random(f"{self.seed}/{number}"),
                )
            pursuit.best = smallest, self.outcome(smallest)
        except (NoSuchExample, Unsatisfiable):
            pass
        except Over:
            complete = False
        if pursuit.best is None:
            if (
                complete and self.tally.run == before
            ):  # nothing could be drawn that was not run before
                self.done = free == self.space.free
                self._usual_done = True
            return None
        asked, outcome = pursuit.best
        assert pursuit.target is not None
        return Find(
            asked,
            outcome,
            pursuit.target,
            finds.essential(self.causes(asked)),
            runs=pursuit.runs,
            complete=complete and not pursuit.spent,
        )

    def causes(self, asked: Asked) -> frozenset[str]:
        return finds.causes_of(asked, self._operators[asked.case.operator])

    def outcome(self, asked: Asked) -> Outcome:
        """What came of the example, run at most once."""
        key = json.dumps(to_json(asked), sort_keys=True)
        if key not in self._outcomes:
            if self._over():
                raise Over
            if self._spared(asked):
                self.tally.spared += 1
                self._outcomes[key] = Outcome(Status.UNAVAILABLE)
                return self._outcomes[key]
            outcome = self.execute(asked)
            self.tally.run += 1
            self.told(f"{self.tally.run} examples, {len(self.finds)} finds")
            slow = self.simulated or self._operators[asked.case.operator].slow
            if finds.is_discarded(asked, outcome, self.tally, slow):
                outcome = Outcome(Status.UNAVAILABLE)
            self._outcomes[key] = outcome
            if outcome.status in finds.DEAR:
                for at in self._like(asked):
                    self._died[at] = self._died.get(at, 0) + 1
        return self._outcomes[key]

    def _like(self, asked: Asked) -> list[int]:
        """The finds that ended the process, of the same operator, whose causes this example has too."""
        causes = self.causes(asked)
        return [
            at
            for at, find in enumerate(self.finds)
            if find.outcome.status in finds.DEAR
            and find.asked.case.operator == asked.case.operator
            and find.causes
            and find.causes <= causes
        ]

    def _spared(self, asked: Asked) -> bool:
        return any(self._died.get(at, 0) >= BELIEVED for at in self._like(asked))

    def was_run(self, asked: Asked) -> bool:
        return json.dumps(to_json(asked), sort_keys=True) in self._outcomes

    def news(self, asked: Asked, outcome: Outcome) -> list[Kind]:
        """The kinds of failure of this example that no find explains yet."""
        causes = self.causes(asked)
        return [
            kind
            for kind in finds.kinds_of(asked, outcome)
            if kind not in self.known and not finds.is_known(kind, causes, self.finds)
        ]


@dataclass
class Pursuit:
    """The condition that hypothesis searches and shrinks with: anything new at first, then that alone."""

    search: Search
    target: Kind | None = None
    best: tuple[Asked, Outcome] | None = None
    runs: int = 0
    dear: int = 0
    spent: bool = False

    def __call__(self, asked: Asked) -> bool:
        if self.target is not None and not self.search.was_run(asked):
            refused = self.target.what in finds.REFUSALS
            most = SHRINK_REFUSAL_RUNS if refused else SHRINK_RUNS
            if self.runs >= most or self.dear >= SHRINK_DEAR_RUNS:
                self.spent = True
                return False
            self.runs += 1
        outcome = self.search.outcome(asked)
        news = self.search.news(asked, outcome)
        if self.target is None:
            if not news:
                return False
            self.target = news[0]
        self.dear += outcome.status in finds.DEAR
        if self.target not in news:
            return False
        # Until it is known which is the smallest, the last that fails is the best guess.
        self.best = asked, outcome
        return True
