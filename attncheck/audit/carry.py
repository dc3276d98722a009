"""Going on past an op that DTensor refuses, on fake tensors: what would its results have been?

Nothing is computed, so only shapes and placements matter. The op is run on the local fakes, as a strategy
that takes each shard by itself would, and on global ones; where an output is smaller on a rank than as a
whole, that says which mesh axis shards which of its dims. Where that cannot be, everything is taken as
replicated.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate

from attncheck.runner import compat
from attncheck.runner.compat import tree_flatten, tree_leaves, tree_map, tree_unflatten
from attncheck.runner.placements import local_shape, shard_dim


def carry_on(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the op may have returned. Raises what the op itself raises on whole fake tensors."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, DTensor)]
    mesh = given[0].device_mesh
    originals: dict[int, DTensor] = {}
    whole = _run(func, args, kwargs, _whole, originals)
    shares: list[Any] | None = None
    if all(_is_plainly_sharded(tensor) for tensor in given):
        try:
            shares = tree_leaves(_run(func, args, kwargs, compat.local_tensor, {}))
        except Exception:  # this strategy is none: the op wants more than its own shards
            shares = None
    axes = sorted({at for tensor in given for at in _sharded_axes(tensor)})
    wholes, spec = tree_flatten(whole)
    if shares is None or len(shares) != len(wholes):
        shares = [None] * len(wholes)
    return tree_unflatten(
        [
            # What the op wrote into and returns is the caller's own tensor.
            originals.get(id(value)) or _placed(value, share, mesh, axes)
            if isinstance(value, torch.Tensor)
            else value
            for value, share in zip(wholes, shares, strict=True)
        ],
        spec,
    )


def _run(
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    part: Callable[[DTensor], torch.Tensor],
    originals: dict[int, DTensor],
) -> Any:
    """Calls the op on a `part` of each DTensor, and notes which part was of which."""
    kept = []  # an id means something only as long as its tensor lives

    def take(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        taken = part(value).detach()
        kept.append(taken)
        originals[id(taken)] = value
        return taken

    with torch.no_grad():
        out = func(*tree_map(take, args), **tree_map(take, dict(kwargs)))
    returned = {id(leaf) for leaf in tree_leaves(out)}
    for taken in kept:
        if id(taken) not in returned:
            del originals[id(taken)]
    return out


def _whole(tensor: DTensor) -> torch.Tensor:
    return torch.empty_strided(
        tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )


def _is_plainly_sharded(tensor: DTensor) -> bool:
    texts = (compat.placement_text(p) for p in tensor.placements)
    return all(text == "R" or shard_dim(text) is not None for text in texts)


def _sharded_axes(tensor: DTensor) -> list[int]:
    return [at for at, p in enumerate(tensor.placements) if compat.placement_text(p) != "R"]


def _placed(
    whole: torch.Tensor, share: torch.Tensor | None, mesh: Any, axes: Sequence[int]
) -> DTensor:
    texts = _explained(whole, share, mesh, axes) if share is not None else None
    return DTensor.from_local(
        whole if share is None or texts is None else share,
        mesh,
        [compat.placement_from_text(text) for text in texts]
        if texts
        else [Replicate()] * mesh.ndim,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def _explained(
    whole: torch.Tensor, share: torch.Tensor, mesh: Any, axes: Sequence[int]
) -> list[str] | None:
    """Placements by which this rank's part of `whole` has the shape of `share`; None where none has."""
    choices = [f"S({dim})" for dim in range(whole.ndim)] + ["R"]
    for chosen in itertools.product(choices, repeat=len(axes)):
        texts = ["R"] * mesh.ndim
        for at, text in zip(axes, chosen, strict=True):
            texts[at] = text
        expected = local_shape(whole.shape, texts, tuple(mesh.shape), mesh.get_coordinate())
        if expected == tuple(share.shape):
            return texts
    return None
