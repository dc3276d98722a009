"""Registering strategies and taking them back, for real: ranks are simulated in this process, values are not.

What is registered has to answer, before and after an op's first use, whatever torch had for the op; what
cannot be done has to be refused in one sentence; and afterwards everything has to be as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed._local_tensor import LocalTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.debug import CommDebugMode

from attncheck import standins
from attncheck.fixes import packages, strategies
from attncheck.fixes.notation import Signature
from attncheck.fixes.packages import torch_overrides, torch_sdpa
from attncheck.fixes.strategies import (
    ABSENT,
    KEPT,
    LEFT,
    OTHER,
    REGISTERED,
    NotRegistered,
    Strategy,
    answers,
    find_op,
    install,
    remove,
)
from attncheck.runner import compat

CPU_FORWARD, CPU_BACKWARD = torch_sdpa.SIGNATURES[:2]
CPU = (CPU_FORWARD, CPU_BACKWARD)
# All sizes and their halves differ.
B, SQ, SK, D = 6, 18, 22, 16
BATCH, HEADS, QUERIES, WHOLE = Shard(0), Shard(1), Shard(2), Replicate()


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    standins.provide("aten_attention")
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # the tensors are small, and on a busy machine threads wait for each other
    compat.simulated_group(4)
    yield
    dist.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def taken_back() -> Iterator[None]:
    yield
    remove()


@contextmanager
def simulated(mesh_shape: Sequence[int]) -> Iterator[DeviceMesh]:
    """A mesh of ranks that are all in this process."""
    with LocalTensorMode(math.prod(mesh_shape)):
        yield init_device_mesh("cpu", tuple(mesh_shape))


def tables() -> list[dict[Any, Any]]:
    return [dict(table) for table in strategies._tables()]


# --- registering and undoing ---------------------------------------------------------------------


def test_everything_is_put_back() -> None:
    before = tables()
    became = install(packages.known(), required=False)
    assert became[CPU_FORWARD.op] == became["aten._cudnn_attention_forward.default"] == REGISTERED
    assert became["npu.npu_fusion_attention.default"] == ABSENT
    assert tables() != before
    remove()
    assert tables() == before
    remove()  # twice is harmless
    assert tables() == before


def test_twice_is_harmless() -> None:
    install(CPU)
    once = tables()
    assert install(CPU) == dict.fromkeys((s.op for s in CPU), KEPT)
    assert tables() == once


def test_what_another_module_of_ours_registered_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """An emitted module has an engine, and so a memory, of its own."""
    install(CPU)
    monkeypatch.setattr(strategies, "_saved", {})
    once = tables()
    assert install(CPU) == dict.fromkeys((s.op for s in CPU), KEPT)
    remove()
    assert tables() == once
    monkeypatch.undo()
    remove()


def test_an_op_that_torch_knows_is_left_alone() -> None:
    before = tables()
    bmm = Signature("aten.bmm.default", {"self": "b n m", "mat2": "b m p"}, {"out": "b n p"})
    softmax = Signature("aten._softmax.default", {"self": "b n"}, {"out": "b n"})
    assert install((bmm, softmax)) == {bmm.op: LEFT, softmax.op: LEFT}
    assert tables() == before


def test_an_op_that_returns_more_than_described_is_of_another_version() -> None:
    before = tables()
    less = replace(CPU_FORWARD, gives={"output": "b h sq d"})
    assert install((less,)) == {CPU_FORWARD.op: OTHER}
    assert tables() == before


@pytest.mark.parametrize(
    ("bounds", "became"),
    [(("2.5", "99"), REGISTERED), (("2.5", "2.6"), LEFT), (("98", "99"), LEFT)],
)
def test_an_override_ends_where_nobody_looked(bounds: tuple[str, str], became: str) -> None:
    bmm = Signature(
        "aten.bmm.default", {"self": "b n m", "mat2": "b m p"}, {"out": "b n p"}, overrides=bounds
    )
    assert install((bmm,)) == {bmm.op: became}


@pytest.mark.parametrize(
    ("version", "bounds", "inside"),
    [
        ("2.13.0+cpu", ("2.9", "2.15"), True),
        ("2.9.1", ("2.9", "2.15"), True),
        ("2.15.0.dev20260101", ("2.9", "2.15"), True),  # not yet 2.15
        ("2.15.0", ("2.9", "2.15"), False),
        ("2.8.0", ("2.9", "2.15"), False),
    ],
)
def test_versions_are_compared_as_versions(
    monkeypatch: pytest.MonkeyPatch, version: str, bounds: tuple[str, str], inside: bool
) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    assert strategies._is_overridden([replace(CPU_FORWARD, overrides=bounds)]) is inside


def test_an_op_that_is_not_there_is_named() -> None:
    with pytest.raises(NotRegistered, match=r"nobody\.made_it\.default is not registered"):
        install((Signature("nobody.made_it.default", {}, {}),))
    assert install((Signature("nobody.made_it.default", {}, {}),), required=False) == {
        "nobody.made_it.default": ABSENT
    }


def test_a_missing_meta_kernel_is_made_and_taken_back() -> None:
    op = find_op("aten._cudnn_attention_forward.default")
    assert not op.has_kernel_for_dispatch_key("Meta")
    install(packages.known(), required=False)
    q, kv = (torch.empty(B, 4, s, D, device="meta", dtype=torch.bfloat16) for s in (SQ, SK))
    out, lse, *rest = op(q, kv, kv, None, None, None, SQ, SK, True)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == ((B, 4, SQ, 1), torch.float32)
    assert rest[:4] == [None, None, SQ, SK]
    remove()
    assert not op.has_kernel_for_dispatch_key("Meta")


# --- who answers ---------------------------------------------------------------------------------


def test_a_single_dim_strategy_shadows_ours_and_is_seen() -> None:
    """2.13 asks these first: what is registered beside one is never asked."""
    install(CPU)
    op = find_op(CPU_FORWARD.op)
    propagator = strategies._propagator()
    ours = propagator.op_strategy_funcs[op]
    assert answers(ours)
    bmm = find_op("aten.bmm.default")
    propagator.op_single_dim_strategy_funcs[op] = propagator.op_single_dim_strategy_funcs[bmm]
    try:
        assert not answers(ours)
    finally:
        del propagator.op_single_dim_strategy_funcs[op]
    assert answers(ours)


def test_a_handler_of_the_whole_op_shadows_ours_and_nothing_is_left_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = tables()
    op = find_op(CPU_BACKWARD.op)
    handlers = {**DTensor._op_dispatcher._custom_op_handlers, op: lambda *a, **k: None}
    monkeypatch.setattr(DTensor._op_dispatcher, "_custom_op_handlers", handlers)
    with pytest.raises(NotRegistered, match=f"registered for {CPU_BACKWARD.op} is not the one"):
        install(CPU)
    assert tables() == before


def test_a_strategy_that_is_not_registered_does_not_answer() -> None:
    assert not answers(Strategy(find_op(CPU_FORWARD.op), [CPU_FORWARD]))


def placements_of_bmm() -> tuple[Any, ...]:
    torch.manual_seed(0)
    whole = torch.randn(8, 12, 20), torch.randn(8, 20, 28)
    with simulated((4,)) as mesh:
        rows, other = (
            distribute_tensor(t, mesh, [p]) for t, p in zip(whole, (HEADS, WHOLE), strict=True)
        )
        out = torch.bmm(rows, other)
        assert apart(out, torch.bmm(*whole)) < 1e-5
    return tuple(out.placements)


def test_an_op_with_a_single_dim_strategy_is_overridden_and_gets_it_back() -> None:
    op = find_op("aten.bmm.default")
    assert op in strategies._propagator().op_single_dim_strategy_funcs  # the premise
    assert placements_of_bmm() == (HEADS,)
    # Ours says less, so that one sees who answers: after the first use, and with torch's own in the caches.
    bmm = Signature(
        "aten.bmm.default", {"self": "b n m", "mat2": "b m p"}, {"out": "b n p"},
        overrides=("2.5", "99"),
    )  # fmt: skip
    install((bmm,))
    assert placements_of_bmm() in {(BATCH,), (WHOLE,)}
    remove()
    assert placements_of_bmm() == (HEADS,)


# --- values --------------------------------------------------------------------------------------


def number(x: Any) -> float:
    return float(x.reconcile() if hasattr(x, "reconcile") else x)


def apart(got: DTensor, whole: torch.Tensor) -> float:
    assert got.shape == whole.shape
    return number((got.full_tensor() - whole).detach().abs().max())


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def attended(
    attend: Attend,
    mesh_shape: Sequence[int],
    at: Sequence[Sequence[Any]],
    heads: int = 4,
    kv_heads: int = 4,
    lengths: tuple[int, int] = (SQ, SK),
) -> tuple[list[float], tuple[Any, ...], int]:
    """How far output and gradients are from those of the whole, the output's placements, and how many
    collectives ran. `at`: placements of q, and of k and v.
    """
    torch.manual_seed(heads)
    rows, columns = lengths
    sizes = (B, heads, rows, D), (B, kv_heads, columns, D), (B, kv_heads, columns, D)
    wholes = [torch.randn(size) for size in sizes]
    leaves = [t.clone().requires_grad_() for t in wholes]
    whole = attend(*leaves)
    expected = whole, *torch.autograd.grad((whole * whole).sum(), leaves)
    with simulated(mesh_shape) as mesh:
        dtensors = [
            distribute_tensor(t, mesh, p).requires_grad_()
            for t, p in zip(wholes, (at[0], at[1], at[1]), strict=True)
        ]
        with CommDebugMode() as communication:
            out = attend(*dtensors)
            grads = torch.autograd.grad((out * out).sum(), dtensors)
        ran = communication.get_total_counts()
        gaps = [apart(*pair) for pair in zip((out, *grads), expected, strict=True)]
        return gaps, tuple(out.placements), ran


def sdpa(causal: bool = False, mask: Any = None) -> Attend:
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def raw_flash(causal: bool = False) -> Attend:
    """CUDA's op by itself, which takes groups of heads as they are."""
    op = torch.ops.aten._scaled_dot_product_flash_attention
    return lambda q, k, v: op(q, k, v, 0.0, causal)[0]


@pytest.mark.parametrize(
    ("mesh", "heads", "q_at", "kv_at", "causal"),
    [
        ((4,), 7, [HEADS], [HEADS], True),  # 2, 2, 2 and 1
        ((2,), 4, [BATCH], [BATCH], True),
        ((2, 2), 4, [BATCH, HEADS], [BATCH, HEADS], False),
        ((2, 2), 4, [BATCH, BATCH], [BATCH, BATCH], True),  # 2, 1, 2 and 1
        ((2, 2), 4, [HEADS, HEADS], [HEADS, HEADS], True),
        ((2, 2), 4, [WHOLE, HEADS], [WHOLE, HEADS], False),
        ((2,), 4, [HEADS], [QUERIES], False),  # k and v move
        ((2,), 4, [WHOLE], [WHOLE], True),
    ],
)
def test_sdpa_on_a_cpu(mesh: Any, heads: int, q_at: Any, kv_at: Any, causal: bool) -> None:
    install(CPU)
    gaps, placed, ran = attended(sdpa(causal), mesh, (q_at, kv_at), heads, heads)
    assert max(gaps) < 1e-5
    assert list(placed) == q_at
    assert (ran == 0) is (q_at == kv_at)


def test_without_them_sdpa_on_a_cpu_has_no_strategy_before_and_after() -> None:
    """And what was propagated in between is forgotten."""
    call = sdpa(causal=True), (2,), ([HEADS], [HEADS])
    with pytest.raises(Exception, match="does not have a sharding strategy registered"):
        attended(*call)
    install(CPU)  # after the first use
    assert max(attended(*call)[0]) < 1e-5
    remove()
    with pytest.raises(Exception, match="does not have a sharding strategy registered"):
        attended(*call)


@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_flags_are_in_the_cache_key(order: tuple[bool, bool]) -> None:
    """Causal and not need other strategies: served stale, one of the two is wrong or moved for nothing."""
    install(CPU)
    found = {}
    for causal in order:
        gaps, placed, ran = attended(sdpa(causal), (2,), ([QUERIES], [WHOLE]))
        assert max(gaps) < 1e-5, causal
        found[causal] = placed, ran > 0
    assert found[False] == ((QUERIES,), False)
    assert found[True][0] != (QUERIES,)
    assert found[True][1]


MASKED_BACKWARD = Signature(
    "aten._scaled_dot_product_efficient_attention_backward.default",
    takes={
        **dict.fromkeys(("grad_out_", "query", "key", "value", "out"), "b h sq d"),
        "attn_bias": "b h sq sk",
        "logsumexp": "b h padded",
        "philox_seed": "replicated",
        "philox_offset": "replicated",
    },
    gives={
        **dict.fromkeys(("grad_query", "grad_key", "grad_value"), "b h sq d"),
        "grad_bias": "like attn_bias, summed over b h, if grad_input_mask[3]",
    },
    overrides=("2.6", "9"),
)


@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_masks_of_gradients_are_in_the_cache_key(order: tuple[bool, bool]) -> None:
    """Efficient attention with a learned bias and a frozen one of one shape: its own strategy fails."""
    op = torch.ops.aten._scaled_dot_product_efficient_attention
    torch.manual_seed(1)
    q, bias = torch.randn(B, 4, SQ, D), torch.randn(B, 4, SQ, SQ)

    def gradients(q: torch.Tensor, bias: torch.Tensor, learned: bool) -> tuple[torch.Tensor, ...]:
        leaves = q.detach().requires_grad_(), bias.detach().requires_grad_(learned)
        out = op(leaves[0], leaves[0], leaves[0], leaves[1], True)[0]
        return torch.autograd.grad(out.sum(), leaves[: 1 + learned])

    def both() -> None:
        with simulated((2,)) as mesh:
            cut = [distribute_tensor(t, mesh, [HEADS]) for t in (q, bias)]
            for learned in order:
                pairs = zip(gradients(*cut, learned), gradients(q, bias, learned), strict=True)
                assert all(apart(*pair) < 1e-4 for pair in pairs)

    if order == (False, True):  # the premise
        with pytest.raises(AssertionError, match="output tensor should be scalar"):
            both()
    install([MASKED_BACKWARD])
    both()


@pytest.mark.parametrize("kv_at", [HEADS, WHOLE])
def test_torn_groups_of_flash_are_mended(kv_at: Any) -> None:
    """12 query and 3 kv heads on 2 ranks: PyTorch's own strategy is silently wrong."""
    call = raw_flash(), (2,), ([HEADS], [kv_at]), 12, 3, (SQ, 40)
    assert max(attended(*call)[0]) > 0.1  # the premise
    install(torch_overrides.SIGNATURES)
    gaps, _, _ = attended(*call)
    assert max(gaps) < 1e-5
    remove()
    assert max(attended(*call)[0]) > 0.1


@pytest.mark.parametrize(
    ("mesh", "heads", "kv_heads", "q_at", "kv_at"),
    [
        ((2,), 8, 1, [HEADS], [WHOLE]),
        ((2,), 8, 2, [HEADS], [HEADS]),
        ((2, 2), 8, 4, [HEADS, HEADS], [HEADS, HEADS]),
        ((2, 2), 8, 1, [BATCH, HEADS], [BATCH, WHOLE]),
        ((2,), 8, 2, [QUERIES], [WHOLE]),
        ((2, 2), 8, 2, [HEADS, QUERIES], [HEADS, WHOLE]),
    ],
)
def test_what_does_not_move_communicates_nothing(
    mesh: Any, heads: int, kv_heads: int, q_at: Any, kv_at: Any
) -> None:
    """Whole groups, one kv head for all, queries apart: gradients of what is whole are sums."""
    install(torch_overrides.SIGNATURES)
    gaps, placed, ran = attended(raw_flash(), mesh, (q_at, kv_at), heads, kv_heads)
    assert max(gaps) < 1e-5
    assert list(placed) == q_at
    assert ran == 0


# --- refused -------------------------------------------------------------------------------------


def test_dropout_is_refused() -> None:
    install(torch_sdpa.SIGNATURES)
    op = torch.ops.aten._scaled_dot_product_fused_attention_overrideable
    with pytest.raises(Exception, match=r"with dropout_p=0\.5 has no right strategy: shards that"):
        attended(lambda q, k, v: op(q, k, v, None, 0.5)[0], (2,), ([HEADS], [HEADS]))


@pytest.mark.parametrize(
    ("mask_at", "q_at", "refused"),
    [
        (HEADS, HEADS, ""),
        (WHOLE, WHOLE, ""),
        (Partial("sum"), HEADS, r"cannot move what it writes into or gets by keyword, and no strategy has "
                                r"attn_mask P\(sum\): bring its arguments to one of"),
        (Shard(3), HEADS, r"no strategy has attn_mask S\(3\)"),
    ],
)  # fmt: skip
def test_tensors_passed_by_keyword_are_never_moved(mask_at: Any, q_at: Any, refused: str) -> None:
    install(CPU)
    torch.manual_seed(2)
    mask = torch.randn(B, 4, SQ, SK)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if not isinstance(q, DTensor):
            return sdpa(mask=mask)(q, k, v)
        return sdpa(mask=distribute_tensor(mask, q.device_mesh, [mask_at]))(q, k, v)

    if refused:
        with pytest.raises(Exception, match=refused):
            attended(attend, (2,), ([q_at], [q_at]))
        return
    gaps, _, _ = attended(attend, (2,), ([q_at], [q_at]))
    assert max(gaps) < 1e-5


def test_within_context_parallel_queries_stay_where_they_lie(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It calls `to_local` on what comes out, and takes it for a part of the sequence."""
    install(CPU)
    sequence = (2,), ([QUERIES], [QUERIES])
    moved = attended(sdpa(causal=True), *sequence)[1]
    assert moved != (QUERIES,)  # the premise: right, and not where context_parallel takes it to be
    handled = torch.ops.aten._scaled_dot_product_flash_attention.default
    handlers = {**DTensor._op_dispatcher._custom_op_handlers, handled: lambda *a, **k: None}
    monkeypatch.setattr(DTensor._op_dispatcher, "_custom_op_handlers", handlers)
    strategies.forget_propagated()
    assert attended(sdpa(), *sequence)[1] == (QUERIES,)
    with pytest.raises(Exception, match="within context_parallel, which takes what comes out for"):
        attended(sdpa(causal=True), *sequence)


@torch.library.custom_op("attncheck_test::add_into", mutates_args=("out",))
def add_into(q: torch.Tensor, out: torch.Tensor, flag: bool = False) -> torch.Tensor:
    out.copy_(q + 1)
    return q.sum(-1)


@add_into.register_fake
def _(q: torch.Tensor, out: torch.Tensor, flag: bool = False) -> torch.Tensor:
    return q.new_empty(q.shape[:-1])


ADD_INTO = Signature(
    "attncheck_test.add_into.default",
    takes={"q": "b h d", "out": "b h d, in place"},
    gives={"sums": "b h"},
)


def written_into(q_at: Any, out_at: Any) -> tuple[tuple[Any, ...], torch.Tensor]:
    """The placements of a buffer, and what is in it, after q + 1 was written into it."""
    with simulated((2,)) as mesh:
        q = distribute_tensor(torch.arange(6.0 * 4 * 10).view(6, 4, 10), mesh, [q_at])
        out = distribute_tensor(torch.zeros(6, 4, 10), mesh, [out_at])
        torch.ops.attncheck_test.add_into(q, out)
        whole: Any = out.full_tensor()
        return tuple(out.placements), whole.reconcile()


def test_what_is_written_into_is_never_moved() -> None:
    install((ADD_INTO,))
    expected = torch.arange(6.0 * 4 * 10).view(6, 4, 10) + 1
    for q_at in (BATCH, HEADS, WHOLE, Shard(2)):
        for out_at in (BATCH, HEADS, WHOLE):
            placed, whole = written_into(q_at, out_at)
            assert placed == (out_at,)
            assert torch.equal(whole, expected)
    with pytest.raises(Exception, match="cannot move what it writes into") as caught:
        written_into(HEADS, Shard(2))
    text = str(caught.value)
    assert "no strategy has out S(2)" in text
    assert "heads (out S(1))" in text  # what would do


def test_the_premise_an_ordinary_strategy_moves_it_into_a_temporary() -> None:
    """What is refused above: without being said to be in place, the result is lost without a word."""
    careless: Mapping[str, str] = {"q": "b h d", "out": "b h d"}
    install((replace(ADD_INTO, takes=careless),))
    assert not written_into(HEADS, Shard(2))[1].any()


def test_a_form_that_nobody_described_is_refused() -> None:
    install((replace(ADD_INTO, when={"flag": True}),))
    with pytest.raises(Exception, match="nobody described this form of the call"):
        written_into(HEADS, HEADS)


def test_a_call_with_other_dims_is_refused() -> None:
    install((replace(ADD_INTO, takes={"q": "b d", "out": "b d, in place"}),))
    with pytest.raises(Exception, match="q is described as 'b d', and has 3 dims"):
        written_into(HEADS, HEADS)
