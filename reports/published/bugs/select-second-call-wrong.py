"""torch 2.9: x[:, :, 0] of a replicated DTensor has a wrong shape from the second time on, and damages x.

    python select-second-call-wrong.py

Packed projections are taken apart so: qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]. One process. Exits 1
where the bug shows, 0 where it does not.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
bug = False
for placement in (Replicate(), Shard(0)):
    whole = torch.randn(2, 5, 3, 5)
    x = distribute_tensor(whole, mesh, [placement])
    for i in range(3):
        right = whole[:, :, i]
        try:
            part = x[:, :, i]
            bug |= part.shape != right.shape
            said = f"has shape {tuple(part.shape)}, its mean over dim 1"
            mean = part.mean(1).full_tensor()
            bug |= mean.shape != right.mean(1).shape
            said += f" has shape {tuple(mean.shape)}"
        except Exception as error:
            bug = True
            said = f"raises {type(error).__name__}: {str(error).splitlines()[0]}"
        print(f"{placement}: x[:, :, {i}] {said}; x is recorded with shape {tuple(x._spec.shape)}")
print("expected: x[:, :, i] (2, 5, 5), its mean (2, 5), x (2, 5, 3, 5)")
print("BUG" if bug else "ok")
sys.exit(int(bug))
