"""A tensor passed by keyword is never redistributed: a Partial attention mask is used half-summed.

    torchrun --standalone --nproc-per-node 2 keyword-tensors-not-redistributed.py

It starts itself again with one hash seed for all ranks: with several, they may choose different strategies
for this call and die of it, which is another bug (sdpa-hash-seed-divergence). Exits 1 where the bug shows,
0 where it does not.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

if os.environ.get("PYTHONHASHSEED") != "0":
    os.environ["PYTHONHASHSEED"] = "0"
    os.execv(sys.executable, [sys.executable, "-W", "ignore", *sys.argv])
dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
q, k, v = (torch.randn(2, 4, 16, 8) for _ in range(3))
parts = torch.randn(2, 2, 4, 16, 16)  # the mask is their sum, as behind a row-parallel linear
op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
expected = op(q, k, v, attn_mask=parts.sum(0))[0]

dq, dk, dv = (distribute_tensor(t, mesh, [Replicate()]) for t in (q, k, v))
mask = DTensor.from_local(parts[rank], mesh, [Partial()])
out = op(dq, dk, dv, attn_mask=mask)[0]
error = (out.full_tensor() - expected).abs().max()
mended = op(dq, dk, dv, attn_mask=mask.redistribute(placements=[Replicate()]))[0]
right = (mended.full_tensor() - expected).abs().max()
bug = bool(error > 1e-4)
if rank == 0:
    print(f"mask Partial: output {out.placements}, max error {error:.1e} (expected: below 1e-04)")
    print(f"mask redistributed by hand: output {mended.placements}, max error {right:.1e}")
    print("BUG" if bug else "ok", flush=True)
dist.barrier()
os._exit(int(bug))
