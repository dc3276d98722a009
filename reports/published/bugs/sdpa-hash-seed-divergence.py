"""Ranks with different hash seeds redistribute differently for one call: they wait for each other or die.

    python sdpa-hash-seed-divergence.py

Python chooses a hash seed for every process, so for every rank, unless PYTHONHASHSEED is set. This file
starts one process for each of several seeds, as a rank of a job of 2, on PyTorch's fake process group
(no other rank is needed, nothing waits), and prints which collectives it would ask for. Exits 1 where
they differ, 0 where they do not.
"""

import os
import subprocess
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.testing._internal.distributed.fake_pg  # the process group "fake"


def rank_of_a_job():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate
    from torch.distributed.tensor.debug import CommDebugMode

    dist.init_process_group("fake", rank=0, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    q, k, v = (
        DTensor.from_local(torch.randn(2, 4, 16, 8), mesh, [p])
        for p in (Partial(), Replicate(), Replicate())
    )
    with CommDebugMode() as mode:
        out = F.scaled_dot_product_attention(q, k, v)
        placements = out.placements
        out.full_tensor()
    counts = {str(op).split(".")[-1]: n for op, n in mode.get_comm_counts().items()}
    print(f"output {placements}; collectives up to its full_tensor(): {counts}")


if len(sys.argv) > 1:
    rank_of_a_job()
    sys.exit(0)
seen = {}
for seed in ("5", "6", "7"):
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    command = [sys.executable, "-W", "ignore", __file__, "rank"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seen.setdefault(run.stdout.strip(), []).append(seed)
for text, seeds in seen.items():
    print(f"PYTHONHASHSEED {', '.join(seeds)}: {text}")
print("expected: one line, whatever the seed")
bug = len(seen) > 1
print("BUG" if bug else "ok")
sys.exit(int(bug))
