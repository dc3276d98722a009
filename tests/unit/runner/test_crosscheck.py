"""Two engines on one case: what counts as a disagreement, and what cannot be asked of simulated ranks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from attncheck.model import (
    Case,
    Collective,
    ErrorStat,
    Fact,
    MissingOp,
    Outcome,
    Reason,
    Status,
)
from attncheck.runner import crosscheck

CASE = Case(
    id="p/o/plain/dtensor/tp=2/heads/forward",
    probe="p",
    operator="o",
    route="dtensor",
    setting={"name": "plain"},
    mesh={"tp": 2},
    placement="heads",
    placements={"q": ("S(1)",)},
    direction="forward",
)
GATHER = Collective("all_gather", "aten.bmm.default", "forward", 2, 4096)
OK = Outcome(
    Status.REDISTRIBUTED,
    collectives=(GATHER,),
    outputs={"out": ("S(1)",)},
    errors={"out": ErrorStat(1e-7, 1e-8, 1e-8, 1e-7, 1e-6, 0.1, 1.0)},
    timings={"first": 10.0, "warm": 1.0},
)
WRONG = Outcome(Status.WRONG, "off by 1.7", facts=(Fact("wrong_result", "out", "off by 1.7"),))
MISSING = Outcome(
    Status.MISSING_STRATEGY, missing_ops=(MissingOp("my.op.default", "forward", "strategy", "?"),)
)
ERROR = Outcome(Status.ERROR, "heads do not divide", exception_type="RuntimeError")


def said(processes: Outcome, simulated: Outcome, **setting: Any) -> Outcome:
    case = replace(CASE, setting={"name": "plain", **setting})
    return crosscheck.crosscheck([case], {0: processes}, {0: simulated})[0]


@pytest.mark.parametrize("outcome", [OK, WRONG, MISSING, ERROR], ids=lambda o: o.status.value)
def test_what_agrees_is_left_as_processes_said_it(outcome: Outcome) -> None:
    errors = {name: replace(stat, max=2e-7, ratio=0.2) for name, stat in outcome.errors.items()}
    simulated = replace(
        outcome, errors=errors, timings={"first": 99.0}, message="other words", kernel_op="x"
    )
    assert said(outcome, simulated) is outcome


DISAGREEMENTS = {
    "status": (OK, replace(OK, status=Status.SUPPORTED), "redistributed with processes, supported"),
    "exception": (ERROR, replace(ERROR, exception_type="IndexError"), "IndexError"),
    "verdict": (
        WRONG,
        replace(WRONG, facts=(Fact("nonfinite", "out"),)),
        "nonfinite out simulated",
    ),
    "gradient": (WRONG, replace(WRONG, facts=(Fact("wrong_result", "lse"),)), "wrong_result lse"),
    "placement": (OK, replace(OK, outputs={"out": ("R",)}), "out [S(1)] with processes, out [R]"),
    "output": (OK, replace(OK, outputs={}), "nothing of that simulated"),
    "refused": (MISSING, replace(MISSING, missing_ops=()), "my.op.default in forward (strategy)"),
    "collective": (OK, replace(OK, collectives=()), "2 all_gather of 4096 B in aten.bmm.default"),
    "name": (OK, replace(OK, collectives=(replace(GATHER, name="all_reduce"),)), "all_reduce"),
    "count": (OK, replace(OK, collectives=(replace(GATHER, count=3),)), "3 all_gather"),
    "bytes": (OK, replace(OK, collectives=(replace(GATHER, bytes=8192),)), "8192 B"),
    "crash of the simulation": (OK, Outcome(Status.CRASH), "crash simulated"),
    "failure of the simulation": (OK, Outcome(Status.UNKNOWN, "KeyError"), "unknown simulated"),
    "unavailable in one": (
        OK,
        Outcome(Status.UNAVAILABLE, reason=Reason.PACKAGE_MISSING),
        "unavailable (package_missing) simulated",
    ),
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_a_disagreement_is_unknown_and_says_what_each_said(name: str) -> None:
    processes, simulated, words = DISAGREEMENTS[name]
    outcome = said(processes, simulated)
    assert outcome.status is Status.UNKNOWN
    assert words in outcome.message
    assert "one of the two has a bug" in outcome.message
    assert [f.code for f in outcome.facts] == ["engines_disagree"] * len(outcome.facts)
    assert outcome.facts


INCOMPARABLE = {
    "hang": (Outcome(Status.HANG), OK, "cannot show a hang: they said redistributed"),
    "crash": (Outcome(Status.CRASH), ERROR, "cannot show a crash"),
    "diverged": (Outcome(Status.DIVERGED), OK, "cannot show a diverged"),
    "not simulated": (
        OK,
        Outcome(Status.UNAVAILABLE, "no rule", reason=Reason.NOT_SIMULATED),
        "it was not simulated: no rule",
    ),
    "slow": (OK, Outcome(Status.HANG), "did not end in time"),
    "failed check": (Outcome(Status.UNKNOWN, "KeyError"), OK, "failed with processes"),
}


@pytest.mark.parametrize("name", INCOMPARABLE)
def test_what_cannot_be_compared_keeps_the_verdict_of_processes(name: str) -> None:
    processes, simulated, words = INCOMPARABLE[name]
    outcome = said(processes, simulated)
    (fact,) = outcome.facts
    assert replace(outcome, facts=()) == processes
    assert fact.code == "not_compared"
    assert words in fact.detail


def test_a_crash_that_simulated_ranks_show_too_agrees() -> None:
    assert said(Outcome(Status.CRASH), Outcome(Status.CRASH)) == Outcome(Status.CRASH)


def test_of_dropout_only_what_no_mask_decides_is_compared() -> None:
    shared = replace(OK, status=Status.WRONG, facts=(Fact("dropout_shared", "out"),))
    (fact,) = (f for f in said(OK, shared, dropout=0.25).facts if f.code == "not_compared")
    assert "dropout masks" in fact.detail
    assert said(OK, shared).status is Status.UNKNOWN
    own = replace(WRONG, facts=(Fact("dropout_rate", "out"),))
    both = replace(WRONG, facts=(*own.facts, Fact("dropout_shared", "out")))
    assert [f.code for f in said(own, both, dropout=0.25).facts] == ["dropout_rate", "not_compared"]
    assert said(own, own, dropout=0.25) is own
    assert said(OK, ERROR, dropout=0.25).status is Status.UNKNOWN
    assert said(OK, replace(OK, collectives=()), dropout=0.25).status is Status.UNKNOWN
    assert said(OK, replace(OK, outputs={"out": ("R",)}), dropout=0.25).status is Status.UNKNOWN


def test_a_case_that_was_not_simulated_any_more_is_said_to_be_so() -> None:
    outcomes = crosscheck.crosscheck([CASE, CASE], {0: OK, 1: OK}, {0: OK})
    assert outcomes[0] == OK
    assert [f.code for f in outcomes[1].facts] == ["not_compared"]


def test_counts_and_the_sentence_of_them() -> None:
    outcomes = [
        said(OK, OK),
        said(OK, ERROR),
        said(Outcome(Status.HANG), OK),
        said(Outcome(Status.DIVERGED), OK),
    ]
    counts = crosscheck.counts(outcomes)
    assert counts == {"agree": 1, "disagree": 1, "not_compared": 2}
    assert "1 agree, 1 disagree, 2 could not be compared" in crosscheck.sentence(counts)


def test_needs_no_torch() -> None:
    code = "import sys, attncheck.runner.crosscheck; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
