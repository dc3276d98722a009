"""The sample report held against a baseline, and hypothesis strategies for comparisons of any report."""

from __future__ import annotations

import datetime
from dataclasses import replace

import sample_report
from hypothesis import strategies as st
from strategies import TEXT, reports, tuples

from attncheck import baseline, compare
from attncheck.compare import Accepted, Known
from attncheck.model import (
    CaseChange,
    ChangeKind,
    Comparison,
    Difference,
    Finding,
    Report,
    Severity,
    Status,
)

TODAY = datetime.date(2026, 8, 1)
REASON = "no GPU kernel for it yet, ticket 77"


def gated() -> Report:
    """Known: the missing strategies of SDPA on a CPU, with a reason, and those of flash-attn's backward.

    Since then: flash-attn's forward lost its strategy, wrong results are new, a matmul gathers twice as much,
    an einsum gives an error no more.
    """
    after = sample_report.sample()
    known = {key: _before(key, one) for key, one in compare.recall(after).items()}
    environment = {
        **compare.facts(after.environment),
        "torch": "2.11.0",
        "flash-attn": "2.7.4.post1",
    }
    held = baseline.Baseline(known, environment)
    return replace(after, comparison=baseline.gate(held, after, compare.Policy(), TODAY))


def _before(key: compare.Key, one: Known) -> Known:
    rules = {rule: severity for rule, severity in one.rules.items() if rule != "ATN201"}
    if key.operator.startswith("flash_attn_func") and key.direction == "forward":
        return Known(Status.SUPPORTED)
    if key.operator == "fallback.matmul" and one.bytes:
        return replace(one, bytes=one.bytes // 2)
    if key.operator == "fallback.einsum" and key.placement == "batch":
        return Known(Status.ERROR, {"ATN504": Severity.ERROR})
    if one.status is Status.WRONG:
        return Known(Status.SUPPORTED)
    written = Accepted(REASON) if key.operator == "sdpa" else Accepted()
    return replace(one, rules=rules, accepted=dict.fromkeys(rules, written))


def passing() -> Report:
    """What ran of the sample; everything is known."""
    report = sample_report.sample()
    ran = tuple(r for r in report.cases if r.outcome.status is not Status.UNKNOWN)
    report = replace(report, cases=ran)
    known = baseline.Baseline(compare.recall(report), compare.facts(report.environment))
    return replace(report, comparison=baseline.gate(known, report, compare.Policy(), TODAY))


def with_change(report: Report, finding: Finding, **fields: object) -> Report:
    """With another change of every case of a finding."""
    assert report.comparison is not None
    changes = tuple(
        CaseChange(case, rules=(finding.rule,), **fields)  # type: ignore[arg-type]
        for case in finding.cases
    )
    others = (change for change in report.comparison.changes if change.case not in finding.cases)
    every = (*changes, *others)
    return replace(report, comparison=replace(report.comparison, changes=every))


def hostile(text: str = sample_report.HOSTILE) -> Report:
    """The hostile report, and a comparison whose every free text is `text` too."""
    report = sample_report.hostile(text)
    change = CaseChange(
        text, ChangeKind.WORSE, Status.SUPPORTED, Status.MISSING_STRATEGY, (text,), text, text, text, True
    )  # fmt: skip
    known = replace(change, kind=ChangeKind.UNCHANGED, gates=False)
    different = (Difference(text, text, text),)
    return replace(report, comparison=Comparison(text, different, (change, known), 1, 1, text, 1))


def gated_reports(finite: bool = True) -> st.SearchStrategy[Report]:
    """Any report, with and without a comparison, whose changes are about its cases and others."""
    return reports(finite).flatmap(_compared)


def _compared(report: Report) -> st.SearchStrategy[Report]:
    ids = st.sampled_from([r.case.id for r in report.cases]) if report.cases else TEXT
    changes = st.builds(
        CaseChange,
        case=ids | TEXT,
        kind=st.sampled_from(ChangeKind),
        before=st.none() | st.sampled_from(Status),
        after=st.none() | st.sampled_from(Status),
        rules=tuples(st.sampled_from(["ATN101", "ATN201"]), 2),
        detail=TEXT,
        reason=TEXT,
        until=TEXT,
        gates=st.booleans(),
    )
    comparisons = st.builds(
        Comparison,
        against=TEXT,
        environment=tuples(st.builds(Difference, TEXT, TEXT, TEXT), 2),
        changes=tuples(changes),
        unchanged=st.integers(0, 9),
        stale=st.integers(0, 9),
        verdict=TEXT,
        exit_code=st.sampled_from([0, 1, 3]),
    )
    held = comparisons.map(lambda comparison: replace(report, comparison=comparison))
    return st.just(report) | held
