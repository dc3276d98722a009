"""The reference against PyTorch's own math attention, and the properties attention must have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from attncheck.runner.reference import attention, attention_lse

# Both sides are float64 sums of a few dozen terms of size 1.
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def qkv(
    batch: int = 2, heads: int = 4, kv_heads: int = 4, sq: int = 5, sk: int = 7, dim: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leaves in (batch, heads, sequence, head_dim), float64."""
    random = torch.Generator().manual_seed(batch * 1000 + heads * 100 + sq * 10 + sk)
    shapes = ((batch, heads, sq, dim), (batch, kv_heads, sk, dim), (batch, kv_heads, sk, dim))
    q, k, v = (torch.randn(s, generator=random, dtype=torch.float64) for s in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def gradients(out: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad(out, leaves, dout)


def test_agrees_with_torch() -> None:
    for sizes in ({}, {"sq": 7}, {"kv_heads": 2}, {"kv_heads": 1}):
        q, k, v = qkv(**sizes)
        gqa = q.shape[1] != k.shape[1]
        for options in ({}, {"is_causal": True}, {"scale": 0.3}):
            want = F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa, **options)
            ours: dict[str, Any] = dict(options)
            if ours.pop("is_causal", False):
                ours["causal"] = "top_left"
            out = attention(q, k, v, **ours)
            torch.testing.assert_close(out, want, **TOLERANCE)
            for got, expected in zip(
                gradients(out, q, k, v), gradients(want, q, k, v), strict=True
            ):
                torch.testing.assert_close(got, expected, **TOLERANCE)


def test_masks_agree_with_torch() -> None:
    q, k, v = qkv()
    keep = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(3)) < 0.6
    keep[..., 0] = True
    bias = torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
    torch.testing.assert_close(attention(q, k, v, bool_mask=keep), want, **TOLERANCE)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(attention(q, k, v, bias=bias), want, **TOLERANCE)


def test_bias_gets_its_gradient() -> None:
    q, k, v = qkv()
    bias = torch.zeros(1, 4, 5, 7, dtype=torch.float64, requires_grad=True)
    ours = gradients(attention(q, k, v, bias=bias), bias)
    want = gradients(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), bias)
    torch.testing.assert_close(ours, want, **TOLERANCE)


@pytest.mark.parametrize(
    ("sq", "sk", "rows"),
    [
        # Written out in flash_attn_func's documentation.
        (2, 5, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
        (5, 2, [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]),
    ],
)
def test_bottom_right_alignment(sq: int, sk: int, rows: list[list[int]]) -> None:
    q, k, v = qkv(sq=sq, sk=sk)
    keep = torch.tensor(rows, dtype=torch.bool)
    torch.testing.assert_close(
        attention(q, k, v, causal="bottom_right"), attention(q, k, v, bool_mask=keep)
    )


def test_window_is_bottom_right_aligned() -> None:
    q, k, v = qkv(sq=4, sk=6)
    keep = torch.tensor(
        [
            [0, 1, 1, 1, 0, 0],
            [0, 0, 1, 1, 1, 0],
            [0, 0, 0, 1, 1, 1],
            [0, 0, 0, 0, 1, 1],
        ],
        dtype=torch.bool,
    )
    torch.testing.assert_close(
        attention(q, k, v, window=(1, 1)), attention(q, k, v, bool_mask=keep)
    )


def test_alibi_is_a_bias() -> None:
    q, k, v = qkv(sq=3, sk=4)
    distance = torch.tensor([[1, 0, 1, 2], [2, 1, 0, 1], [3, 2, 1, 0]], dtype=torch.float64)
    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    bias = -slopes[:, None, None] * distance
    torch.testing.assert_close(
        attention(q, k, v, alibi_slopes=slopes), attention(q, k, v, bias=bias), **TOLERANCE
    )
    two = torch.stack([slopes, 2 * slopes])
    bias = torch.stack([bias, 2 * bias])
    torch.testing.assert_close(
        attention(q, k, v, alibi_slopes=two), attention(q, k, v, bias=bias), **TOLERANCE
    )


def test_softcap_bounds_scores() -> None:
    q, k, v = qkv()
    capped = attention(100 * q, k, v, softcap=1e-9)
    torch.testing.assert_close(capped, attention(0 * q, k, v), rtol=1e-8, atol=1e-8)
    loose = attention(q, k, v, softcap=1e6)
    torch.testing.assert_close(loose, attention(q, k, v), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "hidden",
    [
        {"causal": "bottom_right"},
        {"bool_mask": torch.tensor([[False]] * 3 + [[True]] * 4)},
        {"bias": torch.tensor([[-torch.inf]] * 3 + [[0.0]] * 4, dtype=torch.float64)},
    ],
    ids=["causal", "bool_mask", "bias"],
)
def test_rows_that_see_nothing_are_zero_with_zero_gradient(hidden: dict[str, Any]) -> None:
    q, k, v = qkv(sq=7, sk=4)
    out = attention(q, k, v, **hidden)
    assert torch.equal(out[:, :, :3], torch.zeros_like(out[:, :, :3]))
    grads = gradients(out, q, k, v)
    assert all(bool(torch.isfinite(g).all()) for g in grads)
    assert torch.equal(grads[0][:, :, :3], torch.zeros_like(grads[0][:, :, :3]))
    assert bool((grads[0][:, :, 3:] != 0).any())


def test_layouts_agree() -> None:
    q, k, v = qkv(kv_heads=2)
    bhsd = attention(q, k, v, causal="bottom_right")
    q2, k2, v2 = (t.transpose(1, 2) for t in (q, k, v))
    bshd = attention(q2, k2, v2, layout="bshd", causal="bottom_right")
    torch.testing.assert_close(bshd.transpose(1, 2), bhsd)
    thd = attention(
        q2.flatten(0, 1),
        k2.flatten(0, 1),
        v2.flatten(0, 1),
        layout="thd",
        causal="bottom_right",
        cu_seqlens_q=torch.tensor([0, 5, 10]),
        cu_seqlens_k=torch.tensor([0, 7, 14]),
    )
    torch.testing.assert_close(thd.unflatten(0, (2, 5)), bshd)


def test_packed_tokens_behind_the_last_sequence_are_zero() -> None:
    q, k, v = (t.detach().transpose(1, 2).flatten(0, 1) for t in qkv())
    starts = torch.tensor([0, 0, 6])
    out = attention(q, k, v, layout="thd", cu_seqlens_q=starts, cu_seqlens_k=starts)
    assert out.shape == q.shape
    assert torch.equal(out[6:], torch.zeros_like(out[6:]))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"layout": "sbhd"}, "expected bhsd, bshd or thd"),
        ({"causal": "left"}, "expected None, top_left or bottom_right"),
        ({"layout": "thd"}, "cu_seqlens"),
        ({"cu_seqlens_q": torch.tensor([0, 1])}, "cu_seqlens"),
    ],
)
def test_unknown_options_are_errors(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        attention(*qkv(), **options)


def test_heads_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(ValueError, match="4 query heads cannot share 3 kv heads"):
        attention(*qkv(kv_heads=3))


SIZES = st.integers(1, 6)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "causal": st.sampled_from(["top_left", "bottom_right"]),
        "window": st.tuples(st.integers(-1, 4), st.integers(-1, 4)),
        "softcap": st.sampled_from([0.0, 0.7, 5.0]),
        "scale": st.sampled_from([0.1, 1.0]),
    },
)


@settings(max_examples=60, deadline=None)
@given(st.data(), SIZES, SIZES, SIZES, SIZES, OPTIONS)
def test_batch_and_heads_are_independent(
    data: st.DataObject, batch: int, heads: int, sq: int, sk: int, options: dict[str, Any]
) -> None:
    """Permuting or cutting batch and heads before attention or after it is the same."""
    q, k, v = (t.detach() for t in qkv(batch, heads, heads, sq, sk))
    slopes = torch.linspace(0.1, 0.9, heads, dtype=torch.float64)
    whole = attention(q, k, v, alibi_slopes=slopes, **options)
    rows = data.draw(st.permutations(range(batch)))
    columns = data.draw(st.permutations(range(heads)))
    order = torch.tensor(rows)[:, None], torch.tensor(columns)[None, :]
    moved = attention(q[order], k[order], v[order], alibi_slopes=slopes[columns], **options)
    torch.testing.assert_close(moved, whole[order], **TOLERANCE)
    cut = data.draw(st.integers(1, heads))
    parts = [
        attention(q[:, part], k[:, part], v[:, part], alibi_slopes=slopes[part], **options)
        for part in (slice(0, cut), slice(cut, heads))
        if part.start < heads
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **TOLERANCE)


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.integers(1, 6))
def test_queries_are_independent_under_one_window(sq: int, sk: int, cut: int) -> None:
    """Queries taken in chunks against all keys give the same rows, without positions."""
    q, k, v = (t.detach() for t in qkv(2, 2, 2, sq, sk))
    whole = attention(q, k, v)
    chunks = [attention(q[:, :, at : at + cut], k, v) for at in range(0, sq, cut)]
    torch.testing.assert_close(torch.cat(chunks, 2), whole, **TOLERANCE)


@settings(max_examples=30, deadline=None)
@given(SIZES, SIZES, OPTIONS)
def test_lse_is_the_log_of_the_softmaxs_sum(sq: int, sk: int, options: dict[str, Any]) -> None:
    """Identity values give the probabilities; p = exp(score - lse) ties them to the scores."""
    q, k, _ = (t.detach() for t in qkv(2, 2, 2, sq, sk))
    eye = torch.eye(sk, dtype=torch.float64).expand(2, 2, sk, sk)
    probabilities, lse = attention_lse(q, k, eye, **options, empty_lse=torch.inf)
    assert lse.shape == (2, 2, sq)
    scores = q @ k.transpose(-1, -2) * options.get("scale", q.shape[-1] ** -0.5)
    if cap := options.get("softcap", 0.0):
        scores = cap * torch.tanh(scores / cap)
    seen = probabilities > 0
    want = torch.where(seen, torch.exp(scores - lse[..., None]), 0.0)
    torch.testing.assert_close(probabilities, want, **TOLERANCE)
    assert torch.equal(lse == torch.inf, ~seen.any(-1))


def test_lse_of_packed_sequences_and_of_nothing() -> None:
    q, k, v = (t.detach().transpose(1, 2).flatten(0, 1) for t in qkv())
    starts = torch.tensor([0, 0, 6])
    out, lse = attention_lse(q, k, v, layout="thd", cu_seqlens_q=starts, cu_seqlens_k=starts)
    assert lse.shape == (4, 10)
    assert bool((lse[:, 6:] == -torch.inf).all())  # tokens behind the last sequence
    dense = [t[:6].transpose(0, 1).unsqueeze(0) for t in (q, k, v)]
    want, want_lse = attention_lse(*dense)
    torch.testing.assert_close(lse[:, :6], want_lse[0])
    torch.testing.assert_close(out[:6], want[0].transpose(0, 1))
    _, empty = attention_lse(*(t[:, :, :0] if i else t for i, t in enumerate(dense)))
    assert bool((empty == -torch.inf).all())
