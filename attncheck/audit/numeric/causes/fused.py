"""A fused projection (qkv, gate and up) whose columns were cut by rank and not within q, k and v."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attncheck.audit.numeric.captured import Key
from attncheck.audit.numeric.readings import WHOLE
from attncheck.audit.numeric.recording import Override
from attncheck.audit.numeric.scene import Difference, Scene
from attncheck.audit.numeric.verdict import explains

# How many tensors before the difference are looked at: a projection is followed by what cuts it.
_NEAR = 6


def cause(scene: Scene, difference: Difference) -> str:
    """Runs the unsharded model with the projection's columns as the ranks take them."""
    if difference.gradient:
        return ""
    captures = scene.captures(difference.key)
    for key, dim, ranks in _cut(scene, difference):
        size = scene.own[key].captured.shape[dim]
        for parts in _partitions(size, ranks):
            order = taken_order(size, ranks, parts)
            override = {key: _permuted(dim, order)}
            record, _ = scene.unsharded.replay(scene.at, override)
            events = {each.key: each.captured.local for each in record.events}
            replayed = events.get(difference.key)
            if replayed is not None and explains(
                captures, replayed, difference.verdict, scene.mesh, True
            ):
                names = "q, k and v" if len(parts) == 3 else f"its {len(parts)} parts"
                return (
                    f"the output of {key.path or 'the model'} is cut by rank without interleaving {names}: "
                    f"each rank takes its own run of columns for them ({_words(parts)})"
                )
    return ""


def _cut(scene: Scene, difference: Difference) -> Iterator[tuple[Key, int, int]]:
    """Plain tensors shortly before the difference of which each rank holds columns: (which, dim, ranks)."""
    tried = set()
    for key in scene.keys[: scene.keys.index(difference.key)][-_NEAR:]:
        if id(scene.own[key].captured) in tried:
            continue  # given and taken as it was
        tried.add(id(scene.own[key].captured))
        verdict = scene.judge(key)
        if verdict is None or verdict.unequal:
            continue
        if any(each is None or each.placements is not None for each in scene.captures(key)):
            continue
        cuts = [(how, n) for how, n in zip(verdict.how, scene.mesh, strict=True) if how != WHOLE]
        if len(cuts) == 1 and isinstance(cuts[0][0], int):
            yield key, cuts[0][0], cuts[0][1]


def _permuted(dim: int, order: torch.Tensor) -> Override:
    return lambda whole: whole.index_select(dim, order.to(whole.device))


def _partitions(size: int, ranks: int) -> Iterator[tuple[int, ...]]:
    """Into what a projection of so many columns may be fused: q, k and v, alike or with fewer kv heads; or
    two or four equal parts."""
    ratios = [(1, 1, 1), *((ratio, 1, 1) for ratio in range(2, 9)), (1, 1), (1, 1, 1, 1)]
    for ratio in ratios:
        unit, left = divmod(size, sum(ratio))
        if not left and unit % ranks == 0:
            yield tuple(unit * each for each in ratio)


def taken_order(size: int, ranks: int, parts: tuple[int, ...]) -> torch.Tensor:
    """Which column of the whole each column of the unsharded parts is, where each of the ranks takes an equal
    run of columns and cuts it by itself."""
    columns = torch.arange(size).reshape(ranks, -1)
    own = torch.split(columns, [part // ranks for part in parts], 1)
    return torch.cat([each.flatten() for each in own])


def _words(parts: tuple[int, ...]) -> str:
    return " : ".join(str(part // min(parts)) for part in parts)
