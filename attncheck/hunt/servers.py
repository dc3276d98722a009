"""Workers that stay up and run what they are asked: one process that simulates the ranks of every mesh,
or one group of processes for each.

Starting one takes seconds and an example milliseconds, so groups are kept. They survive an example that
crashes or hangs as a scan does: torchrun starts the ranks again, and the journal says what became of it.
"""

from __future__ import annotations

import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from attncheck.errors import UserError
from attncheck.hunt import finds
from attncheck.model import Outcome, Reason, from_json
from attncheck.runner import growing, launch
from attncheck.runner.rundir import Asked, Queue, RunConfig, RunDir

# All groups together; an idle rank costs memory alone (some 200 MiB of it, half of them shared).
MAX_PROCESSES = 16
# More ranks than this are only simulated.
MAX_RANKS = 4
# Between two looks at whether the workers still live.
LOOK_SECONDS = 0.5


# How an operator failed: its name, the status, the kernel op.
Way = tuple[str, str, str]


def _way(asked: Asked, outcome: Outcome) -> Way:
    return asked.case.operator, outcome.status.value, outcome.kernel_op


class Group:
    """The workers of one mesh, started at once; `checkpoint` is called while waiting, and may raise."""

    def __init__(self, folder: Path, config: RunConfig, checkpoint: Callable[[], None]) -> None:
        self.run_dir = RunDir(folder)
        self.run_dir.write(config, ())
        self.queue = Queue(self.run_dir.queue)
        self.config = config
        self.checkpoint = checkpoint
        self.asked = 0
        self._journal = growing.Growing(self.run_dir.journal)
        self._ended: dict[int, Outcome] = {}
        self.process = launch.start(self.run_dir, config)

    def run(self, asked: Asked) -> Outcome:
        """Raises UserError where the workers cannot run, and whatever `checkpoint` raises."""
        index = self.asked
        self.asked += 1
        self.queue.ask(asked)
        attempts, looked, polls = launch.attempts(self.run_dir), time.monotonic(), 0
        while index not in self._ended:
            growing.pause(polls)
            polls += 1
            self._read()
            if time.monotonic() - looked < LOOK_SECONDS:
                continue
            looked = time.monotonic()
            self.checkpoint()
            fruitless = launch.attempts(self.run_dir) - attempts > launch.FRUITLESS_ATTEMPTS
            if self.process.poll() is not None or fruitless:
                raise UserError(f"The workers could not run: {launch.last_words(self.run_dir)}")
        return self._ended.pop(index)

    def _read(self) -> None:
        for line in self._journal.added():
            event = json.loads(line)
            if event["event"] == "end":
                self._ended[event["index"]] = from_json(Outcome, event["outcome"], "journal")

    def stop(self) -> None:
        launch.end(self.process)


class Groups:
    """A group for each mesh that was asked for, the one longest unused ended where there are too many."""

    def __init__(self, folder: Path, config: RunConfig, checkpoint: Callable[[], None]) -> None:
        self.folder = folder
        self.config = config
        self.checkpoint = checkpoint
        self.started = 0
        # How each simulated failure failed that real processes did not show, and its first example.
        self.disagreements: dict[Way, tuple[Asked, Outcome, Outcome]] = {}
        self._shown: set[Way] = set()
        self._groups: OrderedDict[str, Group] = OrderedDict()

    def run(self, asked: Asked) -> Outcome:
        """What comes of the example; real processes run what PyTorch's simulation of ranks cannot."""
        mesh = asked.case.mesh
        # Of one rank there is nothing to simulate, and PyTorch 2.13 fails when it tries.
        if self.config.engine == "simulated" and math.prod(mesh.values()) > 1:
            simulated = self._group("simulated", mesh).run(asked)
            if math.prod(mesh.values()) > MAX_RANKS or self._believed(asked, simulated):
                return simulated
            real = self._group("processes", mesh).run(asked)
            self._learn(asked, simulated, real)
            return real
        return self._group("processes", mesh).run(asked)

    def _believed(self, asked: Asked, simulated: Outcome) -> bool:
        """Whether real processes need not be asked: a failure that they showed, too, or none at all."""
        if simulated.reason is Reason.NOT_SIMULATED:
            return False
        return simulated.status not in finds.FAILING or _way(asked, simulated) in self._shown

    def _learn(self, asked: Asked, simulated: Outcome, real: Outcome) -> None:
        if simulated.reason is Reason.NOT_SIMULATED:
            return
        if _way(asked, real) == _way(asked, simulated):
            self._shown.add(_way(asked, simulated))
        else:
            self.disagreements.setdefault(_way(asked, simulated), (asked, simulated, real))

    def _group(self, engine: str, mesh: Mapping[str, int]) -> Group:
        # One process simulates every mesh.
        key = engine if engine == "simulated" else json.dumps(dict(mesh))
        if key not in self._groups:
            ranks = 1 if engine == "simulated" else math.prod(mesh.values())
            while self._groups and self._processes() + ranks > MAX_PROCESSES:
                self._groups.popitem(last=False)[1].stop()
            self.started += 1
            name = f"{self.started}-{engine}"
            config = replace(
                self.config,
                mesh=dict(mesh),
                engine=engine,
                hash_seeds=tuple(self.config.hash_seeds[0] + rank for rank in range(ranks)),
                launch=name,
            )
            self._groups[key] = Group(self.folder / name, config, self.checkpoint)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _processes(self) -> int:
        return sum(group.config.workers for group in self._groups.values())

    def stop(self) -> None:
        for group in self._groups.values():
            group.process.terminate()  # all at once: each takes its time
        for group in self._groups.values():
            group.stop()
        self._groups.clear()
