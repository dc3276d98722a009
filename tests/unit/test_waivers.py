"""Waivers silence what they name, say so, and nothing else."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

import pytest
import sample_report
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from attncheck import rules, view, waivers
from attncheck.errors import UserError
from attncheck.model import Finding, Report, dump_report
from attncheck.saved import load_report
from attncheck.waivers import Waiver

TODAY = datetime.date(2026, 8, 1)
WHERE = "pyproject.toml, entry 1 of ignore"
ENTRY = {"rule": "ATN101", "reason": "vendor ticket 123"}


def waiver(**changed: Any) -> Waiver:
    return waivers.parse({**ENTRY, **changed}, WHERE)


def apply(*given: Waiver, report: Report | None = None) -> Report:
    return waivers.apply(report or sample_report.sample(), given, TODAY)


def cases_of(report: Report, rule: str) -> set[str]:
    return {case for f in report.findings if f.rule == rule for case in f.cases}


def silenced(report: Report) -> set[tuple[str, str, str]]:
    """(rule, kernel op, case) that the findings of the sample have and this report's have not."""

    def pairs(findings: tuple[Finding, ...]) -> set[tuple[str, str, str]]:
        return {(f.rule, f.kernel_op, case) for f in findings for case in f.cases}

    return pairs(sample_report.sample().findings) - pairs(report.findings)


# --- reading ----------------------------------------------------------------------------------------


def test_a_table_is_read_and_written_back() -> None:
    table = {
        "rule": "missing-*",
        "operator": "flash_attn*",
        "setting": "*",
        "placement": "heads*",
        "direction": "backward",
        "route": "dtensor",
        "kernel-op": "flash_attn.*",
        "reason": "ticket  123,\nsee there",
        "until": datetime.date(2027, 1, 31),
    }
    read = waivers.parse(table, WHERE)
    assert read.until == datetime.date(2027, 1, 31)
    assert read.record() == {**table, "reason": "ticket 123, see there", "until": "2027-01-31"}
    assert waivers.parse(read.record(), WHERE) == read


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"reason": ""}, ["reason must be a text that is not empty", "''"]),
        ({"reason": " "}, ["reason must be a text"]),
        ({"reason": 3}, ["reason must be a text", "3"]),
        ({"rule": "ATN110"}, ["'ATN110'", "ATN104"]),
        ({"rule": ["ATN101"]}, ["rule must be a text"]),
        ({"operator": ""}, ["operator must be a text"]),
        ({"operators": "sdpa"}, ["'operators'", "operator"]),
        ({"kernel_op": "x"}, ["'kernel_op'", "kernel-op"]),
        ({"until": "31.1.2027"}, ["until must be a date like 2027-01-31", "'31.1.2027'"]),
        ({"until": "2027-02-30"}, ["until must be a date", "'2027-02-30'"]),
        ({"until": "20270131"}, ["until must be a date"]),
        ({"until": datetime.datetime(2027, 1, 31, 8)}, ["until must be a date"]),
        ({"until": 2027}, ["until must be a date", "2027"]),
    ],
)
def test_what_is_wrong_in_a_table_is_named(changed: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        waiver(**changed)
    assert all(word in str(error.value) for word in [*words, WHERE])


@pytest.mark.parametrize("key", ["rule", "reason"])
def test_rule_and_reason_are_asked_for(key: str) -> None:
    table = {k: v for k, v in ENTRY.items() if k != key}
    with pytest.raises(UserError, match=f"{WHERE}: {key} is missing"):
        waivers.parse(table, WHERE)


# --- applying ---------------------------------------------------------------------------------------


def test_a_rule_is_silenced_and_the_cases_stay() -> None:
    sample = sample_report.sample()
    report = apply(waiver())
    assert cases_of(sample, "ATN101")
    assert not [f for f in report.findings if f.rule == "ATN101"]
    assert [f for f in sample.findings if f.rule != "ATN101"] == list(report.findings)
    assert report.cases == sample.cases


@pytest.mark.parametrize(
    "globs",
    [
        {"operator": "flash_attn_func"},
        {"operator": "flash_attn_[!f]*"},  # brackets are part of names
        {"setting": "gqa*"},
        {"placement": "heads"},
        {"direction": "backward"},
        {"route": "ulysses"},
        {"kernel-op": "flash_attn.*"},
        {"operator": "sdpa", "placement": "heads", "direction": "forward", "setting": "causal"},
    ],
)
@pytest.mark.parametrize("rule", ["ATN101", "ATN1", "missing-*", "*"])
def test_what_every_glob_of_a_waiver_matches_is_silenced_and_nothing_else(
    rule: str, globs: dict[str, str]
) -> None:
    report = sample_report.sample()
    by_id = {result.case.id: result.case for result in report.cases}

    def meant(finding: Finding, case: str) -> bool:
        named = {
            "operator": by_id[case].operator,
            "setting": by_id[case].setting_name,
            "placement": by_id[case].placement,
            "direction": by_id[case].direction,
            "route": by_id[case].route,
            "kernel-op": finding.kernel_op,
        }
        return all(
            named[key].startswith(glob[:-1]) if glob.endswith("*") else named[key] == glob
            for key, glob in globs.items()
        )

    assert silenced(apply(waiver(rule=rule, **globs))) == {
        (finding.rule, finding.kernel_op, case)
        for finding in report.findings
        for case in finding.cases
        if finding.rule in rules.expand([rule]) and meant(finding, case)
    }


def test_some_of_these_globs_match_and_some_do_not() -> None:
    """The twin of the test above: it would hold of waivers that never match, too."""
    assert silenced(apply(waiver(operator="flash_attn_func")))
    assert silenced(apply(waiver(placement="heads")))
    assert not silenced(apply(waiver(operator="flash_attn")))
    assert not silenced(apply(waiver(route="ulysses")))


def test_a_finding_that_loses_some_says_how_many_and_why() -> None:
    sample = sample_report.sample()
    report = apply(waiver(placement="heads"), waiver(placement="batch", reason="not used here"))
    before = next(f for f in sample.findings if f.rule == "ATN101")
    after = next(f for f in report.findings if f.fingerprint == before.fingerprint)
    by_id = {result.case.id: result.case for result in sample.cases}
    heads = sum(by_id[case].placement == "heads" for case in before.cases)
    batch = sum(by_id[case].placement == "batch" for case in before.cases)
    assert heads > 0
    assert len(after.cases) == len(before.cases) - heads - batch
    assert after.title == before.title
    assert after.message.startswith(before.message)
    said = view.build(report).findings
    details = next(f.details for f in said if f.fingerprint == before.fingerprint)
    total = len(before.cases)
    assert f"{heads} of its {total} cases are ignored: vendor ticket 123" in details
    assert f"{batch} of its {total} cases are ignored: not used here" in details


@pytest.mark.parametrize(
    ("until", "holds"),
    [("2026-07-31", False), ("2026-08-01", True), ("2026-08-02", True)],
)
def test_until_is_the_last_day(until: str, holds: bool) -> None:
    report = apply(waiver(until=until))
    assert bool(silenced(report)) is holds
    assert report.environment["ignored"][0]["state"] == ("applied" if holds else "expired")


def test_the_report_says_what_became_of_each_waiver() -> None:
    report = apply(
        waiver(operator="flash_attn*", until="2027-01-31"),
        waiver(rule="ATN203", until="2026-07-31"),
        waiver(rule="ATN501", operator="gone"),
        waiver(rule="atn102"),
    )
    forward, drift, gone, backward = report.environment["ignored"]
    assert forward == {
        "rule": "ATN101",
        "operator": "flash_attn*",
        "reason": "vendor ticket 123",
        "until": "2027-01-31",
        "state": "applied",
        "cases": len(cases_of(sample_report.sample(), "ATN101") - cases_of(report, "ATN101")),
    }
    notices = [n for n in view.build(report).notices if "ignore" in n.lower()]
    assert notices == [
        f"Ignored until 2027-01-31: {forward['cases']} cases of ATN101 (operator flash_attn*), "
        "vendor ticket 123",
        f"Ignored until 2026-07-31, and counts again: {drift['cases']} "
        f"case{'' if drift['cases'] == 1 else 's'} of ATN203, vendor ticket 123",
        "Nothing is ignored by ATN501 (operator gone), which no finding of this report meets: "
        "vendor ticket 123",
        f"Ignored: {backward['cases']} cases of atn102, vendor ticket 123",
    ]
    assert gone["cases"] == 0
    assert load_report(dump_report(report)).environment["ignored"] == report.environment["ignored"]


def test_a_case_that_two_waivers_mean_is_of_both() -> None:
    report = apply(waiver(), waiver(placement="heads"))
    assert [record["state"] for record in report.environment["ignored"]] == ["applied"] * 2


def test_without_waivers_nothing_is_said() -> None:
    assert apply() == sample_report.sample()


def test_recorded_waivers_are_those_that_were_applied() -> None:
    given = (waiver(operator="flash_attn*", until="2027-01-31"), waiver(rule="ATN203"))
    assert waivers.recorded(apply(*given).environment, "a.json") == given
    assert waivers.recorded({}, "a.json") == ()


@pytest.mark.parametrize("records", [3, "x", [3], {"a": 1}, [{"rule": "ATN101"}], [{"reason": 1}]])
def test_records_that_no_scan_made_are_refused(records: Any) -> None:
    with pytest.raises(UserError, match=r"a\.json"):
        waivers.recorded({"ignored": records}, "a.json")


TEXTS = st.sampled_from(["*", "sdpa", "sdpa[MATH]", "flash*", "?", "["]) | strategies.TEXT.filter(
    str.strip
)
WAIVERS = st.builds(
    Waiver,
    rule=st.sampled_from(["ATN101", "ATN2", "*", "missing-*"]),
    reason=TEXTS,
    globs=st.dictionaries(st.sampled_from(waivers.GLOBS), TEXTS).map(
        lambda globs: tuple(globs.items())
    ),
    until=st.none() | st.dates(),
)


@settings(max_examples=50)
@given(strategies.reports(finite=False), st.lists(WAIVERS, max_size=3), st.dates())
def test_any_report_takes_any_waivers(report: Report, given: list[Waiver], today) -> None:
    after = waivers.apply(report, given, today)
    assert after.cases == report.cases
    kept = {(f.fingerprint, f.rule) for f in after.findings}
    assert kept <= {(f.fingerprint, f.rule) for f in report.findings}
    assert view.build(after).notices is not None
    if all(w.until is not None and w.until < today for w in given):
        assert after.findings == report.findings


@settings(max_examples=50)
@given(strategies.reports(), WAIVERS)
def test_a_waiver_for_another_operator_silences_nothing(report: Report, given: Waiver) -> None:
    other = dataclasses.replace(given, globs=(*given.globs, ("operator", "no_such_operator")))
    after = waivers.apply(report, [other], datetime.date.min)
    assert after.findings == report.findings


def test_hostile_text_takes_a_waiver_and_shows_it() -> None:
    report = sample_report.hostile()
    given = Waiver("*", sample_report.HOSTILE, (("operator", sample_report.HOSTILE),))
    after = waivers.apply(report, [given], TODAY)
    said = [n for n in view.build(after).notices if n.startswith("Nothing is ignored by *")]
    assert len(said) == 1
    assert "\x1b" not in said[0]
