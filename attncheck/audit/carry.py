"""Going on past an op that DTensor refuses, on fake tensors: what would its results have been?

Nothing is computed, so only shapes and placements matter. The op is run on fakes of the whole tensors and,
for each mesh axis that shards some of them, on what the first rank of that axis would hold, as a strategy
that takes each shard by itself would: the dim of an output that is smaller then is the one which that axis
shards. So all ranks come to the same. Where an output is not explained so, everything is taken as replicated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from attncheck.runner import compat
from attncheck.runner.compat import tree_flatten, tree_leaves, tree_map, tree_unflatten
from attncheck.runner.placements import chunk_bounds, local_shape, shard_dim


def carry_on(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the op may have returned. Raises what the op itself raises on whole fake tensors."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, DTensor)]
    mesh = given[0].device_mesh
    originals: dict[int, DTensor] = {}
    wholes, spec = tree_flatten(_run(func, args, kwargs, _whole, originals))
    placements = _explained(func, args, kwargs, given, wholes)
    return tree_unflatten(
        [
            # What the op wrote into and returns is the caller's own tensor.
            originals[id(value)]
            if id(value) in originals
            else _placed(value, texts, mesh)
            if isinstance(value, torch.Tensor)
            else value
            for value, texts in zip(wholes, placements, strict=True)
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


def _texts(tensor: DTensor) -> list[str]:
    return [compat.placement_text(placement) for placement in tensor.placements]


def _explained(
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    given: Sequence[DTensor],
    wholes: Sequence[Any],
) -> list[list[str]]:
    """The placements of each output; of all of them replicated, where one is not explained."""
    sizes = tuple(given[0].device_mesh.shape)
    texts = [["R"] * len(sizes) for _ in wholes]
    replicated = [[*each] for each in texts]
    for axis, ranks in enumerate(sizes):
        own = {_texts(tensor)[axis] for tensor in given if tensor.device_mesh.ndim > axis}
        if own == {"R"}:
            continue
        if not all(text == "R" or shard_dim(text) is not None for text in own):
            return replicated  # what an op makes of partial sums, nobody can say
        try:
            shares = tree_leaves(_run(func, args, kwargs, lambda t, at=axis: _share(t, at), {}))  # type: ignore[misc]
        except Exception:  # this strategy is none: the op wants more than its own shards
            return replicated
        if len(shares) != len(wholes):
            return replicated
        for text, whole, share in zip(texts, wholes, shares, strict=True):
            if isinstance(whole, torch.Tensor) and isinstance(share, torch.Tensor):
                dim = _sharded_dim(tuple(whole.shape), tuple(share.shape), ranks)
                if dim is None:
                    return replicated
                text[axis] = dim
    return texts


def _share(tensor: DTensor, axis: int) -> torch.Tensor:
    """What the first rank of an axis holds where no other axis shards anything."""
    whole = _whole(tensor)
    dim = shard_dim(_texts(tensor)[axis])
    if dim is None:
        return whole
    _, rows = chunk_bounds(whole.shape[dim], tensor.device_mesh.size(axis), 0)
    return whole.narrow(dim, 0, rows).clone(memory_format=torch.preserve_format)


def _sharded_dim(whole: tuple[int, ...], share: tuple[int, ...], ranks: int) -> str | None:
    """`S(dim)` of the one dim that is smaller by as much as ranks make it, `R` of none, else None."""
    if len(whole) != len(share):
        return None
    smaller = [dim for dim, (a, b) in enumerate(zip(whole, share, strict=True)) if a != b]
    if not smaller:
        return "R"
    explained = len(smaller) == 1 and share[smaller[0]] == -(-whole[smaller[0]] // ranks)
    return f"S({smaller[0]})" if explained else None


def _placed(whole: torch.Tensor, texts: Sequence[str], mesh: Any) -> DTensor:
    shape = local_shape(whole.shape, texts, tuple(mesh.shape), mesh.get_coordinate())
    order = sorted(range(whole.ndim), key=whole.stride, reverse=True)
    return DTensor.from_local(
        torch.empty_permuted(shape, order, dtype=whole.dtype, device=whole.device),
        mesh,
        [compat.placement_from_text(text) for text in texts],
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
