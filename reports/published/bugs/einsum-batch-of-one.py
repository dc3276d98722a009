"""torch.einsum raises for a batch of 1 that is placed Shard(0) on a mesh axis of size 1.

    python einsum-batch-of-one.py

One process. Exits 1 where the bug shows, 0 where it does not.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
torch.manual_seed(0)
failed = 0
for batch, kv_heads, placement in (
    (1, 2, Replicate()),
    (1, 2, Shard(0)),
    (1, 1, Shard(0)),
    (3, 2, Shard(0)),
    (3, 1, Shard(0)),
):
    q = torch.randn(batch, 2, 2, 8)  # batch, sequence, heads, head_dim
    k = torch.randn(batch, 2, kv_heads, 8)
    dq, dk = (distribute_tensor(t, mesh, [placement]) for t in (q, k))
    expected = torch.einsum("bqhd,bkhd->bhqk", q, k)
    try:
        out = torch.einsum("bqhd,bkhd->bhqk", dq, dk)
        said = f"max error {(out.full_tensor() - expected).abs().max():.0e}"
    except Exception as error:
        failed += 1
        said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    print(f"batch {batch}, 2 query heads, {kv_heads} kv heads, {placement}: {said}")
print("expected: all five return")
print("BUG" if failed else "ok")
sys.exit(int(failed > 0))
