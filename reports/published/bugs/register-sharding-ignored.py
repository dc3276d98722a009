"""register_sharding is silently ignored for an op that has a single-dim strategy.

    python register-sharding-ignored.py

One process. Exits 1 where the bug shows, 0 where it does not.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import register_sharding

aten = torch.ops.aten
asked = []


@register_sharding(aten.bmm.default)
def only_replicated(x, y):
    asked.append("bmm")
    return [([Replicate()], [Replicate(), Replicate()])]


@register_sharding(aten._scaled_dot_product_flash_attention.default)
def only_replicated_flash(q, k, v, *args, **kwargs):
    asked.append("flash")
    whole = Replicate()
    return [([whole, whole, None, None, None, None, whole, None, whole], [whole] * 3)]


# A CPU kernel for a CUDA op; its values do not matter.
library = torch.library.Library("aten", "IMPL", "CPU")


def flash(q, k, v, *args, **kwargs):
    seed, unused = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    sizes = q.shape[2], k.shape[2]
    return q.clone(), q[..., 0].clone(), None, None, *sizes, seed, unused, q.new_empty(0)


library.impl("_scaled_dot_product_flash_attention", flash)

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
x = distribute_tensor(torch.randn(2, 16, 16), mesh, [Shard(0)])
q = distribute_tensor(torch.randn(2, 4, 16, 8), mesh, [Shard(0)])
bug = False
flash_op = aten._scaled_dot_product_flash_attention.default
for name, op, out in (
    ("bmm", aten.bmm.default, torch.bmm(x, x)),
    ("flash", flash_op, flash_op(q, q, q)[0]),
):
    propagator = DTensor._op_dispatcher.sharding_propagator
    single = op in getattr(propagator, "op_single_dim_strategy_funcs", {})
    ignored = name not in asked
    bug |= ignored
    print(
        f"{op}: has a single-dim strategy: {single}; my function was called: {not ignored}; "
        f"output {out.placements}"
    )
print("expected: my function is called for both, and both outputs are (Replicate(),)")
print("BUG" if bug else "ok")
sys.exit(int(bug))
