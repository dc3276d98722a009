"""The view of single cases: in words, shared parts once, and narrowed down by what tells cases apart."""

from __future__ import annotations

import dataclasses

import sample_report
from hypothesis import given
from strategies import reports

from attncheck import casesview, view
from attncheck.casesview import CasesView, CaseView
from attncheck.model import (
    CaseChange,
    ChangeKind,
    Comparison,
    ErrorStat,
    KernelOp,
    Report,
    Status,
)


def build(report: Report) -> CasesView:
    return casesview.build(report, view.build(report))


def test_every_case_in_its_order() -> None:
    report = sample_report.sample()
    shown = build(report).cases
    assert [(c.id, c.status) for c in shown] == [
        (r.case.id, r.outcome.status) for r in report.cases
    ]


def test_a_case_in_words() -> None:
    wrong = next(c for c in build(sample_report.sample()).cases if c.status is Status.WRONG)
    (error,) = wrong.errors
    assert (error.tensor, error.max, error.unsharded, error.bound) == (
        "out",
        "2.6",
        "2e-07",
        "4e-06",
    )
    assert error.beyond
    assert wrong.facts == (("wrong_result", "out", "max error 2.6"),)
    assert wrong.timings == "first 41.5 ms, warm 2.25 ms"
    assert "batch=6" in wrong.sizes
    assert "dtype" not in wrong.sizes


def test_no_number_is_beyond_the_bound() -> None:
    report = sample_report.sample()
    result = report.cases[0]
    nan = ErrorStat(float("nan"), 0, 0, 0, 1, 0, 0)
    outcome = dataclasses.replace(result.outcome, errors={"out": nan})
    changed = dataclasses.replace(report, cases=(dataclasses.replace(result, outcome=outcome),))
    assert build(changed).cases[0].errors[0].beyond


def test_findings_are_those_that_name_the_case() -> None:
    report = sample_report.sample()
    shown = view.build(report)
    for case in casesview.build(report, shown).cases:
        expected = tuple(i for i, f in enumerate(shown.findings) if case.id in f.cases)
        assert case.findings == expected


def test_what_cases_share_stands_once() -> None:
    cases = build(sample_report.sample())
    assert len(set(cases.drawings)) == len(cases.drawings) < len(cases.cases)
    assert len(set(cases.kernel_ops)) == len(cases.kernel_ops) < len(cases.cases)
    used = {i for case in cases.cases for i in case.drawings}
    assert used == set(range(len(cases.drawings)))


def test_of_very_many_kernel_ops_the_rest_is_counted() -> None:
    report = sample_report.sample()
    ops = tuple(KernelOp(f"aten.op{i}.default", "forward") for i in range(50))
    outcome = dataclasses.replace(report.cases[0].outcome, kernel_ops=ops)
    changed = dataclasses.replace(
        report, cases=(dataclasses.replace(report.cases[0], outcome=outcome),)
    )
    (case,) = build(changed).cases
    assert len(case.kernel_ops) + case.kernel_ops_left_out == 50


def test_facets_are_what_tells_cases_apart() -> None:
    cases = build(sample_report.sample())
    assert [facet.name for facet in cases.facets] == ["direction", "dtype"]  # one mesh, one version
    other: list[CaseView] = [dataclasses.replace(c, version="torch 2.14") for c in cases.cases]
    facets = casesview.facets([*cases.cases, *other])
    assert [facet.name for facet in facets] == ["direction", "dtype", "version"]
    assert facets[-1].values == (cases.cases[0].version, "torch 2.14")
    unplanned = dataclasses.replace(cases.cases[0], placement="-", direction="-", mesh="-")
    assert casesview.facets([*cases.cases, unplanned]) == cases.facets


def test_the_version_is_that_of_the_packages() -> None:
    assert build(sample_report.sample()).cases[0].version == (
        "numpy 2.1.0, torch 2.13.0+cpu, flash-attn 2.8.3.post2"
    )


def test_changes_since_another_report() -> None:
    report = sample_report.sample()
    first, second = report.cases[0].case.id, report.cases[1].case.id
    change = CaseChange(
        first, ChangeKind.NOT_RUN, Status.SUPPORTED, Status.WRONG, ("ATN201",), "error 2.6",
        "known", "2026-12-01", True,
    )  # fmt: skip
    gone = CaseChange("not/there", ChangeKind.FIXED, Status.WRONG, None)
    compared = dataclasses.replace(report, comparison=Comparison("base", (), (change, gone), 5))
    by_id = {case.id: case for case in build(compared).cases}
    assert by_id[first].change == "not run"
    assert by_id[first].changed == (
        "supported -> wrong (ATN201): error 2.6. In the baseline: known, until 2026-12-01."
    )
    assert by_id[second].change == "unchanged"
    assert build(report).cases[0].change == ""


@given(reports(finite=False))
def test_any_report(report: Report) -> None:
    cases = build(report)
    assert [case.status for case in cases.cases] == [r.outcome.status for r in report.cases]


def test_hostile_text_loses_its_controls() -> None:
    for case in build(sample_report.hostile()).cases:
        text = repr(dataclasses.astuple(case))
        assert "\\x1b" not in text
        assert "\\u202e" not in text
        assert "\\ud800" not in text
