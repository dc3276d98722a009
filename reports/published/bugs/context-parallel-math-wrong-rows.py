"""context_parallel with MATH: from some sizes on, what comes back is not this rank's part of the output.

    torchrun --standalone --nproc-per-node 3 context-parallel-math-wrong-rows.py

Exits 1 where the bug shows, 0 where it does not.
"""

import logging
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import context_parallel_unshard
from torch.nn.attention import SDPBackend, sdpa_kernel

logging.disable(logging.WARNING)
dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
torch.manual_seed(0)
bug = False
with sdpa_kernel(SDPBackend.MATH):
    for heads in (4, 6, 9, 12, 24):
        whole = [torch.randn(6, heads, 24, 16) for _ in range(3)]
        expected = F.scaled_dot_product_attention(*whole)
        parts = [t.clone() for t in whole]
        with context_parallel(mesh, buffers=parts, buffer_seq_dims=[2, 2, 2]):
            q_rows = parts[0].shape[2]
            out = F.scaled_dot_product_attention(*parts)
            again = context_parallel_unshard(mesh, [out], [2])[0]
        right = again.shape == expected.shape and torch.allclose(again, expected, atol=1e-5)
        bug |= not right
        if rank == 0:
            word = "right" if right else "WRONG"
            rows = f"{q_rows} rows of q on a rank, {out.shape[2]} of the output"
            print(f"{heads} heads: {rows}, {again.shape[2]} of 24 unsharded: {word}")
if rank == 0:
    print("BUG" if bug else "ok", flush=True)
dist.barrier()
os._exit(int(bug))
