"""context_parallel leaves F.scaled_dot_product_attention patched when entering it raises.

    torchrun --standalone --nproc-per-node 2 context-parallel-leaves-patch.py

Entering raises, for one, where numpy is not installed, which torch does not require. This file hides it
if it is there. Exits 1 where the bug shows, 0 where it does not.
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.modules["numpy"] = None  # import numpy: ModuleNotFoundError
for name in [name for name in sys.modules if name.startswith("numpy.")]:
    del sys.modules[name]

dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(rank)  # each rank attends to a batch of its own
q, k, v = (torch.randn(2, 4, 16, 8) for _ in range(3))
before = F.scaled_dot_product_attention
expected = before(q, k, v)
x = torch.randn(2, 4, 16, 8)
raised = "nothing"
try:
    with context_parallel(mesh, buffers=[x], buffer_seq_dims=[2]):
        pass
except Exception as error:
    raised = f"{type(error).__name__}: {error}"
patched = F.scaled_dot_product_attention is not before
with sdpa_kernel(SDPBackend.MATH):
    try:
        out = F.scaled_dot_product_attention(q, k, v)
        said = f"is off by {(out - expected).abs().max():.1e}"
    except Exception as error:
        said = f"raises {type(error).__name__}: {str(error).splitlines()[0]}"
bug = patched or x.shape != q.shape
if rank == 0:
    print(f"entering raised {raised}")
    print(f"after it, F.scaled_dot_product_attention is patched: {patched} (expected: False)")
    print(f"after it, the buffer has shape {tuple(x.shape)} (expected: {tuple(q.shape)})")
    print(f"F.scaled_dot_product_attention of plain tensors {said} (expected: below 1e-04)")
    print("BUG" if bug else "ok", flush=True)
dist.barrier()
os._exit(int(bug))
