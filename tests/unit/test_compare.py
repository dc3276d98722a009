"""Each kind of change is told, with the one beside it that is none."""

from __future__ import annotations

import datetime
from dataclasses import replace

import pytest
import sample_report
import strategies
from hypothesis import Phase, given, settings

from attncheck import compare
from attncheck.compare import Accepted, Key, Known, Measured, Policy
from attncheck.errors import UserError
from attncheck.model import ChangeKind, ErrorStat, Outcome, Report, Severity, Spread, Status

KEY = Key("sdpa", "causal", "dtensor", "tp=2", "heads", "forward")
TODAY = datetime.date(2026, 11, 29)
ERROR, WARNING = Severity.ERROR, Severity.WARNING

RIGHT = Known(Status.SUPPORTED, measured=Measured(3e-7, 3e-7, 0.3), bytes=0)
MISSING = Known(Status.MISSING_STRATEGY, {"ATN101": ERROR})
WRONG = Known(Status.WRONG, {"ATN201": ERROR}, Measured(2.0, 3e-7, 1e6))
GATHERS = Known(Status.REDISTRIBUTED, {"ATN301": WARNING}, Measured(3e-7, 3e-7, 0.3), bytes=1000)
GONE = Known(Status.UNAVAILABLE)
BROKEN = Known(Status.UNAVAILABLE, {"ATN402": ERROR})
FAILED_CHECK = Known(Status.UNKNOWN)
DRIFT = Known(Status.DRIFT, {"ATN203": WARNING}, Measured(3e-6, 3e-7, 2.5))


def change(old: Known | None, new: Known | None, policy: Policy | None = None, today=TODAY):
    before = {KEY: old} if old else {}
    after = {KEY: new} if new else {}
    (only,) = compare.compare(before, after, policy or Policy(), today)
    return only


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        (None, MISSING, "new"),
        (None, RIGHT, "added"),
        (None, GONE, "added"),
        (None, BROKEN, "new"),
        (None, FAILED_CHECK, "not_run"),
        (RIGHT, RIGHT, "unchanged"),
        (RIGHT, MISSING, "worse"),
        (RIGHT, GATHERS, "worse"),
        (RIGHT, DRIFT, "worse"),
        (MISSING, WRONG, "worse"),
        (WRONG, MISSING, "better"),
        (MISSING, GATHERS, "better"),
        (MISSING, RIGHT, "fixed"),
        (GATHERS, RIGHT, "fixed"),
        (MISSING, MISSING, "unchanged"),
        (MISSING, replace(MISSING, rules={"ATN101": ERROR, "ATN104": ERROR}), "new"),
        (replace(MISSING, rules={"ATN101": ERROR, "ATN104": ERROR}), MISSING, "better"),
        (RIGHT, GONE, "not_run"),
        (RIGHT, BROKEN, "new"),
        (RIGHT, FAILED_CHECK, "not_run"),
        (MISSING, GONE, "not_run"),
        (RIGHT, None, "not_run"),
        (GONE, None, "unchanged"),
        (GONE, GONE, "unchanged"),
        (GONE, RIGHT, "better"),
        (GONE, MISSING, "new"),
        (GATHERS, replace(GATHERS, bytes=1001), "costlier"),
        (GATHERS, replace(GATHERS, bytes=999), "better"),
        (RIGHT, replace(RIGHT, bytes=2048), "costlier"),
        # How much a failing call sent, or how wrong a wrong result is, says nothing.
        (MISSING, replace(MISSING, bytes=99), "unchanged"),
        (WRONG, replace(WRONG, measured=Measured(9.0, 3e-7, 5e6)), "unchanged"),
        # All rules about it are ignored now.
        (RIGHT, replace(MISSING, rules={}), "ignored"),
        (MISSING, replace(MISSING, rules={}), "unchanged"),
    ],
)
def test_kinds(old: Known | None, new: Known | None, kind: str) -> None:
    assert change(old, new).kind is ChangeKind(kind)


def with_ratio(ratio: float, repeats: int = 1) -> Known:
    return replace(RIGHT, measured=Measured(1e-6 * ratio, 3e-7, ratio, repeats))


@pytest.mark.parametrize(
    ("before", "after", "drifted"),
    [
        (with_ratio(0.31), with_ratio(0.92), False),
        (with_ratio(0.31), with_ratio(0.94), True),
        (with_ratio(0.05), with_ratio(0.89), False),  # a lucky seed, not a rounding that grew
        (with_ratio(0.90), with_ratio(0.3), False),
        # Medians over many values have less noise; one value, or few, on either side is too few.
        (with_ratio(0.30, 20), with_ratio(0.44, 20), False),
        (with_ratio(0.30, 20), with_ratio(0.46, 20), True),
        (with_ratio(0.30, 20), with_ratio(0.46), False),
        (with_ratio(0.30, 5), with_ratio(0.46, 20), False),
        (with_ratio(0.30), replace(RIGHT, measured=None), False),
    ],
)
def test_drift_is_growth_beyond_noise(before: Known, after: Known, drifted: bool) -> None:
    found = change(before, after).kind
    assert found is (ChangeKind.DRIFTED if drifted else ChangeKind.UNCHANGED)


@pytest.mark.parametrize(
    ("until", "kind"),
    [(None, "unchanged"), (TODAY, "unchanged"), (TODAY - datetime.timedelta(1), "new")],
)
def test_an_acceptance_that_expired_counts_as_new(until, kind: str) -> None:
    old = replace(MISSING, accepted={"ATN101": Accepted("vendor ticket", until)})
    found = change(old, MISSING)
    assert found.kind is ChangeKind(kind)
    assert found.gates == (kind == "new")
    assert found.reason == "vendor ticket"


def test_an_acceptance_of_what_cannot_be_loaded_expires_too() -> None:
    old = replace(BROKEN, accepted={"ATN402": Accepted("wheel to come", datetime.date(2020, 1, 1))})
    assert change(old, BROKEN).kind is ChangeKind.NEW
    assert change(replace(old, accepted={}), BROKEN).kind is ChangeKind.UNCHANGED


def test_what_expired_and_is_fixed_is_no_finding() -> None:
    old = replace(MISSING, accepted={"ATN101": Accepted("x", datetime.date(2020, 1, 1))})
    assert change(old, RIGHT).kind is ChangeKind.FIXED


@pytest.mark.parametrize(
    ("old", "new", "policy", "gates"),
    [
        (None, MISSING, Policy(), True),
        (None, GATHERS, Policy(), False),  # a warning, and --fail-on is error
        (None, GATHERS, Policy(fail_on=WARNING), True),
        (None, MISSING, Policy(fail_on=None), False),
        (None, MISSING, Policy(allow=(ChangeKind.NEW,)), False),
        (RIGHT, GATHERS, Policy(), True),  # down from what it was, whatever its severity
        (RIGHT, MISSING, Policy(allow=(ChangeKind.NEW,)), True),
        (RIGHT, MISSING, Policy(allow=(ChangeKind.WORSE,)), False),
        (GATHERS, replace(GATHERS, bytes=2000), Policy(), True),
        (GATHERS, replace(GATHERS, bytes=2000), Policy(allow=(ChangeKind.COSTLIER,)), False),
        (with_ratio(0.3), with_ratio(0.95), Policy(), True),
        (with_ratio(0.3), with_ratio(0.95), Policy(allow=(ChangeKind.DRIFTED,)), False),
        (MISSING, RIGHT, Policy(), False),
    ],
)
def test_policy(old: Known | None, new: Known, policy: Policy, gates: bool) -> None:
    assert change(old, new, policy).gates is gates


def test_a_mere_comparison_gates_nothing() -> None:
    (only,) = compare.compare({KEY: RIGHT}, {KEY: MISSING})
    assert (only.kind, only.gates) == (ChangeKind.WORSE, False)


def test_kinds_that_can_be_allowed() -> None:
    assert compare.kinds(["drifted"]) == (ChangeKind.DRIFTED,)
    with pytest.raises(UserError, match=r"Unknown kind of change 'fixed'.*new.*worse"):
        compare.kinds(["fixed"])


def test_numbers_are_those_of_the_tensor_nearest_to_its_bound() -> None:
    result = next(r for r in sample_report.results() if r.outcome.errors)
    near = ErrorStat(8e-7, 1e-7, 1e-7, 4e-7, 1e-6, 0.8, 2.0)
    far = ErrorStat(9e-7, 1e-7, 1e-7, 8e-7, 9e-6, 0.1, 2.0)
    nan = ErrorStat(float("nan"), 0, 0, 0, 0, float("nan"), 0)
    outcome = replace(result.outcome, errors={"out": far, "grad.q": near, "grad.k": nan})
    report = Report({}, (replace(result, outcome=outcome),), ())
    (known,) = compare.recall(report).values()
    assert known.measured == Measured(8e-7, 4e-7, 0.8)
    spread = Spread(9, 0.2, 0.25, 0.5, 3, 0, True)
    outcome = replace(outcome, spread={"grad.q": spread})
    (known,) = compare.recall(Report({}, (replace(result, outcome=outcome),), ())).values()
    assert known.measured == Measured(8e-7, 4e-7, 0.25, repeats=9)


@pytest.mark.parametrize("turned", [False, True])
def test_of_two_with_one_key_a_failed_check_counts(turned: bool) -> None:
    result = sample_report.results()[0]
    pair = [replace(result, outcome=Outcome(status)) for status in (Status.HANG, Status.UNKNOWN)]
    (known,) = compare.recall(Report({}, tuple(pair[::-1] if turned else pair), ())).values()
    assert known.status is Status.UNKNOWN


def test_seconds_and_notes_gate_nothing() -> None:
    """ATN302 is about time, ATN505 about the check itself, ATN401 says why something was not run."""
    report = sample_report.sample()
    first = report.cases[0].case.id
    finding = replace(report.findings[0], cases=(first,))
    for rule, severity in (("ATN302", WARNING), ("ATN505", ERROR), ("ATN401", Severity.INFO)):
        quiet = replace(finding, rule=rule, severity=severity)
        known = compare.recall(replace(report, findings=(quiet,)))
        assert not any(one.rules for one in known.values())


def test_a_key_holds_no_version() -> None:
    """The same cases on other versions are the same cases, whatever probe file they come from."""
    report = sample_report.sample()
    bumped = replace(report, environment={**report.environment, "packages": {"torch": "2.14.1"}})
    comparison = compare.compare_reports(report, bumped, "old.json")
    assert comparison.changes == ()
    assert comparison.unchanged == len(report.cases)
    first, *_ = comparison.environment
    assert (first.name, first.before, first.after) == ("torch", "2.13.0+cpu", "2.14.1")


# To shrink two whole reports takes many minutes: a failure is shown as it was found.
few = settings(max_examples=25, phases=(Phase.explicit, Phase.reuse, Phase.generate))


@few
@given(strategies.reports(finite=False), strategies.reports(finite=False))
def test_any_two_reports_can_be_compared(old: Report, new: Report) -> None:
    before, after = compare.recall(old), compare.recall(new)
    changes = compare.compare(before, after, Policy(strict=True), TODAY)
    assert len(changes) == len({*before, *after})  # every case of either, once
    back = compare.compare(after, before)
    assert {c.kind for c in compare.compare(before, before)} <= {
        ChangeKind.UNCHANGED,
        ChangeKind.NOT_RUN,  # of a check that failed nothing is known
    }
    # What went down one way goes up the other.
    rank = {c.case: c for c in back if c.before and c.after}
    for change_ in changes:
        if change_.kind is ChangeKind.WORSE and change_.case in rank:
            assert rank[change_.case].kind is not ChangeKind.WORSE
