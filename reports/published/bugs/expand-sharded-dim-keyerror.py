"""Tensor.expand of a DTensor that is sharded on the dim of size 1 that expands: "RuntimeError: 1".

    torchrun --standalone --nproc-per-node 2 expand-sharded-dim-keyerror.py

Exits 1 where the bug shows, 0 where it does not.
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
bug = False
# Multi-query attention: one kv head, placed as the query heads are.
whole = torch.randn(2, 1, 5, 8)
k = distribute_tensor(whole, mesh, [Shard(1)])
q = distribute_tensor(torch.randn(2, 2, 3, 8), mesh, [Shard(1)])
for name, call in {
    "k.expand(2, 2, 5, 8)": lambda: k.expand(2, 2, 5, 8),
    "q @ k.transpose(-2, -1)": lambda: q @ k.transpose(-2, -1),
}.items():
    try:
        said = f"right, placed {call().placements}"
    except Exception as error:
        bug |= isinstance(error.__cause__, KeyError)
        cause = type(error.__cause__).__name__
        said = f"{type(error).__name__}: {str(error).splitlines()[0]!r}, of a {cause}"
    if dist.get_rank() == 0:
        print(f"{name}: {said}")
if dist.get_rank() == 0:
    print("BUG" if bug else "ok", flush=True)
dist.barrier()
os._exit(int(bug))
