"""F.scaled_dot_product_attention with the MATH backend and is_causal=True fails on every DTensor.

    python sdpa-math-causal-mixed-tensor.py

One process. Exits 1 where the bug shows, 0 where it does not.
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
torch.manual_seed(0)
whole = [torch.randn(2, 4, 16, 8) for _ in range(3)]
failed = 0
for title, causal, placement in (
    ("not causal, replicated", False, Replicate()),
    ("causal, replicated", True, Replicate()),
    ("causal, sharded by heads", True, Shard(1)),
    ("causal, sharded by batch", True, Shard(0)),
):
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(*whole, is_causal=causal)
        try:
            dq, dk, dv = (distribute_tensor(t, mesh, [placement]) for t in whole)
            out = F.scaled_dot_product_attention(dq, dk, dv, is_causal=causal)
            print(f"{title}: max error {(out.full_tensor() - expected).abs().max():.0e}")
        except Exception as error:
            failed += 1
            print(f"{title}: {type(error).__name__}: {str(error)[:68]} ...")
print("expected: all four return")
print("BUG" if failed else "ok")
sys.exit(int(failed > 0))
