"""A bias that broadcasts over the heads, or one kv head, and tensor parallelism is silently given up.

    torchrun --standalone --nproc-per-node 2 broadcast-bias-and-mqa-gather.py

The ops are those that F.scaled_dot_product_attention calls on CUDA. So that no GPU is needed, this file
gives them CPU kernels of its own; DTensor's strategies for them are PyTorch's. Exits 1 where the bug
shows, 0 where it does not.
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

aten = torch.ops.aten
library = torch.library.Library("aten", "IMPL", "CPU")


def attend(q, k, v, bias=0):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5 + bias
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def efficient(q, k, v, bias, compute_log_sumexp, *args, **kwargs):
    state = (torch.zeros((), dtype=torch.int64) for _ in range(2))
    return *attend(q, k, v, bias), *state  # 32 queries: no padding of the log-sum-exp


def flash(q, k, v, *args, **kwargs):
    seed, unused = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    sizes = q.shape[2], k.shape[2]
    return *attend(q, k, v), None, None, *sizes, seed, unused, q.new_empty(0)


library.impl("_scaled_dot_product_efficient_attention", efficient)
library.impl("_scaled_dot_product_flash_attention", flash)


def with_bias(q, k, v, bias):
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]


def grouped(q, k, v):
    return aten._scaled_dot_product_flash_attention(q, k, v)[0]


dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
bug = False
for title, op, kv_heads, bias in (
    ("efficient, bias (2, 4, 32, 32) sharded by heads", with_bias, 4, (2, 4, 32, 32)),
    ("efficient, bias (2, 1, 32, 32) replicated", with_bias, 4, (2, 1, 32, 32)),
    ("efficient, bias (1, 4, 32, 32) sharded by heads", with_bias, 4, (1, 4, 32, 32)),
    ("flash, 1 kv head, k and v replicated", grouped, 1, None),
):
    sizes = [(2, heads, 32, 8) for heads in (4, kv_heads, kv_heads)] + ([bias] if bias else [])
    whole = [torch.randn(size) for size in sizes]
    parts = [
        distribute_tensor(t, mesh, [Shard(1) if t.shape[1] > 1 else Replicate()]) for t in whole
    ]
    with CommDebugMode() as mode:
        out = op(*parts)
    error = (out.full_tensor() - op(*whole)).abs().max()
    total = mode.get_total_counts()
    given_up = total > 0 or not out.placements[0].is_shard()
    bug |= given_up
    if dist.get_rank() == 0:
        print(f"{title}: {total} collectives, output {out.placements}, max error {error:.0e}")
if dist.get_rank() == 0:
    print("expected: no collective, and an output (Shard(dim=1),), in all four")
    print("BUG" if bug else "ok", flush=True)
dist.barrier()
os._exit(int(bug))
