"""context_parallel inside context_parallel: after the inner one, attention is silently local.

    torchrun --standalone --nproc-per-node 2 context-parallel-nested.py

Exits 1 where the bug shows, 0 where it does not.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import context_parallel_unshard
from torch.nn.attention import SDPBackend, sdpa_kernel

dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
whole = [torch.randn(2, 4, 16, 8) for _ in range(3)]
errors = {}
with sdpa_kernel(SDPBackend.MATH):
    expected = F.scaled_dot_product_attention(*whole)
    parts = [t.clone() for t in whole]
    other = torch.randn(2, 4, 16, 8)
    with context_parallel(mesh, buffers=parts, buffer_seq_dims=[2, 2, 2]):
        for when in ("before", "after"):
            out = F.scaled_dot_product_attention(*parts)
            out = context_parallel_unshard(mesh, [out], [2])[0]
            errors[when] = (out - expected).abs().max().item()
            with context_parallel(mesh, buffers=[other], buffer_seq_dims=[2]):
                pass
bug = errors["after"] > 1e-4
if rank == 0:
    for when, error in errors.items():
        print(f"{when} the inner context: max error {error:.1e} (expected: below 1e-04)")
    print("BUG" if bug else "ok", flush=True)
dist.barrier()
os._exit(int(bug))
