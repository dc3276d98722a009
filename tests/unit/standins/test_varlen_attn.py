"""`torch.nn.attention.varlen` on the stand-in: against float64 autograd, and PyTorch's own checks of its
ops."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attncheck import standins
from attncheck.runner.reference import attention_lse

varlen = pytest.importorskip("torch.nn.attention.varlen")

TOLERANCE = {"rtol": 0, "atol": 1e-5}
LENGTHS_Q, LENGTHS_K = (9, 4), (5, 13)


@pytest.fixture(scope="module", autouse=True)
def provided() -> None:
    assert standins.provide("varlen_attn") == standins.provide("varlen_attn")


def starts(lengths: tuple[int, ...] | list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def inputs(dtype: torch.dtype = torch.float32, kv_heads: int = 4) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(7)
    shapes = [(sum(LENGTHS_Q), 4, 16), *[(sum(LENGTHS_K), kv_heads, 16)] * 2]
    return [torch.randn(s, generator=random).to(dtype).requires_grad_() for s in shapes]


def packing() -> tuple[torch.Tensor, torch.Tensor, int, int]:
    return starts(LENGTHS_Q), starts(LENGTHS_K), max(LENGTHS_Q), max(LENGTHS_K)


SETTINGS = st.fixed_dictionaries(
    {
        "lengths": st.lists(
            st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4
        ),
        "kv_heads": st.integers(1, 3),
        "groups": st.integers(1, 3),
        "scale": st.sampled_from([None, 0.3]),
        # Causal, sliding, both, one-sided, none.
        "window": st.sampled_from([(-1, -1), (-1, 0), (3, 0), (3, 2), (0, -1)]),
    }
)


@settings(max_examples=25, deadline=None)
@example({"lengths": [(4, 1)], "kv_heads": 1, "groups": 1, "scale": None, "window": (3, 2)})
@given(SETTINGS)
def test_against_float64_autograd(drawn: dict[str, Any]) -> None:
    random = torch.Generator().manual_seed(11)
    lengths_q, lengths_k = zip(*drawn["lengths"], strict=True)
    heads = drawn["kv_heads"] * drawn["groups"]
    shapes = [(sum(lengths_q), heads, 8), *[(sum(lengths_k), drawn["kv_heads"], 8)] * 2]
    exact = [
        torch.randn(s, generator=random, dtype=torch.float64, requires_grad=True) for s in shapes
    ]
    leaves = [x.detach().float().requires_grad_() for x in exact]
    cu = starts(lengths_q), starts(lengths_k)
    flags = {
        "scale": drawn["scale"],
        "window_size": drawn["window"],
        "enable_gqa": drawn["groups"] > 1,
        "return_aux": varlen.AuxRequest(lse=True),
    }
    arguments = (*cu, max(lengths_q), max(lengths_k))
    out, lse = varlen.varlen_attn(*leaves, *arguments, **flags)
    # A side as long as all keys is unlimited in the kernel, whatever the queries.
    window = tuple(-1 if side >= max(lengths_k) else side for side in drawn["window"])
    want, want_lse = attention_lse(
        *exact, layout="thd", scale=drawn["scale"], window=window, cu_seqlens_q=cu[0],
        cu_seqlens_k=cu[1], empty_lse=float("inf"),
    )  # fmt: skip
    torch.testing.assert_close(out.double(), want, **TOLERANCE)
    torch.testing.assert_close(lse.double(), want_lse, **TOLERANCE)
    dout = torch.randn(out.shape, generator=random)
    grads = torch.autograd.grad(out, leaves, dout)
    for got, exact_grad in zip(grads, torch.autograd.grad(want, exact, dout.double()), strict=True):
        torch.testing.assert_close(got.double(), exact_grad, **TOLERANCE)

    buffer = torch.full_like(out, torch.nan)
    detached = [x.detach() for x in leaves]
    written, lse_again = varlen.varlen_attn_out(buffer, *detached, *arguments, **flags)
    assert written is buffer
    torch.testing.assert_close(buffer, out.detach(), rtol=0, atol=0)
    torch.testing.assert_close(lse_again, lse.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtypes(dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype)
    aux = varlen.AuxRequest(lse=True)
    out, lse = varlen.varlen_attn(q, k, v, *packing(), return_aux=aux)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert lse.shape == (
        4,
        sum(LENGTHS_Q),
    )  # as the kernels have it; the docstring says (tokens, heads)
    want, _ = attention_lse(
        *(x.double() for x in (q, k, v)), layout="thd", cu_seqlens_q=packing()[0],
        cu_seqlens_k=packing()[1],
    )  # fmt: skip
    torch.testing.assert_close(out.double(), want, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_only_the_used_keys_count() -> None:
    q, k, v = (x.detach() for x in inputs())
    used = torch.tensor([3, 8], dtype=torch.int32)
    out = varlen.varlen_attn(q, k, v, *packing(), seqused_k=used)
    rows = [*range(3), *range(5, 13)]
    shorter = varlen.varlen_attn(q, k[rows], v[rows], packing()[0], starts([3, 8]), 9, 8)
    torch.testing.assert_close(out, shorter)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_opcheck_of_pytorchs_own_ops(kv_heads: int) -> None:
    """Schema, fake kernels and autograd formula are PyTorch's: they fit what the stand-in returns."""
    arguments = (*inputs(kv_heads=kv_heads), *packing())
    options = {"enable_gqa": kv_heads != 4, "window_size": [3, 2]}
    torch.library.opcheck(torch.ops.torch_attn._varlen_attn.default, arguments, options)
    detached = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    torch.library.opcheck(
        torch.ops.torch_attn._varlen_attn_out.default,
        (torch.empty_like(detached[0]), *detached),
        options,
    )


@pytest.mark.parametrize(
    ("out", "text"),
    [
        (torch.empty(13, 4, 8), "out must have shape"),
        (torch.empty(13, 4, 16, dtype=torch.bfloat16), "same dtype as inputs"),
        (torch.empty(13, 16, 4).transpose(1, 2), "contiguous last dimension"),
    ],
)
def test_an_output_that_does_not_fit_is_refused(out: torch.Tensor, text: str) -> None:
    q, k, v = (x.detach() for x in inputs())
    with pytest.raises(RuntimeError, match=text):
        varlen.varlen_attn_out(out, q, k, v, *packing())


def test_wrong_lengths_are_refused() -> None:
    q, k, v = inputs()
    cu_q, cu_k, *lengths = packing()
    with pytest.raises(RuntimeError, match="cu_seqlens_q must have dtype int32"):
        varlen.varlen_attn(q, k, v, cu_q.long(), cu_k, *lengths)
