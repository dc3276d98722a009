"""One rank of the parallel model: builds it, gives it the unsharded model's weights, runs the calls, and
leaves a record of each."""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from attncheck import standins
from attncheck.audit.comparing import Comparing
from attncheck.audit.numeric import calls, weights
from attncheck.audit.numeric.building import count_devices, users, without_dropout
from attncheck.audit.numeric.captured import Captured, capture
from attncheck.audit.numeric.folder import Folder, Raised, State, put
from attncheck.audit.numeric.recording import Recorder
from attncheck.audit.numeric.running import Cotangent, placed_cotangent, run, whole_cotangent
from attncheck.audit.numeric.unsharded import Shown, save
from attncheck.audit.numeric.words import why
from attncheck.audit.put_in_place import put_in_place
from attncheck.audit.sdpa import AsOnCuda
from attncheck.errors import UserError
from attncheck.model import from_json
from attncheck.runner import compat

# What one raises, the others may raise too: how long it waits for them to say so, before its end ends them.
PATIENCE_SECONDS = 3.0
# The parent ends what stands still much earlier.
GROUP_TIMEOUT = datetime.timedelta(hours=1)


def work(folder: Folder) -> None:
    """Never returns: leaves with an exit code."""
    asked = from_json(Comparing, json.loads(folder.asked.read_text(encoding="utf-8")), "asked")
    store, rank, ranks = compat.rendezvous_store("numeric")
    one = _Rank(folder, asked, rank, ranks, State(folder.state(rank)))
    try:
        one.run(store)
    except (Exception, SystemExit) as error:
        one.tell(error)
        one.wait_for_others()
        compat.quiet_exit(1)
    store.set(f"done/{rank}", "yes")
    # Leave together: an exit in the middle of a peer's last collective looks like a death.
    with contextlib.suppress(Exception):
        store.wait([f"done/{each}" for each in range(ranks)], datetime.timedelta(seconds=60))
    compat.quiet_exit(0)


@dataclass
class _Rank:
    """What it is at, for when it raises: which call (-1: none yet), with which flags, and who records it."""

    folder: Folder
    asked: Comparing
    rank: int
    ranks: int
    state: State
    call: int = -1
    flags: str = ""
    recorder: Recorder = field(default_factory=Recorder)

    def run(self, store: Any) -> None:
        """Raises what the user's functions raise, and what not all ranks raise in a call."""
        asked = self.asked
        torch.set_num_threads(1)
        _init_group(asked.device, store, self.rank, self.ranks)
        put_in_place(asked.path, asked.probe_files, asked.fixes, asked.device)
        mesh = init_device_mesh(
            asked.device, tuple(asked.mesh.values()), mesh_dim_names=tuple(asked.mesh)
        )
        count_devices(self.ranks)
        if asked.device == "cpu":
            standins.provide("aten_attention")
        functions = users(asked)
        self.state.set("building the model")
        model, number = functions.model(mesh), 0
        given = functions.given(mesh)
        self.state.set("waiting for the unsharded model")
        shown = _shown(self.folder)
        refused = _ready(model, shown)
        for at, call in shown.calls.items():
            if call.model != number:
                model, number = functions.model(mesh), call.model
                refused = _ready(model, shown)
            self.call = self.state.call = at
            self.flags = calls.flipped(given.kwargs) if call.flipped else ""
            self.recorder = Recorder(on_enter=self.state.set)
            cotangent = _cotangent(shown.outputs[at], asked.seed)
            try:
                with self.as_on_cuda():
                    record = run(model, given, call, cotangent, self.recorder)
            except (Exception, SystemExit) as error:
                self.tell(error)
                if not self.wait_for_others():
                    raise
                continue  # all of them stopped at the same: they are still in step
            record.refused = refused
            record.parts = _held(model, refused, shown)
            save(record, self.folder.record(self.rank, at))
        self.state.set("done")

    def as_on_cuda(self) -> contextlib.AbstractContextManager[object]:
        """The op that F.scaled_dot_product_attention is on a CPU has no strategy; a GPU would run another."""
        if self.asked.device != "cpu":
            return contextlib.nullcontext()
        return AsOnCuda(lambda *_: None)

    def tell(self, error: BaseException) -> None:
        """Leaves word of what it raised."""
        users_own = isinstance(error, UserError)
        text = str(error) if users_own else f"{why(error)}{self.flags}"
        path = self.recorder.path
        file = self.folder.raised(self.rank, self.call)
        if not file.exists():
            put(file, Raised(self.rank, self.call, path, text, users_own, time.time()))
        self.state.set("raised in", path)

    def wait_for_others(self) -> bool:
        """Whether all ranks raise the same in this call. Gives them a while to say so."""
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            raised = [each for each in self.folder.all_raised() if each.call == self.call]
            if len(raised) == self.ranks:
                return len({(each.module, each.text) for each in raised}) == 1
            time.sleep(0.05)
        return False


def _held(model: nn.Module, refused: Iterable[str], shown: Shown) -> dict[str, Captured]:
    tensors = weights.named(model)
    return {
        name: capture(tensors[name])
        for name in refused
        if name in tensors and name in shown.weights
    }


def _ready(model: nn.Module, shown: Shown) -> dict[str, str]:
    """Gives a model its weights; {name: why not} of those that could not be given."""
    without_dropout(model)
    return weights.give(model, shown.weights)


def _cotangent(outputs: Sequence[torch.Tensor], seed: int) -> Cotangent:
    def cotangent(number: int, out: torch.Tensor) -> torch.Tensor | None:
        if number >= len(outputs):
            return None
        like = outputs[number]
        return placed_cotangent(out, whole_cotangent(number, like, seed), like)

    return cotangent


def _shown(folder: Folder) -> Shown:
    while not folder.unsharded.exists():
        time.sleep(0.05)  # the parent ends this process where it never comes
    # Written by attncheck's own process a moment ago: not a file from elsewhere.
    shown = torch.load(folder.unsharded, weights_only=False)
    assert isinstance(shown, Shown)
    return shown


def _init_group(device: str, store: Any, rank: int, ranks: int) -> None:
    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        # NCCL refuses ranks that share a GPU; gloo stages through the host.
        if torch.cuda.device_count() >= ranks:
            backend = "nccl"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=ranks, timeout=GROUP_TIMEOUT
    )
