"""A mesh of fake ranks in this process, of which it is one; gone afterwards."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from attncheck.fixes.strategies import forget_propagated
from attncheck.runner import compat
from attncheck.runner.placements import local_shape


@contextlib.contextmanager
def fake_mesh(axes: Mapping[str, int], rank: int = 0) -> Iterator[DeviceMesh]:
    """In here tensors are fake, and so are all ranks but this one."""
    compat.simulated_group(math.prod(axes.values()), rank)
    try:
        mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
        with compat.fake_mode(take_real=True):
            yield mesh
    finally:
        dist.destroy_process_group()
        forget_propagated()  # what is kept has local shapes of this rank in it


def placed(
    shape: Sequence[int],
    texts: Sequence[str],
    mesh: DeviceMesh,
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = False,
) -> DTensor:
    """A fake DTensor of this shape; a leaf of the graph."""
    local = torch.empty(local_shape(shape, texts, tuple(mesh.shape), coordinate(mesh)), dtype=dtype)
    return DTensor.from_local(
        local,
        mesh,
        [compat.placement_from_text(text) for text in texts],
        run_check=False,
        shape=torch.Size(shape),
        stride=contiguous(shape),
    ).requires_grad_(requires_grad)


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[at + 1 :]) for at in range(len(shape)))


def coordinate(mesh: DeviceMesh) -> list[int]:
    found = mesh.get_coordinate()
    assert found is not None
    return list(found)


def texts_of(tensor: torch.Tensor) -> tuple[str, ...]:
    assert isinstance(tensor, DTensor)
    return tuple(compat.placement_text(p) for p in tensor.placements)
