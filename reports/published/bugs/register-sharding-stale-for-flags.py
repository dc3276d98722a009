"""register_sharding: the answer for causal=False is served for causal=True.

    torchrun --standalone --nproc-per-node 2 register-sharding-stale-for-flags.py

Exits 1 where the bug shows, 0 where it does not.
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import register_sharding


@torch.library.custom_op("demo::attention", mutates_args=())
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        scores += torch.full(scores.shape[-2:], -torch.inf).triu(1)
    return scores.softmax(-1) @ v


@attention.register_fake
def _(q, k, v, causal):
    return torch.empty_like(q)


@register_sharding(torch.ops.demo.attention.default)
def strategy(q, k, v, causal):
    whole = ([Replicate()], [Replicate(), Replicate(), Replicate(), None])
    if causal:
        return [whole]  # the kernel counts a query's position from the start of what it gets
    return [whole, ([Shard(2)], [Shard(2), Replicate(), Replicate(), None])]


dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
bug = False
for order, size in (([True], 16), ([False, True], 24)):
    whole = [torch.randn(2, 4, size, 8) for _ in range(3)]
    q, k, v = (
        distribute_tensor(t, mesh, [placement])
        for t, placement in zip(whole, (Shard(2), Replicate(), Replicate()), strict=True)
    )
    for causal in order:
        out = torch.ops.demo.attention(q, k, v, causal)
        error = (out.full_tensor() - torch.ops.demo.attention(*whole, causal)).abs().max()
        bug |= bool(error > 1e-4)
        if dist.get_rank() == 0:
            print(
                f"calls so far {order[: order.index(causal) + 1]}: causal={causal}, "
                f"output {out.placements}, max error {error:.1e}"
            )
if dist.get_rank() == 0:
    print("expected: causal=True gives Replicate, and no error, whatever was called before")
    print("BUG" if bug else "ok", flush=True)
dist.barrier()
os._exit(int(bug))
