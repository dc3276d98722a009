"""Decoding with a cache: the stand-in against a float64 formula, over random settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attncheck.runner.reference import attention_lse
from attncheck.standins import flash_attn_2_5_cuda, flash_attn_2_6_cuda
from attncheck.standins import flash_attn_2_cuda as kernels

PAGE = 256
ARGUMENTS = (
    "k_", "v_", "seqlens_k_", "rotary_cos_", "rotary_sin_", "cache_batch_idx_", "leftpad_k_",
    "block_table_", "alibi_slopes_", "out_",
)  # fmt: skip


def run(
    q: torch.Tensor, kcache: torch.Tensor, vcache: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    defaults: dict[str, Any] = {
        **dict.fromkeys(ARGUMENTS),
        "softmax_scale": 0.3,
        "is_causal": False,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "is_rotary_interleaved": True,
        "num_splits": 0,
    }
    assert not set(options) - set(defaults)
    return kernels.fwd_kvcache(q, kcache, vcache, **{**defaults, **options})


def turned(x: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x (rows, heads, 24) by complex numbers: the first 16 columns, angles (rows, 8)."""
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    head = x[..., :16]
    a, b = (head[..., 0::2], head[..., 1::2]) if interleaved else (head[..., :8], head[..., 8:])
    z = torch.complex(a, b) * turn
    pairs = torch.stack([z.real, z.imag], -1) if interleaved else torch.stack([z.real, z.imag], -2)
    return torch.cat([pairs.flatten(-2), x[..., 16:]], -1)


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


CASES = st.fixed_dictionaries(
    {
        "groups": st.sampled_from([1, 2, 3]),
        "rows": st.integers(1, 5),
        "causal": st.booleans(),
        "window": st.sampled_from([(-1, -1), (3, -1), (2, 1), (-1, 2)]),
        "softcap": st.sampled_from([0.0, 0.8]),
        "alibi": st.sampled_from([None, "heads", "batch"]),
        "append": st.booleans(),
        "rotary": st.sampled_from([None, "interleaved", "halves"]),
        "where": st.sampled_from(["rows", "chosen_rows", "pages", "leftpad"]),
        "seed": st.integers(0, 2**31),
    }
)


@settings(max_examples=40, deadline=None)
@given(st.data(), CASES)
def test_against_float64(data: st.DataObject, case: dict[str, Any]) -> None:
    random = torch.Generator().manual_seed(case["seed"])
    batch, heads, rows = 3, 2 * case["groups"], case["rows"]
    paged = case["where"] == "pages"
    room = 2 * PAGE if paged else 14
    lengths = data.draw(st.lists(st.integers(0, room - rows), min_size=batch, max_size=batch))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    q, k, v = normal(batch, rows, heads, 24), normal(batch, rows, 2, 24), normal(batch, rows, 2, 24)
    cache_shape = (7, PAGE) if paged else (5, room)
    caches = [normal(*cache_shape, 2, 24) for _ in "kv"]
    options: dict[str, Any] = {"seqlens_k_": int32(lengths), "softcap": case["softcap"]}
    places = [[i] for i in range(batch)]
    leftpads = [0] * batch
    if case["where"] == "chosen_rows":
        places = [[4], [0], [2]]
        options["cache_batch_idx_"] = int32([4, 0, 2])
    elif paged:
        places = [[3, 0], [6, 1], [2, 5]]
        options["block_table_"] = torch.tensor(places, dtype=torch.int32)
    elif case["where"] == "leftpad":
        leftpads = [data.draw(st.integers(0, length)) for length in lengths]
        options["leftpad_k_"] = int32(leftpads)
    if case["append"]:
        options |= {"k_": k, "v_": v}
    angles = 3 * torch.rand(room, 8, generator=random)
    rotary = case["rotary"] if case["append"] else None
    if rotary:
        options |= {"rotary_cos_": angles.cos(), "rotary_sin_": angles.sin()}
        options["is_rotary_interleaved"] = rotary == "interleaved"
    left, right = case["window"]
    options |= {"is_causal": case["causal"], "window_size_left": left, "window_size_right": right}
    slopes = None
    if case["alibi"]:
        shape = (heads,) if case["alibi"] == "heads" else (batch, heads)
        # Small ones: under causal the kernel adds slope * j, and float32 rounds large scores.
        slopes = 0.1 * torch.rand(shape, generator=random)
        options["alibi_slopes_"] = slopes
    want_caches = [cache.double() for cache in caches]
    out, lse = run(q, *caches, **options)

    moving = case["causal"] or max(left, right) >= 0
    for i in range(batch):
        length, query, last = lengths[i], q[i].double(), lengths[i]
        flat = [cache[places[i]].flatten(0, 1) for cache in want_caches]
        if case["append"]:
            new, last = k[i].double(), length + rows
            if rotary:
                exact = angles.double()
                new = turned(new, exact[length:last], rotary == "interleaved")
                at = torch.arange(length, last) if moving else torch.full((rows,), length)
                query = turned(query, exact[at], rotary == "interleaved")
            flat[0][length:last], flat[1][length:last] = new, v[i].double()
            for cache, row in zip(want_caches, flat, strict=True):
                cache[places[i]] = row.unflatten(0, (len(places[i]), -1))
        keys, values = (row[leftpads[i] : last].unsqueeze(0) for row in flat)
        row_slopes = (
            None if slopes is None else (slopes[i] if slopes.ndim == 2 else slopes).double()
        )
        want, want_lse = attention_lse(
            query.unsqueeze(0), keys, values, layout="bshd", scale=0.3,
            causal="bottom_right" if case["causal"] else None, window=(left, right),
            softcap=case["softcap"], alibi_slopes=row_slopes, empty_lse=torch.inf,
        )  # fmt: skip
        torch.testing.assert_close(out[i].double(), want[0], rtol=1e-5, atol=1e-5)
        if slopes is None:  # under causal, ALiBi shifts it by a constant per row
            torch.testing.assert_close(lse[i].double(), want_lse[0], rtol=1e-5, atol=1e-5)
    for got, expected in zip(caches, want_caches, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def small() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, cache, new keys, lengths."""
    return (
        torch.randn(2, 3, 4, 16),
        torch.randn(2, 9, 4, 16),
        torch.randn(2, 3, 4, 16),
        int32([4, 2]),
    )


def test_without_new_keys_the_cache_stays_as_it_is() -> None:
    q, cache, _, lengths = small()
    before = cache.clone()
    run(q, cache, cache, seqlens_k_=lengths)
    assert torch.equal(cache, before)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("options", "moving"), [
    ({}, False),
    ({"is_causal": True}, True),
    ({"window_size_left": 5, "window_size_right": 3}, True),
    ({"window_size_left": 9}, False),  # as long as the cache: no window
])  # fmt: skip
def test_queries_are_turned_by_their_positions_only_where_order_counts(
    options: dict[str, Any], moving: bool, interleaved: bool
) -> None:
    """Else all of them by the position of the first, as flash-attn documents."""
    q, cache, new = torch.randn(1, 3, 2, 24), torch.randn(1, 9, 2, 24), torch.randn(1, 3, 2, 24)
    angles = 3 * torch.rand(9, 8)
    rotary = {"rotary_cos_": angles.cos(), "rotary_sin_": angles.sin()}
    rotary |= {"is_rotary_interleaved": interleaved}
    got = cache.clone()
    out, _ = run(q, got, cache.clone(), k_=new, v_=new, seqlens_k_=int32([4]), **rotary, **options)
    keys = turned(new[0], angles[4:7], interleaved)
    queries = turned(q[0], angles[[4, 5, 6]] if moving else angles[[4, 4, 4]], interleaved)
    torch.testing.assert_close(got[0, 4:7], keys)
    want, _ = run(
        queries[None], cache.clone(), cache.clone(), k_=keys[None], v_=new,
        seqlens_k_=int32([4]), **options,
    )  # fmt: skip
    torch.testing.assert_close(out, want)


def test_older_signatures_give_the_same() -> None:
    q, cache, new, lengths = small()
    want = run(q, cache.clone(), cache.clone(), k_=new, v_=new, seqlens_k_=lengths, is_causal=True)
    tensors = (q, cache.clone(), cache.clone(), new, new, lengths, None, None, None)
    spec = (None, None, 0.3, True, -1, -1)
    newer = flash_attn_2_6_cuda.fwd_kvcache(*tensors, None, None, *spec, 0.0, True, 0)
    tensors = (q, cache.clone(), cache.clone(), new, new, lengths, None, None, None)
    older = flash_attn_2_5_cuda.fwd_kvcache(*tensors, None, *spec, True, 0)
    for got in (newer, older):
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


REFUSALS: dict[str, tuple[Callable[..., Any], str]] = {
    "behind_the_end": (
        lambda q, c, new, n: run(q, c, c, k_=new, v_=new, seqlens_k_=n + 3),
        "the cache has 9 rows for a sequence and would need 10",
    ),
    "pages_of_any_size": (
        lambda q, c, new, n: run(q, c, c, seqlens_k_=n, block_table_=int32([0, 1])[:, None]),
        "Paged KV cache block size must be divisible by 256",
    ),
    "page_that_is_not_there": (
        lambda q, c, new, n: run(
            q, *(torch.zeros(2, 256, 4, 16) for _ in "kv"), block_table_=int32([0, 2])[:, None]
        ),
        "block_table names blocks that the cache of 2 lacks",
    ),
    "pages_and_rows": (
        lambda q, c, new, n: run(
            q, c, c, block_table_=int32([0, 1])[:, None], cache_batch_idx_=int32([0, 1])
        ),
        "Paged KVcache does not support cache_batch_idx",
    ),
    "value_missing": (
        lambda q, c, new, n: run(q, c, c, k_=new, seqlens_k_=n),
        "If key is supplied, value must also be passed in",
    ),
    "lengths_missing": (
        lambda q, c, new, n: run(q, c, c, k_=new, v_=new),
        "If key is supplied, seqlens_k must also be passed in",
    ),
    "int64_lengths": (
        lambda q, c, new, n: run(q, c, c, seqlens_k_=n.long()), "seqlens_k must have dtype int32"
    ),
    "rotary_without_keys": (
        lambda q, c, new, n: run(q, c, c, rotary_cos_=torch.ones(9, 8), rotary_sin_=torch.ones(9, 8)),
        "new key / value to be appended to KV cache must also be provided",
    ),
    "rotary_dim": (
        lambda q, c, new, n: run(
            q, c, c, k_=new, v_=new, seqlens_k_=n,
            rotary_cos_=torch.ones(9, 4), rotary_sin_=torch.ones(9, 4),
        ),
        "Only rotary dimensions divisible by 16",
    ),
    "fewer_rows_than_sequences": (
        lambda q, c, new, n: run(q, c[:1], c[:1]), "the cache has 1 rows for 2 sequences"
    ),
    "splits": (lambda q, c, new, n: run(q, c, c, num_splits=129), "num_splits > 128 not supported"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses_as_the_extension_does(name: str) -> None:
    call, message = REFUSALS[name]
    with pytest.raises(RuntimeError, match=message):
        call(*small())
