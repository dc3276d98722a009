"""flash-attn 2: the backward of the packed functions fails on DTensors even with strategies registered.

    python flash-attn-qkvpacked-backward.py

Needs flash-attn 2.7 or newer. No GPU is needed: this file gives its two dense operators CPU kernels and
sharding strategies of its own. With them flash_attn_func works forward and backward. One process. Exits 1
where the bug shows, 0 where it does not.
"""

import importlib.util
import sys
import types

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import register_sharding

if importlib.util.find_spec("flash_attn_2_cuda") is None:
    sys.modules["flash_attn_2_cuda"] = types.ModuleType("flash_attn_2_cuda")
import flash_attn

ops = torch.ops.flash_attn
library = torch.library.Library("flash_attn", "IMPL", "CPU")


def scores(q, k, scale):
    return torch.einsum("bihd,bjhd->bhij", q, k) * scale


def forward(q, k, v, dropout_p, scale, *args):
    s = scores(q, k, scale)
    out = torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v)
    return out, s.logsumexp(-1), q.new_empty(0), torch.zeros(2, dtype=torch.int64)


def backward(dout, q, k, v, out, lse, dq, dk, dv, dropout_p, scale, *args):
    p = (scores(q, k, scale) - lse[..., None]).exp()
    d = (dout * out).sum(-1).transpose(1, 2)
    ds = p * (torch.einsum("bihd,bjhd->bhij", dout, v) - d[..., None]) * scale
    dq.copy_(torch.einsum("bhij,bjhd->bihd", ds, k))
    dk.copy_(torch.einsum("bhij,bihd->bjhd", ds, q))
    dv.copy_(torch.einsum("bhij,bihd->bjhd", p, dout))
    return d


library.impl("_flash_attn_forward", forward)
library.impl("_flash_attn_backward", backward)
R, H, L = Replicate(), Shard(2), Shard(1)  # heads: dim 2 of q, k, v, dim 1 of the log-sum-exp


@register_sharding(ops._flash_attn_forward.default)
def forward_strategy(q, k, v, *args):
    rest = [None] * len(args)
    return [([R, R, R, R], [R, R, R, *rest]), ([H, L, R, R], [H, H, H, *rest])]


@register_sharding(ops._flash_attn_backward.default)
def backward_strategy(*args):
    rest = [None] * (len(args) - 10) + [R]  # the last one is the RNG state
    return [([R], [R] * 9 + rest), ([L], [H] * 5 + [L] + [H] * 3 + rest)]


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
torch.manual_seed(0)
qkv = torch.randn(2, 16, 3, 4, 16)
failed = 0
for name, function, tensors, placement in (
    ("flash_attn_func", flash_attn.flash_attn_func, qkv.unbind(2), H),
    ("flash_attn_qkvpacked_func", flash_attn.flash_attn_qkvpacked_func, [qkv], Shard(3)),
    ("flash_attn_kvpacked_func", flash_attn.flash_attn_kvpacked_func,
     [qkv[:, :, 0], qkv[:, :, 1:]], None),
):  # fmt: skip
    placements = [placement] * len(tensors) if placement else [H, Shard(3)]
    parts = [
        distribute_tensor(t.contiguous(), mesh, [p]).requires_grad_()
        for t, p in zip(tensors, placements, strict=True)
    ]
    done = "before forward"
    try:
        out = function(*parts)
        done = "forward"
        out.sum().backward()
        print(f"{name}: forward and backward ok, gradient {parts[0].grad.placements}")
    except Exception as error:
        failed += 1
        print(f"{name}: failed after {done}: {type(error).__name__}: {str(error)[:90]} ...")
print(f"expected: all work forward and backward (flash-attn {flash_attn.__version__})")
print("BUG" if failed else "ok")
sys.exit(int(failed > 0))
