"""context_parallel refuses attention that is not causal, with its default load balancing.

    torchrun --standalone --nproc-per-node 2 context-parallel-not-causal.py

On CUDA, F.scaled_dot_product_attention calls this op inside context_parallel. So that no GPU is needed,
this file gives it a CPU kernel of its own, and calls it on the DTensors that context_parallel would
make; the ring is PyTorch's. Exits 1 where the bug shows, 0 where it does not.
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import (
    _cp_options,
    context_parallel_unshard,
)

flash_op = torch.ops.aten._scaled_dot_product_flash_attention
library = torch.library.Library("aten", "IMPL", "CPU")


def flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores += torch.full(scores.shape[-2:], -torch.inf).triu(1)
    seed, unused = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    sizes = q.shape[2], k.shape[2]
    out = scores.softmax(-1) @ v
    return out, scores.logsumexp(-1), None, None, *sizes, seed, unused, q.new_empty(0)


library.impl("_scaled_dot_product_flash_attention", flash)

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
bug = False
for title, causal, balance, tokens in (
    ("causal, default", True, True, 24),
    ("not causal, default", False, True, 24),
    ("not causal, private switch off", False, False, 24),
    ("not causal, default, parts that cannot be halved", False, True, 18),
):
    torch.manual_seed(0)
    whole = [torch.randn(2, 4, tokens, 8) for _ in range(3)]
    expected = flash(*whole, 0.0, causal)[0]
    parts = [t.clone() for t in whole]
    _cp_options.enable_load_balance = balance
    try:
        with context_parallel(mesh, buffers=parts, buffer_seq_dims=[2, 2, 2]):
            q, k, v = (DTensor.from_local(t, mesh, [Shard(2)]) for t in parts)
            out = flash_op(q, k, v, 0.0, causal)[0].to_local()
            whole_out = context_parallel_unshard(mesh, [out], [2])[0]
        said = f"max error {(whole_out - expected).abs().max():.0e}"
    except Exception as error:  # on both ranks alike
        bug = True
        said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if dist.get_rank() == 0:
        print(f"{title} ({tokens} tokens): {said}")
if dist.get_rank() == 0:
    print("expected: an error below 1e-05 for all")
    print("BUG" if bug else "ok", flush=True)
dist.barrier()
os._exit(int(bug))
