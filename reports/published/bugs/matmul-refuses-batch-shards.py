"""torch.matmul of 4-D DTensors refuses what bmm takes: a sharded batch of 1, an uneven batch.

    torchrun --standalone --nproc-per-node 2 matmul-refuses-batch-shards.py

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
for batch, heads, dim in ((2, 2, 0), (1, 2, 0), (2, 1, 1), (3, 2, 0), (2, 3, 1)):
    q, k = torch.randn(batch, heads, 3, 8), torch.randn(batch, heads, 5, 8)
    whole = q @ k.transpose(-2, -1)
    dq, dk = (distribute_tensor(t, mesh, [Shard(dim)]) for t in (q, k))
    try:
        out = dq @ dk.transpose(-2, -1)
        said = "right" if torch.allclose(out.full_tensor(), whole, atol=1e-5) else "WRONG"
    except RuntimeError as error:
        said = str(error).splitlines()[0].partition(",")[0].partition(".")[0]
    bug |= said != "right"
    if dist.get_rank() == 0:
        print(f"batch {batch}, heads {heads}, Shard({dim}): {said}")
if dist.get_rank() == 0:
    print("BUG" if bug else "ok", flush=True)
dist.barrier()
os._exit(int(bug))
