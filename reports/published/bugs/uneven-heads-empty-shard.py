"""4 heads on 3 ranks: the third rank gets none, and the attention kernel is called on an empty shard.

    torchrun --standalone --nproc-per-node 3 uneven-heads-empty-shard.py

The op is the one that F.scaled_dot_product_attention calls on CUDA. So that no GPU is needed, this file
gives it a CPU kernel of its own, which says what it is called with; DTensor's strategy for it is
PyTorch's. Exits 1 where the bug shows, 0 where it does not.
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

library = torch.library.Library("aten", "IMPL", "CPU")
called_with = []


def flash(q, k, v, *args, **kwargs):
    called_with.append(tuple(q.shape))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    seed, unused = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    sizes = q.shape[2], k.shape[2]
    out = scores.softmax(-1) @ v
    return out, scores.logsumexp(-1), None, None, *sizes, seed, unused, q.new_empty(0)


library.impl("_scaled_dot_product_flash_attention", flash)

dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = init_device_mesh("cpu", (3,))
bug = False
for heads, placement in ((2, Shard(1)), (4, Shard(1)), (4, Replicate())):
    torch.manual_seed(0)
    q, k, v = (distribute_tensor(torch.randn(2, heads, 16, 8), mesh, [placement]) for _ in range(3))
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    shapes = [None] * 3
    dist.all_gather_object(shapes, called_with[-1])
    empty = any(shape[1] == 0 for shape in shapes)
    bug |= empty
    if rank == 0:
        print(f"{heads} heads, {placement}: output {out.placements}, the kernels get {shapes}")
if rank == 0:
    print("expected: no kernel gets 0 heads (with 2 heads DTensor gathers them, as it should)")
    print("BUG" if bug else "ok", flush=True)
dist.barrier()
os._exit(int(bug))
