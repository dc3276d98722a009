"""GQA with 6 query and 3 kv heads on 2 ranks: one rank raises, the other goes on as if all were well.

    torchrun --standalone --nproc-per-node 2 flash-gqa-one-rank-raises.py

The op is the one that F.scaled_dot_product_attention calls on CUDA with enable_gqa=True. So that no
GPU is needed, this file gives it a CPU kernel of its own, with the CUDA kernel's check of the heads;
DTensor's strategy for it is PyTorch's. Exits 1 where the bug shows, 0 where it does not.
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

library = torch.library.Library("aten", "IMPL", "CPU")


def flash(q, k, v, *args, **kwargs):
    if q.shape[1] % k.shape[1]:  # the text is the CUDA kernel's
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    seed, unused = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    sizes = q.shape[2], k.shape[2]
    out = scores.softmax(-1) @ v
    return out, scores.logsumexp(-1), None, None, *sizes, seed, unused, q.new_empty(0)


library.impl("_scaled_dot_product_flash_attention", flash)

dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = init_device_mesh("cpu", (2,))
store = dist.distributed_c10d._get_default_store()  # not a collective: one rank may have raised
torch.manual_seed(0)
q, k, v = (distribute_tensor(torch.randn(2, heads, 16, 8), mesh, [Shard(1)]) for heads in (6, 3, 3))
try:
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    said = f"returned {tuple(out.shape)} {out.placements}"
except RuntimeError as error:
    said = f"raised {str(error).splitlines()[0]}"
store.set(f"said-{rank}", said)
both = [store.get(f"said-{r}").decode() for r in range(2)]
bug = len({text.split()[0] for text in both}) > 1
if rank == 0:
    print("expected: both ranks return, or both raise before anything is computed")
    for r, text in enumerate(both):
        print(f"actual, rank {r}: {text}")
    print("BUG" if bug else "ok", flush=True)
store.set(f"done-{rank}", "")
store.wait([f"done-{r}" for r in range(2)])
os._exit(int(bug))
