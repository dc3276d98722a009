"""The CPU kernels for PyTorch's CUDA attention ops: against float64 autograd, through PyTorch's own
autograd formulas, and against PyTorch's own Meta kernels."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attncheck import standins
from attncheck.runner.reference import attention_lse

standins.provide("aten_attention")
aten = torch.ops.aten

FLASH = "_scaled_dot_product_flash_attention"
EFFICIENT = "_scaled_dot_product_efficient_attention"
CUDNN = "_scaled_dot_product_cudnn_attention"
OVERRIDEABLE = "_scaled_dot_product_fused_attention_overrideable"
RAW_FLASH = "_flash_attention_forward"
RAW_EFFICIENT = "_efficient_attention_forward"
RAW_CUDNN = "_cudnn_attention_forward"
SDPA = (FLASH, EFFICIENT, CUDNN, OVERRIDEABLE)
RAW = (RAW_FLASH, RAW_EFFICIENT, RAW_CUDNN)
BSHD = (RAW_FLASH, RAW_EFFICIENT)
WITH_BIAS = (EFFICIENT, CUDNN, OVERRIDEABLE, RAW_EFFICIENT, RAW_CUDNN)
# PyTorch's formula gives the bias of these a gradient.
BIAS_GRAD = (EFFICIENT, OVERRIDEABLE, RAW_EFFICIENT)
# The causal alignments that each can be asked for.
ALIGNMENTS = {
    FLASH: ("bottom_right",),
    RAW_FLASH: ("bottom_right",),
    RAW_EFFICIENT: ("top_left", "bottom_right"),
}
MASK_TYPES = {None: 0, "top_left": 1, "bottom_right": 2}
# What stands in the log-sum-exp of a query that sees no key.
EMPTY_LSE = {EFFICIENT: 0.0, RAW_EFFICIENT: 0.0}


def call(name: str, q: Any, k: Any, v: Any, bias: Any = None, **options: Any) -> tuple[Any, ...]:
    """`options`: causal (an alignment or None), scale, dropout, window, lengths, lse."""
    causal, scale = options.get("causal"), options.get("scale")
    dropout, wants_lse = options.get("dropout", 0.0), options.get("lse", True)
    op = getattr(aten, name).default
    if name in (FLASH, OVERRIDEABLE):
        between = () if name == FLASH else (bias,)
        return op(q, k, v, *between, dropout, causal is not None, scale=scale)  # type: ignore[no-any-return]
    if name in (EFFICIENT, CUDNN):
        return op(q, k, v, bias, wants_lse, dropout, causal is not None, scale=scale)  # type: ignore[no-any-return]
    lengths = options.get("lengths")
    rows = 1 if name in BSHD else 2
    packing: tuple[Any, ...] = (None, None, q.shape[rows], k.shape[rows])
    if lengths is not None:
        packing = (*map(starts, lengths), *map(max, lengths))
    if name == RAW_FLASH:
        left, right = options.get("window", (None, None))
        return op(  # type: ignore[no-any-return]
            q, k, v, *packing, dropout, causal is not None, False, scale=scale, window_size_left=left,
            window_size_right=right,
        )  # fmt: skip
    if name == RAW_EFFICIENT:
        kind = MASK_TYPES[causal]
        window = options.get("window_size")
        return op(  # type: ignore[no-any-return]
            q, k, v, bias, *packing, dropout, kind, wants_lse, scale=scale, window_size=window
        )
    return op(q, k, v, bias, *packing, wants_lse, dropout, causal is not None, scale=scale)  # type: ignore[no-any-return]


def starts(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def expected(
    name: str, q: Any, k: Any, v: Any, bias: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp in the dtype of q, in the op's layouts."""
    lengths = options.get("lengths")
    layout = "thd" if lengths else "bshd" if name in BSHD else "bhsd"
    one_batch = bool(lengths) and q.ndim == 4
    if one_batch:
        q, k, v = q.squeeze(0), k.squeeze(0), v.squeeze(0)
    out, lse = attention_lse(
        q,
        k,
        v,
        layout=layout,
        scale=options.get("scale"),
        causal=options.get("causal"),
        window=tuple(-1 if side is None else side for side in options.get("window", (-1, -1))),
        bias=bias,
        cu_seqlens_q=starts(lengths[0]) if lengths else None,
        cu_seqlens_k=starts(lengths[1]) if lengths else None,
        empty_lse=EMPTY_LSE.get(name, torch.inf),
    )
    if name in (CUDNN, RAW_CUDNN):
        lse = (lse.transpose(0, 1) if lengths else lse).unsqueeze(-1)
    if name in (EFFICIENT, RAW_EFFICIENT):
        parts = lse.split(lengths[0], 1) if lengths else lse.unbind(0)
        columns = -(-max(part.shape[1] for part in parts) // 32) * 32
        rows = [
            torch.nn.functional.pad(part, (0, columns - part.shape[1]), value=torch.inf)
            for part in parts
        ]
        lse = torch.stack(rows)
    return out.unsqueeze(0) if one_batch else out, lse


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Within 1e-5 of the largest value, or of 1."""
    got, want = got.detach(), want.detach()
    assert got.shape == want.shape
    largest = torch.where(torch.isfinite(want), want.abs(), 0.0).max()
    bound = 1e-5 * max(1.0, float(largest))
    torch.testing.assert_close(got.double(), want, rtol=0.0, atol=bound)


@st.composite
def problems(draw: st.DrawFn, name: str) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """(q, k, v, bias or nothing), options."""
    size = st.integers(1, 7)
    batch, kv_heads, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), 8
    heads = kv_heads * (1 if "efficient" in name else draw(st.integers(1, 3)))
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    alignment = st.sampled_from((None, *ALIGNMENTS.get(name, ("top_left",))))
    options: dict[str, Any] = {
        "causal": draw(alignment),
        "scale": draw(st.sampled_from((None, 0.4))),
    }
    packed = name in RAW and draw(st.booleans())
    if packed:
        count = draw(st.integers(1, 3))
        lengths = [tuple(draw(size) for _ in range(count)) for _ in range(2)]
        options["lengths"] = lengths
        rows, columns = map(sum, lengths)
    if name == RAW_FLASH and draw(st.booleans()):
        # A side that covers all keys is unlimited to this kernel: keep to windows that are not.
        options["window"] = (draw(st.integers(0, 6)), None)
        rows = columns = max(rows, columns, 8)
        options.pop("lengths", None)
        packed = False
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def tensor(heads: int, rows: int) -> torch.Tensor:
        shape = {
            True: (rows, heads, head_dim),
            False: (batch, rows, heads, head_dim)
            if name in BSHD
            else (batch, heads, rows, head_dim),
        }[packed]
        made = torch.randn(shape, generator=random)
        return made.unsqueeze(0) if packed and name == RAW_EFFICIENT else made

    tensors = [tensor(heads, rows), tensor(kv_heads, columns), tensor(kv_heads, columns)]
    if name in WITH_BIAS and not packed and draw(st.booleans()):
        shape = (
            draw(st.sampled_from((1, batch))),
            draw(st.sampled_from((1, heads))),
            rows,
            columns,
        )
        tensors.append(torch.randn(shape, generator=random))
    return tuple(tensors), options


@pytest.mark.parametrize("name", [*SDPA, *RAW])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_agrees_with_float64_autograd(name: str, data: st.DataObject) -> None:
    tensors, options = data.draw(problems(name))
    count = len(tensors) if name in BIAS_GRAD else 3
    got_leaves = [t.clone().requires_grad_(at < count) for at, t in enumerate(tensors)]
    want_leaves = [t.double().requires_grad_(at < count) for at, t in enumerate(tensors)]
    got = call(name, *got_leaves, **options)
    q, k, v, *bias = want_leaves
    want_out, want_lse = expected(name, q, k, v, bias[0] if bias else None, **options)
    close(got[0], want_out)
    close(got[1], want_lse)
    dout = torch.randn(want_out.shape, dtype=torch.float64)
    got_grads = torch.autograd.grad(got[0], got_leaves[:count], dout.float())
    want_grads = torch.autograd.grad(want_out, want_leaves[:count], dout)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        close(got_grad, want_grad)


def dense(name: str, heads: int = 4, kv_heads: int = 4, dtype: torch.dtype = torch.float32) -> Any:
    """q, k, v with 2 batches, 9 queries, 16 keys and head_dim 16."""
    random = torch.Generator().manual_seed(3)
    shapes = ((2, heads, 9, 16), (2, kv_heads, 16, 16), (2, kv_heads, 16, 16))
    made = (torch.randn(shape, generator=random).to(dtype) for shape in shapes)
    return [t.transpose(1, 2).contiguous() if name in BSHD else t for t in made]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*SDPA, *RAW])
def test_half_precision_rounds_and_nothing_else(name: str, dtype: torch.dtype) -> None:
    q, k, v = dense(name, dtype=dtype)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out, lse = call(name, *leaves)[:2]
    want, want_lse = expected(name, *exact, None)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), want, rtol=0, atol=4 * eps)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-5)
    dout = torch.ones_like(want)
    grads = torch.autograd.grad(out, leaves, dout.to(dtype))
    for got, exact_grad in zip(grads, torch.autograd.grad(want, exact, dout), strict=True):
        bound = 8 * eps * float(exact_grad.abs().max())
        torch.testing.assert_close(got.double(), exact_grad, rtol=0, atol=bound)


@pytest.mark.parametrize("name", [*SDPA, RAW_FLASH, RAW_EFFICIENT])
def test_outputs_are_what_the_meta_kernel_says(name: str) -> None:
    """Shapes and dtypes, philox state and padding included; cuDNN's raw op has no Meta kernel."""
    tensors = dense(name)
    real = call(name, *tensors, lse=True)
    meta = call(name, *(t.to("meta") for t in tensors), lse=True)
    assert len(real) == len(meta)
    for got, want in zip(real, meta, strict=True):
        if isinstance(want, torch.Tensor):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
        else:
            assert got == want


@pytest.mark.parametrize("name", [EFFICIENT, RAW_EFFICIENT])
def test_no_log_sum_exp_unless_asked(name: str) -> None:
    assert call(name, *dense(name), lse=False)[1].shape == (2, 4, 0)


# --- dropout -------------------------------------------------------------------------------


def readable(name: str) -> list[torch.Tensor]:
    """q = 0 and v = identity: out[..., i, j] is keep[i, j] / (16 * (1 - rate))."""
    q, k, _ = dense(name)
    v = torch.eye(16).expand(2, 4, 16, 16)
    return [torch.zeros_like(q), k, (v.transpose(1, 2) if name in BSHD else v).contiguous()]


def heads_first(name: str, x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2) if name in BSHD else x


@pytest.mark.parametrize("name", [*SDPA, *RAW])
def test_backward_drops_what_forward_dropped(name: str) -> None:
    leaves = [t.requires_grad_() for t in readable(name)]
    torch.manual_seed(5)
    out = call(name, *leaves, dropout=0.25)[0]
    weights = heads_first(name, out.detach())
    torch.testing.assert_close(weights[weights > 0].unique(), torch.tensor([1 / 12]))
    assert 0.15 < float((weights == 0).float().mean()) < 0.35
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (dv,) = torch.autograd.grad(out, leaves[2:], dout)
    want = weights.transpose(-1, -2) @ heads_first(name, dout)
    torch.testing.assert_close(heads_first(name, dv), want)
    torch.manual_seed(5)
    assert torch.equal(call(name, *leaves, dropout=0.25)[0], out)
    assert not torch.equal(call(name, *leaves, dropout=0.25)[0], out)


@pytest.mark.parametrize("name", [*SDPA, *RAW])
def test_gradients_through_a_dropout_mask(name: str) -> None:
    """With the mask read off one call, the gradients of another with the same state are exact."""
    torch.manual_seed(9)
    keep = heads_first(name, call(name, *readable(name), dropout=0.25)[0]) > 0
    leaves = [t.requires_grad_() for t in dense(name)]
    torch.manual_seed(9)
    out = call(name, *leaves, dropout=0.25)[0]
    exact = [heads_first(name, t.detach()).double().requires_grad_() for t in leaves]
    weights = torch.softmax(exact[0] @ exact[1].transpose(-1, -2) / 4, -1)
    want = (weights * keep / 0.75) @ exact[2]
    dout = torch.ones_like(want)
    for got, exact_grad in zip(
        torch.autograd.grad(out, leaves, heads_first(name, dout).float()),
        torch.autograd.grad(want, exact, dout),
        strict=True,
    ):
        close(heads_first(name, got), exact_grad)


# --- backward ------------------------------------------------------------------------------


def backward(name: str, spoil: Callable[[torch.Tensor, torch.Tensor], tuple[Any, Any]]) -> Any:
    """dq, dk, dv of the backward op, called with what `spoil` makes of the output and log-sum-exp."""
    q, k, v = dense(name)
    result = call(name, q, k, v)
    out, lse = spoil(result[0], result[1])
    dout = torch.ones_like(result[0])
    if name == FLASH:
        op, rest = aten._scaled_dot_product_flash_attention_backward, (*result[2:6], 0.0, False)
        return op.default(dout, q, k, v, out, lse, *rest, *result[6:8])
    if name == EFFICIENT:
        op, mask = aten._scaled_dot_product_efficient_attention_backward, [True, True, True, False]
        return op.default(dout, q, k, v, None, out, lse, *result[2:4], 0.0, mask)[:3]
    assert name == CUDNN
    op, rest = aten._scaled_dot_product_cudnn_attention_backward, (None, *result[2:6], 0.0, False)
    return op.default(dout, q, k, v, out, lse, *result[6:8], *rest)


@pytest.mark.parametrize("name", [FLASH, EFFICIENT, CUDNN])
def test_backward_takes_the_output_and_log_sum_exp_it_is_given(name: str) -> None:
    right = backward(name, lambda out, lse: (out, lse))
    other_lse = backward(name, lambda out, lse: (out, lse + 0.5))
    other_out = backward(name, lambda out, lse: (out + 0.5, lse))
    assert not torch.allclose(other_lse[2], right[2], atol=1e-2)
    assert not torch.allclose(other_out[0], right[0], atol=1e-2)
    assert torch.equal(other_out[2], right[2])  # dv needs the log-sum-exp alone


@pytest.mark.parametrize("name", [FLASH, EFFICIENT, CUDNN])
def test_a_log_sum_exp_of_another_shape_is_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match="the kernel reads it as float32"):
        backward(name, lambda out, lse: (out, lse[:, :3]))


# --- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "heads", "text"),
    [
        (FLASH, (6, 4), "Number of heads in key/value must divide number of heads in query"),
        (RAW_FLASH, (6, 4), "Number of heads in key/value must divide number of heads in query"),
        (EFFICIENT, (8, 4), r"Expected query.size\(2\) == key.size\(2\) to be true, but got false"),
        (CUDNN, (6, 4), "For group-query attention, number of heads for key and query must be a"),
        (OVERRIDEABLE, (6, 4), "number of heads for key and query must be a factor"),
    ],
)
def test_heads_that_the_kernel_refuses(name: str, heads: tuple[int, int], text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        call(name, *dense(name, *heads))


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        (EFFICIENT, (9, 16), "Bias expected in BMHK format"),
        (EFFICIENT, (3, 4, 9, 16), r"attn_bias: wrong shape \(batch dimension\)"),
        (EFFICIENT, (2, 2, 9, 16), r"attn_bias: wrong shape \(head dimension\)"),
        (EFFICIENT, (2, 4, 9, 15), r"attn_bias: wrong shape \(seqlenKV dimension\)"),
        (CUDNN, (2, 1, 4, 9, 16), "cuDNN SDPA expects either a 2D, 3D, or 4D attn_bias but got 5D"),
        (CUDNN, (2, 2, 9, 16), "attn_bias has 2 heads, the query 4"),
        (CUDNN, (3, 4, 9, 16), "expanded size of the tensor"),
    ],
)
def test_biases_that_the_kernel_refuses(name: str, shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        call(name, *dense(name), torch.zeros(shape))


def test_a_bias_of_another_dtype_is_refused() -> None:
    with pytest.raises(RuntimeError, match="invalid dtype for bias - should match query's dtype"):
        call(EFFICIENT, *dense(EFFICIENT), torch.zeros(2, 4, 9, 16, dtype=torch.float16))


@pytest.mark.parametrize("shape", [(9, 16), (1, 9, 16)])
def test_cudnn_takes_a_bias_of_fewer_dims(shape: tuple[int, ...]) -> None:
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    got = call(CUDNN, *dense(CUDNN), bias)[0]
    want, _ = expected(CUDNN, *(t.double() for t in dense(CUDNN)), bias.double())
    close(got, want)


def test_packed_sequences_of_the_efficient_kernel_come_as_one_batch() -> None:
    q, k, v = dense(RAW_EFFICIENT)
    with pytest.raises(RuntimeError, match="cu_seqlen only supports batch_size=1"):
        call(RAW_EFFICIENT, q, k, v, lengths=((4, 5), (6, 10)))


@pytest.mark.parametrize("causal", ["top_left", "bottom_right"])
def test_window_of_the_efficient_kernel(causal: str) -> None:
    q, k, v = dense(RAW_EFFICIENT)
    got = call(RAW_EFFICIENT, q, k, v, causal=causal, window_size=3)[0]
    i = torch.arange(9)[:, None] + (7 if causal == "bottom_right" else 0)
    j = torch.arange(16)[None, :]
    hidden = torch.where((j <= i) & (j > i - 3), 0.0, -torch.inf).double()
    want, _ = expected(RAW_EFFICIENT, q.double(), k.double(), v.double(), hidden)
    close(got, want)
    with pytest.raises(RuntimeError, match="window_size needs a causal"):
        call(RAW_EFFICIENT, q, k, v, window_size=3)


def test_keys_behind_seqlen_k_do_not_count() -> None:
    q, k, v = dense(RAW_EFFICIENT)
    op = aten._efficient_attention_forward.default
    lengths = torch.tensor([5, 16], dtype=torch.int32)
    got = op(q, k, v, None, None, None, 9, 16, 0.0, 0, True, seqlen_k=lengths)[0]
    close(
        got[:1],
        expected(RAW_EFFICIENT, q[:1].double(), k[:1, :5].double(), v[:1, :5].double(), None)[0],
    )
    close(got[1:], call(RAW_EFFICIENT, q, k, v)[0][1:].double())


def test_twice_is_harmless() -> None:
    before = call(FLASH, *dense(FLASH))[0]
    assert "CPU reference kernels by attncheck" in standins.provide("aten_attention")
    assert torch.equal(call(FLASH, *dense(FLASH))[0], before)
