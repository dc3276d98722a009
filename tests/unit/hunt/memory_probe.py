"""Operators that say with which strides they were called: right with the ones they expect, else refusing."""

from __future__ import annotations

from typing import Any

from attncheck.probing import BATCH, HEAD_DIM, HEADS, SEQUENCE, Operator, Probe, Setting, Tensor

DIMS = (BATCH, HEADS, SEQUENCE, HEAD_DIM)
SIZES = {"batch": 2, "heads": 4, "sequence": 6, "head_dim": 8}
# Of (batch, heads, sequence, head_dim) with 2 and with 4 heads.
EXPECTED = {
    "contiguous": {4: (192, 48, 8, 1), 2: (96, 48, 8, 1)},
    "transposed": {4: (192, 8, 32, 1), 2: (96, 8, 16, 1)},
    "sliced": {4: (576, 144, 24, 1), 2: (288, 144, 24, 1)},
    "expanded": {4: (0, 48, 8, 1), 2: (0, 48, 8, 1)},
}


def tensors(setting: Setting) -> tuple[Tensor, ...]:
    return (Tensor("q", DIMS, tuple(setting[role] for role in DIMS)),)


def check(setting: Setting, tensor: Any) -> None:
    strides = EXPECTED[setting.memory][int(tensor.shape[1])]
    if tuple(tensor.stride()) != strides:
        raise RuntimeError(f"strides {tuple(tensor.stride())}, expected {strides}")


def call(setting: Setting, t: Any) -> Any:
    """On DTensors, the strides of the whole and of the local tensor are both looked at."""
    import torch
    from torch.distributed.tensor import DTensor

    q = t["q"]
    check(setting, q)
    if isinstance(q, DTensor):
        local = q.to_local()
        for one in getattr(local, "_local_tensors", {0: local}).values():
            check(setting, one.detach())
    return torch.mul(q, 2.0)


def reference(setting: Setting, t: Any) -> Any:
    return t["q"] * 2.0


PROBE = Probe(
    name="memory",
    summary="says with which strides it was called",
    operators=(
        Operator(
            name="memory.strides",
            tensors=tensors,
            call=call,
            reference=reference,
            settings=tuple(
                Setting(m, SIZES, level="quick", placements=("replicate", "heads"), memory=m)
                for m in EXPECTED
            ),
            output_dims=DIMS,
        ),
    ),
)
