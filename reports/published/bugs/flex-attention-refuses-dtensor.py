"""flex_attention refuses every DTensor, replicated ones included.

    python flex-attention-refuses-dtensor.py

One process. Exits 1 where the bug shows, 0 where it does not.
"""

import sys
import warnings

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.attention.flex_attention import flex_attention

warnings.simplefilter("ignore")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
torch.manual_seed(0)
whole = [torch.randn(2, 4, 16, 8) for _ in range(3)]
expected = flex_attention(*whole)
failed = 0
for title, placement in (
    ("replicated", Replicate()),
    ("sharded by batch", Shard(0)),
    ("sharded by heads", Shard(1)),
):
    try:
        out = flex_attention(*(distribute_tensor(t, mesh, [placement]) for t in whole))
        print(f"{title}: max error {(out.full_tensor() - expected).abs().max():.0e}")
    except Exception as error:
        failed += 1
        cause = error
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__
        print(f"{title}: {type(error).__name__}, caused by {type(cause).__name__}: {cause}")
print("expected: all three return")
print("BUG" if failed else "ok")
sys.exit(int(failed > 0))
