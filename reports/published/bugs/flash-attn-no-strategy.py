"""flash-attn 2: none of its four operators has a sharding strategy, so DTensors fail everywhere.

    python flash-attn-no-strategy.py

Needs flash-attn 2.7 or newer. Its compiled extension is not needed, and is replaced by an empty module
where there is none: the call fails before it is reached. One process. Exits 1 where the bug shows, 0
where it does not.
"""

import importlib.util
import sys
import types

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

if importlib.util.find_spec("flash_attn_2_cuda") is None:
    sys.modules["flash_attn_2_cuda"] = types.ModuleType("flash_attn_2_cuda")
import flash_attn

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
ops = torch.ops.flash_attn
options = (0.0, 0.25, False, -1, -1, 0.0, None)  # dropout, scale, causal, window, softcap, alibi


def shard(size, *placements, dtype=torch.float32):
    return distribute_tensor(torch.zeros(size, dtype=dtype), mesh, placements)


x = shard((2, 16, 4, 16), Shard(2))  # batch, sequence, heads, head_dim
lse = shard((2, 4, 16), Shard(1))
t = shard((32, 4, 16), Shard(1))  # tokens, heads, head_dim
t_lse = shard((4, 32), Shard(0))
cu = distribute_tensor(torch.tensor([0, 16, 32], dtype=torch.int32), mesh, [Replicate()])
failed = 0
for name, call in {
    "flash_attn_func": lambda: flash_attn.flash_attn_func(x, x, x),
    "flash_attn_varlen_func": lambda: flash_attn.flash_attn_varlen_func(t, t, t, cu, cu, 16, 16),
    "_flash_attn_backward": lambda: ops._flash_attn_backward(
        x, x, x, x, x, lse, x, x, x, *options, False
    ),
    "_flash_attn_varlen_backward": lambda: ops._flash_attn_varlen_backward(
        t, t, t, t, t, t_lse, t, t, t, cu, cu, 16, 16, *options, False
    ),
}.items():
    try:
        call()
        print(f"{name}: ok")
    except NotImplementedError as error:
        missing = "does not have a sharding strategy registered" in str(error)
        failed += missing
        print(f"{name}: {str(error).splitlines()[0] if missing else 'ok up to the kernel'}")
print(f"expected: all four reach the kernel (flash-attn {flash_attn.__version__})")
print("BUG" if failed else "ok")
sys.exit(int(failed > 0))
