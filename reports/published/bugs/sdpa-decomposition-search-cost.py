"""The first F.scaled_dot_product_attention of each new shape on CPU DTensors takes seconds.

    python sdpa-decomposition-search-cost.py

DTensor has no strategy for the op and traces its decomposition for every combination of input
placements. One process. Exits 1 where more than 10 traces are made for one call, 0 where not; the
seconds are printed and judged by nobody.
"""

import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

try:
    from torch.distributed.tensor._decompositions import DecompShardingStrategy
except ImportError:  # before 2.11
    print("this torch has no decomposition-based propagation\nok")
    sys.exit(0)

traces = 0
trace = DecompShardingStrategy._propagate_through_decomp


def counted(*args, **kwargs):
    global traces
    traces += 1
    return trace(*args, **kwargs)


DecompShardingStrategy._propagate_through_decomp = counted
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
most = 0
for call in ("first", "second"):
    q = distribute_tensor(torch.randn(2, 4, 16, 8), mesh, [Shard(1)])
    traces, start = 0, time.perf_counter()
    out = F.scaled_dot_product_attention(q, q, q)
    seconds = time.perf_counter() - start
    most = max(most, traces)
    print(f"{call} call: {traces} traces of the decomposition, {seconds:.2f} s")
print("expected: a handful of traces, milliseconds")
print("BUG" if most > 10 else "ok")
sys.exit(int(most > 10))
