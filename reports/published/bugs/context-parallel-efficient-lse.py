"""context_parallel with EFFICIENT_ATTENTION fails unless every part is a multiple of 32 queries.

    torchrun --standalone --nproc-per-node 2 context-parallel-efficient-lse.py

On CUDA, F.scaled_dot_product_attention calls this op inside context_parallel. So that no GPU is needed,
this file gives it a CPU kernel of its own, with the log-sum-exp padded to a multiple of 32 queries as
the CUDA kernel and PyTorch's Meta kernel have it, and calls it on the DTensors that context_parallel
would make; the ring is PyTorch's. Exits 1 where the bug shows, 0 where it does not.
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import context_parallel_unshard

efficient_op = torch.ops.aten._scaled_dot_product_efficient_attention
library = torch.library.Library("aten", "IMPL", "CPU")


def efficient(q, k, v, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores += torch.full(scores.shape[-2:], -torch.inf).triu(1)
    padding = -q.shape[2] % 32
    lse = torch.nn.functional.pad(scores.logsumexp(-1), (0, padding), value=torch.inf)
    state = (torch.zeros((), dtype=torch.int64) for _ in range(2))
    return scores.softmax(-1) @ v, lse, *state


library.impl("_scaled_dot_product_efficient_attention", efficient)


dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
store = dist.distributed_c10d._get_default_store()  # not a collective: one rank may have raised
rank = dist.get_rank()
bug = False
for tokens in (128, 96, 48):
    torch.manual_seed(0)
    whole = [torch.randn(2, 4, tokens, 8) for _ in range(3)]
    expected = efficient(*whole, None, True, 0.0, True)[0]
    parts = [t.clone() for t in whole]
    try:
        with context_parallel(mesh, buffers=parts, buffer_seq_dims=[2, 2, 2]):
            q, k, v = (DTensor.from_local(t, mesh, [Shard(2)]) for t in parts)
            out = efficient_op(q, k, v, None, True, 0.0, True)[0].to_local()
            whole_out = context_parallel_unshard(mesh, [out], [2])[0]
        said = f"max error {(whole_out - expected).abs().max():.0e}"
    except RuntimeError as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    store.set(f"{tokens}-{rank}", said)
    for r in range(2):
        text = store.get(f"{tokens}-{r}").decode()
        bug |= text.startswith("RuntimeError")
        if rank == 0:
            print(f"{tokens} tokens, parts of {tokens // 2}, rank {r}: {text}")
if rank == 0:
    print("expected: an error below 1e-05 for all")
    print("BUG" if bug else "ok", flush=True)
store.set(f"done-{rank}", "")
store.wait([f"done-{r}" for r in range(2)])
os._exit(int(bug))
