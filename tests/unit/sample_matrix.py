"""A matrix made by hand: some operators of the sample report, in three versions of torch, two of flash-attn.

What is planted: `fallback.einsum` breaks in torch 2.15.0; `sdpa[MATH]` works with heads from 2.13.0 on, and
costs more from 2.15.0 on; `flash_attn_with_kvcache` is there from flash-attn 2.8.3.post2 on. One combination
could not be built.
"""

from __future__ import annotations

import dataclasses

import sample_report

from attncheck.cells import Bisection, Cell, Matrix, Turn
from attncheck.model import CaseResult, Finding, Outcome, Reason, Report, Severity, Status

TORCH = ("2.9.1", "2.13.0", "2.15.0")
FLASH = ("2.7.4.post1", "2.8.3.post2")
UNBUILT = ("2.9.1", "2.7.4.post1")
PROBLEM = "flash-attn 2.7.4.post1 could not be installed: pip: no matching distribution found."
OPERATORS = ("sdpa[MATH]", "flash_attn_func", "flash_attn_with_kvcache", "fallback.einsum")
BROKEN = "0123456789abcdef"


def sample() -> Matrix:
    cells = (_cell(torch, flash) for torch in TORCH for flash in FLASH)
    return Matrix(environment(), tuple(cells))


def environment() -> dict[str, object]:
    return {
        "attncheck": "0.1.0",
        "device": "cpu",
        "mesh": {"tp": 2},
        "level": "default",
        "command": "attncheck matrix --torch 2.9.1,2.13.0,2.15.0 --flash-attn 2.7.4.post1,2.8.3.post2",
        "date": "2026-08-01T12:00:00+00:00",
    }


def bisected() -> Matrix:
    """A bisection over torch, of which the sample's cells were tried."""
    einsum = next(
        r.case.id for r in sample_report.results() if r.case.operator == "fallback.einsum"
    )
    found = Bisection(
        package="torch",
        selection="operator=fallback.einsum, placement=heads",
        candidates=("2.9.1", "2.10.0", "2.11.0", "2.13.0", "2.14.0", "2.15.0"),
        tried=("2.9.1", "2.15.0", "2.13.0", "2.14.0"),
        before="2.13.0",
        after="2.15.0",
        turns=(Turn(einsum, Status.SUPPORTED, Status.ERROR),),
        skipped={"2.14.0": "torch 2.14.0 could not be installed."},
    )
    cells = tuple(_cell(torch, "2.8.3.post2") for torch in TORCH)
    return dataclasses.replace(sample(), cells=cells, bisection=found)


def _cell(torch: str, flash: str) -> Cell:
    versions = {"torch": torch, "flash-attn": flash}
    if (torch, flash) == UNBUILT:
        return Cell(versions, None, PROBLEM)
    whole = sample_report.sample()
    results = tuple(
        _in(result, torch, flash) for result in whole.cases if result.case.operator in OPERATORS
    )
    packages = {"torch": torch, "flash-attn": flash, "numpy": "2.1.0"}
    report = Report({**whole.environment, "packages": packages}, results, _findings(whole, results))
    return Cell(versions, report, reused=40 if torch == "2.13.0" else 0)


def _in(result: CaseResult, torch: str, flash: str) -> CaseResult:
    case, outcome = result.case, result.outcome
    changed = outcome
    if case.operator == "fallback.einsum" and torch == "2.15.0" and outcome.status.usable:
        changed = Outcome(
            Status.ERROR, "RuntimeError: view size is not compatible", "aten.view.default"
        )
    if case.operator == "sdpa[MATH]" and outcome.status is Status.SUPPORTED:
        if torch == "2.9.1" and case.placement == "heads":
            changed = Outcome(Status.MISSING_STRATEGY, "no strategy", "aten.bmm.default")
        if torch == "2.15.0" and case.placement == "batch":
            changed = dataclasses.replace(outcome, status=Status.REDISTRIBUTED)
    if case.operator == "flash_attn_with_kvcache" and flash == FLASH[0]:
        reason = Reason.VERSION_UNSUPPORTED
        changed = Outcome(Status.UNAVAILABLE, "needs flash-attn 2.8", reason=reason)
    return result if changed is outcome else CaseResult(case, changed)


def _findings(whole: Report, results: tuple[CaseResult, ...]) -> tuple[Finding, ...]:
    """Those of the sample whose cases fail in this cell, and what is planted."""
    failed = {r.case.id for r in results if r.outcome.status.ran and not r.outcome.status.usable}
    kept = [
        dataclasses.replace(finding, cases=cases)
        for finding in whole.findings
        if (cases := tuple(case for case in finding.cases if case in failed))
    ]
    broken = tuple(r.case.id for r in results if r.outcome.kernel_op == "aten.view.default")
    if broken:
        kept.append(
            Finding(
                rule="ATN504",
                name="unexpected-exception",
                severity=Severity.ERROR,
                title="aten.view.default raises RuntimeError: view size is not compatible",
                kernel_op="aten.view.default",
                cases=broken,
                fingerprint=BROKEN,
            )
        )
    return tuple(kept)


def hostile(text: str = sample_report.HOSTILE) -> Matrix:
    """A matrix whose every free text is `text`."""
    report = sample_report.hostile(text)
    cells = (
        Cell({text: text, "torch": "1"}, report, text),
        Cell({text: text + "2", "torch": "1"}, dataclasses.replace(report, cases=report.cases[1:])),
        Cell({text: text + "3", "torch": "2"}, None, text),
    )
    turn = Turn(text, Status.SUPPORTED, Status.WRONG)
    told = Bisection(text, text, (text, "b"), (text,), text, "b", (turn,), {text: text})
    return Matrix({text: text, "notes": text}, cells, told)
