"""A learned attention bias fails after a frozen one of the same shape, and works without it.

    python efficient-backward-cache-key.py

The ops are those that F.scaled_dot_product_attention calls on CUDA for the EFFICIENT_ATTENTION backend.
So that no GPU is needed, this file gives them CPU kernels of its own; DTensor's strategies for them are
PyTorch's. One process. Exits 1 where the bug shows, 0 where it does not.
"""

import subprocess
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

library = torch.library.Library("aten", "IMPL", "CPU")


def efficient(q, k, v, bias, compute_log_sumexp, *args, **kwargs):
    scores = q @ k.mT * q.shape[-1] ** -0.5 + bias
    state = (torch.zeros((), dtype=torch.int64) for _ in range(2))
    return scores.softmax(-1) @ v, scores.logsumexp(-1), *state  # 32 queries: no padding of the lse


def efficient_backward(grad, q, k, v, bias, out, lse, seed, offset, dropout, mask, *args, **kwargs):
    scale = q.shape[-1] ** -0.5
    p = (q @ k.mT * scale + bias - lse[..., None]).exp()
    ds = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))
    return ds @ k * scale, ds.mT @ q * scale, p.mT @ grad, ds if mask[3] else None


library.impl("_scaled_dot_product_efficient_attention", efficient)
library.impl("_scaled_dot_product_efficient_attention_backward", efficient_backward)


def train(order):
    """One forward and backward for each: is the bias learned?"""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    torch.manual_seed(0)
    for learned in order:
        bias = torch.randn(2, 4, 32, 32)
        tensors = [*(torch.randn(2, 4, 32, 8) for _ in range(3)), bias]
        q, k, v, bias = (distribute_tensor(t, mesh, [Replicate()]) for t in tensors)
        for t in (q, k, v, bias) if learned else (q, k, v):
            t.requires_grad_()
        name = "learned" if learned else "frozen"
        try:
            op = torch.ops.aten._scaled_dot_product_efficient_attention
            op(q, k, v, bias, True)[0].sum().backward()
            grad = bias.grad
            print(f"  {name} bias: ok, its gradient is {grad if grad is None else grad.placements}")
            failed = learned and grad is None
        except Exception as error:
            print(f"  {name} bias: {type(error).__name__}: {str(error).splitlines()[0]}")
            failed = True
        if failed:
            sys.exit(1)


ORDERS = {"learned": [True], "frozen": [False], "both": [False, True], "reverse": [True, False]}
if len(sys.argv) > 1:
    train(ORDERS[sys.argv[1]])
    sys.exit(0)
bug = False
for order in ORDERS:  # the cache lives as long as the process: one for each order
    print(f"{order}:", flush=True)
    bug |= subprocess.run([sys.executable, __file__, order]).returncode != 0
print("expected: every order works")
print("BUG" if bug else "ok")
sys.exit(int(bug))
