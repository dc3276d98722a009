"""Run by test_xformers_ops.py where the real xformers is: prints what it saw as JSON.

`python xformers_session.py EXAMPLES`: hypothesis tries so many random settings of each pair of kernels.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from attncheck import standins
from attncheck.runner.reference import attention
from attncheck.standins import xformers_ops

SEEN: dict[str, Any] = {"worst": {}, "examples": {}}
EXAMPLES = settings(
    max_examples=int(sys.argv[1]),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def compare(pair: str, found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> None:
    """Note the worst error, relative to the largest value where that is above 1."""
    SEEN["examples"][pair] = SEEN["examples"].get(pair, 0) + 1
    for name, want in exact.items():
        assert found[name].shape == want.shape, (pair, name, found[name].shape, want.shape)
        size = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        error = (found[name].double() - want).abs().max().item() / size if want.numel() else 0.0
        assert math.isfinite(error), (pair, name)
        SEEN["worst"][pair] = max(SEEN["worst"].get(pair, 0.0), error)


def with_gradients(
    function: Callable[..., torch.Tensor], leaves: dict[str, torch.Tensor], dout: torch.Tensor
) -> dict[str, torch.Tensor]:
    out = function(**leaves)
    wanted = {n: t for n, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(out, list(wanted.values()), dout.to(out.dtype))
    return {"out": out.detach(), **{f"grad.{n}": g for n, g in zip(wanted, grads, strict=True)}}


def leaves_of(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}


sizes = st.integers(1, 9)
LENGTHS = st.lists(st.tuples(sizes, sizes), min_size=1, max_size=3)


@EXAMPLES
@given(
    st.data(), st.integers(1, 3), sizes, sizes, st.integers(1, 3), st.sampled_from([1, 7, 16, 24])
)
def cutlass_dense(data: Any, batch: int, rows: int, columns: int, heads: int, dim: int) -> None:
    """Through memory_efficient_attention itself, in float32: no bias, both triangles, a tensor."""
    from xformers.ops import fmha, memory_efficient_attention

    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    kind = data.draw(st.sampled_from(["none", "top_left", "bottom_right", "tensor"]))
    scale = data.draw(st.sampled_from([None, 0.3]))
    value_dim = data.draw(st.sampled_from([dim, 8]))
    q = torch.randn(batch, rows, heads, dim)
    k = torch.randn(batch, columns, heads, dim)
    v = torch.randn(batch, columns, heads, value_dim)
    tensors = {"q": q, "k": k, "v": v}
    masks: dict[str, Any] = {
        "none": None,
        "top_left": fmha.attn_bias.LowerTriangularMask(),
        "bottom_right": fmha.attn_bias.LowerTriangularFromBottomRightMask(),
    }
    if kind == "tensor":  # rows aligned in memory, as xformers asks for
        whole = torch.randn(batch, heads, rows, -(-columns // 8) * 8)
        tensors["bias"] = whole[..., :columns]

    def call(q: Any, k: Any, v: Any, bias: Any = None) -> torch.Tensor:
        if bias is not None:
            padded = torch.nn.functional.pad(bias, (0, -bias.shape[-1] % 8))
            bias = padded[..., : bias.shape[-1]]
        op = (fmha.cutlass.FwOp, fmha.cutlass.BwOp)
        out: torch.Tensor = memory_efficient_attention(
            q, k, v, attn_bias=masks.get(kind, bias), scale=scale, op=op
        )
        return out

    def exactly(q: Any, k: Any, v: Any, bias: Any = None) -> torch.Tensor:
        causal = kind if kind in ("top_left", "bottom_right") else None
        return attention(q, k, v, layout="bshd", causal=causal, scale=scale, bias=bias)

    dout = torch.randn(batch, rows, heads, value_dim)
    with xformers_ops.taking_the_cpu():
        found = with_gradients(call, leaves_of(**tensors), dout)
    double = {n: t.double() for n, t in tensors.items()}
    compare("cutlass", found, with_gradients(exactly, leaves_of(**double), dout))


@EXAMPLES
@given(st.integers(0, 2**20), LENGTHS, st.integers(1, 3), st.booleans(), st.booleans())
def cutlass_packed(
    seed: int, lengths: list[tuple[int, int]], heads: int, causal: bool, from_bottom_right: bool
) -> None:
    from xformers.ops import fmha, memory_efficient_attention

    torch.manual_seed(seed)
    if from_bottom_right:  # xformers asks for it
        lengths = [(rows, max(rows, columns)) for rows, columns in lengths]
    q_lengths, kv_lengths = ([pair[i] for pair in lengths] for i in (0, 1))
    q = torch.randn(1, sum(q_lengths), heads, 16)
    k, v = (torch.randn(1, sum(kv_lengths), heads, 16) for _ in range(2))
    mask = fmha.attn_bias.BlockDiagonalMask.from_seqlens(q_lengths, kv_lengths)
    if causal:
        mask = mask.make_causal_from_bottomright() if from_bottom_right else mask.make_causal()

    def call(q: Any, k: Any, v: Any) -> torch.Tensor:
        op = (fmha.cutlass.FwOp, fmha.cutlass.BwOp)
        out: torch.Tensor = memory_efficient_attention(q, k, v, attn_bias=mask, op=op)
        return out

    with xformers_ops.taking_the_cpu():
        found = with_gradients(call, leaves_of(q=q, k=k, v=v), q)
    kind = ("bottom_right" if from_bottom_right else "top_left") if causal else None
    exact = exact_packed(q, k, v, lengths, q, causal=kind)
    compare("cutlass packed", found, exact)


def exact_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: list[tuple[int, int]],
    dout: torch.Tensor,
    **flags: Any,
) -> dict[str, torch.Tensor]:
    starts_q, starts_k = (
        torch.tensor([0, *accumulate(pair[i] for pair in lengths)]) for i in (0, 1)
    )

    def exactly(q: Any, k: Any, v: Any) -> torch.Tensor:
        return attention(
            q.flatten(0, -3),
            k.flatten(0, -3),
            v.flatten(0, -3),
            layout="thd",
            cu_seqlens_q=starts_q,
            cu_seqlens_k=starts_k,
            **flags,
        ).reshape(dout.shape)

    return with_gradients(exactly, leaves_of(q=q.double(), k=k.double(), v=v.double()), dout)


@EXAMPLES
@given(
    st.sampled_from(["xformers_flash", "xformers_flash3"]),
    st.integers(0, 2**20),
    st.one_of(st.tuples(st.integers(1, 3), sizes, sizes), LENGTHS),
    st.sampled_from([(1, 1), (3, 3), (4, 2), (6, 1)]),
    st.booleans(),
    st.sampled_from([(-1, -1), (3, 2), (2, -1), (-1, 1)]),
    st.sampled_from([0.25, 0.5]),
)
def flash_ops(
    namespace: str,
    seed: int,
    shape: tuple[int, int, int] | list[tuple[int, int]],
    heads: tuple[int, int],
    causal: bool,
    window: tuple[int, ...],
    scale: float,
) -> None:
    """The ops themselves, which take float32 here: dense and packed, grouped heads, windows."""
    torch.manual_seed(seed)
    packing: tuple[Any, ...]
    if isinstance(shape, list):
        rows, columns = (sum(pair[i] for pair in shape) for i in (0, 1))
        lead: tuple[int, ...] = ()
        starts = [
            torch.tensor([0, *accumulate(pair[i] for pair in shape)], dtype=torch.int32)
            for i in (0, 1)
        ]
        longest = [max(pair[i] for pair in shape) for i in (0, 1)]
        packing = (*starts, *longest)
    else:
        batch, rows, columns = shape
        lead = (batch,)
        packing = (None, None, rows, columns)
    q = torch.randn(*lead, rows, heads[0], 16)
    k, v = (torch.randn(*lead, columns, heads[1], 16) for _ in range(2))
    found = run_flash(namespace, q, k, v, packing, causal, window, scale)
    if namespace == "xformers_flash":  # flash-attn 2: a side as long as all keys is unlimited
        window = tuple(-1 if side >= packing[-1] else side for side in window)
    flags = {"causal": "bottom_right" if causal else None, "window": window, "scale": scale}
    if isinstance(shape, list):
        exact = exact_packed(q, k, v, shape, q, **flags)
    else:

        def exactly(q: Any, k: Any, v: Any) -> torch.Tensor:
            return attention(q, k, v, layout="bshd", **flags)

        exact = with_gradients(exactly, leaves_of(q=q.double(), k=k.double(), v=v.double()), q)
    compare(namespace, found, exact)


def run_flash(
    namespace: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: tuple[Any, ...],
    causal: bool,
    window: tuple[int, ...],
    scale: float,
) -> dict[str, torch.Tensor]:
    """`out` and the gradients for dout = q."""
    ops = getattr(torch.ops, namespace)
    *starts, max_q, max_k = packing
    maxima = (max_q, max_k)
    if namespace == "xformers_flash":
        out, lse, rng = ops.flash_fwd(
            q, k, v, *starts, None, *maxima, 0.0, scale, causal, *window, False, None
        )
        grads = ops.flash_bwd(
            False, q, q, k, v, out, lse, *starts, *maxima, 0.0, scale, causal, *window, rng
        )
    else:
        out, lse = ops.flash_fwd(
            q, k, v, *starts, None, None, *maxima, 0.0, scale, causal,
            window_left=window[0], window_right=window[1],
        )  # fmt: skip
        grads = ops.flash_bwd(False, q, q, k, v, out, lse, *starts, *maxima, scale, causal, *window)
    return {"out": out, **dict(zip(("grad.q", "grad.k", "grad.v"), grads, strict=True))}


def chosen() -> dict[str, list[str]]:
    """Which kernels dispatch picks, forward and backward."""
    from xformers.ops import fmha

    def pick(dtype: torch.dtype, dim: int, bias: Any = None, columns: int = 8) -> list[str]:
        q = torch.randn(1, 8, 2, dim, dtype=dtype)
        k, v = (torch.randn(1, columns, 2, dim, dtype=dtype) for _ in range(2))
        inputs = fmha.Inputs(q, k, v, attn_bias=bias)
        with xformers_ops.taking_the_cpu():
            ops = fmha._dispatch_fw(inputs, True), fmha._dispatch_bw(inputs, None)
        return [op.__module__.rpartition(".")[2] for op in ops]

    half, lower = torch.bfloat16, fmha.attn_bias.LowerTriangularMask()
    return {
        "float32": pick(torch.float32, 64),
        "bfloat16": pick(half, 64),
        "head_dim 32": pick(half, 32),
        "head_dim 16": pick(half, 16),
        "causal": pick(half, 64, lower),
        "causal of unequal lengths": pick(half, 64, lower, 16),
        "tensor": pick(half, 64, torch.zeros(1, 2, 8, 8, dtype=half)),
    }


def refusal(function: Callable[[], Any]) -> str:
    try:
        function()
    except (NotImplementedError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def scope() -> dict[str, Any]:
    """What is refused before, inside and after, and whether everything is put back."""
    from xformers.ops import fmha, memory_efficient_attention

    def call(dtype: torch.dtype = torch.bfloat16, op: Any = None) -> None:
        q = torch.randn(2, 8, 2, 64, dtype=dtype, requires_grad=True)
        memory_efficient_attention(q, q, q, op=op).sum().backward()

    classes = [op for m in (fmha.cutlass, fmha.flash, fmha.flash3) for op in (m.FwOp, m.BwOp)]
    owners = [*classes, fmha, torch.version, torch.cuda]
    state = [dict(vars(owner)) for owner in owners]
    before = refusal(call)
    with xformers_ops.taking_the_cpu():
        inside = refusal(call)
        splitk = refusal(lambda: call(op=(fmha.triton_splitk.FwOp, None)))
        float64 = refusal(lambda: call(torch.float64))
    return {
        "before": before,
        "inside": inside,
        "splitk": splitk,
        "float64": float64,
        "after": refusal(call),
        "put back": state == [dict(vars(owner)) for owner in owners],
    }


def dropout_gaps() -> dict[str, float]:
    """|<dout, out(v)> - <dv, v>| through autograd: 0 if backward drops what forward dropped."""
    from xformers.ops import fmha, memory_efficient_attention

    gaps = {}
    for module in (fmha.cutlass, fmha.flash):
        q, k, dout = (torch.randn(2, 16, 4, 32, dtype=torch.bfloat16) for _ in range(3))
        v = torch.randn_like(q).requires_grad_()
        with xformers_ops.taking_the_cpu():
            op = (module.FwOp, module.BwOp)
            out = memory_efficient_attention(q, k, v, p=0.3, op=op)
            (dv,) = torch.autograd.grad(out, v, dout)
        products, others = (dout * out).double(), (dv * v).double()
        gap = (products.sum() - others.sum()).abs() / products.abs().sum()
        gaps[module.__name__.rpartition(".")[2]] = gap.item()
    return gaps


def opcheck_all() -> dict[str, str]:
    """`torch.library.opcheck` of the flash ops: schemas, and fake kernels against real ones."""
    q, dout = (torch.randn(2, 9, 4, 16) for _ in range(2))
    k, v = (torch.randn(2, 13, 4, 16) for _ in range(2))
    ops = torch.ops.xformers_flash
    forward = (q, k, v, None, None, None, 9, 13, 0.0, 0.25, True, -1, -1, False, None)
    out, lse, rng = ops.flash_fwd(*forward)
    backward = (
        False, dout, q, k, v, out, lse, None, None, 9, 13, 0.0, 0.25, True, -1, -1, rng,
    )  # fmt: skip
    results = {}
    for op, arguments in ((ops.flash_fwd, forward), (ops.flash_bwd, backward)):
        for check in ("test_schema", "test_faketensor"):
            found = opcheck(op.default, arguments, test_utils=check, raise_exception=False)
            results[f"{op.__name__} {check}"] = str(found[check])
    return results


if __name__ == "__main__":
    SEEN["sentence"] = standins.provide("xformers")
    standins.provide("xformers")  # twice is harmless
    from xformers.ops import fmha

    SEEN["flash"] = fmha.flash.FwOp.NAME
    cutlass_dense()
    cutlass_packed()
    flash_ops()
    SEEN |= {
        "chosen": chosen(),
        "scope": scope(),
        "dropout": dropout_gaps(),
        "opcheck": opcheck_all(),
        "loaded": sorted(set(sys.modules) & {"flash_attn_3", "flash_attn_3._C"}),
    }
    print(json.dumps(SEEN))
