"""cuDNN attention on DTensors fails with every bias, replicated ones included.

    python cudnn-any-bias-fails.py

The op is the one that F.scaled_dot_product_attention calls on CUDA for the CUDNN_ATTENTION backend
with an attn_mask. No kernel is needed: it fails in DTensor's own strategy, before any kernel is called.
One process. Exits 1 where the bug shows, 0 where it does not.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

# Never reached on torch 2.13.0; lets a version without the bug run to its end.
library = torch.library.Library("aten", "IMPL", "CPU")


def cudnn(q, k, v, bias, compute_log_sumexp, *args, **kwargs):
    scores = q @ k.mT * q.shape[-1] ** -0.5 + (0 if bias is None else bias)
    lse = scores.logsumexp(-1, keepdim=True) if compute_log_sumexp else None
    zeros = (torch.zeros((), dtype=torch.int64) for _ in range(2))
    return scores.softmax(-1) @ v, lse, None, None, q.shape[2], k.shape[2], *zeros, None


library.impl("_scaled_dot_product_cudnn_attention", cudnn)

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
torch.manual_seed(0)
q, k, v = (torch.randn(2, 4, 16, 8) for _ in range(3))
failed = 0
for title, bias, placement in (
    ("no bias, replicated", None, Replicate()),
    ("bias, all replicated", torch.randn(2, 4, 16, 16), Replicate()),
    ("bias, all sharded by heads", torch.randn(2, 4, 16, 16), Shard(1)),
    ("bias, all sharded by batch", torch.randn(2, 4, 16, 16), Shard(0)),
):
    dq, dk, dv, dbias = (
        None if t is None else distribute_tensor(t, mesh, [placement]) for t in (q, k, v, bias)
    )
    try:
        out = torch.ops.aten._scaled_dot_product_cudnn_attention(dq, dk, dv, dbias, True)[0]
        print(f"{title}: {tuple(out.shape)} {out.placements}")
    except Exception as error:
        failed += bias is not None
        print(f"{title}: {type(error).__name__}: {str(error).splitlines()[0]}")
print("expected: all four return")
print("BUG" if failed else "ok")
sys.exit(int(failed > 0))
