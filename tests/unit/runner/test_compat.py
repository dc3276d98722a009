"""PyTorch's own words, read, and its private names, used: by whichever torch runs this file, 2.6 to 2.15.

PYTHONPATH=. /path/to/another/python -m pytest tests/unit/runner/test_compat.py
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from packaging.version import Version
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from attncheck import environment
from attncheck.fixes import strategies
from attncheck.fixes.notation import Signature
from attncheck.runner import compat

TORCH = Version(Version(torch.__version__).base_version)

MISSING = (
    "Operator flash_attn._flash_attn_forward.default does not have a sharding strategy registered."
)
TEXTS = [
    (MISSING, ("strategy", "flash_attn._flash_attn_forward.default")),
    (f"{MISSING}\n\nSharding propagation failed for Op(...)", ("strategy", MISSING.split()[1])),
    (
        "aten.add.Tensor got mixed torch.Tensor and DTensor, need to convert all torch.Tensor",
        ("mixed", "aten.add.Tensor"),
    ),
    (
        "aten.add.Tensor: got mixed torch.Tensor and DTensor, need to convert all: torch.Tensor",
        ("mixed", "aten.add.Tensor"),
    ),
    ("shape '[2]' is invalid for input of size 3", None),
    ("bad\n\nSharding propagation failed for Op(...)", None),
]


@pytest.mark.parametrize(("text", "expected"), TEXTS)
def test_refusals(text: str, expected: tuple[str, str] | None) -> None:
    assert compat.refusal(RuntimeError(text)) == expected


def test_an_op_without_a_meta_kernel_is_refused_in_other_words() -> None:
    class UnsupportedOperatorException(RuntimeError):
        pass

    error = RuntimeError(
        "flash_attn_3.fwd.default\n\n"
        "Sharding propagation failed for flash_attn_3.fwd.default(Spec(f32[4, 4](S(0))))"
    )
    cause = UnsupportedOperatorException("flash_attn_3.fwd.default")
    error.__cause__ = cause
    silent = RuntimeError(
        "Sharding propagation failed for Op(op=flash_attn_3.fwd.default, args_schema=Spec(S(0) on (4,)))"
    )
    silent.__cause__ = cause
    # As 2.10 says it, 2.9 and 2.8.
    for raised in (error, silent, cause):
        assert compat.refusal(raised) == ("propagation", None)
        assert compat.refusal_sentence(raised) == (
            "Sharding propagation failed for flash_attn_3.fwd.default: it has no Meta kernel, and DTensor "
            "runs an op on meta tensors before it asks for a sharding strategy"
        )


def test_a_cause_that_the_wrapping_leaves_out_is_told() -> None:
    wrapped = RuntimeError("Sharding propagation failed for Op(op=aten.view.default)")
    assert compat.error_text(wrapped) == str(wrapped)
    wrapped.__cause__ = ValueError("cannot flatten dim 1")
    assert compat.error_text(wrapped) == f"cannot flatten dim 1\n\n{wrapped}"
    other = RuntimeError("no such thing")
    other.__cause__ = ValueError("cannot flatten dim 1")
    assert compat.error_text(other) == "no such thing"
    assert compat.error_text(KeyError()) == "KeyError"


@pytest.mark.parametrize(
    ("placement", "text"), [(Replicate(), "R"), (Shard(2), "S(2)"), (Partial(), "P(sum)")]
)
def test_placements(placement: object, text: str) -> None:
    assert compat.placement_text(placement) == text  # type: ignore[arg-type]
    assert compat.placement_from_text(text) == placement


def test_a_refusal_inside_torch_compile_is_found_and_quoted_alone() -> None:
    rule = (
        "There was no rule registered for HOP flex_attention and subclass "
        "<class 'torch.distributed.tensor.DTensor'>. We recommend filing an issue."
    )
    compiled = RuntimeError(
        "NotImplementedError when running FX node\n  Explanation: failed: call_function "
        f'flex_attention(*(DTensor(...),), **{{}}): got NotImplementedError("{rule}")\n  Hint: none'
    )
    assert compat.refusal(compiled) == ("strategy", "higher_order.flex_attention")
    assert compat.refusal_sentence(compiled) == rule
    mixed = "aten.index.Tensor got mixed torch.Tensor and DTensor, need to convert all!"
    compiled = RuntimeError(
        f"RuntimeError when making fake tensor call: got RuntimeError('{mixed}')"
    )
    assert compat.refusal(compiled) == ("mixed", "aten.index.Tensor")
    assert compat.refusal_sentence(compiled) == mixed


def test_a_mode_without_a_rule_is_no_refusal_of_dtensor() -> None:
    text = (
        "There was no rule registered for HOP flex_attention and mode <Mode object>. We recommend"
    )
    assert compat.refusal(NotImplementedError(text)) is None


# --- as the torch that runs this has it -----------------------------------------------------------


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """Two ranks, of which there is only this one."""
    compat.simulated_group(2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ops() -> Iterator[Any]:
    """`strategyless` and, without a Meta kernel too, `unshaped`."""
    library: Any = torch.library.Library("compat_test", "DEF")
    for name in ("strategyless", "unshaped"):
        library.define(f"{name}(Tensor x) -> Tensor")
        library.impl(name, lambda x: x * 2, "CPU")
    library.impl("strategyless", torch.empty_like, "Meta")
    yield torch.ops.compat_test
    library._destroy()


def sharded(mesh: DeviceMesh, *shape: int) -> DTensor:
    return DTensor.from_local(torch.ones(shape), mesh, [Shard(0)], run_check=False)


def error_of(call: Callable[[], object]) -> Exception:
    """What the second call raises: a cache may answer it."""
    for _ in range(2):
        with pytest.raises(Exception) as raised:  # noqa: PT011  (which one is what is looked at)
            call()
    return raised.value


def test_its_refusals_are_recognised(mesh: DeviceMesh, ops: Any) -> None:
    x = sharded(mesh, 2, 4)
    name = "compat_test.strategyless.default"
    missing = error_of(lambda: ops.strategyless(x))
    assert compat.refusal(missing) == ("strategy", name)
    assert compat.refusal_sentence(missing).startswith(f"Operator {name} does not have a sharding")
    mixed = error_of(lambda: x + torch.ones(4, 4))
    assert compat.refusal(mixed) == ("mixed", "aten.add.Tensor")
    colon = ":" if Version("2.10") > TORCH else ""
    assert str(mixed).startswith(f"aten.add.Tensor{colon} got mixed torch.Tensor and DTensor")
    unshaped = error_of(lambda: ops.unshaped(x))
    assert compat.refusal(unshaped) == ("propagation", None)
    assert "failed for compat_test.unshaped.default: it" in compat.refusal_sentence(unshaped)
    assert compat.error_text(unshaped).startswith("compat_test.unshaped.default")


def test_a_placement_is_printed_as_it_prints_it() -> None:
    assert compat.placement_text(Shard(1)) == str(Shard(1))
    assert compat.placement_text(Replicate()) == str(Replicate())
    assert (compat.placement_text(Partial()) == str(Partial())) == (Version("2.10") <= TORCH)


def test_schemas_and_kernels() -> None:
    softmax = compat.find_overload("aten._softmax.default")
    schema = compat.schema_of(softmax)
    assert compat.schema_op_name(schema) == compat.op_name(softmax) == "aten._softmax.default"
    assert compat.schema_op_name(schema) in map(compat.schema_op_name, compat.registered_schemas())
    assert compat.kernel_keys(schema, ("CPU", "Meta")) == ("CPU", "Meta")
    assert compat.has_autograd(schema)
    assert not compat.is_composite(schema)
    assert compat.is_composite(compat.schema_of(torch.ops.aten.softmax.int))
    assert compat.is_packet(torch.ops.aten._softmax)
    assert not compat.is_packet(softmax)
    cond = compat.higher_order_ops()["cond"]
    assert compat.schema_of(cond) is None
    assert compat.op_name(cond) == "higher_order.cond"


def test_where_strategies_are_registered(ops: Any) -> None:
    assert compat.has_strategy(torch.ops.aten.add.Tensor)
    assert compat.has_strategy(torch.ops.aten.bmm.default)
    assert compat.has_strategy(torch.ops.aten._scaled_dot_product_flash_attention.default)
    assert not compat.has_strategy(ops.strategyless.default)
    assert not compat.has_strategy(compat.higher_order_ops()["cond"])


def test_a_strategy_is_registered_answers_and_is_taken_back(mesh: DeviceMesh, ops: Any) -> None:
    """Before and after the first use: what is cached, in Python and in C++, is forgotten."""
    op, x = ops.strategyless.default, sharded(mesh, 2, 4)
    signature = Signature("compat_test.strategyless.default", {"x": "b d"}, {"out": "b d"})
    for _ in range(2):
        assert compat.refusal(error_of(lambda: op(x)))
        assert strategies.install([signature]) == {signature.op: strategies.REGISTERED}
        assert compat.has_strategy(op)
        assert op(x).placements == (Shard(0),)
        strategies.remove()
    assert compat.refusal(error_of(lambda: op(x)))


def test_its_search_in_decompositions(mesh: DeviceMesh, ops: Any) -> None:
    celu = torch.ops.aten.celu.default
    assert compat.has_decomposition(celu) == (Version("2.11") <= TORCH)
    assert not compat.has_decomposition(ops.strategyless.default)

    def found() -> object:
        strategies.forget_propagated()
        try:
            return celu(sharded(mesh, 2, 4)).placements
        except NotImplementedError:
            return "none"

    alone = found()
    assert alone == ((Shard(0),) if Version("2.11") <= TORCH else "none")
    with compat.unwatched_propagation():
        assert found() == alone
    assert found() == alone
    if Version("2.11") <= TORCH:
        assert compat.refuses_decomposition(celu, (torch.ones(4, 4),), {}) == ""
        nonzero = torch.ops.aten.nonzero.default
        assert compat.refuses_decomposition(nonzero, (torch.ones(4, 4),), {})


def test_an_all_to_all_of_shards_is_seen(mesh: DeviceMesh) -> None:
    seen = []

    @contextlib.contextmanager
    def note(local: torch.Tensor, ranks: int) -> Iterator[None]:
        seen.append((tuple(local.shape), ranks))
        yield

    x = sharded(mesh, 2, 4)
    with compat.watch_alltoall(note):
        x.redistribute(placements=[Shard(1)])
        x.redistribute(placements=[Replicate()])
    x.redistribute(placements=[Shard(1)])
    assert seen == [((2, 4), 2)]


def test_a_group_by_its_name_and_itself(mesh: DeviceMesh) -> None:
    group = mesh.get_group()
    assert compat.group_size(group) == compat.group_size(group.group_name) == 2


def test_collectives_are_kept_out(mesh: DeviceMesh) -> None:
    x, functional = torch.ones(4), torch.ops._c10d_functional
    name = mesh.get_group().group_name
    asks: list[Callable[[], object]] = [
        lambda: dist.all_reduce(x),
        lambda: dist.broadcast(x, 0),
        lambda: dist.barrier(),
        lambda: sharded(mesh, 2, 4).full_tensor(),
        lambda: functional.wait_tensor(functional.all_reduce(x, "sum", name)),
    ]
    for ask in asks:
        with compat.no_communication(), pytest.raises(compat.Communicates):
            ask()
        ask()


class _Note(compat.TorchDispatchMode):
    """Notes the ops it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(compat.op_name(func))
        return func(*args, **(kwargs or {}))


def test_higher_order_ops_go_through_a_mode() -> None:
    compat.route_higher_order_ops(_Note)
    compat.route_higher_order_ops(_Note)  # twice is harmless
    flex = compat.higher_order_ops()["flex_attention"]
    mode = _Note()
    rule = flex.python_key_table[_Note]
    with pytest.raises(Exception):  # noqa: B017, PT011  (the op is called, and misses its arguments)
        rule(mode, torch.ones(2))
    assert mode.seen == ["higher_order.flex_attention"]


def test_context_parallel_s_options_are_put_back() -> None:
    options = compat.context_parallel_tools()._cp_options
    before = options.enable_load_balance, options.rotate_method
    with compat.context_parallel_options(load_balance=False, rotate="alltoall"):
        assert options.enable_load_balance is False
        assert options.rotate_method != before[1]
    assert (options.enable_load_balance, options.rotate_method) == before


def test_what_a_call_leaves_changed_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = compat.process_state()
    assert compat.process_state() == before
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda: None)
    after = compat.process_state()
    changed = [name for name, value in before.items() if after[name] != value]
    assert changed == ["F.scaled_dot_product_attention"]


def test_memory_is_told_apart() -> None:
    x, empty, other = torch.ones(4), torch.empty(0), torch.empty(0)
    assert compat.storage_id(x) == compat.storage_id(x[1:])
    assert compat.storage_id(empty) != compat.storage_id(other)


def test_fake_tensors_refuse_real_ones() -> None:
    real = torch.ones(2, 3)
    with compat.fake_mode() as mode:
        fake = mode.from_tensor(torch.ones(2, 3))
        assert (fake @ fake.T).shape == (2, 2)
        with pytest.raises(Exception, match="fake"):
            fake + real


def test_simulated_ranks(mesh: DeviceMesh) -> None:
    assert environment.simulates_ranks() == (Version("2.10") <= TORCH)
    if not environment.simulates_ranks():
        with pytest.raises(ImportError), compat.simulated_ranks(2):
            pass
        return
    rank = dist.get_rank
    with compat.simulated_ranks(2):
        uneven = compat.map_ranks(lambda rank: torch.ones(2 - rank))
        assert [tuple(t.shape) for t in compat.each_rank(uneven)] == [(2,), (1,)]
        assert [compat.on_rank(uneven.shape[0], rank) for rank in range(2)] == [2, 1]
        # The mode was off for a moment; and now it is, while a function runs once a rank.
        with pytest.raises(compat.RankAsked):
            dist.get_rank()
        with pytest.raises(compat.RankAsked) as asked:
            compat.call_on_ranks(lambda x: x * dist.get_rank(), (uneven,), {})
        assert "asks for its rank" in compat.not_simulated(asked.value)
        rows = compat.map_ranks(lambda rank: torch.full((1, 2), float(rank)))
        placed = DTensor.from_local(rows, mesh, [Shard(0)], run_check=False)
        whole = placed.redistribute(placements=[Replicate()])
        for local in compat.each_rank(compat.local_tensor(whole)):
            assert local.tolist() == [[0.0, 0.0], [1.0, 1.0]]
        with compat.unsimulated():
            assert len(compat.each_rank(torch.randn(4))) == 1
    assert dist.get_rank is rank
    assert dist.get_rank() == 0
