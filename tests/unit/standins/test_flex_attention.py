"""Gradients of flex_attention on a CPU, once PyTorch's refusal is off: against float64 autograd."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as flex

from attncheck import standins
from attncheck.runner.reference import attention

TOLERANCE = {"rtol": 0, "atol": 1e-5}

SETTINGS = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "kv_heads": st.integers(1, 3),
        "groups": st.integers(1, 3),
        "sq": st.integers(1, 9),
        "sk": st.integers(1, 9),
        "scale": st.sampled_from([None, 0.3]),
        "window": st.sampled_from([None, (0, 0), (3, 1)]),
        "bias": st.booleans(),
    }
)


@pytest.fixture(scope="module", autouse=True)
def provided() -> None:
    assert standins.provide("flex_attention") == standins.provide("flex_attention")


@settings(max_examples=15, deadline=None)
@given(SETTINGS)
def test_against_float64_autograd(drawn: dict[str, Any]) -> None:
    random = torch.Generator().manual_seed(11)
    heads = drawn["kv_heads"] * drawn["groups"]
    shapes = [
        (drawn["batch"], heads, drawn["sq"], 8),
        *[(drawn["batch"], drawn["kv_heads"], drawn["sk"], 8)] * 2,
        (heads,),
    ]
    exact = [
        torch.randn(s, generator=random, dtype=torch.float64, requires_grad=True) for s in shapes
    ]
    leaves = [x.detach().float().requires_grad_() for x in exact]
    i, j = torch.arange(drawn["sq"])[:, None], torch.arange(drawn["sk"])[None, :]
    mask, visible, bias, score_mod = None, None, None, None
    if drawn["window"]:
        left, right = drawn["window"]
        visible = (j - i <= right) & (i - j <= left)
        mask = flex.create_block_mask(
            lambda b, h, i, j: (j - i <= right) & (i - j <= left),
            None, None, drawn["sq"], drawn["sk"], "cpu",
        )  # fmt: skip
    if drawn["bias"]:
        slopes = leaves[3]
        bias = exact[3][:, None, None] * (i - j)

        def score_mod(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            return score + slopes[h] * (i - j)

    out = flex.flex_attention(
        *leaves[:3], score_mod=score_mod, block_mask=mask, scale=drawn["scale"],
        enable_gqa=drawn["groups"] > 1,
    )  # fmt: skip
    want = attention(*exact[:3], scale=drawn["scale"], bool_mask=visible, bias=bias)
    torch.testing.assert_close(out.double(), want, **TOLERANCE)
    dout = torch.randn(out.shape, generator=random)
    count = 4 if drawn["bias"] else 3
    grads = torch.autograd.grad(out, leaves[:count], dout)
    expected = torch.autograd.grad(want, exact[:count], dout.double())
    for got, exact_grad in zip(grads, expected, strict=True):
        scale = max(1.0, float(exact_grad.abs().max()))
        torch.testing.assert_close(got.double() / scale, exact_grad / scale, **TOLERANCE)


@pytest.mark.skipif(not torch.__version__.startswith("2.13.0"), reason="2.10 refused nothing")
def test_pytorch_refuses_gradients_on_a_cpu_without_it() -> None:
    code = (
        "import torch; from torch.nn.attention.flex_attention import flex_attention\n"
        "from attncheck import standins\n"
        "q = torch.ones(1, 1, 2, 8, requires_grad=True)\n"
        "try: flex_attention(q, q, q)\n"
        "except NotImplementedError as error: assert 'does not support backward on CPU' in str(error)\n"
        "else: raise SystemExit(1)\n"
        "standins.provide('flex_attention')\n"
        "flex_attention(q, q, q).sum().backward()\n"
        "raise SystemExit(0 if q.grad is not None else 2)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_other_devices_are_still_checked() -> None:
    strange = SimpleNamespace(device=SimpleNamespace(type="abacus"), requires_grad=False)
    with pytest.raises(ValueError, match="only supported on"):
        flex._validate_device(strange, strange, strange)
