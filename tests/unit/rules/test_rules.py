"""Every rule fires on a planted outcome and is silent on its healthy twin."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import pathlib
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attncheck import rules
from attncheck.errors import UserError
from attncheck.model import (
    Case,
    CaseResult,
    Collective,
    ErrorStat,
    Fact,
    Finding,
    MissingOp,
    Outcome,
    RankState,
    Reason,
    Remedy,
    Report,
    Severity,
    Status,
    case_id,
    dump_report,
)
from attncheck.rules import remedies
from attncheck.rules.base import empty_roles, uneven_roles
from attncheck.saved import load_report

SIZES = {
    "batch": 6,
    "heads": 4,
    "kv_heads": 4,
    "sequence": 18,
    "kv_sequence": 18,
    "head_dim": 16,
}
FLASH = "flash_attn._flash_attn_forward.default"
FLASH_BACKWARD = "flash_attn._flash_attn_backward.default"
PLACED = {"heads": "S(2)", "batch": "S(0)", "sequence": "S(1)", "replicate": "R", "partial": "R"}
HEADINGS = ["What it does", "Why is this bad?", "Example", "What to do"]


def make(
    outcome: Outcome,
    operator: str = "flash_attn_func",
    placement: str = "heads",
    direction: str = "forward",
    setting: str = "plain",
    route: str = "dtensor",
    probe: str = "flash_attn",
    mesh: dict[str, int] | None = None,
    extra: dict[str, tuple[str, ...]] | None = None,
    **options: Any,
) -> CaseResult:
    mesh = mesh or {"tp": 2}
    placed = tuple(PLACED[pattern] for pattern in placement.split(","))
    first = tuple("P(sum)" if p == "partial" else PLACED[p] for p in placement.split(","))
    case = Case(
        id=case_id(probe, operator, setting, route, mesh, placement, direction),
        probe=probe,
        operator=operator,
        route=route,
        setting={"name": setting, "dtype": "float32", **SIZES, **options},
        mesh=mesh,
        placement=placement,
        placements={"q": first, "k": placed, "v": placed, **(extra or {})},
        direction=direction,
    )
    return CaseResult(case, outcome)


def missing(
    op: str = FLASH,
    phase: str = "forward",
    kind: str = "strategy",
    message: str = f"Operator {FLASH} does not have a sharding strategy registered.",
) -> Outcome:
    status = Status.MIXED_TENSOR if kind == "mixed" else Status.MISSING_STRATEGY
    return Outcome(
        status, message, kernel_op=op, missing_ops=(MissingOp(op, phase, kind, message),)
    )


def fact(code: str, subject: str = "out", status: Status = Status.WRONG, **rest: Any) -> Outcome:
    return Outcome(status, kernel_op=FLASH, facts=(Fact(code, subject, "detail"),), **rest)


def unavailable(reason: Reason | None, message: str = "no") -> Outcome:
    return Outcome(Status.UNAVAILABLE, message, reason=reason)


STAT = ErrorStat(1.7, 0.3, 0.4, 4e-7, 2e-5, 85000.0, 3.2, " at global index (0, 1)")
OK = Outcome(Status.SUPPORTED, timings={"first": 40.0, "warm": 2.0})
GATHER = (Collective("all_gather", "aten.bmm.default", "forward", 3, 1572864),)
RANKS = (
    RankState(0, 6, "all_gather in aten.bmm.default", "(collective)", 3),
    RankState(1, 7, "aten.bmm.default", "", 2),
)


@dataclass(frozen=True)
class Planted:
    """A rule's own fault, a twin without it, and what the finding must say."""

    rule: str
    sick: Outcome
    says: str
    healthy: Outcome = OK
    subject: str = FLASH
    route: str = "dtensor"


PLANTED = [
    Planted("ATN101", missing(), "forward fails for 1 case of flash_attn_func"),
    Planted(
        "ATN101",
        missing(kind="propagation", message="Sharding propagation failed for flash_attn"),
        "PyTorch: Sharding propagation failed",
    ),
    Planted("ATN101", missing(), "does not have", missing(FLASH_BACKWARD, "backward")),
    Planted("ATN101", Outcome(Status.MISSING_STRATEGY, "?"), "fails", subject="flash_attn_func"),
    Planted(
        "ATN102",
        missing(FLASH_BACKWARD, "backward"),
        "backward fails",
        missing(),
        FLASH_BACKWARD,
    ),
    Planted("ATN103", missing(kind="mixed"), "together with DTensors", missing()),
    Planted("ATN103", missing(kind="mixed"), "the operator makes one itself"),
    Planted("ATN201", fact("wrong_result", errors={"out": STAT}), "8.5e+04 times the bound 2e-05"),
    Planted("ATN201", fact("wrong_result"), "wrong result", fact("wrong_gradient", "grad.q")),
    Planted("ATN201", fact("nonfinite"), "wrong result", fact("nonfinite", "grad.q")),
    Planted("ATN201", Outcome(Status.WRONG, kernel_op=FLASH), "wrong", fact("replicas_differ")),
    Planted("ATN202", fact("wrong_gradient", "grad.q"), "grad.q: detail", fact("wrong_result")),
    Planted("ATN202", fact("gradient_missing", "grad.k"), "grad.k"),
    Planted("ATN202", fact("nonfinite", "grad.v"), "gradients", fact("nonfinite")),
    Planted("ATN203", fact("drift_result", status=Status.DRIFT), "drifts", fact("wrong_result")),
    Planted("ATN203", fact("drift_gradient", "grad.q", status=Status.WRONG), "grad.q: detail"),
    Planted("ATN203", Outcome(Status.DRIFT, kernel_op=FLASH), "drifts"),
    Planted("ATN204", fact("replicas_differ"), "should agree", fact("wrong_result")),
    Planted("ATN205", fact("dropout_shared"), "shards share one mask", fact("wrong_result")),
    Planted("ATN205", fact("dropout_rate"), "the rate is not"),
    Planted("ATN205", fact("dropout_values"), "neither dropped nor scaled"),
    Planted("ATN206", fact("local_shape"), "contradict their placements", fact("wrong_result")),
    Planted("ATN207", fact("second_call_differs"), "second call", fact("wrong_result")),
    Planted("ATN209", fact("plain_result"), "ordinary tensors", fact("wrong_result")),
    Planted(
        "ATN301",
        Outcome(Status.REDISTRIBUTED, collectives=GATHER, outputs={"out": ("R",)}),
        "3 all_gather in forward (1.5 MiB per rank)",
        subject="aten.bmm.default",
    ),
    Planted(
        "ATN301",
        Outcome(Status.REDISTRIBUTED, collectives=GATHER),
        "up to 1.5 MiB per rank",
        Outcome(Status.ERROR, collectives=GATHER),
        "aten.bmm.default",
    ),
    Planted("ATN301", Outcome(Status.REDISTRIBUTED, kernel_op=FLASH), "communicates unasked"),
    Planted(
        "ATN301",
        Outcome(Status.REDISTRIBUTED, collectives=GATHER),
        "communicates",
        # What communicates by design.
        Outcome(Status.SUPPORTED, collectives=GATHER),
        "aten.bmm.default",
    ),
    Planted(
        "ATN302",
        Outcome(Status.SUPPORTED, kernel_op=FLASH, timings={"first": 7250.0, "warm": 20.0}),
        "first call 7.25 s, second 20 ms: 362 times",
        Outcome(Status.SUPPORTED, timings={"first": 4999.0, "warm": 20.0}),
    ),
    Planted(
        "ATN401",
        unavailable(Reason.PACKAGE_MISSING, "flash-attn>=2.7 is not installed"),
        "a package is missing (1 case not judged)",
        unavailable(Reason.VERSION_UNSUPPORTED),
        "probe flash_attn",
    ),
    Planted(
        "ATN401",
        unavailable(Reason.DEVICE_MISSING),
        "a device is missing",
        unavailable(Reason.NOT_RUN),
        "probe flash_attn",
    ),
    Planted(
        "ATN401",
        unavailable(Reason.SETTING_REFUSED),
        "it refuses the setting",
        unavailable(Reason.PROBE_NOT_LOADABLE),
        "flash_attn_func",
    ),
    Planted(
        "ATN402",
        unavailable(Reason.EXTENSION_NOT_LOADABLE, "x.so: undefined symbol: _ZN3c10"),
        "undefined symbol: _ZN3c10",
        unavailable(Reason.PACKAGE_MISSING),
        "flash_attn",
    ),
    Planted(
        "ATN403",
        unavailable(Reason.VERSION_UNSUPPORTED, "flash-attn 2.5.9 has no dispatcher ops"),
        "2.5.9 has no dispatcher ops",
        unavailable(Reason.PACKAGE_MISSING),
        "flash_attn_func",
    ),
    Planted(
        "ATN404",
        unavailable(Reason.PROBE_NOT_LOADABLE, "ImportError: nothing"),
        "ImportError: nothing",
        unavailable(Reason.PACKAGE_MISSING),
        "flash_attn",
    ),
    Planted(
        "ATN501",
        Outcome(Status.CRASH, "floating point exception", kernel_op=FLASH, ranks=RANKS),
        "floating point exception",
        Outcome(Status.HANG),
    ),
    Planted(
        "ATN502",
        Outcome(Status.HANG, "no answer within 60 s", kernel_op=FLASH, ranks=RANKS),
        "rank 0 (hash seed 6): last op all_gather in aten.bmm.default, 3 collectives",
        Outcome(Status.CRASH),
    ),
    Planted(
        "ATN503",
        Outcome(Status.DIVERGED, "mismatch", kernel_op=FLASH, ranks=RANKS),
        "rank 1 (hash seed 7): last op aten.bmm.default, 2 collectives",
        Outcome(Status.HANG, ranks=RANKS),
    ),
    Planted(
        "ATN104",
        Outcome(
            Status.ERROR,
            "flash_attn_2_cuda.fwd is no dispatcher op",
            kernel_op="flash_attn_2_cuda.fwd",
            exception_type="BypassesDispatcher",
        ),
        "flash_attn_2_cuda.fwd is no dispatcher op: a DTensor would reach it as a null pointer in 1",
        Outcome(Status.ERROR, "something else", kernel_op=FLASH, exception_type="RuntimeError"),
        "flash_attn_2_cuda.fwd",
    ),
    Planted(
        "ATN504",
        Outcome(
            Status.ERROR,
            "input_specs(3) != strategies(4)\nmore",
            kernel_op=FLASH,
            exception_type="AssertionError",
        ),
        "raises AssertionError: input_specs(3) != strategies(4) in 1 case",
        missing(),
    ),
    Planted(
        "ATN505",
        Outcome(Status.UNKNOWN, "KeyError: 'K'", kernel_op=FLASH),
        "not a verdict",
        Outcome(Status.ERROR),
    ),
    Planted(
        "ATN506",
        fact("engines_disagree", "status", Status.UNKNOWN),
        "disagree",
        Outcome(Status.UNKNOWN, "KeyError: 'K'", kernel_op=FLASH),
    ),
    Planted(
        "ATN505",
        Outcome(Status.UNKNOWN, "KeyError: 'K'", kernel_op=FLASH),
        "not a verdict",
        fact("engines_disagree", "status", Status.UNKNOWN),
    ),
]


def found(results: list[CaseResult], rule: str) -> list[Finding]:
    return [finding for finding in rules.judge(results) if finding.rule == rule]


def text_of(finding: Finding) -> str:
    return f"{finding.title}\n{finding.message}"


@pytest.mark.parametrize("plant", PLANTED, ids=lambda p: f"{p.rule}-{p.says[:24]}")
def test_rule_fires_on_its_fault_and_not_on_the_twin(plant: Planted) -> None:
    sick = make(plant.sick, route=plant.route)
    (finding,) = found([sick], plant.rule)
    rule = rules.find(plant.rule)
    assert plant.says in text_of(finding)
    assert plant.subject in finding.title
    assert finding.kernel_op == (plant.subject if "." in plant.subject else "")
    assert finding.cases == (sick.case.id,)
    assert (finding.name, finding.severity) == (rule.name, rule.severity)
    assert found([make(plant.healthy, route=plant.route)], plant.rule) == []


def test_every_rule_is_planted() -> None:
    """Those about what is installed are in tests/unit/test_static_rules.py."""
    judging = {rule.id for rule in rules.RULES if not rule.static}
    assert {plant.rule for plant in PLANTED} == judging


def test_a_supported_case_has_no_finding() -> None:
    assert rules.judge([make(OK)]) == ()


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.SUPPORTED])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_no_bad_status_goes_without_a_finding(status: Status, direction: str) -> None:
    """Even where the outcome says nothing more than its status."""
    assert rules.judge([make(Outcome(status), direction=direction)])


def test_every_missing_op_of_a_case_makes_a_finding() -> None:
    outcome = Outcome(
        Status.MISSING_STRATEGY,
        kernel_op=FLASH,
        missing_ops=(
            MissingOp(FLASH, "forward", "strategy", "a"),
            MissingOp("aten.x.default", "forward", "propagation", "b"),
            MissingOp(FLASH_BACKWARD, "backward", "strategy", "c"),
            MissingOp("aten.add.Tensor", "backward", "mixed", "d"),
        ),
    )
    findings = rules.judge([make(outcome, direction="backward")])
    assert {(f.rule, f.kernel_op) for f in findings} == {
        ("ATN101", FLASH),
        ("ATN101", "aten.x.default"),
        ("ATN102", FLASH_BACKWARD),
        ("ATN103", "aten.add.Tensor"),
    }
    forward = next(f for f in findings if f.kernel_op == FLASH)
    assert f"Also refused in these cases: aten.add.Tensor, aten.x.default, {FLASH_BACKWARD}." in (
        forward.message
    )


def test_one_finding_per_rule_and_op_names_what_fails_and_what_does_not() -> None:
    results = [
        make(missing(), placement="heads"),
        make(missing(), placement="batch"),
        make(OK, placement="replicate"),
        make(missing(), "flash_attn_qkvpacked_func"),
        make(missing(), setting="causal", causal=True),
        make(OK, setting="scale", placement="replicate", scale=0.3),
        make(Outcome(Status.HANG), setting="plain", placement="sequence"),
    ]
    (finding,) = found(results, "ATN101")
    assert finding.title == (
        f"{FLASH} has no sharding strategy: forward fails for 4 cases of flash_attn_func, "
        "flash_attn_qkvpacked_func"
    )
    assert finding.cases == tuple(sorted(finding.cases))
    # `sequence` hangs: not affected by this, but nothing to send anyone to.
    assert "Placements affected: batch, heads; not affected: replicate." in finding.message
    assert "Settings affected: causal, plain; not affected: scale." in finding.message
    assert "Meshes" not in finding.message


# --- remedies ------------------------------------------------------------------------------------


def kinds(finding: Finding) -> list[str]:
    return [remedy.kind for remedy in finding.remedies]


def test_alternatives_need_the_same_placement_an_equivalent_setting_and_every_direction() -> None:
    sick = [
        make(missing(), setting="causal", causal=True),
        make(missing(), setting="causal", causal=True, direction="backward"),
    ]
    good = [
        make(OK, "sdpa", setting="is_causal", probe="sdpa", causal=True, direction=d)
        for d in ("forward", "backward")
    ]
    decoys = [
        make(OK, "forward_only", setting="causal", causal=True),
        make(OK, "other_placement", setting="causal", placement="batch", causal=True),
        make(OK, "not_causal", setting="plain"),
        make(OK, "not_causal", setting="plain", direction="backward"),
        make(OK, "same_name", setting="causal"),
        make(OK, "masked", setting="masked", causal=True, mask="bool"),
        make(OK, "other_mesh", setting="causal", causal=True, mesh={"tp": 4}),
        make(Outcome(Status.HANG), "broken_forward", setting="causal", causal=True),
        make(OK, "broken_forward", setting="causal", causal=True, direction="backward"),
    ]
    (finding,) = found([*sick, *good, *decoys], "ATN101")
    proven = [r for r in finding.remedies if r.evidence]
    assert [r.kind for r in proven] == ["operator"]
    assert proven[0].text == (
        "`sdpa` works in this scan where this one fails (forward and backward), "
        "without communication of its own."
    )
    assert proven[0].evidence == tuple(sorted(r.case.id for r in good))


def test_heads_that_the_ranks_divide_are_no_way_out_of_heads_that_they_do_not() -> None:
    sick = make(fact("wrong_result"), setting="gqa_12_3", heads=12, kv_heads=3)
    even = make(OK, "other", setting="gqa", heads=20, kv_heads=4)
    uneven = make(OK, "uneven_too", setting="gqa_24_3", heads=24, kv_heads=3)
    (finding,) = found([sick, even, uneven], "ATN201")
    assert {case for r in finding.remedies for case in r.evidence} == {uneven.case.id}


def test_a_setting_of_the_same_name_that_fails_is_not_passed_over_for_another() -> None:
    sick = make(missing(), setting="gqa", heads=20)
    fails = make(fact("wrong_result"), "other", setting="gqa", heads=20)
    works = make(OK, "other", setting="gqa_wide", heads=40)
    (finding,) = found([sick, fails, works], "ATN101")
    assert not any(r.evidence for r in finding.remedies)


def test_alternatives_prefer_supported_over_redistributed_and_state_the_cost() -> None:
    costly = Outcome(Status.REDISTRIBUTED, collectives=GATHER)
    results = [
        make(missing()),
        make(costly, "a_costly"),
        make(OK, "b_free"),
        make(OK, route="ulysses"),
    ]
    (finding,) = found(results, "ATN101")
    first, second, third = [remedy for remedy in finding.remedies if remedy.evidence]
    assert first.text.startswith("`b_free` works in this scan")
    assert (second.kind, "by the route `ulysses`" in second.text) == ("route", True)
    assert "at the price of up to 1.5 MiB sent per rank and call" in third.text


def test_another_failing_operator_is_no_route() -> None:
    results = [
        make(missing(), "a"),
        make(OK, "b"),
        make(OK, "a", setting="causal", causal=True),
        make(missing(), "b", setting="causal", causal=True),
    ]
    (finding,) = found(results, "ATN101")
    proven = [remedy for remedy in finding.remedies if remedy.evidence]
    assert [(r.kind, r.text[:3]) for r in proven] == [("operator", "`a`"), ("operator", "`b`")]


def test_partial_coverage_is_said() -> None:
    results = [
        make(missing(), placement="heads"),
        make(missing(), placement="batch"),
        make(OK, "sdpa", placement="batch"),
    ]
    (finding,) = found(results, "ATN101")
    assert "in 1 of the 2 failing combinations" in finding.remedies[0].text


def test_redistribution_to_a_working_placement_comes_with_code() -> None:
    results = [
        make(missing(), placement="heads"),
        make(OK, placement="replicate"),
        make(OK, placement="partial"),
    ]
    (finding,) = found(results, "ATN101")
    remedy = next(r for r in finding.remedies if r.kind == "redistribute")
    assert remedy.evidence == (results[1].case.id,)  # PyTorch refuses to redistribute to Partial
    assert remedy.code == (
        "from torch.distributed.tensor import Replicate\n\n"
        "# setting plain, mesh tp=2\n"
        "q = q.redistribute(placements=[Replicate()])\n"
        "k = k.redistribute(placements=[Replicate()])\n"
        "v = v.redistribute(placements=[Replicate()])\n"
    )


def test_cost_findings_offer_only_what_is_free() -> None:
    costly = Outcome(Status.REDISTRIBUTED, collectives=GATHER)
    results = [
        make(costly),
        make(costly, placement="batch"),
        make(costly, "b_costly"),
        make(OK, "a_free"),
        make(OK, placement="replicate"),
    ]
    (finding,) = found(results, "ATN301")
    proven = [r for r in finding.remedies if r.evidence]
    # Evidence is free of communication: `batch` and `b_costly` are as dear as what they would mend.
    assert {case for r in proven for case in r.evidence} == {
        results[3].case.id,
        results[4].case.id,
    }


# --- what `attncheck fix` can do, and the price of the others --------------------------------------


def placed_bytes(result: CaseResult, each: int = 4800) -> CaseResult:
    """The same with q, k and v of so many bytes."""
    case = dataclasses.replace(result.case, tensor_bytes=dict.fromkeys("qkv", each))
    return dataclasses.replace(result, case=case)


def test_a_missing_strategy_is_for_attncheck_fix_behind_what_is_proven_to_be_free() -> None:
    costly = Outcome(Status.REDISTRIBUTED, collectives=GATHER)
    results = [make(missing()), make(costly, "a_costly"), make(OK, "b_free")]
    (finding,) = found(results, "ATN101")
    assert kinds(finding) == ["operator", "strategy", "route", "operator"]
    assert finding.remedies[1].code.startswith(
        f"attncheck fix --from report.json --kernel-op '{FLASH}' --write attncheck_fixes.py"
    )
    assert "`a_costly`" in finding.remedies[3].text


def test_an_op_that_writes_in_place_needs_placements_that_lie_alike() -> None:
    (finding,) = found([make(missing(FLASH_BACKWARD, "backward"), direction="backward")], "ATN102")
    strategy = next(r for r in finding.remedies if r.kind == "strategy")
    assert "bring q, k and v to one placement" in strategy.text


def test_no_strategy_is_offered_for_a_higher_order_op() -> None:
    (finding,) = found([make(missing("higher_order.flex_attention"))], "ATN101")
    strategy = next(r for r in finding.remedies if r.kind == "strategy")
    assert strategy.text.startswith("No strategy can be registered")
    assert "attncheck fix" not in "".join(r.text + r.code for r in finding.remedies)


@pytest.mark.parametrize(
    ("target", "directions", "sent"),
    [
        # From S(1) over 2 ranks a tensor of 4800 B has 2400 B on each. An all-gather sends them to one peer,
        # an all-to-all half of them.
        ("replicate", ("forward",), "7.031 KiB"),
        ("heads", ("forward",), "3.516 KiB"),
        ("heads", ("forward", "backward"), "7.031 KiB"),  # gradients go the way back
    ],
)
def test_redistribution_says_what_it_sends(
    target: str, directions: tuple[str, ...], sent: str
) -> None:
    graded = dict.fromkeys(("grad.q", "grad.k", "grad.v"), ("S(2)",))
    ran = {
        "forward": OK,
        "backward": dataclasses.replace(OK, outputs=graded),
    }
    results = []
    for d in directions:
        results.append(placed_bytes(make(missing(), placement="sequence", direction=d)))
        results.append(placed_bytes(make(ran[d], placement=target, direction=d)))
    (finding,) = found(results, "ATN101")
    remedy = next(r for r in finding.remedies if r.kind == "redistribute")
    assert f"{target} (1 of 1, at the price of up to {sent} sent per rank and call)" in remedy.text
    assert finding.remedies[0] is remedy  # a strategy would have to send as much


def test_the_cheaper_placement_is_the_one_whose_code_is_shown() -> None:
    results = [
        placed_bytes(make(missing(), placement="sequence")),
        placed_bytes(make(OK, placement="replicate")),
        placed_bytes(make(OK, placement="heads")),
    ]
    (finding,) = found(results, "ATN101")
    remedy = next(r for r in finding.remedies if r.kind == "redistribute")
    assert "q.redistribute(placements=[Shard(2)])" in remedy.code
    assert remedy.text.index("heads") < remedy.text.index("replicate")


def test_where_nothing_works_yet_a_placement_to_redistribute_to_is_named_with_its_price() -> None:
    sick = [placed_bytes(make(missing(), placement=p)) for p in ("sequence", "heads")]
    (finding,) = found(sick, "ATN101")
    remedy = next(r for r in finding.remedies if r.kind == "redistribute")
    assert (remedy.evidence, "which sends 3.516 KiB per rank" in remedy.text) == ((), True)
    assert "q.redistribute(placements=[Shard(2)])" in remedy.code
    assert finding.remedies[-1] is remedy
    (finding,) = found(sick[1:], "ATN101")
    assert "redistribute" not in kinds(finding)


def bypass(operator: str) -> CaseResult:
    outcome = Outcome(
        Status.ERROR, kernel_op="flash_attn_2_cuda.fwd", exception_type="BypassesDispatcher"
    )
    result = make(outcome, operator)
    case = dataclasses.replace(result.case, function=f"flash_attn.{operator}")
    return dataclasses.replace(result, case=case)


def test_a_known_function_that_is_no_op_gets_a_wrapper_and_another_one_local_map() -> None:
    (finding,) = found([bypass("flash_attn_with_kvcache")], "ATN104")
    assert kinds(finding)[0] == "strategy"
    assert finding.remedies[0].text.startswith("No strategy can mend this: what it calls is no")
    assert "--kernel-op 'flash_attn.flash_attn_with_kvcache'" in finding.remedies[0].code
    assert "local_map(" in finding.remedies[1].code
    (finding,) = found([bypass("somebodys_attention")], "ATN104")
    assert "strategy" not in kinds(finding)
    assert "local_map(" in local_map_code(finding)


def test_an_ordinary_tensor_made_inside_gets_a_wrapper() -> None:
    inside = make(missing(kind="mixed"), "flash_attn_qkvpacked_func")
    case = dataclasses.replace(inside.case, function="flash_attn.flash_attn_qkvpacked_func")
    (finding,) = found([dataclasses.replace(inside, case=case)], "ATN103")
    assert "the operator itself makes an ordinary tensor" in finding.remedies[0].text
    assert "flash_attn.flash_attn_qkvpacked_func" in finding.remedies[0].code


def test_a_strategy_of_torch_that_is_known_to_be_wrong_is_replaced() -> None:
    op = "aten._scaled_dot_product_flash_attention.default"
    wrong = dataclasses.replace(fact("wrong_result"), kernel_op=op)
    (finding,) = found([make(wrong)], "ATN201")
    assert kinds(finding)[:1] == ["strategy"]
    assert f"--kernel-op '{op}'" in finding.remedies[0].code
    (finding,) = found([make(fact("wrong_result"))], "ATN201")
    assert "strategy" not in kinds(finding)


def test_what_rules_say_of_fixes_is_what_there_is() -> None:
    from attncheck.fixes import packages

    assert {s.op for s in packages.functions()} == remedies.WRAPPED
    assert {s.op for s in packages.known() if s.overrides} == remedies.OVERRIDDEN


def local_map_code(finding: Finding) -> str:
    return next(r.code for r in finding.remedies if "local_map(" in r.code)


def test_local_map_takes_the_placements_of_the_failing_case() -> None:
    (finding,) = found([make(missing())], "ATN101")
    code = local_map_code(finding)
    assert "out_placements=[Shard(2)]," in code  # a list: a tuple would mean several outputs
    assert code.count("        [Shard(2)],  # ") == 3
    assert "redistribute_inputs=True" in code
    assert "flash_attn_func" in code


@pytest.mark.parametrize(
    ("placement", "options", "twin", "expected"),
    [
        ("sequence", {}, True, "Shard(2)"),  # local attention over a shard would be wrong
        ("sequence", {}, False, "Replicate()"),
        ("partial", {}, False, "Replicate()"),
        ("heads", {"kv_heads": 3}, False, "Replicate()"),  # the ranks do not divide 3 kv heads
        ("heads,batch", {}, False, "Shard(2), Shard(0)"),
    ],
)
def test_local_map_never_cuts_where_a_shard_is_no_whole_problem(
    placement: str, options: dict[str, int], twin: bool, expected: str
) -> None:
    mesh = {"dp": 2, "tp": 2} if "," in placement else {"tp": 2}
    results = [make(missing(), placement=placement, mesh=mesh, **options)]
    if twin:
        results.append(make(Outcome(Status.HANG), placement="heads"))
    (finding,) = found(results, "ATN101")
    assert f"out_placements=[{expected}]," in local_map_code(finding)


def test_local_map_that_worked_in_the_scan_is_shown_with_evidence_instead() -> None:
    worked = make(OK, route="local_map")
    (finding,) = found([make(missing()), worked], "ATN101")
    assert not any("local_map(" in r.code for r in finding.remedies)
    assert finding.remedies[0].kind == "route"
    assert finding.remedies[0].evidence == (worked.case.id,)


def test_an_ordinary_tensor_is_wrapped_with_evidence_if_there_is_any() -> None:
    def masked(outcome: Outcome, how: str, kind: str = "bool") -> CaseResult:
        placed = ("plain",) if how == "plain" else ("R",)
        return make(
            outcome, setting=f"{kind}_mask_{how}", mask=kind, mask_as=how, extra={"mask": placed}
        )

    sick = masked(missing(kind="mixed"), "plain")
    (alone,) = found([sick, masked(OK, "replicated", "float")], "ATN103")
    assert alone.remedies[0].evidence == ()  # a float mask proves nothing of a bool one
    assert remedies.NOT_RUN in alone.remedies[0].text
    assert "mask = DTensor.from_local(mask, mesh, [Replicate()], run_check=False)" in (
        alone.remedies[0].code
    )
    wrapped = masked(OK, "replicated")
    (finding,) = found([sick, wrapped], "ATN103")
    assert finding.remedies[0].evidence == (wrapped.case.id,)
    assert "operator makes one itself" not in finding.message


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("flash-attn>=2.7.0 is not installed", "attncheck scan --with flash-attn\n"),
        ("No module named 'flash_attn'", "attncheck scan --with flash-attn\n"),
        ("'xformers>=0.0.35' is not installed", "attncheck scan --with xformers\n"),
        ("No module named 'xformers.ops'", "attncheck scan --with xformers\n"),
        ("natten is not installed.", "pip install 'natten'\n"),
        ("'natten>=0.20' is not installed", "pip install 'natten>=0.20'\n"),
        ("No module named 'natten.functional'", "pip install 'natten'\n"),
        ("flash-attn-4 is not installed", "pip install 'flash-attn-4'\n"),
    ],
)
def test_a_missing_package_comes_with_the_command_that_brings_it(message: str, code: str) -> None:
    (finding,) = found([make(unavailable(Reason.PACKAGE_MISSING, message))], "ATN401")
    assert finding.remedies[0].code == code


def test_a_refusal_in_many_lines_is_shown_whole_and_once() -> None:
    def refusal(sequence: int) -> str:
        lines = ("No operator found:", f"  shape=({sequence}, 4)", "", "`ckF`:", "    device=cpu")
        return "\n".join(lines)

    cases = [
        make(unavailable(Reason.SETTING_REFUSED, refusal(n)), setting=str(i))
        for i, n in enumerate((18, 22, 22))
    ]
    (finding,) = found(cases, "ATN401")
    assert finding.message.splitlines()[2:] == [
        "No operator found:",
        "  shape=(22, 4)",
        "`ckF`:",
        "    device=cpu",
    ]


def test_crash_on_empty_shards_says_so() -> None:
    crash = Outcome(Status.CRASH, "floating point exception")
    (finding,) = found([make(crash, placement="batch", batch=1)], "ATN501")
    assert "some rank holds an empty shard (1 batch over 2 ranks)" in finding.remedies[0].text
    (finding,) = found([make(crash, placement="batch")], "ATN501")
    assert "empty shard" not in "".join(r.text for r in finding.remedies)


def test_uneven_heads_are_named() -> None:
    wrong = fact("wrong_result")
    uneven = make(wrong, heads=12, kv_heads=3)
    assert uneven_roles(uneven.case) == ["3 kv_heads over 2 ranks"]
    assert empty_roles(uneven.case) == []
    (finding,) = found([uneven], "ATN201")
    assert "the ranks do not divide the sharded size: 3 kv_heads over 2 ranks" in finding.message
    (finding,) = found([uneven, make(wrong, setting="even")], "ATN201")
    assert "do not divide" not in finding.message


def test_dropout_seeds_follow_the_sharded_axes() -> None:
    outcome = fact("dropout_shared")
    case = make(outcome, placement="replicate,heads", mesh={"dp": 2, "tp": 2})
    (finding,) = found([case], "ATN205")
    assert 'torch.manual_seed(seed + mesh.get_local_rank("tp"))\n' in [
        r.code for r in finding.remedies
    ]


# --- the registry --------------------------------------------------------------------------------


def test_ids_are_unique_sorted_and_names_kebab_case() -> None:
    ids = [rule.id for rule in rules.RULES]
    names = [rule.name for rule in rules.RULES]
    assert ids == sorted(set(ids))
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"ATN[1-5]\d\d", rule_id) for rule_id in ids)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in names)
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", rule.since) for rule in rules.RULES)


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda r: r.id)
def test_docs_have_the_four_sections_and_a_snippet(rule: rules.Rule) -> None:
    sections = re.split(r"^## (.+)$", rule.docs, flags=re.MULTILINE)
    assert sections[0] == ""
    assert sections[1::2] == HEADINGS
    assert all(body.strip() for body in sections[2::2])
    snippets = re.findall(r"```python\n(.*?)```", rule.docs, re.DOTALL)
    assert len(snippets) == 1
    ast.parse(snippets[0])
    assert rule.docs.isascii()


def test_every_file_of_the_family_is_registered() -> None:
    files = sorted(pathlib.Path(rules.__file__).parent.glob("atn*.py"))
    stated = [f"{r.id.lower()}_{r.name.replace('-', '_')}.py" for r in rules.RULES]
    assert [file.name for file in files] == stated


@pytest.mark.parametrize("name", ["ATN101", "atn101", "missing-forward-strategy"])
def test_find(name: str) -> None:
    assert rules.find(name).id == "ATN101"


@pytest.mark.parametrize(
    ("name", "near"),
    [("ATN110", "ATN104"), ("wrong-results", "wrong-result"), ("atn1010", "ATN101")],
)
def test_find_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError, match=near):
        rules.find(name)


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        ([], set()),
        (["ATN101"], {"ATN101"}),
        (["atn1"], {"ATN101", "ATN102", "ATN103", "ATN104"}),
        (["ATN?02", "drift"], {"ATN102", "ATN202", "ATN302", "ATN402", "ATN502", "ATN203"}),
        (["missing-*"], {"ATN101", "ATN102"}),
        (["ATN"], {rule.id for rule in rules.RULES}),
    ],
)
def test_expand(selectors: list[str], expected: set[str]) -> None:
    assert rules.expand(selectors) == expected


@pytest.mark.parametrize("selector", ["ATN9", "", "A", "missing", "wrongresult", "nothing-*"])
def test_expand_refuses_what_stands_for_no_rule(selector: str) -> None:
    with pytest.raises(UserError, match="Unknown rule"):
        rules.expand([selector])


def test_select_and_ignore() -> None:
    results = [make(missing()), make(fact("wrong_result"), placement="batch")]
    assert {f.rule for f in rules.judge(results)} == {"ATN101", "ATN201"}
    assert {f.rule for f in rules.judge(results, select=["ATN1"])} == {"ATN101"}
    assert {f.rule for f in rules.judge(results, ignore=["ATN1"])} == {"ATN201"}
    assert rules.judge(results, select=["ATN1"], ignore=["missing-*"]) == ()
    with pytest.raises(UserError):
        rules.judge(results, ignore=["ATN999"])


# --- properties ----------------------------------------------------------------------------------


def everything() -> list[CaseResult]:
    """Every planted fault, under several operators and placements, and what works beside them."""
    results = []
    for i, plant in enumerate(PLANTED):
        for operator, placement, direction in itertools.product(
            ("flash_attn_func", "sdpa[MATH]"), ("heads", "sequence"), ("forward", "backward")
        ):
            outcome = plant.sick if (i + len(placement) + len(operator)) % 2 else OK
            results.append(make(outcome, operator, placement, direction, f"setting{i}"))
    return results


EVERYTHING = everything()
EXPECTED = rules.judge(EVERYTHING)


@settings(max_examples=6, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_order_of_the_results_does_not_matter(random: Any) -> None:
    shuffled = list(EVERYTHING)
    random.shuffle(shuffled)
    assert rules.judge(shuffled) == EXPECTED
    # Each rule by itself too, without the sorting in front.
    for rule in rules.RULES:
        assert list(rule.judge(shuffled)) == list(rule.judge(EVERYTHING))


def test_worst_first() -> None:
    assert {f.rule for f in EXPECTED} == {rule.id for rule in rules.RULES if not rule.static}
    ranks = [f.severity.rank for f in EXPECTED]
    assert ranks == sorted(ranks)
    assert EXPECTED[0].rule == "ATN502"  # nothing is worse than a hang
    assert EXPECTED[-1].severity is Severity.INFO
    few = [make(missing()), *(make(missing("b"), setting=f"s{i}") for i in range(2))]
    assert [f.kernel_op for f in rules.judge(few)] == ["b", FLASH]


def test_findings_are_one_per_rule_and_subject() -> None:
    fingerprints = [f.fingerprint for f in EXPECTED]
    assert len(set(fingerprints)) == len(fingerprints)
    assert all("\n" not in f.title for f in EXPECTED)


def test_every_remedy_shows_its_evidence_or_says_that_it_was_not_run() -> None:
    outcomes = {r.case.id: r.outcome for r in EVERYTHING}
    for finding in EXPECTED:
        for remedy in finding.remedies:
            assert all(outcomes[case].status.usable for case in remedy.evidence)
            claimed = bool(remedy.evidence) or remedy.kind == "report"
            assert claimed != (remedies.NOT_RUN in remedy.text), remedy
            if not remedy.code.startswith(("pip", "attncheck")):
                ast.parse(remedy.code)


def test_findings_survive_the_report_codec() -> None:
    report = Report({}, tuple(EVERYTHING), EXPECTED)
    assert load_report(dump_report(report)) == report
    # What is judged again from a saved report is what was judged before.
    assert rules.judge(load_report(dump_report(report)).cases) == EXPECTED


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(PLANTED), st.integers(0, 10**6), st.text(max_size=20))
def test_fingerprints_do_not_depend_on_numbers(plant: Planted, number: int, text: str) -> None:
    other = dataclasses.replace(
        plant.sick,
        message=text,
        seed=number,
        errors={"out": dataclasses.replace(STAT, max=float(number))},
        collectives=tuple(
            dataclasses.replace(c, count=number, bytes=number) for c in plant.sick.collectives
        ),
        facts=tuple(dataclasses.replace(f, detail=text) for f in plant.sick.facts),
    )
    (before,) = found([make(plant.sick)], plant.rule)
    (after,) = found(
        [make(other, setting=f"s{number}"), make(other, placement="batch")], plant.rule
    )
    assert after.fingerprint == before.fingerprint


def test_build_ids_of_hub_kernels_stay_out_of_fingerprints() -> None:
    one, other = (
        found([make(missing(f"_flash_attn_{build}.fwd.default"))], "ATN101")[0]
        for build in ("9e27194", "a1b2c3d")
    )
    assert one.kernel_op != other.kernel_op
    assert one.fingerprint == other.fingerprint


def test_rules_need_no_torch() -> None:
    code = "import sys, attncheck.rules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def scan_of(settings: int) -> list[CaseResult]:
    return [
        make(
            missing() if (i + j) % 3 else OK,
            f"operator{i % 12}",
            ("heads", "batch", "sequence", "replicate")[j],
            direction,
            f"setting{i}",
        )
        for i in range(settings)
        for j in range(4)
        for direction in ("forward", "backward")
    ]


def test_judging_a_large_scan_takes_a_few_times_as_long_as_writing_it_down() -> None:
    results = scan_of(240)
    began = time.process_time()
    dump_report(Report({}, tuple(results), ()))
    written = time.process_time()
    assert rules.judge(results)
    assert time.process_time() - written < 30 * (written - began)


def test_what_helps_few_comes_behind_what_helps_many() -> None:
    def priced(name: str, size: int, covers: int, *evidence: str) -> remedies.Priced:
        return remedies.Priced(Remedy("operator", name, evidence=evidence), size, covers)

    ways = [
        priced("free, for few", 0, 1, "case"),
        priced("dear", 900, 80, "case"),
        priced("cheap", 90, 50, "case"),
        priced("free, not run", 0, 0),
    ]
    assert [r.text for r in remedies.ranked(ways)] == [
        "free, not run",
        "cheap",
        "dear",
        "free, for few",
    ]
    assert remedies.ranked([ways[0]])[0].text == "free, for few"
