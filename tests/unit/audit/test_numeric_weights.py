"""The unsharded model's weights in the parallel one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from attncheck.audit.numeric import weights
from attncheck.fixes.strategies import forget_propagated
from attncheck.runner import compat


@contextlib.contextmanager
def mesh_of(axes: dict[str, int], rank: int) -> Iterator[DeviceMesh]:
    """Real tensors on a mesh that connects nobody."""
    compat.simulated_group(math.prod(axes.values()), rank)
    try:
        yield init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    finally:
        dist.destroy_process_group()
        forget_propagated()  # what is kept has the mesh in it, and this rank's place


def parameter(local: torch.Tensor, mesh: DeviceMesh, *placements: Placement) -> nn.Parameter:
    return nn.Parameter(DTensor.from_local(local, mesh, placements, run_check=False))


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_gets_its_own_part(rank: int) -> None:
    whole = torch.arange(8.0).reshape(4, 2)
    with mesh_of({"tp": 2}, rank) as mesh:
        model = nn.Module()
        model.rows = parameter(torch.zeros(2, 2), mesh, Shard(0))
        model.columns = parameter(torch.zeros(4, 1), mesh, Shard(1))
        model.all = parameter(torch.zeros(4, 2), mesh, Replicate())
        model.plain = nn.Parameter(torch.zeros(4, 2))
        refused = weights.give(model, dict.fromkeys(("rows", "columns", "all", "plain"), whole))
        assert refused == {}
        assert torch.equal(compat.local_tensor(model.rows), whole.chunk(2, 0)[rank])
        assert torch.equal(compat.local_tensor(model.columns), whole.chunk(2, 1)[rank])
        assert torch.equal(compat.local_tensor(model.all), whole)
        assert torch.equal(model.plain, whole)


def test_what_has_no_counterpart_is_named() -> None:
    model = nn.Linear(4, 2)
    refused = weights.give(model, {"weight": torch.zeros(4, 4), "scale": torch.zeros(1)})
    assert refused == {
        "weight": "it has shape (2, 4), and (4, 4) in the unsharded model",
        "bias": "the unsharded model has nothing of that name",
        "scale": "the parallel model has nothing of that name",
    }


def test_tied_weights_and_buffers_go_by_each_of_their_names() -> None:
    model = nn.Module()
    model.one, model.other = nn.Linear(2, 2), nn.Linear(2, 2)
    model.other.weight = model.one.weight
    model.register_buffer("table", torch.zeros(3))
    assert {"one.weight", "other.weight", "table"} <= set(weights.named(model))


def test_wrappers_are_no_part_of_a_name() -> None:
    model = nn.Module()
    model.block = torch.compile(nn.Linear(2, 2))
    assert set(weights.named(model)) == {"block.weight", "block.bias"}
