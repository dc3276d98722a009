"""The engine that runs a case with real processes: this one is a rank, and speaks for itself alone."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from attncheck.model import Case
from attncheck.runner import case as cases
from attncheck.runner.blame import Record
from attncheck.runner.case import Prepared, RankRecord
from attncheck.runner.observe import Observer, StateFile
from attncheck.runner.rundir import RunConfig


class Processes:
    """One rank of the mesh, in a process group of real processes."""

    def __init__(
        self, config: RunConfig, state: StateFile, store: Any, rank: int, ranks: int
    ) -> None:
        self.config = config
        self.rank = rank
        self.observer = Observer(state)
        _init_group(config, store, rank, ranks)
        self.mesh = init_device_mesh(
            config.device, tuple(config.mesh.values()), mesh_dim_names=tuple(config.mesh)
        )

    def calls(self) -> Record:
        """What the kernel ops of the last case took and gave on this rank."""
        return self.observer.calls

    def run(self, case: Case, prepared: Sequence[tuple[int, Prepared]]) -> list[RankRecord]:
        """What this rank has to say about the case with each set of values in turn: one record."""
        config = self.config
        (seed, first), *others = prepared
        record = cases.run_case(
            first,
            case,
            self.rank,
            self.mesh,
            config.device,
            seed,
            self.observer,
            others,
        )
        return [record]


def _init_group(config: RunConfig, store: Any, rank: int, ranks: int) -> None:
    timeout = datetime.timedelta(seconds=config.case_timeout * 2 + 60)
    backend = "gloo"
    if config.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        # NCCL refuses ranks that share a GPU; gloo stages through the host.
        if torch.cuda.device_count() >= ranks:
            backend = "nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
