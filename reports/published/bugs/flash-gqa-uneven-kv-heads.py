"""GQA with heads sharded is silently wrong where the ranks do not divide the kv heads.

    torchrun --standalone --nproc-per-node 2 flash-gqa-uneven-kv-heads.py

12 query heads, 3 kv heads, 2 ranks. The ops are those that F.scaled_dot_product_attention calls on
CUDA with enable_gqa=True. So that no GPU is needed, this file gives them CPU kernels of its own, which
group the heads as the CUDA kernels do; DTensor's strategies for them are PyTorch's and untouched.
Exits 1 where the bug shows, 0 where it does not.
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

aten = torch.ops.aten
library = torch.library.Library("aten", "IMPL", "CPU")


def groups(q, *kv):
    """Each kv head once per query head of its group: query head h reads kv head h // group."""
    if q.shape[1] % kv[0].shape[1]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")
    return (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in kv)


def attend(q, k, v):
    k, v = groups(q, k, v)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def flash(q, k, v, *args, **kwargs):
    out, lse = attend(q, k, v)
    seed, unused = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    return out, lse, None, None, q.shape[2], k.shape[2], seed, unused, q.new_empty(0)


def flash_backward(grad, q, k, v, out, lse, *args, **kwargs):
    k_all, v_all = groups(q, k, v)
    scale = q.shape[-1] ** -0.5
    p = (q @ k_all.mT * scale - lse[..., None]).exp()
    ds = p * (grad @ v_all.mT - (grad * out).sum(-1, keepdim=True)) * scale
    size = (k.shape[0], k.shape[1], -1, *k.shape[2:])
    return ds @ k_all, (ds.mT @ q).view(size).sum(2), (p.mT @ grad).view(size).sum(2)


def cudnn(q, k, v, bias, compute_log_sumexp, *args, **kwargs):
    out, lse = attend(q, k, v)
    scalar = torch.zeros((), dtype=torch.int64)
    return out, lse[..., None], None, None, q.shape[2], k.shape[2], scalar, scalar.clone(), None


for name, kernel in {
    "_scaled_dot_product_flash_attention": flash,
    "_scaled_dot_product_flash_attention_backward": flash_backward,
    "_scaled_dot_product_cudnn_attention": cudnn,
}.items():
    library.impl(name, kernel)


def run_flash(q, k, v):
    return aten._scaled_dot_product_flash_attention(q, k, v)[0]


def run_cudnn(q, k, v):
    return aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]


def error(x, y):
    x = x.full_tensor() if hasattr(x, "full_tensor") else x
    return (x - y).abs().amax((0, 2, 3))  # per head


dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
bug = False
for title, op, kv_placement, kv_heads in (
    ("flash, q, k, v sharded by heads", run_flash, Shard(1), 3),
    ("flash, q sharded by heads, k, v replicated", run_flash, Replicate(), 3),
    ("cudnn, q, k, v sharded by heads", run_cudnn, Shard(1), 3),
    ("flash, the same with 4 kv heads", run_flash, Shard(1), 4),
):
    torch.manual_seed(0)
    whole = [torch.randn(2, heads, 16, 8) for heads in (12, kv_heads, kv_heads)]
    for t in whole:
        t.requires_grad_(op is run_flash)
    placements = Shard(1), kv_placement, kv_placement
    sharded = [
        distribute_tensor(t.detach(), mesh, [p]).requires_grad_(t.requires_grad)
        for t, p in zip(whole, placements, strict=True)
    ]
    expected, actual = op(*whole), op(*sharded)
    wrong = {"out": error(actual, expected)}
    if op is run_flash:
        g = torch.randn(2, 12, 16, 8)
        expected.backward(g)
        actual.backward(distribute_tensor(g, mesh, [Shard(1)]))
        for name, t, d in zip("qkv", whole, sharded, strict=True):
            wrong[f"d{name}"] = error(d.grad, t.grad)
    if dist.get_rank() == 0:
        print(f"{title}: output {actual.placements}")
        for name, e in wrong.items():
            heads = [h for h, x in enumerate(e.tolist()) if x > 1e-4]
            print(f"  {name}: max error {e.max():.1e}, wrong heads {heads} (expected: [])")
    bug |= any(e.max() > 1e-4 for e in wrong.values())

dist.barrier()
print("BUG" if bug else "ok", flush=True) if dist.get_rank() == 0 else None
os._exit(int(bug))
