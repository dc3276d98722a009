"""The stand-in against float64 autograd, its faithfulness to the extension, and the real package on
it.

Errors are judged as the flash-attention test suites do: at most twice what the plain formula shows
in the same dtype against float64, plus 4 roundings of the largest value.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from attncheck import standins
from attncheck.errors import UserError
from attncheck.runner.reference import attention
from attncheck.standins import flash_attn_2_cuda as kernels
from attncheck.standins import flash_attn_package

# Each with a signature, or a Python part, of its own.
VERSIONS = ("2.5.9.post1", "2.6.3", "2.7.0.post2", "2.8.3.post2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SLOPES = torch.tensor([0.1, 0.3, 0.6, 0.9])

# name -> (kv heads, seqlen_q, seqlen_k, options); 2 batches, 4 heads, head_dim 16
SETTINGS: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "plain": (4, 9, 13, {}),
    "one_query": (4, 1, 13, {"causal": True}),
    "causal": (4, 9, 13, {"causal": True}),
    "causal_empty_rows": (4, 13, 9, {"causal": True}),
    "window": (4, 9, 13, {"window": (3, 2)}),
    "window_left": (4, 9, 13, {"window": (3, -1)}),
    "window_causal": (4, 9, 13, {"window": (3, 2), "causal": True}),
    "softcap": (4, 9, 13, {"softcap": 1.5}),
    "softcap_causal": (4, 9, 13, {"softcap": 1.5, "causal": True}),
    "alibi": (4, 9, 13, {"slopes": SLOPES}),
    "alibi_causal": (4, 9, 13, {"slopes": SLOPES, "causal": True}),
    "alibi_batch": (4, 9, 13, {"slopes": torch.stack([SLOPES, SLOPES.flip(0)])}),
    "alibi_softcap": (4, 9, 13, {"slopes": SLOPES, "softcap": 1.5}),
    "gqa": (2, 9, 13, {}),
    "mqa_causal": (1, 9, 13, {"causal": True}),
    "scale": (4, 9, 13, {"scale": 0.7}),
}
LENGTHS_Q, LENGTHS_K = (9, 4), (5, 13)


def starts(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def inputs(
    name: str, dtype: torch.dtype, packed: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v, dout: rounded to `dtype`, so that input rounding is nobody's error."""
    kv_heads, sq, sk, _ = SETTINGS[name]
    random = torch.Generator().manual_seed(7)
    q_rows = (sum(LENGTHS_Q),) if packed else (2, sq)
    k_rows = (sum(LENGTHS_K),) if packed else (2, sk)
    shapes = ((*q_rows, 4, 16), (*k_rows, kv_heads, 16), (*k_rows, kv_heads, 16), (*q_rows, 4, 16))
    q, k, v, dout = (torch.randn(s, generator=random).to(dtype) for s in shapes)
    return q, k, v, dout


def expected(
    name: str, dtype: torch.dtype, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    dout: torch.Tensor, packed: bool = False,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """out, dq, dk, dv of the plain formula in `dtype`, by autograd."""
    options = SETTINGS[name][3]
    leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
    slopes = options.get("slopes")
    out = attention(
        *leaves,
        layout="thd" if packed else "bshd",
        scale=options.get("scale"),
        causal="bottom_right" if options.get("causal") else None,
        window=options.get("window", (-1, -1)),
        softcap=options.get("softcap", 0.0),
        alibi_slopes=None if slopes is None else slopes.to(dtype),
        cu_seqlens_q=starts(LENGTHS_Q) if packed else None,
        cu_seqlens_k=starts(LENGTHS_K) if packed else None,
    )
    grads = torch.autograd.grad(out, leaves, dout.to(dtype))
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def flags(name: str, dropout: float = 0.0) -> dict[str, Any]:
    options = SETTINGS[name][3]
    window = options.get("window", (-1, -1))
    return {
        "alibi_slopes": options.get("slopes"),
        "p_dropout": dropout,
        "softmax_scale": options.get("scale", 0.25),
        "is_causal": options.get("causal", False),
        "window_size_left": window[0],
        "window_size_right": window[1],
        "softcap": options.get("softcap", 0.0),
        "gen_": None,
    }


def packing() -> dict[str, Any]:
    return {
        "cu_seqlens_q": starts(LENGTHS_Q),
        "cu_seqlens_k": starts(LENGTHS_K),
        "max_seqlen_q": max(LENGTHS_Q),
        "max_seqlen_k": max(LENGTHS_K),
        "zero_tensors": False,
    }


def run_fwd(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: Any) -> Any:
    options = {"out_": None, "return_softmax": False, **flags(name), **more}
    return kernels.fwd(q, k, v, **options)


def run_bwd(name: str, *tensors: torch.Tensor, **more: Any) -> Any:
    """`tensors`: dout, q, k, v, out, lse."""
    options = {
        "dq_": None, "dk_": None, "dv_": None, "deterministic": False, "rng_state": None,
        **flags(name), **more,
    }  # fmt: skip
    return kernels.bwd(*tensors, **options)


def run_varlen_fwd(
    name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: Any
) -> Any:
    options = {
        "out_": None, "seqused_k": None, "leftpad_k": None, "block_table": None,
        "return_softmax": False, **flags(name), **packing(), **more,
    }  # fmt: skip
    return kernels.varlen_fwd(q, k, v, **options)


def run_varlen_bwd(name: str, *tensors: torch.Tensor, **more: Any) -> Any:
    options = {
        "dq_": None, "dk_": None, "dv_": None, "deterministic": False, "rng_state": None,
        **flags(name), **packing(), **more,
    }  # fmt: skip
    return kernels.varlen_bwd(*tensors, **options)


def assert_as_good_as_the_formula(
    got: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor],
    same_dtype: dict[str, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    for name, want in exact.items():
        error = float((got[name].double() - want).abs().max())
        own = float((same_dtype[name].double() - want).abs().max())
        bound = 2 * own + 4 * torch.finfo(dtype).eps * float(want.abs().max())
        assert error <= bound, f"{name}: {error} above {bound}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_dense_against_float64(name: str, dtype: torch.dtype) -> None:
    q, k, v, dout = inputs(name, dtype)
    out, lse, s_dmask, rng_state = run_fwd(name, q, k, v)
    dq, dk, dv, softmax_d = run_bwd(name, dout, q, k, v, out, lse)
    assert_as_good_as_the_formula(
        {"out": out, "dq": dq, "dk": dk, "dv": dv},
        expected(name, torch.float64, q, k, v, dout),
        expected(name, dtype, q, k, v, dout),
        dtype,
    )
    assert (out.dtype, dq.dtype, dk.dtype) == (dtype,) * 3
    assert (out.shape, dk.shape) == (q.shape, k.shape)
    assert lse.dtype == torch.float32
    assert tuple(lse.shape) == (2, 4, q.shape[1])
    assert s_dmask.numel() == 0
    assert (rng_state.dtype, tuple(rng_state.shape)) == (torch.int64, (2,))
    assert tuple(softmax_d.shape) == (2, 4, 128)
    torch.testing.assert_close(
        softmax_d[..., : q.shape[1]], (dout.float() * out.float()).sum(-1).transpose(1, 2)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_varlen_against_float64(name: str, dtype: torch.dtype) -> None:
    q, k, v, dout = inputs(name, dtype, packed=True)
    out, lse, _, rng_state = run_varlen_fwd(name, q, k, v)
    dq, dk, dv, softmax_d = run_varlen_bwd(name, dout, q, k, v, out, lse)
    assert_as_good_as_the_formula(
        {"out": out, "dq": dq, "dk": dk, "dv": dv},
        expected(name, torch.float64, q, k, v, dout, packed=True),
        expected(name, dtype, q, k, v, dout, packed=True),
        dtype,
    )
    assert (lse.dtype, tuple(lse.shape)) == (torch.float32, (4, 13))
    assert tuple(rng_state.shape) == (2,)
    assert tuple(softmax_d.shape) == (4, 13 + 128 * 2)
    second = (dout.float() * out.float()).sum(-1)[9:].T
    torch.testing.assert_close(softmax_d[:, 9 + 128 : 13 + 128], second)


def test_lse_is_the_log_of_the_sum_and_infinite_where_nothing_is_seen() -> None:
    q, k, v, _ = inputs("causal_empty_rows", torch.float32)
    _, lse, _, _ = run_fwd("causal_empty_rows", q, k, v)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 0.25
    hidden = torch.ones(13, 9, dtype=torch.bool).tril(-4).logical_not()
    want = torch.logsumexp(scores.masked_fill(hidden, -torch.inf), -1)
    assert bool((lse[..., :4] == torch.inf).all())
    torch.testing.assert_close(lse[..., 4:], want[..., 4:])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "varlen"])
def test_a_wrong_lse_or_out_changes_the_gradient(packed: bool) -> None:
    forward, backward = (run_varlen_fwd, run_varlen_bwd) if packed else (run_fwd, run_bwd)
    q, k, v, dout = inputs("causal", torch.float32, packed)
    out, lse, _, _ = forward("causal", q, k, v)
    right = backward("causal", dout, q, k, v, out, lse)
    wrong_lse = backward("causal", dout, q, k, v, out, lse + 0.5)
    wrong_out = backward("causal", dout, q, k, v, out + 0.5, lse)
    dq, dk, dv = range(3)
    for gradient in (dq, dk, dv):
        assert float((right[gradient] - wrong_lse[gradient]).abs().max()) > 0.01
    for gradient in (dq, dk):
        assert float((right[gradient] - wrong_out[gradient]).abs().max()) > 0.01
    assert torch.equal(right[dv], wrong_out[dv])  # dV does not depend on D


def test_buffers_are_written_in_place() -> None:
    q, k, v, dout = inputs("gqa", torch.float32)
    buffer = torch.full_like(q, torch.nan)
    out, lse, _, _ = run_fwd("gqa", q, k, v, out_=buffer)
    assert out is buffer
    fresh = run_bwd("gqa", dout, q, k, v, out, lse)
    # As flash_attn passes them: slices of one packed tensor.
    dq, dkv = torch.full_like(q, torch.nan), torch.full((2, 13, 2, 2, 16), torch.nan)
    returned = run_bwd("gqa", dout, q, k, v, out, lse, dq_=dq, dk_=dkv[:, :, 0], dv_=dkv[:, :, 1])
    assert returned[0] is dq
    for got, want in zip((dq, dkv[:, :, 0], dkv[:, :, 1]), fresh[:3], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "varlen"])
def test_backward_drops_what_forward_dropped(packed: bool) -> None:
    forward, backward = (run_varlen_fwd, run_varlen_bwd) if packed else (run_fwd, run_bwd)
    q, k, v, dout = inputs("plain", torch.float32, packed)
    torch.manual_seed(5)
    first = forward("plain", q, k, v, p_dropout=0.3)
    torch.manual_seed(5)
    second = forward("plain", q, k, v, p_dropout=0.3)
    third = forward("plain", q, k, v, p_dropout=0.3)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], third[0])
    out, lse, _, rng_state = first
    dv = backward("plain", dout, q, k, v, out, lse, p_dropout=0.3, rng_state=rng_state)[2]
    # out is linear in v: <dout, out(v)> = <dv, v> for the same mask only.
    left, right = float((dout * out).sum()), float((dv * v).sum())
    assert left == pytest.approx(right, rel=1e-4)
    other = backward("plain", dout, q, k, v, out, lse, p_dropout=0.3, rng_state=third[3])[2]
    assert not torch.allclose(dv, other)


def test_dropout_gradients_against_the_mask_in_s_dmask() -> None:
    q, k, v, dout = inputs("causal", torch.float32)
    torch.manual_seed(2)
    out, lse, s_dmask, rng_state = run_fwd("causal", q, k, v, p_dropout=0.25, return_softmax=True)
    assert tuple(s_dmask.shape) == (2, 4, 128, 128)
    keep = ~torch.signbit(s_dmask[..., :9, :13])
    leaves = [t.double().transpose(1, 2).requires_grad_() for t in (q, k, v)]
    scores = leaves[0] @ leaves[1].transpose(-1, -2) * 0.25
    hidden = torch.ones(9, 13, dtype=torch.bool).tril(4).logical_not()
    probabilities = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
    want = (probabilities * keep / 0.75) @ leaves[2]
    grads = torch.autograd.grad(want, leaves, dout.double().transpose(1, 2))
    got = run_bwd("causal", dout, q, k, v, out, lse, p_dropout=0.25, rng_state=rng_state)
    torch.testing.assert_close(out.double().transpose(1, 2), want.detach(), rtol=1e-4, atol=1e-5)
    for one, other in zip(got[:3], grads, strict=True):
        torch.testing.assert_close(one.double().transpose(1, 2), other, rtol=1e-4, atol=1e-5)
    kept = float(keep.double().mean())
    assert 0.68 < kept < 0.82  # 0.75, 936 draws: 5 standard deviations


def test_without_dropout_no_random_number_is_drawn() -> None:
    q, k, v, _ = inputs("plain", torch.float32)
    before = torch.get_rng_state()
    run_fwd("plain", q, k, v)
    assert torch.equal(torch.get_rng_state(), before)


def test_seqused_and_leftpad_choose_keys() -> None:
    q, k, v, _ = inputs("plain", torch.float32, packed=True)
    used, pad = torch.tensor([3, 10], dtype=torch.int32), torch.tensor([1, 4], dtype=torch.int32)
    out, _, _, _ = run_varlen_fwd("plain", q, k, v, seqused_k=used, leftpad_k=pad)
    picked = torch.tensor([1, 2, *range(5 + 4, 5 + 10)])
    want, _, _, _ = run_varlen_fwd("plain", q, k[picked], v[picked], cu_seqlens_k=starts((2, 6)))
    assert torch.equal(out, want)


def test_zero_tensors_decides_what_lies_behind_the_last_sequence() -> None:
    q, k, v, _ = inputs("plain", torch.float32, packed=True)
    short = starts((9, 2))
    for zero_tensors, behind in ((True, -torch.inf), (False, torch.inf)):
        out, lse, _, _ = run_varlen_fwd(
            "plain", q, k, v, cu_seqlens_q=short, zero_tensors=zero_tensors
        )
        assert bool((out[11:] == 0).all())
        assert bool((lse[:, 11:] == behind).all())


def test_no_keys_give_zeros_and_no_queries_give_zero_gradients() -> None:
    q, k, v, dout = inputs("plain", torch.float32)
    out, lse, _, _ = run_fwd("plain", q, k[:, :0], v[:, :0])
    assert bool((out == 0).all())
    assert bool((lse == torch.inf).all())
    none = slice(0, 0)
    _, dk, dv, _ = run_bwd("plain", dout[:, none], q[:, none], k, v, out[:, none], lse[..., none])
    assert bool((dk == 0).all())
    assert bool((dv == 0).all())


REFUSALS: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any], str]] = {
    "batch": (lambda q, k, v: run_fwd("plain", q[:0], k[:0], v[:0]), "batch size must be positive"),
    "heads": (lambda q, k, v: run_fwd("plain", q[:, :, :0], k, v), "invalid configuration"),
    "kv_heads": (lambda q, k, v: run_fwd("plain", q, k[:, :, :0], v[:, :, :0]), "SIGFPE"),
    "groups": (
        lambda q, k, v: run_fwd("plain", q, k[:, :, :3], v[:, :, :3]),
        "Number of heads in key/value must divide number of heads in query",
    ),
    "head_dim": (
        lambda q, k, v: run_fwd("plain", *(t[..., :12].contiguous() for t in (q, k, v))),
        "multiple of 8",
    ),
    "wide": (
        lambda q, k, v: run_fwd("plain", *(t.repeat(1, 1, 1, 17) for t in (q, k, v))),
        "head dimension at most 256",
    ),
    "dtype": (lambda q, k, v: run_fwd("plain", q, k.half(), v), "query and key must have the same"),
    "float64": (
        lambda q, k, v: run_fwd("plain", q.double(), k.double(), v.double()),
        "only support fp16 and bf16",
    ),
    "stride": (
        lambda q, k, v: run_fwd("plain", q.transpose(1, 3).contiguous().transpose(1, 3), k, v),
        "contiguous last dimension",
    ),
    "k_shape": (
        lambda q, k, v: run_fwd("plain", q, k[:1], v),
        "k must have shape \\(batch_size, seqlen_k, num_heads_k, head_size\\)",
    ),
    "softmax": (lambda q, k, v: run_fwd("plain", q, k, v, return_softmax=True), "return_softmax"),
    "softcap": (
        lambda q, k, v: run_fwd("softcap", q, k, v, p_dropout=0.1),
        "Softcapping does not support dropout",
    ),
    "slopes": (
        lambda q, k, v: run_fwd("plain", q, k, v, alibi_slopes=torch.ones(3)),
        "ALiBi slopes must have shape",
    ),
    "buffer": (
        lambda q, k, v: run_fwd("plain", q, k, v, out_=torch.empty_like(q[:1])),
        "out must have shape",
    ),
    "lse": (
        lambda q, k, v: run_bwd("plain", q, q, k, v, q, torch.zeros(2, 4, 8)),
        "softmax_lse is torch.float32 \\(2, 4, 8\\), the kernel reads it as float32 \\(2, 4, 9\\)",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses_as_the_extension_does(name: str) -> None:
    call, message = REFUSALS[name]
    q, k, v, _ = inputs("plain", torch.float32)
    with pytest.raises(RuntimeError, match=message):
        call(q, k, v)


def test_install_names_itself_and_is_harmless_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(__import__("sys").modules, "flash_attn_2_cuda", raising=False)
    flash_attn_package.install()
    flash_attn_package.install()
    sentence = flash_attn_package.SENTENCE
    assert sentence.startswith("flash_attn_2_cuda: CPU reference kernels by attncheck")
    assert __import__("flash_attn_2_cuda").fwd is kernels.fwd


def test_install_refuses_to_shadow_the_real_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "flash_attn_2_cuda", object())
    with pytest.raises(UserError, match="already loaded"):
        flash_attn_package.install()


def test_unknown_stand_in_names_the_known() -> None:
    with pytest.raises(UserError, match=r"stand-in .flash_attn_3_cuda.*flash_attn_2_cuda"):
        standins.provide("flash_attn_3_cuda")


def test_packages_before_2_7_have_no_ops_to_register(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import ModuleType

    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_forward = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    assert flash_attn_package.register_cpu_kernels() == ()


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("2.5.9.post1", "flash_attn_2_5_cuda"),
        ("2.6.1", "flash_attn_2_6_cuda"),
        ("2.6.3", "flash_attn_2_6_cuda"),
        ("2.7.0.post2", "flash_attn_2_cuda"),
        ("2.8.3.post2", "flash_attn_2_cuda"),
        ("3.0", "flash_attn_2_cuda"),
        ("", "flash_attn_2_cuda"),
    ],
)
def test_each_version_gets_the_signatures_it_calls(version: str, name: str) -> None:
    assert flash_attn_package.standin_for(version) == name


@pytest.mark.parametrize("version", ["2.6.0.post1", "2.5.6", "1.0.9"])
def test_versions_with_other_signatures_are_refused(version: str) -> None:
    text = (
        f"no stand-in for the compiled module of flash-attn {version}: expected 2.5.7 to 2.5.9, or"
    )
    with pytest.raises(UserError, match=text):
        flash_attn_package.standin_for(version)


@pytest.mark.parametrize(
    "version",
    [VERSIONS[0], *(pytest.param(v, marks=pytest.mark.slow) for v in VERSIONS[1:-1]), VERSIONS[-1]],
)
def test_the_real_package_runs_on_it(
    version: str, run_with_flash_attn: Callable[[str, Path], str]
) -> None:
    script = Path(__file__).with_name("flash_attn_session.py")
    report = json.loads(run_with_flash_attn(version, script))
    assert report["version"] == version
    assert report["dropout_gap"] < 1e-4
    if version < "2.7":
        assert report["ops"] == []
        return
    assert report["ops"] == [
        f"flash_attn._flash_attn_{op}.default"
        for op in ("forward", "backward", "varlen_forward", "varlen_backward")
    ]
    assert report["opcheck"] == dict.fromkeys(report["ops"], "SUCCESS")
    assert report["softmax_d_shape"] == [2, 4, 128]
