"""The stand-in against float64 autograd, its faithfulness to the schemas, and ops of another's making."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attncheck import standins
from attncheck.runner.reference import attention, attention_lse
from attncheck.standins import flash_attn_3, flash_attn_3_beta

flash_attn_3.provide()
OPS = torch.ops.flash_attn_3
SURFACES = ("raw", "custom_op")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def forward(surface: str, *args: Any, **kwargs: Any) -> Any:
    return (OPS.fwd if surface == "raw" else OPS._flash_attn_forward)(*args, **kwargs)


def leaves(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random) for shape in shapes]


def assert_agrees(
    function: Callable[..., Any], exact: Callable[..., Any], tensors: list[torch.Tensor]
) -> None:
    """`function` in float32 and `exact` in float64 give the same outputs and gradients."""
    singles = [t.clone().requires_grad_() for t in tensors]
    doubles = [t.double().requires_grad_() for t in tensors]
    got, want = function(*singles), exact(*doubles)
    dout = leaves(1, tuple(got[0].shape))[0]
    grads = torch.autograd.grad(got[0], singles, dout)
    expected = torch.autograd.grad(want[0], doubles, dout.double())
    # With one key the gradients of q and k are differences of equal numbers, as large as the others.
    atol = 1e-5 * max(1.0, *(float(b.abs().max()) for b in expected))
    for a, b in zip((*got, *grads), (*want, *expected), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=atol)


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "causal": st.booleans(),
        "window": st.tuples(st.integers(-1, 5), st.integers(-1, 5)),
        "softcap": st.sampled_from([0.7, 5.0]),
        "scale": st.sampled_from([0.1, 0.9]),
    },
)


def as_arguments(options: dict[str, Any]) -> dict[str, Any]:
    names = {"window": "window_size", "scale": "softmax_scale"}
    return {names.get(name, name): value for name, value in options.items()}


def as_reference(options: dict[str, Any]) -> dict[str, Any]:
    causal = "bottom_right" if options.get("causal") else None
    return {**options, "causal": causal}


@pytest.mark.parametrize("surface", SURFACES)
@settings(max_examples=30)
@given(
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([8, 16, 40]),
    OPTIONS,
)
def test_dense_agrees_with_float64(
    surface: str,
    batch: int,
    kv_heads: int,
    groups: int,
    sq: int,
    sk: int,
    head_dim: int,
    options: dict[str, Any],
) -> None:
    function = flash_attn_3.interface(surface).flash_attn_func
    kv = (batch, sk, kv_heads, head_dim)
    assert_agrees(
        lambda q, k, v: function(q, k, v, return_attn_probs=True, **as_arguments(options)),
        lambda q, k, v: attention_lse(q, k, v, layout="bshd", **as_reference(options)),
        leaves(sq * sk, (batch, sq, kv_heads * groups, head_dim), kv, kv),
    )


@pytest.mark.parametrize("surface", SURFACES)
@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4),
    st.integers(1, 2),
    st.integers(1, 2),
    OPTIONS,
)
def test_packed_agrees_with_float64(
    surface: str,
    lengths: list[tuple[int, int]],
    kv_heads: int,
    groups: int,
    options: dict[str, Any],
) -> None:
    lengths = [*lengths, (3, 2)]  # an empty call is another matter
    starts = [
        torch.tensor([0, *accumulate(pair[side] for pair in lengths)], dtype=torch.int32)
        for side in (0, 1)
    ]
    longest = [max(pair[side] for pair in lengths) for side in (0, 1)]
    function = flash_attn_3.interface(surface).flash_attn_varlen_func
    kv = (int(starts[1][-1]), kv_heads, 16)
    assert_agrees(
        lambda q, k, v: (function(q, k, v, *starts, *longest, **as_arguments(options)),),
        lambda q, k, v: (
            attention(
                q,
                k,
                v,
                layout="thd",
                cu_seqlens_q=starts[0],
                cu_seqlens_k=starts[1],
                **as_reference(options),
            ),
        ),
        leaves(len(lengths), (int(starts[0][-1]), kv_heads * groups, 16), kv, kv),
    )


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.booleans())
def test_attention_chunk(sq: int, sk: int, chunk: int, causal: bool) -> None:
    """A query at position p sees the keys of its own chunk, floor(p / chunk)."""
    q, k, v = leaves(chunk, (2, sq, 2, 8), (2, sk, 2, 8), (2, sk, 2, 8))
    position = torch.arange(sq)[:, None] + sk - sq
    same = torch.arange(sk)[None, :] // chunk == position.div(chunk, rounding_mode="floor")
    want, want_lse = attention_lse(
        q.double(),
        k.double(),
        v.double(),
        layout="bshd",
        bool_mask=same,
        causal="bottom_right" if causal else None,
    )
    for surface in SURFACES:
        flags = {"is_causal" if surface == "raw" else "causal": causal, "attention_chunk": chunk}
        out, lse, *_ = forward(surface, q, k, v, **flags)
        torch.testing.assert_close(out.double(), want, **TOLERANCE)
        torch.testing.assert_close(lse.double(), want_lse, **TOLERANCE)


def test_backward_of_a_chunk_is_refused() -> None:
    for surface in SURFACES:
        q, k, v = (t.requires_grad_() for t in leaves(0, *[(1, 4, 1, 8)] * 3))
        out = flash_attn_3.interface(surface).flash_attn_func(q, k, v, attention_chunk=2)
        with pytest.raises(AssertionError, match="FA3 backward does not support attention_chunk"):
            out.sum().backward()


def test_qv_adds_its_own_scores() -> None:
    q, k, v, qv = leaves(2, (2, 5, 2, 64), (2, 7, 1, 64), (2, 7, 1, 256), (2, 5, 2, 256))
    want = attention(
        torch.cat([q, qv], -1).double(),
        torch.cat([k, v], -1).double(),
        v.double(),
        layout="bshd",
        scale=0.05,
    )
    raw = forward("raw", q, k, v, q_v=qv, softmax_scale=0.05)[0]
    custom = forward("custom_op", q, k, v, qv=qv, softmax_scale=0.05)[0]
    torch.testing.assert_close(raw.double(), want, **TOLERANCE)
    assert torch.equal(raw, custom)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_as_the_formula_does(dtype: torch.dtype) -> None:
    tensors = [t.to(dtype) for t in leaves(4, (2, 9, 4, 16), (2, 13, 2, 16), (2, 13, 2, 16))]
    results = {}
    for name, kind in (("own", dtype), ("plain", dtype), ("exact", torch.float64)):
        q, k, v = (t.to(kind).requires_grad_() for t in tensors)
        if name == "own":
            out = flash_attn_3.interface("raw").flash_attn_func(q, k, v, causal=True)
        else:
            out = attention(q, k, v, layout="bshd", causal="bottom_right")
        dout = leaves(5, tuple(out.shape))[0].to(dtype).to(kind)
        results[name] = (out, *torch.autograd.grad(out, (q, k, v), dout))
    for own, plain, exact in zip(*results.values(), strict=True):
        assert own.dtype == dtype
        bound = 2 * (plain.double() - exact).abs().max()
        bound += 4 * torch.finfo(dtype).eps * exact.abs().max()
        assert (own.double() - exact).abs().max() <= bound


def test_lse_of_rows_without_keys() -> None:
    q, k, v = leaves(6, (1, 5, 2, 8), (1, 3, 2, 8), (1, 3, 2, 8))
    out, lse, *_ = forward("raw", q, k, v, is_causal=True)
    assert bool((lse[..., :2] == -torch.inf).all())
    assert bool(torch.isfinite(lse[..., 2:]).all())
    assert bool((out[:, :2] == 0).all())
    out, lse, *_ = forward("raw", q, k[:, :0], v[:, :0])
    assert bool((lse == torch.inf).all())
    assert bool((out == 0).all())


def test_accumulators() -> None:
    q, k, v = leaves(7, (2, 5, 4, 8), (2, 7, 4, 8), (2, 7, 4, 8))
    assert forward("raw", q, k, v, num_splits=1)[2:] == (None, None)
    assert [t.numel() for t in forward("custom_op", q, k, v)[2:]] == [0, 0]
    for surface in SURFACES:
        out, lse, out_accum, lse_accum = forward(surface, q, k, v, num_splits=3)
        assert tuple(out_accum.shape) == (3, 2, 4, 5, 8)
        assert tuple(lse_accum.shape) == (3, 2, 4, 5)
        weights = torch.softmax(lse_accum, 0)[..., None]
        torch.testing.assert_close((weights * out_accum).sum(0).transpose(1, 2), out)
        torch.testing.assert_close(torch.logsumexp(lse_accum, 0), lse)


def test_buffers_are_written_in_place_and_workspace_has_the_kernel_s_shape() -> None:
    q, k, v, dout = leaves(8, (2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 16), (2, 5, 4, 16))
    buffer = torch.full_like(q, torch.nan)
    out, lse, *_ = OPS.fwd(q, k, v, out=buffer)
    assert out is buffer
    buffers = [torch.full_like(t, torch.nan) for t in (q, k, v)]
    returned = OPS.bwd(dout, q, k, v, out, lse, *buffers)
    assert all(a is b for a, b in zip(returned[:3], buffers, strict=True))
    fresh = OPS.bwd(dout, q, k, v, out, lse)
    for a, b in zip(returned[:3], fresh[:3], strict=True):
        assert torch.equal(a, b)
    softmax_d, lse_log2, dq_accum, dk_accum, dv_accum = returned[3:]
    assert tuple(softmax_d.shape) == tuple(lse_log2.shape) == (2, 4, 128)
    torch.testing.assert_close(softmax_d[..., :5], (dout * out).sum(-1).transpose(1, 2))
    torch.testing.assert_close(lse_log2[..., :5].exp2(), lse.exp())
    assert tuple(dq_accum.shape) == (2, 4, 128 * 64)
    assert tuple(dk_accum.shape) == tuple(dv_accum.shape) == (2, 2, 128 * 64)
    # Without grouped heads the kernel has no such accumulators.
    many = OPS.bwd(dout, q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1), out, lse)
    assert many[6:] == (None, None)
    narrow = OPS.bwd(dout, q, k, v, out, lse, is_causal=True, softcap=1.0)[3]
    assert tuple(narrow.shape) == (2, 4, 96)


def test_backward_uses_the_out_and_lse_it_is_given() -> None:
    q, k, v, dout = leaves(9, *[(1, 5, 2, 8)] * 4)
    out, lse, *_ = OPS.fwd(q, k, v)
    right = OPS.bwd(dout, q, k, v, out, lse)
    wrong_lse, wrong_out = (
        OPS.bwd(dout, q, k, v, out, lse + 0.5),
        OPS.bwd(dout, q, k, v, out + 0.5, lse),
    )
    for gradient in range(3):
        assert float((right[gradient] - wrong_lse[gradient]).abs().max()) > 0.01
    for gradient in range(2):
        assert float((right[gradient] - wrong_out[gradient]).abs().max()) > 0.01


def custom_calls() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    q, k, v, dout = leaves(10, (2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 16), (2, 5, 4, 16))
    starts = torch.tensor([0, 4, 10], dtype=torch.int32)
    packed = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 6, "max_seqlen_k": 6}
    qp, kp, vp = leaves(11, (10, 4, 16), (10, 2, 16), (10, 2, 16))
    grads = {"dq": torch.empty_like(q), "dk": torch.empty_like(k), "dv": torch.empty_like(v)}
    packed_grads = {n: torch.empty_like(t) for n, t in zip(grads, (qp, kp, vp), strict=True)}
    forward_op, backward_op = OPS._flash_attn_forward.default, OPS._flash_attn_backward.default
    out, lse = forward_op(q, k, v)[:2]
    packed_out, packed_lse = forward_op(qp, kp, vp, **packed)[:2]
    leaf = [t.clone().requires_grad_() for t in (q, k, v)]
    return {
        "forward": (forward_op, tuple(leaf), {}),
        "splits": (forward_op, (q, k, v), {"num_splits": 2}),
        "packed": (forward_op, (qp, kp, vp), packed),
        "backward": (backward_op, (dout, q, k, v, out, lse), grads),
        "packed_backward": (
            backward_op,
            (packed_out, qp, kp, vp, packed_out, packed_lse),
            {**packed, **packed_grads},
        ),
    }


@pytest.mark.parametrize("name", ["forward", "splits", "packed", "backward", "packed_backward"])
def test_opcheck(name: str) -> None:
    op, args, kwargs = custom_calls()[name]
    results = torch.library.opcheck(op, args, kwargs)
    assert set(results.values()) == {"SUCCESS"}, results


def test_the_op_s_own_formula_has_24_gradients() -> None:
    """As 3.0.0 has it: right at the defaults, refused by PyTorch from `causal` on."""
    q, k, v = leaves(12, *[(1, 5, 2, 8)] * 3)
    assert_agrees(
        lambda *t: OPS._flash_attn_forward(*t)[:2],
        lambda *t: attention_lse(*t, layout="bshd"),
        [q, k, v],
    )
    out = OPS._flash_attn_forward(q.requires_grad_(), k, v, causal=True)[0]
    with pytest.raises(RuntimeError, match="incorrect number of gradients"):
        out.sum().backward()


def test_raw_ops_have_no_meta_kernel() -> None:
    q = torch.empty(1, 4, 1, 8, device="meta")
    with pytest.raises(NotImplementedError, match="Meta"):
        OPS.fwd(q, q, q)


SHAPE = (2, 5, 4, 16)
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"q": torch.zeros(SHAPE, dtype=torch.float64)}, "only supports fp16, bf16, and fp8"),
    "dtypes": ({"k": torch.zeros(SHAPE, dtype=torch.float16)}, "query and key must have the same"),
    "stride": ({"q": torch.zeros(2, 5, 16, 4).transpose(2, 3)}, "contiguous last dimension"),
    "batch": ({"k": torch.zeros(1, 5, 4, 16)}, "batch_size must be equal to batch_size_k"),
    "groups": (
        {"k": torch.zeros(2, 5, 3, 16), "v": torch.zeros(2, 5, 3, 16)},
        "Number of heads in key/value must divide number of heads in query",
    ),
    "no_kv_heads": ({"k": torch.zeros(2, 5, 0, 16)}, "SIGFPE"),
    "head_dim": ({n: torch.zeros(2, 5, 4, 12) for n in "qkv"}, "should be a multiple of 8"),
    "wide": ({n: torch.zeros(2, 5, 4, 264) for n in "qkv"}, "head dimension at most 256"),
    "value_head_dim": (
        {**{n: torch.zeros(2, 5, 4, 72) for n in "qk"}, "v": torch.zeros(2, 5, 4, 80)},
        "If V headdim is different",
    ),
    "value_shape": (
        {"v": torch.zeros(2, 6, 4, 16)},
        r"v must have shape \(batch_size_k, seqlen_k, num_heads_k, head_size_v\)",
    ),
    "max_seqlen": (
        {
            **{n: torch.zeros(10, 4, 16) for n in "qkv"},
            "cu_seqlens_q": torch.tensor([0, 10], dtype=torch.int32),
            "cu_seqlens_k": torch.tensor([0, 10], dtype=torch.int32),
        },
        "max_seqlen_q must be provided if cu_seqlens_q is provided",
    ),
    "starts": (
        {"cu_seqlens_q": torch.tensor([0, 10]), "max_seqlen_q": 10},
        "cu_seqlens_q must have dtype torch.int32",
    ),
    "qv": ({"q_v": torch.zeros(SHAPE)}, "q_v is only supported for hdim_v >= 256"),
    "fp8": (
        {n: torch.zeros(SHAPE).to(torch.float8_e4m3fn) for n in "qkv"},
        "stand-in for flash-attn 3 has no fp8",
    ),
    "descale": ({"q_descale": torch.ones(2, 4)}, "q_descale: .* has no fp8"),
    "page_table": ({"page_table": torch.zeros(2, 1)}, "page_table: .* has no paged"),
    "seqused": ({"seqused_k": torch.zeros(2)}, "seqused_k: .* has no partly used"),
    "cache": ({"k_new": torch.zeros(SHAPE)}, "k_new: .* has no kv cache"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses_by_name(name: str) -> None:
    arguments, message = REFUSALS[name]
    with pytest.raises(RuntimeError, match=message):  # NotImplementedError is one
        OPS.fwd(**{**{n: torch.zeros(SHAPE) for n in "qkv"}, **arguments})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"softmax_lse": torch.zeros(2, 4, 6)}, r"reads it as float32 \(2, 4, 5\)"),
        ({"dout": torch.zeros(2, 5, 4, 8)}, "dout must have shape"),
        ({"dk": torch.zeros(2, 6, 4, 16)}, "dk must have shape"),
        ({"dq": torch.zeros(SHAPE, dtype=torch.float16)}, "dq must have the same dtype as q"),
    ],
)
def test_backward_refuses_by_name(changed: dict[str, Any], message: str) -> None:
    tensors = {n: torch.zeros(SHAPE) for n in ("dout", "q", "k", "v", "out")}
    with pytest.raises(RuntimeError, match=message):
        OPS.bwd(**{**tensors, "softmax_lse": torch.zeros(2, 4, 5), **changed})


def test_it_is_named_as_what_it_is() -> None:
    sentence = standins.provide("flash_attn_3")
    assert sentence.startswith("flash_attn_3: ")
    assert "only the schemas" in sentence
    assert "attncheck's" in sentence
    assert [flash_attn_3.missing(surface) for surface in SURFACES] == ["", ""]


# The parameters of 3.0.0.b1 (hopper/flash_attn_interface.py of the tags v2.8.0 to v2.8.3.post1).
REST = [
    *("softmax_scale", "causal", "qv", "q_descale", "k_descale", "v_descale", "window_size"),
    *("attention_chunk", "softcap", "num_splits", "pack_gqa", "deterministic", "sm_margin"),
]
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_q", "seqused_k"]


def test_the_betas_functions_have_its_parameters_and_3_0_0_one_more() -> None:
    for name, lengths in (("flash_attn_func", []), ("flash_attn_varlen_func", LENGTHS)):
        wanted = ["q", "k", "v", *lengths, *REST]
        assert [*inspect.signature(getattr(flash_attn_3_beta, name)).parameters] == wanted
        newer = inspect.signature(getattr(flash_attn_3.interface("custom_op"), name))
        assert [*newer.parameters] == [*wanted, "return_attn_probs"]


def test_the_beta_calls_the_raw_ops() -> None:
    q, k, v, qv = leaves(3, (2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 256), (2, 5, 4, 256))
    flags = {"causal": True, "softcap": 0.7}
    got = flash_attn_3_beta.flash_attn_func(q, k, v, qv=qv, window_size=(3, 1), **flags)
    by_hand = flash_attn_3_beta._flash_attn_forward(
        q, k, v, None, None, qv, *[None] * 17, 264**-0.5, window_size=(3, 1), **flags
    )[0]
    assert torch.equal(got, by_hand)
    assert not torch.equal(got, flash_attn_3_beta.flash_attn_func(q, k, v, **flags))
    with pytest.raises(NotImplementedError, match="fp8"):
        flash_attn_3_beta.flash_attn_func(q, k, v, q_descale=torch.ones(2, 2))


def test_the_betas_module_is_where_users_import_it_and_is_not_taken_for_the_package() -> None:
    said = run(
        "from attncheck import standins\n"
        "from attncheck.standins import flash_attn_3, flash_attn_3_beta\n"
        "standins.provide('flash_attn_3_beta'); standins.provide('flash_attn_3_beta')\n"
        "import flash_attn_interface\n"
        "print(flash_attn_interface is flash_attn_3_beta, flash_attn_3.missing('raw') == '')\n"
        "try:\n"
        "    flash_attn_3.import_package()\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)\n"
    ).splitlines()
    assert said[0] == "True True"
    assert "is not there: it is on no package index" in said[1]


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_op_of_that_name_with_another_schema_is_left_alone() -> None:
    """3.0.0's `bwd` returns five tensors, the beta's eight."""
    said = run(
        "import torch\n"
        "from attncheck.standins import flash_attn_3\n"
        "library = torch.library.Library('flash_attn_3', 'FRAGMENT')\n"
        "schema = flash_attn_3.RAW_BACKWARD.removeprefix('flash_attn_3::').rpartition('->')[0]\n"
        "library.define(schema + '-> (Tensor, Tensor, Tensor, Tensor, Tensor)')\n"
        "flash_attn_3.provide()\n"
        "flash_attn_3.provide()\n"
        "print(flash_attn_3.missing('raw'))\n"
        "print(repr(flash_attn_3.missing('custom_op')))\n"
        "q = torch.zeros(1, 4, 1, 8)\n"
        "try:\n"
        "    torch.ops.flash_attn_3.bwd(q, q, q, q, q, torch.zeros(1, 1, 4))\n"
        "except NotImplementedError as error:\n"
        "    print('no kernel')\n"
    ).splitlines()
    assert said[0].startswith(
        "flash_attn_3::bwd is registered with another schema: it returns (Tensor, Tensor, Tensor, Tensor, "
        "Tensor), expected (Tensor(!), Tensor(!), Tensor(!), Tensor,"
    )
    assert "expected flash_attn_3::bwd(Tensor dout" in said[0]
    assert "found flash_attn_3::bwd(Tensor dout" in said[0]
    assert said[1:] == ["''", "no kernel"]


def test_an_op_of_the_package_itself_gets_a_cpu_kernel() -> None:
    said = run(
        "import torch\n"
        "from attncheck.standins import flash_attn_3\n"
        "library = torch.library.Library('flash_attn_3', 'FRAGMENT')\n"
        "library.define(flash_attn_3.RAW_FORWARD.removeprefix('flash_attn_3::'))\n"
        "library.impl('fwd', lambda *a, **k: 1 / 0, 'CUDA')\n"
        "flash_attn_3.provide()\n"
        "q = torch.zeros(1, 4, 1, 8)\n"
        "print(repr(flash_attn_3.missing('raw')), torch.ops.flash_attn_3.fwd(q, q, q)[0].shape)\n"
    )
    assert said.strip() == "'' torch.Size([1, 4, 1, 8])"
