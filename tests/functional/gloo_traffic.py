"""A torchrun worker: what the observer counted beside what gloo wrote to its sockets, per redistribution.

Prints one JSON object on rank 0: {name: {"counted": bytes, "sent": bytes, "collectives": [...]}}; the
larger of the ranks' numbers. `sent` is read from the kernel (TCP_INFO's tcpi_bytes_sent less its
tcpi_bytes_retrans, summed over this process's sockets), so it knows nothing of PyTorch.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, init_device_mesh

from attncheck.runner.observe import Observer, StateFile

# struct tcp_info (linux/tcp.h), since Linux 4.19: tcpi_bytes_sent, retransmissions included, lies 200 bytes
# in, and tcpi_bytes_retrans follows it.
BYTES_SENT = 200


def bytes_sent() -> int:
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as sock:
                info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                sent, again = struct.unpack_from("QQ", info, BYTES_SENT)
                total += sent - again
    return total


def wait_for_all(folder: Path, name: str, world: int) -> None:
    """A barrier that sends nothing itself. Once all are past it, nothing lies in a send buffer."""
    (folder / f"{name}.{dist.get_rank()}").touch()
    while len(list(folder.glob(f"{name}.*"))) < world:
        time.sleep(0.001)


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    observer = Observer(StateFile(Path(folder) / f"rank{rank}.state"))
    local = torch.randn(64, 128, 64)  # 2 MiB, against which gloo's headers are nothing
    cases: dict[str, tuple[Placement, Placement]] = {
        "all_gather": (Shard(0), Replicate()),
        "all_reduce": (Partial(), Replicate()),
        "reduce_scatter": (Partial(), Shard(0)),
        "all_to_all": (Shard(0), Shard(1)),
        "none": (Replicate(), Shard(0)),
    }
    found = {}
    for name, (before, after) in cases.items():
        tensor = DTensor.from_local(local, mesh, [before], run_check=False)
        dist.barrier()
        start = bytes_sent()
        with observer.watch() as trace:
            observer.phase = "forward"
            tensor.redistribute(placements=[after]).to_local().sum().item()
        wait_for_all(Path(folder), name, world)
        sent = bytes_sent() - start
        seen = trace.communication()
        numbers = torch.tensor([sum(c.bytes for c in seen), sent])
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        found[name] = {
            "counted": int(numbers[0]),
            "sent": int(numbers[1]),
            "collectives": [[c.name, c.count] for c in seen],
        }
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
