"""Attention ops of PyTorch itself that have no sharding strategy and refuse every DTensor.

    python attention-ops-without-strategy.py

Nested tensors, variable lengths (torch.nn.attention.varlen), out-of-tree devices and xformers come here.
No kernel is needed: the calls fail before one is reached. One process. Exits 1 where the bug shows, 0
where it does not.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
aten = torch.ops.aten


def whole(*size, dtype=torch.float32):
    return DTensor.from_local(torch.zeros(size, dtype=dtype), mesh, [Replicate()])


x, lse = whole(2, 32, 4, 8), whole(2, 4, 32)  # batch, sequence, heads, head_dim
y = whole(2, 4, 32, 8)  # batch, heads, sequence, head_dim
t = whole(64, 4, 8)  # tokens, heads, head_dim
cu = DTensor.from_local(torch.tensor([0, 32, 64], dtype=torch.int32), mesh, [Replicate()])
seed = whole(2, dtype=torch.uint64)
zero = whole(dtype=torch.int64)


def varlen():
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(t, t, t, cu, cu, 32, 32)


CALLS = {
    "aten._flash_attention_forward": lambda: aten._flash_attention_forward(
        x, x, x, None, None, 32, 32, 0.0, False, False
    ),
    "aten._flash_attention_backward": lambda: aten._flash_attention_backward(
        x, x, x, x, x, lse, None, None, 32, 32, 0.0, False, seed, zero
    ),
    "aten._efficient_attention_forward": lambda: aten._efficient_attention_forward(
        x, x, x, None, None, None, 32, 32, 0.0, 0, True
    ),
    "aten._efficient_attention_backward": lambda: aten._efficient_attention_backward(
        x, x, x, x, None, x, None, None, 32, 32, lse, 0.0, zero, zero, 0, False
    ),
    "aten._scaled_dot_product_fused_attention_overrideable": lambda: (
        aten._scaled_dot_product_fused_attention_overrideable(y, y, y)
    ),
    "torch.nn.attention.varlen.varlen_attn": varlen,
}
missing = 0
for name, call in CALLS.items():
    try:
        call()
        said = "ok"
    except (AttributeError, ImportError):
        said = "not in this torch"
    except Exception as error:
        said = str(error).splitlines()[0]
        if "does not have a sharding strategy registered" in said:
            missing += 1
            said = f"{type(error).__name__}: {said}"
        else:
            said = f"ok as far as DTensor goes ({type(error).__name__}: {said[:60]})"
    print(f"{name}: {said}")
print("expected: none lacks a strategy")
print("BUG" if missing else "ok")
sys.exit(int(missing > 0))
