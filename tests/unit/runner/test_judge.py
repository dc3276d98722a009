"""From what the ranks recorded to one outcome: which status wins, and what is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attncheck import plugins
from attncheck.model import Case, Outcome, Reason, Status
from attncheck.plan import Selection, plan
from attncheck.runner import judge
from attncheck.runner.case import Local, Prepared, RankRecord
from attncheck.runner.drift import Expected
from attncheck.runner.inputs import whole_tensors
from attncheck.runner.observe import Trace

PROBE = plugins.load_probe_file(Path(__file__).resolve().parents[3] / "probes" / "fallback.py")
OPERATOR = PROBE.operators[0]
SETTING = OPERATOR.settings[0]
SPECS = OPERATOR.tensors(SETTING)
OUT = torch.randn(6, 4, 18, 16)
EXPECTED = {"out": Expected(OUT.double(), OUT)}


def case(placement: str = "replicate") -> Case:
    selection = Selection(
        operators=(OPERATOR.name,),
        settings=("plain",),
        placements=(placement,),
        directions=("forward",),
    )
    (only,) = plan((PROBE,), {"tp": 2}, selection)
    return only


def prepared() -> Prepared:
    wholes = whole_tensors(OPERATOR.name, SETTING, SPECS, seed=1)
    return Prepared(OPERATOR, SETTING, SPECS, wholes, {"out": OUT})


def record(rank: int, tensor: torch.Tensor = OUT, placement: str = "R") -> RankRecord:
    local = Local(tensor, (6, 4, 18, 16), (placement,))
    trace = Trace(ops={("aten.bmm.default", "forward", (("R",),), (("R",),)): 1}, last_op="aten.x")
    return RankRecord(rank, trace=trace, results={"out": local}, warm={"out": local})


def outcome(change: Callable[[list[RankRecord]], None]) -> Outcome:
    records = [record(0), record(1)]
    change(records)
    return judge.judge(case(), [judge.Values(1, prepared(), EXPECTED)], records, (6, 7), ())


def test_healthy() -> None:
    found = outcome(lambda records: None)
    assert found.status is Status.SUPPORTED
    assert found.outputs == {"out": ("R",)}
    assert [r.hash_seed for r in found.ranks] == [6, 7]


def test_collectives_make_it_redistributed_and_the_larger_rank_counts() -> None:
    def talk(records: list[RankRecord]) -> None:
        for r, size in zip(records, (96, 128), strict=True):
            r.trace.sequence = ["all_gather:128"]
            r.trace.collectives = {("all_gather", "aten.bmm.default", "forward"): (1, size)}

    found = outcome(talk)
    assert found.status is Status.REDISTRIBUTED
    assert found.collectives[0].bytes == 128
    assert found.kernel_op == "aten.bmm.default"


def test_one_rank_raises() -> None:
    def fail(records: list[RankRecord]) -> None:
        records[1].exception = ("RuntimeError", "rank 1 is unhappy", "aten.bmm.default")

    found = outcome(fail)
    assert found.status is Status.DIVERGED
    assert "rank 0 finished; rank 1 RuntimeError: rank 1 is unhappy" in found.message


def test_the_same_exception_with_other_numbers_is_one_error() -> None:
    def fail(records: list[RankRecord]) -> None:
        for r in records:
            r.exception = ("RuntimeError", f"bad shape on rank {r.rank} at 0x7f{r.rank}", "aten.x")

    assert outcome(fail).status is Status.ERROR


@pytest.mark.parametrize(
    ("sequences", "words"),
    [
        ((["all_gather:8"], ["all_reduce:8"]), "collective 1 differs"),
        ((["all_reduce:8"], ["all_reduce:16"]), "rank 1 all_reduce of 16 B"),
        ((["all_reduce:8"], []), "different numbers of collectives"),
    ],
)
def test_other_collectives(sequences: tuple[list[str], list[str]], words: str) -> None:
    def part(records: list[RankRecord]) -> None:
        for r, sequence in zip(records, sequences, strict=True):
            r.trace.sequence = sequence

    found = outcome(part)
    assert found.status is Status.DIVERGED
    assert words in found.message


def test_other_placements_name_the_op_where_ranks_part() -> None:
    def part(records: list[RankRecord]) -> None:
        records[1] = record(1, placement="P(sum)")
        records[1].trace.ops = {("aten.mm.default", "forward", (), (("P(sum)",),)): 1}
        records[0].trace.ops = {("aten.mm.default", "forward", (), (("R",),)): 1}

    found = outcome(part)
    assert found.status is Status.DIVERGED
    assert found.kernel_op == "aten.mm.default"


def test_every_missing_op_is_kept_and_a_strategy_outranks_a_mixture() -> None:
    def refuse(records: list[RankRecord]) -> None:
        for r in records:
            r.trace.missing = {
                ("aten.a.default", "forward", "mixed"): "aten.a.default got mixed",
                ("aten.b.default", "backward", "strategy"): "Operator aten.b.default does not",
            }

    found = outcome(refuse)
    assert found.status is Status.MISSING_STRATEGY
    assert found.kernel_op == "aten.b.default"
    assert [m.op for m in found.missing_ops] == ["aten.a.default", "aten.b.default"]


def test_a_checker_that_fails_passes_no_verdict() -> None:
    def fail(records: list[RankRecord]) -> None:
        records[1] = RankRecord(1, failure="Traceback ...\nNameError: name 'x' is not defined")

    found = outcome(fail)
    assert found.status is Status.UNKNOWN
    assert "NameError" in found.message


def test_unavailable_carries_its_reason() -> None:
    def refuse(records: list[RankRecord]) -> None:
        for i in range(2):
            records[i] = RankRecord(i, unavailable=(Reason.PACKAGE_MISSING, "x is not installed"))

    found = outcome(refuse)
    assert (found.status, found.reason) == (Status.UNAVAILABLE, Reason.PACKAGE_MISSING)


def test_a_refusal_is_carried_with_all_its_lines_up_to_a_bound() -> None:
    text = "No operator found:\n  cutlassF: device=cpu\n" + "x" * 3000

    def refuse(records: list[RankRecord]) -> None:
        for i in range(2):
            records[i] = RankRecord(i, unavailable=(Reason.SETTING_REFUSED, text))

    found = outcome(refuse)
    assert found.message == text[:2000]
    assert "cutlassF" in found.message


def test_wrong_values_and_stale_second_calls() -> None:
    def wrong(records: list[RankRecord]) -> None:
        for i in range(2):
            records[i] = record(i, OUT * 2)

    found = outcome(wrong)
    assert found.status is Status.WRONG
    assert {f.code for f in found.facts} == {"wrong_result"}

    def stale(records: list[RankRecord]) -> None:
        for r in records:
            r.warm = {"out": Local(OUT * 2, (6, 4, 18, 16), ("R",))}

    found = outcome(stale)
    assert found.status is Status.WRONG
    assert {f.code for f in found.facts} == {"second_call_differs"}


@pytest.mark.parametrize(
    ("mesh", "sizes", "differ"),
    [
        ((2, 2), (16, 16, 12, 12), False),  # two groups along the second axis, each in step
        ((2, 2), (16, 12, 16, 12), False),  # along the first
        ((2, 2), (16, 16, 16, 12), True),  # one rank of a group sends less than its peer
        ((2, 2), (16, 12, 12, 16), True),
        ((4,), (16, 16, 12, 12), True),
        ((1, 4), (16, 16, 12, 12), True),
    ],
)
def test_ranks_of_a_group_send_equally_much(
    mesh: tuple[int, ...], sizes: tuple[int, ...], differ: bool
) -> None:
    records = [record(rank) for rank in range(4)]
    for r, size in zip(records, sizes, strict=True):
        r.trace.sequence = ["all_reduce:8", f"all_to_all:{size}"]
    assert judge.collectives_differ(records, mesh) is differ


def test_groups_on_different_paths_are_out_of_step() -> None:
    records = [record(rank) for rank in range(4)]
    for r, size in zip(records, (16, 16, 12, 12), strict=True):
        r.trace.sequence = [f"all_to_all:{size}"]
    records[2].trace.ops = {("aten.bmm.default", "forward", (("S(0)",),), (("R",),)): 1}
    assert judge.collectives_differ(records, (2, 2))


WHY = "a rank holds (6, 2, 18), but [S(2)] of (6, 4, 18) is (6, 4, 9)"


def _illegal(records: list[RankRecord]) -> None:
    for r in records:
        r.trace.illegal = {
            ("aten.first.default", "forward"): WHY,
            ("aten.x.default", "forward"): "",
        }


def test_a_shape_that_contradicts_its_placement_is_wrong_though_nobody_returns_it() -> None:
    found = outcome(_illegal)
    assert found.status is Status.WRONG
    assert found.kernel_op == "aten.first.default"
    assert [(f.code, f.subject) for f in found.facts] == [("local_shape", "aten.first.default")]
    assert not judge.wants_blame(found, dropout=False)  # it is known


@pytest.mark.parametrize("raises", [(0, 1), (1,)])
def test_what_raises_beyond_such_a_shape_is_not_what_is_at_fault(raises: tuple[int, ...]) -> None:
    def fail(records: list[RankRecord]) -> None:
        _illegal(records)
        for rank in raises:
            records[rank].exception = ("RuntimeError", "no such lse", "aten.later.default")

    found = outcome(fail)
    assert found.status is (Status.WRONG if raises == (0, 1) else Status.DIVERGED)
    assert found.kernel_op == "aten.first.default"
    assert WHY in found.message
    assert "no such lse" in found.message


def test_blame_replaces_the_op_or_says_that_none_is_at_fault() -> None:
    def wrong(records: list[RankRecord]) -> None:
        for r in records:
            r.results = record(r.rank, OUT * 2).results

    found = outcome(wrong)
    assert judge.wants_blame(found, dropout=False)
    assert not judge.wants_blame(found, dropout=True)
    assert not judge.wants_blame(outcome(lambda records: None), dropout=False)
    assert judge.blamed(found, "aten.bmm.default", True).kernel_op == "aten.bmm.default"
    assert judge.blamed(found, "", False) == found
    nobody = judge.blamed(found, "", True)
    assert nobody.kernel_op == ""
    assert "the fault lies around them" in nobody.message
