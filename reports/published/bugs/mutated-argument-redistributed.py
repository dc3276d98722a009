"""DTensor redistributes an argument that the op writes to: the result lands in a temporary and is lost.

    torchrun --standalone --nproc-per-node 2 mutated-argument-redistributed.py

Attention backwards write dq, dk and dv into buffers of the caller (flash_attn::_flash_attn_backward
does). Exits 1 where the bug shows, 0 where it does not.
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import register_sharding


@torch.library.custom_op("demo::double_into", mutates_args=("out",))
def double_into(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    out.copy_(2 * x)
    return x.sum(-1)


@double_into.register_fake
def _(x, out):
    return x.new_empty(x.shape[:-1])


@register_sharding(torch.ops.demo.double_into.default)
def strategy(x, out):
    return [([Replicate()], [Replicate(), Replicate()])]


dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
whole = torch.randn(4, 8)
bug = False
for title, placement in (("Replicate()", Replicate()), ("Shard(0)", Shard(0))):
    x = distribute_tensor(whole, mesh, [placement])
    out = distribute_tensor(torch.full((4, 8), -1.0), mesh, [placement])
    try:
        torch.ops.demo.double_into(x, out)
        error = (out.full_tensor() - 2 * whole).abs().max()
        untouched = bool((out.full_tensor() == -1).all())
        bug |= bool(error > 1e-6)
        said = f"max error {error:.1e}, the buffer was never written: {untouched}"
    except RuntimeError as error:  # what one would wish for; on both ranks alike
        said = f"refused: {str(error).splitlines()[0]}"
    if dist.get_rank() == 0:
        print(f"x and out {title}, the strategy wants Replicate(): {said}")
if dist.get_rank() == 0:
    print("expected: no error, or an exception")
    print("BUG" if bug else "ok", flush=True)
dist.barrier()
os._exit(int(bug))
