"""JUnit XML: valid by the schema of the Jenkins plugin, a test case a case, failures where a job fails."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import gated_report
import pytest
import sample_report
from hypothesis import given, settings
from lxml import etree

from attncheck import plugins
from attncheck.model import ChangeKind, Report, Severity, Status
from attncheck.view import RenderOptions

SCHEMA = Path(__file__).parents[2] / "schemas" / "junit-10.xsd"


def render(report: Report, **options: object) -> str:
    return plugins.load_format("junit").render(report, options=RenderOptions(**options))


@functools.cache
def schema() -> etree.XMLSchema:
    return etree.XMLSchema(etree.parse(SCHEMA))


def suite(report: Report, **options: object) -> etree._Element:
    """The only suite of a document that is valid, its counts checked."""
    root = etree.fromstring(render(report, **options).encode())
    schema().assertValid(root)
    (only,) = root.findall("testsuite")
    for attribute, path in (
        ("tests", "testcase"),
        ("failures", "testcase/failure"),
        ("errors", "testcase/error"),
        ("skipped", "testcase/skipped"),
    ):
        assert only.get(attribute) == str(len(only.findall(path)))
    assert root.get("failures") == only.get("failures")
    return only


def verdicts(report: Report) -> dict[str, str]:
    """`failure: message` by the id of the case."""
    found = suite(report).findall("testcase")
    assert len(found) == len(report.cases)
    out = {}
    for result, testcase in zip(report.cases, found, strict=True):
        one = [child for child in testcase if child.tag != "system-out"]
        assert len(one) <= 1
        out[result.case.id] = f"{one[0].tag}: {one[0].get('message')}" if one else "passed"
    return out


def of_status(report: Report, status: Status) -> list[str]:
    return [r.case.id for r in report.cases if r.outcome.status is status]


# --- the shape -----------------------------------------------------------------------------------


def test_snapshots() -> None:
    """A few cases of each status: the shape of the document, not its length."""
    for name, report in (
        ("junit.xml", sample_report.sample()),
        ("junit-gated.xml", gated_report.gated()),
    ):
        few = {id_ for status in Status for id_ in of_status(report, status)[:2]}
        few |= {c.case for c in report.comparison.changes[::8]} if report.comparison else set()
        short = replace(report, cases=tuple(r for r in report.cases if r.case.id in few))
        sample_report.check_snapshot(name, render(short))


def test_the_schema_refuses_what_is_wrong() -> None:
    """The check of the check."""
    root = etree.fromstring(render(sample_report.sample()).encode())
    assert schema().validate(root)
    for spoil in (
        lambda case: case.attrib.pop("name"),
        lambda case: case.set("unheard", "1"),
        lambda case: etree.SubElement(case, "passed"),
        lambda case: case.getparent().set("time", "a while"),
    ):
        spoiled = etree.fromstring(etree.tostring(root))
        spoil(spoiled.find(".//testcase"))
        assert not schema().validate(spoiled)


def test_one_testcase_a_case() -> None:
    report = sample_report.sample()
    found = suite(report).findall("testcase")
    names = {(case.get("classname"), case.get("name")) for case in found}
    assert len(names) == len(report.cases)
    ids = {f"{classname}/{name}" for classname, name in names}
    for result in report.cases:
        assert result.case.id.replace("/", ".", 1) in ids


def test_time_is_in_seconds() -> None:
    report = sample_report.sample()
    one = replace(report.cases[0].outcome, timings={"first": 1500.0, "warm": 34.0})
    odd = replace(one, timings={"first": float("nan"), "warm": -3.0})
    cases = tuple(replace(report.cases[0], outcome=outcome) for outcome in (one, odd))
    only = suite(replace(report, cases=cases))
    assert [case.get("time") for case in only.findall("testcase")] == ["1.534", "0.000"]
    assert only.get("time") == "1.534"


def test_the_environment_is_there() -> None:
    properties = {
        p.get("name"): p.get("value") for p in suite(sample_report.sample()).iter("property")
    }
    assert properties["packages"].startswith("torch 2.13.0+cpu")
    assert properties["seed"] == "20260801"


# --- verdicts ------------------------------------------------------------------------------------


def test_errors_fail_and_nothing_else_does() -> None:
    report = sample_report.sample()
    found = verdicts(report)
    errors = {c for f in report.findings if f.severity is Severity.ERROR for c in f.cases}
    failed = {case for case, verdict in found.items() if verdict.startswith("failure")}
    assert failed == errors
    for case in of_status(report, Status.UNKNOWN):
        assert found[case] == "error: the check itself failed"
    for case in of_status(report, Status.UNAVAILABLE):
        assert found[case].startswith("skipped: the operator refuses this setting: ")
    for case in of_status(report, Status.SUPPORTED):
        assert found[case] == "passed"


def test_a_failure_says_what_and_what_to_do() -> None:
    report = sample_report.sample()
    finding = report.findings[0]
    failures = {f.get("message"): f.text for f in suite(report).iter("failure")}
    text = failures[finding.title]
    assert text.startswith(f"Operator {finding.kernel_op} does not have a sharding strategy")
    assert "What to do (not run in this scan): Call it through `local_map`." in text
    assert "attention = local_map(" in text
    assert "attncheck explain ATN101" in text


def test_warnings_go_to_the_output() -> None:
    report = sample_report.sample()
    told = [
        case for case in suite(report).findall("testcase") if case.find("system-out") is not None
    ]
    warned = [f for f in report.findings if f.severity is Severity.WARNING]
    assert len(told) == len({case for f in warned for case in f.cases}) > 0
    assert told[0].findtext("system-out").startswith("warning ATN301 implicit-redistribution: ")


def test_an_error_about_what_could_not_run_fails() -> None:
    """As the exit code does: an extension that cannot be loaded is an error, though nothing ran."""
    report = sample_report.sample()
    idle = of_status(report, Status.UNAVAILABLE)[0]
    finding = replace(report.findings[0], rule="ATN402", cases=(idle,))
    assert verdicts(replace(report, findings=(finding,)))[idle].startswith("failure: ")


def test_against_a_baseline_only_what_gates_fails() -> None:
    report = gated_report.gated()
    found = verdicts(report)
    assert report.comparison is not None
    gating = {change.case: change for change in report.comparison.changes if change.gates}
    assert {case for case, verdict in found.items() if verdict.startswith("failure")} == set(gating)
    for case, change in gating.items():
        assert found[case].startswith(f"failure: {change.kind.value}: ")
    known = [case for case, verdict in found.items() if verdict.startswith("skipped: known")]
    assert set(known) == {
        case
        for finding in report.findings
        if finding.severity is Severity.ERROR
        for case in finding.cases
        if case not in gating
    }
    told = {found[case] for case in known}
    reason = f"skipped: known: {gated_report.REASON}"
    assert told == {"skipped: known: in attncheck-baseline.json", reason}


def test_what_people_wrote_is_said() -> None:
    report = gated_report.gated()
    finding = next(f for f in report.findings if f.kernel_op == sample_report.CPU_BACKWARD)
    wrote = gated_report.with_change(
        report, finding, kind=ChangeKind.UNCHANGED, reason=gated_report.REASON
    )
    assert verdicts(wrote)[finding.cases[0]] == f"skipped: known: {gated_report.REASON}"
    allowed = gated_report.with_change(report, finding, kind=ChangeKind.NEW)
    assert verdicts(allowed)[finding.cases[0]] == "skipped: allowed: new"


def test_a_gate_that_passes_has_no_failures() -> None:
    report = gated_report.passing()
    assert report.comparison is not None
    assert report.comparison.exit_code == 0
    only = suite(report)
    assert (only.get("failures"), only.get("errors")) == ("0", "0")
    assert "The gate passes" in only.findtext("system-out")


# --- text from elsewhere -------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sample_report.hostile, gated_report.hostile])
@pytest.mark.parametrize("unicode", [True, False])
@pytest.mark.parametrize(
    "text", [sample_report.HOSTILE, "]]>&amp;<!--", "\x00\ufffe\uffff\ud800 x"]
)
def test_hostile_text_changes_no_structure(make, text: str, unicode: bool) -> None:
    tags = [
        [
            (element.tag, sorted(element.attrib))
            for element in suite(make(t), unicode=unicode).iter()
        ]
        for t in ("plain", text)
    ]
    assert tags[0] == tags[1]


def test_text_comes_back() -> None:
    text = "a <b> & \"c\" 'd' ]]> \n e"
    failure = next(suite(sample_report.hostile(text)).iter("failure"))
    assert failure.text.startswith(text)
    assert failure.get("message") == " ".join(text.split())


def test_ascii() -> None:
    report = sample_report.hostile("h\u00e4ng \u2713")
    assert render(report, unicode=False).isascii()
    assert suite(report, unicode=False).find(".//failure").get("message") == "h\u00e4ng \u2713"


def test_long_texts_are_cut() -> None:
    assert len(render(sample_report.hostile("x" * 100_000))) < 40_000


def test_an_empty_report() -> None:
    assert suite(Report({}, (), ())).get("tests") == "0"


@settings(max_examples=30)
@given(gated_report.gated_reports(finite=False))
def test_any_report(report: Report) -> None:
    assert len(suite(report).findall("testcase")) == len(report.cases)
