"""Watching a real run: the facts of an audit, from the job itself.

`with attncheck.observe():` in the user's code, or `torchrun ... -m attncheck audit --script train.py`. Of
the first steps the first and the last are recorded; between them and later nothing of ours is in the way.
Nothing is mended or gone past: what PyTorch raises, the job raises. The report is written when the block is
left, whichever way.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from attncheck import environment, rules
from attncheck.audit import auditing, calls
from attncheck.audit.lines import line_of
from attncheck.audit.recorder import Recorder
from attncheck.audit.seen import told
from attncheck.audited import OBSERVED, Audit
from attncheck.model import Report
from attncheck.runner import compat

# A dispatch mode in Python costs a third of a step of small ops; two of ten steps leave that under a tenth.
STEPS = 10
# Stands for a module's path in what an optimizer does to the weights.
OPTIMIZER = "(optimizer)"
Write = Callable[[Report], None]


class Observation:
    """A context manager; see `attncheck.observe`. `report()` is what it saw so far."""

    def __init__(
        self, steps: int, write: Write | None, target: str = "", command: str = ""
    ) -> None:
        self.recorder = Recorder()
        self.steps = steps
        self.done = 0
        self.recorded = 0
        self.failure = ""
        self._write = write
        self._target = target or (sys.argv[0] if sys.argv and sys.argv[0] else "the run")
        self._command = command
        self._around = contextlib.ExitStack()
        self._step = contextlib.ExitStack()
        self._began = time.perf_counter()

    def __enter__(self) -> Observation:
        from torch.optim.optimizer import (
            register_optimizer_step_post_hook,
            register_optimizer_step_pre_hook,
        )

        for hook in (
            register_optimizer_step_pre_hook(self._updating),
            register_optimizer_step_post_hook(self._updated),
        ):
            self._around.callback(hook.remove)
        self._around.callback(self._terminable())
        self._record()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not _is_clean(error):
            at = line_of(error)
            text = str(error).strip().split("\n", 1)[0]
            self.failure = f"{type(error).__name__}{f' at {at}' if at else ''}: {text}"
        self._step.close()
        self._around.close()
        if self._write is not None and (_rank() == 0 or self.failure):
            self._write(self.report())

    def step(self) -> None:
        """A step has ended. An optimizer's `step()` says so itself, and so does a model that is called
        without gradients."""
        self.done += 1
        self.recorder.where.forget()
        if self.recorder.on:
            self.recorded += 1
            self._pause()
        if self.done == self.steps - 1:
            self._record()

    def _updating(self, *_: object) -> None:
        self.recorder.where.outside = OPTIMIZER

    def _updated(self, *_: object) -> None:
        self.recorder.where.outside = ""
        self.step()

    def _record(self) -> None:
        self.recorder.on = True
        self.recorder.where.on_return = self._returned
        self._step.enter_context(self.recorder.recording())

    def _pause(self) -> None:
        """Leaves the modes, and with them all that the recorder costs."""
        self.recorder.on = False
        if compat.is_innermost(self.recorder.modes):
            self._step.close()  # else a mode of the user's stands over ours: both stay until the end

    def _returned(self) -> None:
        if not torch.is_grad_enabled():
            self.step()

    def report(self) -> Report:
        """Facts of one step, as a report without cases of attention calls: nothing is run beside a job."""
        steps = max(1, self.recorded)
        named = [item for model in self.recorder.where.models for item in model.named_parameters()]
        parameters, parameter_bytes = self.recorder.weigh(named)
        mesh = _mesh([parameter for _, parameter in named])
        facts = told(self.recorder.facts, self.recorder.where.paths.values(), steps)
        audit = Audit(
            target=self._target,
            mesh=mesh,
            kind=OBSERVED,
            parameters=parameters,
            parameter_bytes=parameter_bytes,
            layers=facts.layers,
            steps=steps,
            ops=facts.ops,
            communication=facts.communication,
            uneven=facts.uneven,
            attention=tuple(each.call for each in calls.plan(facts.attention, mesh)),
            failure=self.failure,
            seconds=round(time.perf_counter() - self._began, 2),
        )
        results = auditing.model_case(audit)
        described = {
            **environment.describe(),
            "command": self._command,
            "mesh": mesh,
            "rank": _rank(),
        }
        return Report(described, results, rules.judge(results, select=(), ignore=()), audit=audit)

    def _terminable(self) -> Callable[[], None]:
        """torchrun ends the other ranks by SIGTERM where one has failed: they have something to tell, too."""
        before = signal.getsignal(signal.SIGTERM)
        try:
            signal.signal(signal.SIGTERM, self._terminate)
        except ValueError:  # not the main thread
            return lambda: None
        return lambda: (signal.signal(signal.SIGTERM, before), None)[1]

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)


def _is_clean(error: BaseException) -> bool:
    return isinstance(error, SystemExit) and error.code in (0, None)


def _rank() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def _mesh(parameters: Sequence[torch.Tensor]) -> dict[str, int]:
    """The largest mesh that a parameter is placed on."""
    meshes = [p.device_mesh for p in parameters if isinstance(p, DTensor)]
    if not meshes:
        return {"world": dist.get_world_size()} if dist.is_initialized() else {"world": 1}
    mesh = max(meshes, key=lambda each: (each.size(), each.ndim))
    names = mesh.mesh_dim_names or tuple(f"axis{at}" for at in range(mesh.ndim))
    return dict(zip(names, tuple(mesh.shape), strict=True))
