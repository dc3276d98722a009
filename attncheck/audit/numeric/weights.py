"""The unsharded model's weights in the parallel model, by name and without communication."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from attncheck.audit.numeric.recording import clean
from attncheck.runner import compat
from attncheck.runner.placements import shard, shard_dim

# How PyTorch prints a shard that another axis, further right, has cut before (FSDP over TP): dim and into
# how many.
_STRIDED = re.compile(r"_S\((\d+), \d+\)|_StridedShard\(dim=(\d+), .*\)")


def named(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, tied ones under each of their names."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensors[clean(name)] = parameter
    for name, buffer in model.named_buffers(remove_duplicate=False):
        tensors[clean(name)] = buffer
    return tensors


def give(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Writes the weights into the model; {name: why not} of those that could not be."""
    refused: dict[str, str] = {}
    own = named(model)
    for name, tensor in own.items():
        if name not in weights:
            refused[name] = "the unsharded model has nothing of that name"
            continue
        whole = weights[name]
        if isinstance(tensor, DTensor):
            part = share(whole, tensor)
            local = compat.local_tensor(tensor)
        else:
            part, local = whole, tensor
        if part.shape != local.shape:
            refused[name] = (
                f"it has shape {tuple(tensor.shape)}, and {tuple(whole.shape)} in the unsharded model"
            )
            continue
        with torch.no_grad():
            local.copy_(part)
    for name in weights:
        if name not in own:
            refused[name] = "the parallel model has nothing of that name"
    return refused


def share(whole: torch.Tensor, like: DTensor) -> torch.Tensor:
    """This rank's part of a whole tensor, as the placements of `like` have it. A `P(sum)` of n ranks has an
    n-th on each."""
    mesh = tuple(like.device_mesh.mesh.shape)
    coordinate = tuple(like.device_mesh.get_coordinate() or ())
    texts = [compat.placement_text(p) for p in like.placements]
    order = axis_order(texts)
    parts = [plain_shard(texts[axis]) for axis in order]
    partial = [n for text, n in zip(texts, mesh, strict=True) if text == "P(sum)"]
    placed = ["R" if text.startswith("P(") else text for text in parts]
    own = shard(whole, placed, [mesh[axis] for axis in order], [coordinate[axis] for axis in order])
    for ranks in partial:
        own = own / ranks
    return own


def axis_order(placements: Sequence[str]) -> list[int]:
    """In which order mesh axes cut a tensor: left to right, but a strided shard comes after the axes to its
    right that cut the same dim."""
    order: list[int] = []
    for axis in reversed(range(len(placements))):
        if _STRIDED.fullmatch(placements[axis]):
            order.append(axis)
        else:
            order.insert(0, axis)
    return order


def plain_shard(placement: str) -> str:
    """`S(0)` of a strided shard of dim 0; any other placement as it is."""
    match = _STRIDED.fullmatch(placement)
    return f"S({match[1] or match[2]})" if match else placement


def is_sharded(placements: Sequence[str]) -> bool:
    return any(shard_dim(plain_shard(text)) is not None for text in placements)


def parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Those that get gradients."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield clean(name), parameter
