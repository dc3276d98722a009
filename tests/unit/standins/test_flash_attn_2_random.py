"""The stand-ins for every version of the compiled module against float64 autograd, at random settings."""

from __future__ import annotations

from itertools import accumulate
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attncheck.runner.reference import attention, attention_lse
from attncheck.standins import flash_attn_2_5_cuda, flash_attn_2_6_cuda, flash_attn_2_cuda

MODULES = (flash_attn_2_cuda, flash_attn_2_6_cuda, flash_attn_2_5_cuda)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SCALE = 0.3

CASES = st.fixed_dictionaries(
    {
        "kv_heads": st.sampled_from([1, 2]),
        "groups": st.integers(1, 3),
        "width": st.sampled_from([8, 12]),
        "causal": st.booleans(),
        "window": st.tuples(st.integers(-1, 4), st.integers(-1, 4)),
        "softcap": st.sampled_from([0.0, 0.8]),
        "alibi": st.sampled_from([None, "heads", "batch"]),
        "seed": st.integers(0, 2**31),
    }
)


class Call:
    """One random setting: its tensors, and what the module's version takes as arguments."""

    def __init__(self, module: ModuleType, case: dict[str, Any], batch: int, dropout: float = 0.0):
        self.module, self.case, self.dropout = module, case, dropout
        self.random = torch.Generator().manual_seed(case["seed"])
        self.heads = case["kv_heads"] * case["groups"]
        # Before 2.7 the module pads what is no multiple of 8; from 2.7 on the Python before it does.
        self.width = 8 if module is flash_attn_2_cuda else case["width"]
        # 2.5 has no softcap, and no version has it together with dropout.
        capped = module is not flash_attn_2_5_cuda and not dropout
        self.softcap = case["softcap"] if capped else 0.0
        kind = case["alibi"]
        shape = (self.heads,) if kind == "heads" else (batch, self.heads)
        self.slopes = torch.rand(shape, generator=self.random) if kind else None

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, self.width, generator=self.random)

    def spec(self, *between: Any) -> tuple[Any, ...]:
        """scale to softcap, with `between` (zero_tensors) behind the scale."""
        softcap = () if self.module is flash_attn_2_5_cuda else (self.softcap,)
        return (self.dropout, SCALE, *between, self.case["causal"], *self.case["window"], *softcap)

    def padded(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """As the Python of old versions hands them back to the backward."""
        extra = -self.width % 8
        return [torch.nn.functional.pad(t, [0, extra]) for t in tensors]

    def options(self, keys: int, slopes: torch.Tensor | None) -> dict[str, Any]:
        """Of the reference. A window side as long as all keys is unlimited: see flash_math."""
        return {
            "scale": SCALE,
            "causal": "bottom_right" if self.case["causal"] else None,
            "window": tuple(-1 if side >= keys else side for side in self.case["window"]),
            "softcap": self.softcap,
            "alibi_slopes": None if slopes is None else slopes.double(),
        }


def forward(returned: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor, Any, torch.Tensor]:
    """out (padded, as the backward wants it), lse, S_dmask, rng_state, of any version."""
    out, lse, s_dmask, rng_state = (
        (returned[0], *returned[1:]) if len(returned) == 4 else returned[4:]
    )
    return out, lse, s_dmask, rng_state


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rpartition(".")[2])
@settings(max_examples=30, deadline=None)
@given(
    CASES, st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.sampled_from([0.0, 0.0, 0.4])
)
def test_dense(
    module: ModuleType, case: dict[str, Any], batch: int, sq: int, sk: int, dropout: float
) -> None:
    call = Call(module, case, batch, dropout)
    q, dout = (call.normal(batch, sq, call.heads) for _ in range(2))
    k, v = (call.normal(batch, sk, case["kv_heads"]) for _ in range(2))
    torch.manual_seed(case["seed"])
    returned = module.fwd(q, k, v, None, call.slopes, *call.spec(), dropout > 0, None)
    out, lse, s_dmask, rng_state = forward(returned)
    tail = (call.slopes, *call.spec(), False, None, rng_state)
    grads = module.bwd(dout, *call.padded(q, k, v), out, lse, None, None, None, *tail)

    leaves = [t.double().transpose(1, 2).requires_grad_() for t in (q, k, v)]
    options = call.options(sk, call.slopes)
    want, want_lse = attention_lse(*leaves, **options, empty_lse=torch.inf)
    if dropout:
        eye = torch.eye(sk, dtype=torch.float64).expand(batch, case["kv_heads"], sk, sk)
        keep = ~torch.signbit(s_dmask[..., :sq, :sk])
        values = leaves[2].repeat_interleave(case["groups"], 1)
        want = (attention(leaves[0], leaves[1], eye, **options) * keep / (1 - dropout)) @ values
    wants = torch.autograd.grad(want, leaves, dout.double().transpose(1, 2))
    got = (returned[0], *grads[:3])
    for one, other in zip(got, (want, *wants), strict=True):
        torch.testing.assert_close(one.double().transpose(1, 2), other.detach(), **CLOSE)
    if call.slopes is None:  # under causal, ALiBi shifts it by a constant per row
        torch.testing.assert_close(lse.double(), want_lse.detach(), **CLOSE)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rpartition(".")[2])
@settings(max_examples=30, deadline=None)
@given(CASES, st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3))
def test_packed(module: ModuleType, case: dict[str, Any], lengths: list[tuple[int, int]]) -> None:
    call = Call(module, case, len(lengths))
    longest = [max(side) for side in zip(*lengths, strict=True)]
    starts = [
        torch.tensor([0, *accumulate(side)], dtype=torch.int32)
        for side in zip(*lengths, strict=True)
    ]
    q, dout = (call.normal(int(starts[0][-1]), call.heads) for _ in range(2))
    k, v = (call.normal(int(starts[1][-1]), case["kv_heads"]) for _ in range(2))
    old = module is flash_attn_2_5_cuda
    places = (None, None) if old else (None, None, None)  # seqused_k, (leftpad_k,) block_table
    middle = (call.slopes, *longest, *call.spec(False))
    returned = module.varlen_fwd(q, k, v, None, *starts, *places, *middle, False, None)
    out, lse, _, rng_state = forward(returned)
    tensors = (dout, *call.padded(q, k, v), out, lse, None, None, None)
    grads = module.varlen_bwd(*tensors, *starts, *middle, False, None, rng_state)

    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    want, want_lse = attention_lse(
        *leaves,
        **call.options(longest[1], call.slopes),
        layout="thd",
        cu_seqlens_q=starts[0],
        cu_seqlens_k=starts[1],
        empty_lse=torch.inf,
    )
    wants = torch.autograd.grad(want, leaves, dout.double())
    for one, other in zip((returned[0], *grads[:3]), (want, *wants), strict=True):
        torch.testing.assert_close(one.double(), other.detach(), **CLOSE)
    if old:
        assert tuple(lse.shape) == (len(lengths), call.heads, longest[0])
        lse = torch.cat([row[:, :n] for row, (n, _) in zip(lse, lengths, strict=True)], dim=1)
    if call.slopes is None:
        torch.testing.assert_close(lse.double(), want_lse.detach(), **CLOSE)


@settings(max_examples=20, deadline=None)
@given(CASES, st.data())
def test_pages_are_packed_keys_in_another_place(case: dict[str, Any], data: st.DataObject) -> None:
    """The same keys, in order and in pages: the same bits."""
    call = Call(flash_attn_2_cuda, case, 2)
    lengths = [data.draw(st.integers(1, 512)) for _ in range(2)]
    pages = [call.normal(5, 256, case["kv_heads"]) for _ in "kv"]
    table = torch.tensor([[4, 0], [2, 4]], dtype=torch.int32)
    packed = [
        torch.cat([x[table[i].long()].flatten(0, 1)[:n] for i, n in enumerate(lengths)])
        for x in pages
    ]
    q = call.normal(5, call.heads)
    starts_q = torch.tensor([0, 3, 5], dtype=torch.int32)
    starts_k = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    middle = (call.slopes, 3, max(lengths), *call.spec(False), False, None)
    module = flash_attn_2_cuda
    want = module.varlen_fwd(q, *packed, None, starts_q, starts_k, None, None, None, *middle)
    got = module.varlen_fwd(q, *pages, None, starts_q, starts_k, None, None, table, *middle)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
