"""The collectives of one step on real gloo ranks, as PyTorch's profiler saw them: JSON on stdout.

    python tests/models/counted.py RANKS MESH TARGETS     starts itself on RANKS ranks with torchrun

MESH is like `dp=2,tp=2`. TARGETS is JSON: what builds a model, and what it is called with, both names in
this folder like `integrations:build_llama`. For each build, of rank 0: `calls` by the op of c10d, and
`elements` of all inputs by what gloo ran. (It has no reduce-scatter, and runs an all-reduce for it.)
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from compared import load, start
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._pytree import tree_leaves

from attncheck import standins


def step(model: torch.nn.Module, given: Any) -> None:
    returned = model(**given) if isinstance(given, dict) else model(*given)
    outputs = [
        leaf
        for leaf in tree_leaves(returned)
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad
    ]
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


def counted(build: str, inputs: str, mesh: DeviceMesh) -> dict[str, dict[str, int]]:
    model, given = load(build)(mesh), load(inputs)(mesh)
    with torch.profiler.profile(record_shapes=True) as profile:
        step(model, given)
    calls: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    for event in profile.key_averages(group_by_input_shape=True):
        library, _, name = event.key.partition(":")
        if library == "c10d":
            calls[name.strip(":")] += event.count
        elif library == "gloo":
            elements[name] += event.count * sum(map(math.prod, event.input_shapes))
    return {"calls": calls, "elements": elements}


def main() -> None:
    ranks, axes, targets = sys.argv[1:]
    if "RANK" not in os.environ:
        start(ranks)
    standins.provide("aten_attention")  # a ring asks for the log-sum-exp of a kernel for CUDA
    dist.init_process_group("gloo")
    torch.accelerator.device_count = lambda: int(ranks)  # diffusers divides by it
    sizes = {name: int(size) for name, size in (axis.split("=") for axis in axes.split(","))}
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    answers = {build: counted(build, inputs, mesh) for build, inputs in json.loads(targets).items()}
    if dist.get_rank() == 0:
        print(json.dumps(answers))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo aborts in one teardown of five


if __name__ == "__main__":
    main()
