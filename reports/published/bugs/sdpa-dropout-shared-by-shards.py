"""Attention dropout: all shards of the heads draw one mask, and replicas draw different ones.

    torchrun --standalone --nproc-per-node 2 sdpa-dropout-shared-by-shards.py

q = 0 and v = identity make the mask readable: an output of 0 is a dropped weight. The second op is the
one that CUDA calls for FLASH_ATTENTION; so that no GPU is needed, this file gives it a CPU kernel of its
own, which draws from the default generator as the CUDA kernel does. Exits 1 where the bug shows, 0 where
it does not.
"""

import os
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

library = torch.library.Library("aten", "IMPL", "CPU")


def flash_kernel(q, k, v, dropout_p=0.0, *args, **kwargs):
    scores = q @ k.mT * q.shape[-1] ** -0.5
    keep = torch.rand_like(scores) >= dropout_p
    seed, unused = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    sizes = q.shape[2], k.shape[2]
    out = scores.softmax(-1) * keep / (1 - dropout_p) @ v
    return out, scores.logsumexp(-1), None, None, *sizes, seed, unused, q.new_empty(0)


library.impl("_scaled_dot_product_flash_attention", flash_kernel)


def math(q, k, v):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)


def flash(q, k, v):
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.5)[0]


dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = init_device_mesh("cpu", (2,))


def masks(attend, placement, seed):
    """The dropout masks of both ranks. 4 heads: two for each rank where they are sharded."""
    q = torch.zeros(2, 4, 16, 16)
    v = torch.eye(16).expand(2, 4, 16, 16).contiguous()
    q, k, v = (distribute_tensor(t, mesh, [placement]) for t in (q, q.clone(), v))
    torch.manual_seed(seed)
    out = attend(q, k, v)
    kept = (out.to_local() != 0).to(torch.uint8)
    both = [torch.empty_like(kept) for _ in range(2)]
    dist.all_gather(both, kept)
    return out.placements, (both[0] == both[1]).float().mean()


bug = False
for attend in (math, flash):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sharded, agree = masks(attend, Shard(1), seed=0)
        whole, same = masks(attend, Replicate(), seed=rank)
    bug |= bool(agree == 1) or bool(same < 1)
    if rank == 0:
        print(f"{attend.__name__}: DTensor warned: {bool(said)}")
        print(
            f"  heads sharded, one seed, output {sharded}: the masks of the two shards agree in "
            f"{agree:.0%} of the weights (expected: about 50%, as chance has it)"
        )
        print(
            f"  replicated, each rank its own seed, output {whole}: the masks of the two replicas "
            f"agree in {same:.0%} (expected: 100%)"
        )
if rank == 0:
    ops = [str(op) for op in DTensor._op_dispatcher._random_ops if "attention" in str(op)]
    print(f"attention ops among DTensor's random ops: {ops}")
    print("BUG" if bug else "ok", flush=True)
dist.barrier()
os._exit(int(bug))
