"""`F.scaled_dot_product_attention` is taken as CUDA would choose: by its documented rules, to its values."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from attncheck import standins
from attncheck.audit.sdpa import AsOnCuda
from attncheck.runner import compat
from attncheck.runner.compat import TorchDispatchMode

standins.provide("aten_attention")  # CPU kernels of the fused ops

FLASH, EFFICIENT, MATH, CUDNN = "flash", "efficient", "math", "cudnn"
OPS = {
    "aten._scaled_dot_product_flash_attention.default": FLASH,
    "aten._scaled_dot_product_efficient_attention.default": EFFICIENT,
    "aten._scaled_dot_product_cudnn_attention.default": CUDNN,
    "aten.bmm.default": MATH,
}


class Ops(TorchDispatchMode):
    """Which of the kernels an op belongs to that was run; each call of F runs those of one."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kernel = OPS.get(compat.op_name(func))
        if kernel is not None:
            self.kernels.add(kernel)
        return func(*args, **(kwargs or {}))


def attended(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Nobody's."""


def route(*args: Any, **kwargs: Any) -> tuple[str, torch.Tensor]:
    """The kernel that stood for a call, and what it returned."""
    mode = AsOnCuda(attended)
    with Ops() as ops, mode:
        out = F.scaled_dot_product_attention(*args, **kwargs)
    (kernel,) = ops.kernels
    assert mode.chosen == {kernel: 1}
    return kernel, out


def tensors(
    *,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 4,
    tokens: int = 16,
    kv_tokens: int = 16,
    head_dim: int = 32,
    v_head_dim: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(7)

    def one(heads: int, tokens: int, width: int) -> torch.Tensor:
        return torch.randn(batch, heads, tokens, width, generator=draw).to(dtype)

    return (
        one(heads, tokens, head_dim),
        one(kv_heads, kv_tokens, head_dim),
        one(kv_heads, kv_tokens, v_head_dim or head_dim),
    )


def mask(*shape: int) -> torch.Tensor:
    """One that hides something, but never all keys."""
    hides = torch.zeros(shape, dtype=torch.bool)
    hides[..., ::3] = True
    return ~hides


# --- which kernel --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "kernel"),
    [
        (torch.bfloat16, FLASH),
        (torch.float16, FLASH),
        (torch.float32, EFFICIENT),
        (torch.float64, MATH),  # "the C++ implementation supports torch.float64"
    ],
)
def test_by_dtype(dtype: torch.dtype, kernel: str) -> None:
    assert route(*tensors(dtype=dtype))[0] == kernel


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_tokens", [16, 24])
def test_by_causal(causal: bool, kv_tokens: int) -> None:
    """Flash aligns a causal mask to the last query, F to the first: they agree on squares alone."""
    kernel, _ = route(*tensors(kv_tokens=kv_tokens), is_causal=causal)
    assert kernel == (EFFICIENT if causal and kv_tokens != 16 else FLASH)


@pytest.mark.parametrize("shape", [(2, 4, 16, 16), (2, 1, 1, 16), (1, 4, 16, 16), (16, 16), (16,)])
@pytest.mark.parametrize("kind", [torch.bool, torch.bfloat16])
def test_a_mask_is_for_efficient(shape: tuple[int, ...], kind: torch.dtype) -> None:
    assert route(*tensors(), attn_mask=mask(*shape).to(kind))[0] == EFFICIENT


@pytest.mark.parametrize(
    ("given", "kernel"),
    [
        # "It currently works only for Flash_attention and math kernel on CUDA tensor".
        ({"kv_heads": 2}, FLASH),
        ({"kv_heads": 2, "dtype": torch.float32}, MATH),
        ({"head_dim": 256}, FLASH),
        ({"head_dim": 264}, EFFICIENT),
        ({"v_head_dim": 16}, EFFICIENT),  # multi-head latent attention
        ({"head_dim": 20}, FLASH),  # F pads it for flash
        ({"head_dim": 20, "v_head_dim": 32}, MATH),  # but for nothing else
        ({"head_dim": 20, "dtype": torch.float32}, EFFICIENT),
        ({"head_dim": 10, "dtype": torch.float32}, MATH),
    ],
)
def test_by_heads_and_head_dim(given: dict[str, Any], kernel: str) -> None:
    assert route(*tensors(**given), enable_gqa="kv_heads" in given)[0] == kernel


def test_without_asking_for_groups_heads_broadcast() -> None:
    """No fused kernel does that; and where they do not broadcast, F raises."""
    q, k, v = tensors(kv_heads=1)
    kernel, out = route(q, k, v)
    assert kernel == MATH
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=2e-2, rtol=2e-2)
    with pytest.raises(RuntimeError, match="must match the size"):
        route(*tensors(kv_heads=2))


def test_a_batch_broadcasts_in_math_alone() -> None:
    q, k, v = tensors()
    assert route(q, k[:1], v[:1])[0] == MATH


def test_without_a_batch_it_is_math() -> None:
    q, k, v = (tensor[0] for tensor in tensors())
    assert route(q, k, v)[0] == MATH


def test_groups_with_a_mask_are_math() -> None:
    q, k, v = tensors(kv_heads=2)
    assert route(q, k, v, attn_mask=mask(16, 16), enable_gqa=True)[0] == MATH


def test_a_mask_and_causal_is_refused() -> None:
    with pytest.raises(RuntimeError, match="attn_mask should not be set when is_causal=True"):
        route(*tensors(), attn_mask=mask(16, 16), is_causal=True)


@pytest.mark.parametrize(
    ("enabled", "kernel"),
    [
        ([SDPBackend.FLASH_ATTENTION], FLASH),
        ([SDPBackend.EFFICIENT_ATTENTION], EFFICIENT),
        ([SDPBackend.MATH], MATH),
        ([SDPBackend.CUDNN_ATTENTION], CUDNN),
        ([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION], EFFICIENT),
        ([SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION], MATH),
    ],
)
def test_only_what_is_enabled(enabled: list[SDPBackend], kernel: str) -> None:
    with sdpa_kernel(enabled):
        assert route(*tensors())[0] == kernel


@pytest.mark.parametrize(
    ("enabled", "given"),
    [
        (SDPBackend.FLASH_ATTENTION, {"dtype": torch.float32}),
        (SDPBackend.EFFICIENT_ATTENTION, {"dtype": torch.float64}),
        (SDPBackend.CUDNN_ATTENTION, {"dtype": torch.float32}),
    ],
)
def test_no_kernel_is_left(enabled: SDPBackend, given: dict[str, Any]) -> None:
    with sdpa_kernel(enabled), pytest.raises(RuntimeError, match="No available kernel"):
        route(*tensors(**given))


def test_other_functions_go_through() -> None:
    mode = AsOnCuda(attended)
    with mode:
        assert torch.equal(F.relu(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))
    assert mode.chosen == {}


def test_chosen_counts_calls() -> None:
    mode = AsOnCuda(attended)
    with mode:
        for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
            F.scaled_dot_product_attention(*tensors(dtype=dtype))
    assert mode.chosen == {FLASH: 2, EFFICIENT: 1}


def test_what_is_no_op_any_more_is_told() -> None:
    """Math is many ops, none of which is attention."""
    told: list[tuple[str, dict[str, Any]]] = []
    q, k, v = tensors(dtype=torch.float64)
    with AsOnCuda(lambda op, args, kwargs: told.append((op, dict(kwargs)))):
        F.scaled_dot_product_attention(q, k, v, None, 0.0, True)
        F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    ((op, given),) = told
    assert op == "aten._scaled_dot_product_attention_math.default"
    assert [*given] == ["query", "key", "value", "attn_mask", "dropout_p", "is_causal"]
    assert [*given.values()] == [q, k, v, None, 0.0, True]


# --- what comes of it ----------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, 3))
    tokens = draw(st.integers(1, 9))
    return {
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "batch": draw(st.integers(1, 2)),
        "heads": kv_heads * draw(st.integers(1, 2)),
        "kv_heads": kv_heads,
        "tokens": tokens,
        "kv_tokens": draw(st.just(tokens) | st.integers(1, 9)),
        "head_dim": draw(st.sampled_from([4, 8, 10, 16])),
        "v_head_dim": draw(st.sampled_from([0, 8])),
    }


@settings(max_examples=60)
@given(
    calls(),
    st.sampled_from(["", "causal", "bool", "float"]),
    st.sampled_from([None, 0.3]),
    st.booleans(),
)
def test_values_are_those_of_f(
    given: dict[str, Any], masked: str, scale: float | None, only_math: bool
) -> None:
    q, k, v = tensors(**given)
    options: dict[str, Any] = {"scale": scale, "enable_gqa": given["heads"] != given["kv_heads"]}
    if masked == "causal":
        options["is_causal"] = True
    elif masked:
        hides = mask(given["tokens"], given["kv_tokens"] + 1)[:, 1:]
        options["attn_mask"] = hides if masked == "bool" else hides.to(q.dtype)
    context = sdpa_kernel(SDPBackend.MATH) if only_math else contextlib.nullcontext()
    with context:
        _, out = route(q, k, v, **options)
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    atol = 2e-6 if q.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, expected, atol=atol, rtol=atol)


@pytest.mark.parametrize("given", [{}, {"dtype": torch.float32}, {"head_dim": 20}])
def test_gradients_are_those_of_f(given: dict[str, Any]) -> None:
    gradients = []
    for take in (lambda *t: route(*t)[1], F.scaled_dot_product_attention):
        leaves = [tensor.requires_grad_() for tensor in tensors(**given)]
        out = take(*leaves)
        gradients.append(torch.autograd.grad(out.float().square().sum(), leaves))
    for own, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(own, expected, atol=5e-2, rtol=5e-2)
