"""Run by test_flash_attn_2_cuda.py where the real flash_attn is: prints what it saw as JSON."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch.library import opcheck

from attncheck import standins
from attncheck.standins import flash_attn_package


def opcheck_all() -> dict[str, str]:
    """`torch.library.opcheck` on each op: its result, the same for all of its tests."""
    ops = torch.ops.flash_attn
    q, dout = (torch.randn(2, 9, 4, 16) for _ in range(2))
    k, v = (torch.randn(2, 13, 2, 16) for _ in range(2))
    flags = (0.0, 0.25, True, -1, -1, 0.0, None)
    out, lse, _, rng = ops._flash_attn_forward(q, k, v, *flags, False)
    buffers = tuple(torch.empty_like(t) for t in (q, k, v))
    packed = tuple(t.flatten(0, 1) for t in (q, k, v))
    cu = (torch.tensor([0, 9, 18], dtype=torch.int32), torch.tensor([0, 13, 26], dtype=torch.int32))
    packing = (*cu, 9, 13)
    out2, lse2, _, rng2 = ops._flash_attn_varlen_forward(*packed, *packing, *flags, False)
    buffers2 = tuple(torch.empty_like(t) for t in packed)
    calls: dict[str, tuple[Any, ...]] = {
        "_flash_attn_forward": (q, k, v, *flags, False),
        "_flash_attn_backward": (dout, q, k, v, out, lse, *buffers, *flags, False, rng),
        "_flash_attn_varlen_forward": (*packed, *packing, *flags, False),
        "_flash_attn_varlen_backward": (
            dout.flatten(0, 1), *packed, out2, lse2, *buffers2, *packing, *flags, False, rng2,
        ),
    }  # fmt: skip
    results = {}
    for name, arguments in calls.items():
        states = set(opcheck(getattr(ops, name).default, arguments).values())
        results[f"flash_attn.{name}.default"] = ", ".join(sorted(states))
    return results


def dropout_gap() -> float:
    """|<dout, out(v)> - <dv, v>| through autograd: 0 if backward drops what forward dropped."""
    from flash_attn import flash_attn_func

    q, k, dout = (torch.randn(2, 9, 4, 16) for _ in range(3))
    v = torch.randn(2, 9, 4, 16, requires_grad=True)
    out = flash_attn_func(q, k, v, dropout_p=0.3)
    (dv,) = torch.autograd.grad(out, v, dout)
    products, others = (dout * out).detach(), (dv * v).detach()
    return abs(float(products.sum() - others.sum())) / float(products.abs().sum())


def softmax_d_shape() -> list[int]:
    q = torch.randn(2, 9, 4, 16)
    flags = (0.0, 0.25, False, -1, -1, 0.0, None)
    out, lse, _, rng = torch.ops.flash_attn._flash_attn_forward(q, q, q, *flags, False)
    d = torch.ops.flash_attn._flash_attn_backward(
        q, q, q, q, out, lse, None, None, None, *flags, False, rng
    )
    return list(d.shape)


def main() -> None:
    torch.manual_seed(0)
    standins.provide("flash_attn_2_cuda")
    ops = flash_attn_package.register_cpu_kernels()  # twice is harmless
    import flash_attn

    report = {
        "version": flash_attn.__version__,
        "ops": list(ops),
        "dropout_gap": dropout_gap(),
    }
    if ops:
        report |= {"opcheck": opcheck_all(), "softmax_d_shape": softmax_d_shape()}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
