"""A worker that waits for cases: what `attncheck hunt` launches, once for each mesh.

Hunted cases are not known beforehand, nor are their settings among their operator's. Rank 0 reads them
from a file that grows (see `rundir.Queue`) and hands each on through the store; all else, the journal,
the watchdog, and going on after a crash, is the worker's own.
"""

from __future__ import annotations

import datetime
import faulthandler
import gc
import json
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from attncheck.model import from_json
from attncheck.runner import growing
from attncheck.runner.rundir import Asked
from attncheck.runner.simulate import Simulated
from attncheck.runner.worker import Worker

# Watchdog and torchrun end a server that nobody needs any more; the store only has to wait that long.
IDLE = datetime.timedelta(days=7)


class Server(Worker):
    """Runs each case that is asked for, until it is told that there will be no more."""

    def loop(self) -> None:
        faulthandler.cancel_dump_traceback_later()  # it is up; the first case may be long in coming
        gc.disable()
        index = len(self.done)  # asked one by one: what has ended is what came first
        while (asked := self._next(index)) is not None:
            if index % 32 == 0:
                gc.collect()
            self._take(asked)
            self._run(index, asked.case)
            index += 1
        self._leave()

    def _take(self, asked: Asked) -> None:
        """Makes the setting the only one of its operator. Nothing made of another one is used again.

        Simulated ranks are as many as the case's mesh has: one process serves every mesh.
        """
        if asked.case.mesh != self.config.mesh and isinstance(self.engine, Simulated):
            self.config = replace(self.config, mesh=asked.case.mesh)
            dist.destroy_process_group()
            self.engine = Simulated(self.config, self.state)
        operator = self.operators[asked.case.operator]
        if operator.settings != (asked.setting,):
            self.operators[operator.name] = replace(operator, settings=(asked.setting,))
            self.forget_prepared()

    def _next(self, index: int) -> Asked | None:
        """The case with this index, waited for; None when there will be none."""
        key = f"asked/{index}"
        if self.journal is None:
            self.store.wait([key], IDLE)
            line = bytes(self.store.get(key)).decode()
        else:
            line = self._read(index)
            self.store.set(key, line)
        document: Any = json.loads(line)
        return None if document is None else from_json(Asked, document, "queue")

    def _read(self, index: int) -> str:
        polls = 0
        while (line := self.queue.line(index)) is None:
            growing.pause(polls)
            polls += 1
        return line
