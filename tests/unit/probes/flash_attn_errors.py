"""Run by test_flash_attn.py where the real flash_attn is: the error of every setting, unsharded, as
JSON.

Bound: 16 roundings of the largest value of a result: about one for each of the products,
exponentials and sums that a gradient goes through (5.4 is the worst that was measured, in float32).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from attncheck import standins
from attncheck.plugins import load_probe_file
from attncheck.probing import Operator, Setting
from attncheck.runner.inputs import cotangent, whole_tensors

ROUNDINGS = 16


def results(
    operator: Operator, setting: Setting, tensors: dict[str, torch.Tensor], exact: bool
) -> dict[str, torch.Tensor]:
    """`out` and `grad.*` of the reference in float64 (`exact`) or of the operator."""
    leaves = {}
    for spec in operator.tensors(setting):
        whole = tensors[spec.name]
        if exact and whole.is_floating_point():
            whole = whole.double()
        leaves[spec.name] = whole.detach().clone().requires_grad_(spec.requires_grad)
    out = (operator.reference if exact else operator.call)(setting, leaves)
    dout = cotangent(operator.name, setting, out.shape, tensors[next(iter(tensors))].dtype, 0)
    wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
    grads = torch.autograd.grad(out, [leaves[name] for name in wanted], dout.to(out.dtype))
    return {"out": out.detach(), **{f"grad.{n}": g for n, g in zip(wanted, grads, strict=True)}}


def errors(operator: Operator, setting: Setting) -> dict[str, list[float]]:
    tensors = whole_tensors(operator.name, setting, operator.tensors(setting), 0)
    want, got = (results(operator, setting, tensors, exact) for exact in (True, False))
    assert list(want) == list(got)
    out = {}
    for name, exact in want.items():
        assert got[name].shape == exact.shape
        eps = torch.finfo(got[name].dtype).eps
        error = float((got[name].double() - exact).abs().max())
        out[name] = [error, ROUNDINGS * eps * float(exact.abs().max())]
    return out


def main() -> None:
    standins.provide("flash_attn_2_cuda")
    probe = load_probe_file(Path(__file__).parents[3] / "probes" / "flash_attn.py")
    report = {
        f"{operator.name}/{setting.name}": errors(operator, setting)
        for operator in probe.operators
        for setting in operator.settings
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
