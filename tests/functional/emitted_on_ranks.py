"""A module that attncheck fix wrote, on two gloo ranks of any torch from 2.6 on, without attncheck.

    python -c "from attncheck.fixes import emit; from pathlib import Path; print(emit.write_known(Path('.')))"
    /other/venv/bin/python tests/functional/emitted_on_ranks.py fixes/known_*.py

`F.scaled_dot_product_attention` on DTensors is used once without the module, then with it: sharded by batch,
heads and sequence, GQA, groups that the ranks do not divide, one kv head; causal after not causal and the
reverse; forward and backward. Prints one JSON object: what became of the ops, the largest error against whole
tensors, and what PyTorch itself refuses (GQA goes through other ops up to 2.6).
"""

import importlib.util
import json
import os
import socket
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

HEADS = ((8, 8), (8, 4), (9, 3), (8, 1))


def load(path):
    spec = importlib.util.spec_from_file_location("emitted", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["emitted"] = module
    spec.loader.exec_module(module)
    return module


def first_line(call):
    try:
        call()
    except (RuntimeError, NotImplementedError) as error:
        return str(error).strip().split("\n")[0]
    return ""


def compared(mesh, heads, kv_heads, dim, causal):
    """The largest error of the output and the gradients against whole tensors."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    whole = [torch.randn(4, n, 6, 16, requires_grad=True) for n in (heads, kv_heads, kv_heads)]
    kv = [Replicate()] if kv_heads == 1 and dim == 1 else [Shard(dim)]
    placed = [
        distribute_tensor(x.detach(), mesh, p).requires_grad_()
        for x, p in zip(whole, ([Shard(dim)], kv, kv), strict=True)
    ]
    options = {"is_causal": causal, "enable_gqa": heads != kv_heads}
    want, got = (F.scaled_dot_product_attention(*x, **options) for x in (whole, placed))
    weight = torch.randn_like(want)
    loss = (got * distribute_tensor(weight, mesh, got.placements)).sum()
    pairs = zip(
        (got, *torch.autograd.grad(loss, placed)),
        (want, *torch.autograd.grad((want * weight).sum(), whole)),
        strict=True,
    )
    return max(float((a.full_tensor() - b).detach().abs().max()) for a, b in pairs)


def work(rank, ranks, path, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (ranks,))
    x = distribute_tensor(torch.randn(4, 8, 6, 16), mesh, [Shard(1)])
    said = {"torch": torch.__version__}
    said["before"] = first_line(lambda: F.scaled_dot_product_attention(x, x, x, is_causal=True))
    module = load(path)
    said["ops"] = module.register(False)
    refused = {}
    errors = []
    for heads, kv_heads in HEADS:
        for dim in (0, 1, 2):
            for causal in (False, True, False):
                try:
                    errors.append(compared(mesh, heads, kv_heads, dim, causal))
                except RuntimeError as error:
                    what = str(error).strip().split("\n")[0]
                    refused[what] = refused.get(what, 0) + 1
    said |= {"worst": max(errors), "compared": len(errors), "refused": refused}
    module.unregister()
    said["after"] = first_line(lambda: F.scaled_dot_product_attention(x, x, x, is_causal=True))
    if rank == 0:
        print(json.dumps(said))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo aborts in one teardown of five


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (2, sys.argv[1], port), nprocs=2)
