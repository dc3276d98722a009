"""All ranks of a mesh in one process, through PyTorch's `LocalTensorMode`: worlds that no machine here has.

One call runs the case for every rank: a DTensor's local tensor holds the shards of all of them, each op on
it runs once a rank, and a collective passes values from one to the other. What comes of the call is taken
apart into one record a rank, so that observer, judge and oracle are the same as with real processes.

It is blind to whatever needs more than one process, or is no dispatcher op: see `crosscheck.BLIND`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch.distributed.device_mesh import init_device_mesh

from attncheck.model import Case, Reason
from attncheck.runner import case as cases
from attncheck.runner import compat
from attncheck.runner.blame import Record
from attncheck.runner.case import Local, Prepared, RankRecord
from attncheck.runner.observe import Observer, StateFile
from attncheck.runner.rundir import RunConfig


class Simulated:
    """The engine that runs a case for all ranks at once, in this process."""

    def __init__(self, config: RunConfig, state: StateFile) -> None:
        self.config = config
        self.observer = Observer(state, config.ranks)
        compat.simulated_group(config.ranks)
        self.mesh = init_device_mesh(
            config.device, tuple(config.mesh.values()), mesh_dim_names=tuple(config.mesh)
        )

    def calls(self) -> Record:
        """What the kernel ops of the last case took and gave on this rank."""
        return self.observer.calls

    def run(self, case: Case, prepared: Sequence[tuple[int, Prepared]]) -> list[RankRecord]:
        """What each rank has to say about the case with each set of values in turn, in rank order."""
        config = self.config
        (seed, first), *others = prepared
        with compat.simulated_ranks(config.ranks):
            together = cases.run_case(
                first, case, 0, self.mesh, config.device, seed, self.observer, others
            )
        communication = [together.trace, *self.observer.peers]
        records = []
        for rank in range(config.ranks):
            record = _of_rank(together, rank)
            if record.results or record.trace.sequence:
                own = communication[rank]
                record.trace = replace(
                    together.trace, sequence=own.sequence, collectives=own.collectives
                )
            records.append(record)
        return records


def _of_rank(together: RankRecord, rank: int) -> RankRecord:
    record = replace(
        together,
        rank=rank,
        results=_results(together.results, rank),
        warm=None if together.warm is None else _results(together.warm, rank),
        repeats=[_results(results, rank) for results in together.repeats],
    )
    if record.exception is not None and record.exception[0] == cases.NOT_SIMULATED:
        record.unavailable, record.exception = (Reason.NOT_SIMULATED, record.exception[1]), None
    return record


def _results(together: Mapping[str, Local], rank: int) -> dict[str, Local]:
    out = {}
    for name, local in together.items():
        tensor: torch.Tensor = compat.on_rank(local.tensor, rank)
        # The whole shape of a DTensor is every rank's; that of a plain tensor is its own.
        shape = tuple(int(compat.on_rank(size, rank)) for size in local.shape)
        out[name] = Local(tensor, shape, local.placements)
    return out
