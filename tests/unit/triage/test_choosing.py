"""Which finding is meant, whose it is, and which of our own cases a report's case id means."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sample_report import sample

from attncheck import plugins
from attncheck.errors import UserError
from attncheck.model import Case, CaseResult, Finding, Outcome, Report, Severity, Status, case_id
from attncheck.plan import Selection, plan
from attncheck.triage import choosing

SHELF = plugins.load_probes()


def finding(rule: str, op: str, *cases: str, mark: str = "") -> Finding:
    mark = mark or f"{abs(hash((rule, op))):016x}"[:16]
    return Finding(rule, "name", Severity.ERROR, "title", op, cases, mark)


def planned(operator: str, placement: str = "heads", direction: str = "forward") -> Case:
    selection = Selection((operator,), ("causal",), (placement,), (direction,), level="full")
    return plan(SHELF.probes, {"tp": 2}, selection)[0]


REPORT = Report(
    {},
    (),
    (
        finding("ATN101", "aten.a.default", "x/1", mark="aaaa000011112222"),
        finding("ATN101", "flash_attn.b.default", "x/2", "x/3", mark="aaab000011112222"),
        finding("ATN201", "aten.c.default", "x/3", mark="cccc000011112222"),
    ),
)


@pytest.mark.parametrize(
    ("wanted", "op"),
    [
        ("aaaa000011112222", "aten.a.default"),
        ("aaab", "flash_attn.b.default"),
        ("ATN201", "aten.c.default"),
        ("atn201", "aten.c.default"),
        ("x/1", "aten.a.default"),
    ],
)
def test_a_finding_goes_by_its_fingerprint_its_rule_or_a_case(wanted: str, op: str) -> None:
    assert choosing.find(REPORT, wanted).kernel_op == op


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("ATN101", "is the rule of 2 findings"),
        ("aaa", "is the fingerprint of 2 findings"),
        ("x/3", "is the case of 2 findings"),
        ("ATN202", "Unknown finding 'ATN202'"),
        ("x/4", "Unknown finding 'x/4'"),
        ("", "--finding is empty"),
    ],
)
def test_what_is_unknown_or_ambiguous_is_one_sentence(wanted: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        choosing.find(REPORT, wanted)
    assert "\n" not in str(caught.value)


def test_what_an_ambiguous_one_could_mean_cannot_reach_the_terminal() -> None:
    hostile = replace(
        REPORT, findings=tuple(replace(f, kernel_op="\x1b[31m") for f in REPORT.findings)
    )
    with pytest.raises(UserError) as caught:
        choosing.find(hostile, "ATN101")
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "op", "function", "project"),
    [
        ("ATN101", "aten.bmm.default", "", "pytorch"),
        ("ATN101", "torch_attn._varlen_attn.default", "", "pytorch"),
        ("ATN301", "higher_order.flex_attention", "", "pytorch"),
        ("ATN101", "flash_attn._flash_attn_forward.default", "", "flash-attn"),
        ("ATN101", "flash_attn_3.fwd.default", "", "flash-attn"),
        ("ATN104", "flash_attn_2_cuda.fwd_kvcache", "", "flash-attn"),
        ("ATN101", "xformers.efficient.default", "", "xformers"),
        ("ATN205", "", "torch.nn.functional.scaled_dot_product_attention", "pytorch"),
        ("ATN205", "", "flash_attn.flash_attn_func", "flash-attn"),
        ("ATN205", "", "my_kernel.attend", ""),
        ("ATN101", "mine.attend.default", "torch.nn.functional.sdpa", ""),
        ("ATN401", "aten.bmm.default", "", ""),  # about the environment
        ("ATN505", "aten.bmm.default", "", ""),  # about attncheck
    ],
)
def test_a_finding_belongs_to_whom_its_op_or_function_belongs(
    rule: str, op: str, function: str, project: str
) -> None:
    case = replace(planned("sdpa"), function=function)
    one = finding(rule, op, case.id)
    by_id = {case.id: CaseResult(case, Outcome(Status.ERROR))}
    assert choosing.project_of(one, by_id) == project


def test_the_worst_of_a_project_comes_first() -> None:
    found = choosing.of_project(sample(), "pytorch")
    assert found
    assert [f.severity.rank for f in found] == sorted(f.severity.rank for f in found)
    with pytest.raises(UserError, match="Expected one of: flash-attn, pytorch, xformers"):
        choosing.of_project(sample(), "torch")


# --- hostile reports -----------------------------------------------------------------------------------


def test_a_case_of_ours_is_found_again() -> None:
    case = planned("sdpa[MATH]")
    found = choosing.planned_case(case, SHELF)
    assert found is not None
    assert found[0] == case
    assert found[1].name == "sdpa[MATH]"
    assert found[2].name == "causal"


@pytest.mark.parametrize(
    "change",
    [
        {"operator": "__import__('os')"},
        {"operator": "sdpa*"},
        {"probe": "../../etc"},
        {"setting": {"name": "__import__('os')"}},
        {"setting": {"name": ["list"]}},
        {"setting": {}},
        {"placement": "heads; import os"},
        {"placement": "*"},
        {"direction": "sideways"},
        {"mesh": {"tp": 100_000}},
        {"mesh": {"tp": -2}},
        {"mesh": {"a']);import os": 2}},
        {"mesh": {}},
        {"id": "sdpa/sdpa/causal/dtensor/tp=2/heads/forward"},
    ],
)
def test_what_is_no_case_of_ours_is_none(change: dict[str, object]) -> None:
    case = replace(planned("sdpa[MATH]"), **change)  # type: ignore[arg-type]
    if "id" not in change:  # what it says of itself is consistent
        setting = str(case.setting.get("name"))
        case = replace(
            case,
            id=case_id(
                case.probe,
                case.operator,
                setting,
                "dtensor",
                case.mesh,
                case.placement,
                case.direction,
            ),
        )
    assert choosing.planned_case(case, SHELF) is None


def test_sizes_and_placements_are_our_planners_whatever_the_report_says() -> None:
    case = planned("sdpa[MATH]")
    told = replace(
        case,
        setting={**case.setting, "batch": "__import__('os')", "causal": "1; import os"},
        placements={"q": ("S(__import__('os'))",)},
    )
    found = choosing.planned_case(told, SHELF)
    assert found is not None
    assert found[0] == case


def test_the_simplest_case_comes_first() -> None:
    cases = [
        planned("sdpa[MATH]", "head_dim", "backward"),
        planned("sdpa[MATH]", "head_dim"),
        planned("sdpa[MATH]", "heads", "backward"),
        planned("sdpa[MATH]", "heads"),
    ]
    results = tuple(CaseResult(case, Outcome(Status.MIXED_TENSOR)) for case in cases)
    one = finding("ATN103", "aten.add.Tensor", *(case.id for case in cases))
    found = [c.case for c in choosing.candidates(Report({}, results, (one,)), one, SHELF)]
    assert found == [cases[3], cases[1], cases[2], cases[0]]
