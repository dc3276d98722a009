"""F.scaled_dot_product_attention on CPU DTensors fails when causal, and in every backward.

    python sdpa-cpu-flash-no-strategy.py

The default dispatch, no backend chosen. One process. Exits 1 where the bug shows, 0 where it does not.
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
torch.manual_seed(0)
whole = [torch.randn(2, 4, 16, 8) for _ in range(3)]
failed = 0
for title, causal, backward, placement in (
    ("forward, replicated", False, False, Replicate()),
    ("causal forward, replicated", True, False, Replicate()),
    ("causal forward, sharded by heads", True, False, Shard(1)),
    ("backward, replicated", False, True, Replicate()),
    ("backward, sharded by heads", False, True, Shard(1)),
):
    q, k, v = (distribute_tensor(t, mesh, [placement]).requires_grad_(backward) for t in whole)
    try:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        if backward:
            out.sum().backward()
        print(f"{title}: ok")
    except Exception as error:
        failed += 1
        print(f"{title}: {type(error).__name__}: {str(error).splitlines()[0]}")
print("expected: all five return")
print("BUG" if failed else "ok")
sys.exit(int(failed > 0))
