"""Which of the ops of a wrong case is named: ranks and their ops made by hand, as they would record them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attncheck.runner import blame, compat
from attncheck.runner.blame import Held, OpCall, Record, first_at_fault
from attncheck.runner.placements import coordinates, shard

MESH = (2,)
Placed = tuple[torch.Tensor, str]


def held(whole: torch.Tensor, placement: str, rank: int) -> Held:
    """A rank's part of a whole tensor; of a `P(sum)` its own, different share."""
    local = shard(whole, (placement,), MESH, coordinates(MESH)[rank])
    return Held(local, tuple(whole.shape), (placement,))


def called(func: Any, inputs: list[Placed], outputs: Callable[[int], list[Held]]) -> list[OpCall]:
    """One call of an op of tensors alone, on both ranks."""
    calls = []
    for rank in range(2):
        record = Record()
        call = record.begin(func, str(func), "forward", tuple(w for w, _ in inputs), {})
        assert call is not None
        call.inputs = [held(whole, placement, rank) for whole, placement in inputs]
        call.outputs = outputs(rank)
        calls.append(call)
    return calls


def asked(*ops: list[OpCall]) -> tuple[str, bool]:
    return first_at_fault([[op[rank] for op in ops] for rank in range(2)], MESH)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


A, B = numbers(3, 4, 6), numbers(3, 6, 5)
BMM = torch.ops.aten.bmm.default
TANH = torch.ops.aten.tanh.default


def product(claimed: str) -> list[OpCall]:
    """A product over a sharded dim: each rank has a part of the sum, whatever is claimed of it."""
    parts = [A[..., :3] @ B[:, :3], A[..., 3:] @ B[:, 3:]]
    return called(
        BMM,
        [(A, "S(2)"), (B, "S(1)")],
        lambda rank: [Held(parts[rank], (3, 4, 5), (claimed,))],
    )


def tanh(given: str, claimed: str) -> list[OpCall]:
    return called(
        TANH,
        [(A, given)],
        lambda rank: [Held(torch.tanh(held(A, given, rank).local), (3, 4, 6), (claimed,))],
    )


def test_no_op_is_named_where_each_gave_what_it_gives_on_whole_tensors() -> None:
    assert asked(product("P(sum)"), tanh("S(1)", "S(1)"), tanh("R", "R")) == ("", True)


@pytest.mark.parametrize("claimed", ["R", "S(1)"])
def test_a_part_of_a_sum_called_something_else(claimed: str) -> None:
    assert asked(tanh("R", "R"), product(claimed)) == ("aten.bmm.default", True)


def test_a_function_of_parts_is_no_part_of_the_function() -> None:
    assert asked(product("P(sum)"), tanh("P(sum)", "P(sum)")) == ("aten.tanh.default", True)


def test_the_first_of_two_is_named() -> None:
    assert asked(tanh("P(sum)", "P(sum)"), product("R"))[0] == "aten.tanh.default"


def test_what_follows_a_wrong_op_is_not_asked_with_shards_that_do_not_fit() -> None:
    torn = called(TANH, [(A, "R")], lambda rank: [held(A.tanh(), "R", rank)])
    torn[1].inputs = [Held(A[:1], (3, 4, 6), ("R",))]
    assert asked(torn) == ("", False)


def test_an_argument_written_in_place_counts_as_an_output() -> None:
    copy = torch.ops.aten.copy_.default
    zeros = torch.zeros_like(A)

    def lost(rank: int) -> list[Held]:
        # The op returned the temporary that it wrote into; the caller's own buffer is as it was.
        return [held(A, "S(0)", rank), held(zeros, "S(0)", rank)]

    def kept(rank: int) -> list[Held]:
        return [held(A, "S(0)", rank), held(A, "S(0)", rank)]

    given = [(zeros, "S(0)"), (A, "S(0)")]
    assert asked(called(copy, given, lost)) == ("aten.copy_.default", True)
    assert asked(called(copy, given, kept)) == ("", True)


def test_rounding_is_nobodys_fault() -> None:
    noisy = called(TANH, [(A, "S(0)")], lambda rank: [held(A.tanh() * (1 + 4e-7), "S(0)", rank)])
    assert asked(noisy) == ("", True)
    half = A.bfloat16()
    rounded = (half.float().tanh() * (1 + 4e-3)).bfloat16()
    assert asked(called(TANH, [(half, "S(0)")], lambda rank: [held(rounded, "S(0)", rank)])) == (
        "",
        True,
    )


@pytest.mark.parametrize("name", ["empty_like", "rand_like"])
def test_what_is_another_thing_in_each_call_is_not_asked(name: str) -> None:
    func = getattr(torch.ops.aten, name).default
    op = called(func, [(A, "R")], lambda rank: [held(A, "R", rank)])
    assert asked(op) == ("", False)


def test_a_placement_that_nobody_can_put_together() -> None:
    op = called(TANH, [(A, "R")], lambda rank: [Held(A.tanh(), (3, 4, 6), ("P(max)",))])
    assert asked(op) == ("", False)


def test_ranks_that_called_other_ops() -> None:
    one, other = product("P(sum)"), tanh("R", "R")
    assert first_at_fault([[one[0]], [other[1]]], MESH) == ("", False)


def test_an_op_that_waits_for_its_peers_is_not_asked() -> None:
    def ask(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops._c10d_functional.all_reduce(x, "sum", "0")
        return result

    def kernel(x: Any) -> Any:
        return ask(x)

    library = torch.library.Library("blame_test", "DEF")  # type: ignore[no-untyped-call]
    library.define("sums(Tensor x) -> Tensor")
    library.impl("sums", kernel, "CPU")  # type: ignore[no-untyped-call]
    func = torch.ops.blame_test.sums.default
    with compat.no_communication(), pytest.raises(compat.Communicates):
        func(A)
    assert asked(called(func, [(A, "R")], lambda rank: [held(2 * A, "R", rank)])) == ("", False)


def test_a_record_ends_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blame, "MAX_OPS", 3)
    record = Record()
    for _ in range(5):
        call = record.begin(TANH, "aten.tanh.default", "forward", (A,), {})
        if call is not None:
            record.end(call, (A,), {}, A.tanh())
    assert not record.calls
    assert not record.complete
    assert first_at_fault([record.calls, record.calls], MESH) == ("", False)


def test_a_record_keeps_what_an_op_took_and_not_what_became_of_it() -> None:
    record, x = Record(), torch.zeros(3)
    func = torch.ops.aten.add_.Tensor
    call = record.begin(func, str(func), "forward", (x, 1), {})
    assert call is not None
    record.end(call, (x, 1), {}, func(x, 1))
    (kept,) = record.calls
    assert kept.inputs[0].local.tolist() == [0, 0, 0]
    assert [h.local.tolist() for h in kept.outputs] == [[1, 1, 1], [1, 1, 1]]
