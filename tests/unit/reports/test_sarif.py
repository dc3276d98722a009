"""SARIF: valid by the schema of OASIS, one result a finding, fingerprints that outlive versions."""

from __future__ import annotations

import copy
import functools
import gzip
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gated_report
import jsonschema
import pytest
import sample_report
from hypothesis import given, settings

from attncheck import plugins, rules
from attncheck.model import ChangeKind, Report, Status
from attncheck.view import RenderOptions, build

SCHEMA = Path(__file__).parents[2] / "schemas" / "sarif-schema-2.1.0.json"


def render(report: Report, **options: object) -> str:
    return plugins.load_format("sarif").render(report, options=RenderOptions(**options))


@functools.cache
def validator() -> jsonschema.Draft4Validator:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    return jsonschema.Draft4Validator(schema, format_checker=jsonschema.FormatChecker())


def run(report: Report, **options: object) -> dict[str, Any]:
    """The only run of a log that is valid."""
    log = json.loads(render(report, **options))
    (only,) = log["runs"]
    check = {**log, "runs": [{**only, "tool": {"driver": {"name": "attncheck"}}}]}
    # The rules are always the same, and long: that they are valid is seen once.
    validator().validate(check)
    return only


def texts(value: Any) -> list[str]:
    """Every string of a JSON value."""
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [t for item in items for t in texts(item)] if isinstance(value, (dict, list)) else []


# --- the shape -----------------------------------------------------------------------------------


def test_snapshots() -> None:
    """With one rule: the others have tests of their own."""
    for name, report in (
        ("sarif.sarif", sample_report.sample()),
        ("sarif-gated.sarif", gated_report.gated()),
    ):
        log = json.loads(render(report))
        del log["runs"][0]["tool"]["driver"]["rules"][1:]
        sample_report.check_snapshot(name, json.dumps(log, indent=1) + "\n")


def test_the_schema_refuses_what_is_wrong() -> None:
    """The check of the check."""
    log = json.loads(render(sample_report.sample()))
    validator().validate(log)
    for spoil in (
        lambda run: run["results"][0].update(level="fatal"),
        lambda run: run["results"][0].update(baselineState="gone"),
        lambda run: run["results"][0]["locations"][0]["physicalLocation"]["region"].update(startLine=0),
        lambda run: run["tool"]["driver"].pop("name"),
        lambda run: run["tool"]["driver"]["rules"].append(run["tool"]["driver"]["rules"][0]),
        lambda run: run["results"][0].update(unheard=1),
    ):  # fmt: skip
        spoiled = copy.deepcopy(log)
        spoil(spoiled["runs"][0])
        assert not validator().is_valid(spoiled)


def test_every_rule_is_described() -> None:
    described = run(sample_report.sample())["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in described] == [rule.id for rule in rules.RULES]
    for rule, found in zip(rules.RULES, described, strict=True):
        assert found["name"] == rule.name
        assert found["helpUri"] == rule.docs_url
        assert found["help"]["markdown"].replace("{{", "{").replace("}}", "}") == rule.docs
        assert found["defaultConfiguration"]["level"] in ("error", "warning", "note")
        short, full = found["shortDescription"]["text"], found["fullDescription"]["text"]
        assert 20 < len(short) <= 1024  # GitHub's limit
        assert len(short) <= len(full) <= 1024
        assert not re.search(r"[`*#]|\.\.\.$", full), full


def test_the_address_of_a_rule_is_its_heading_as_github_anchors_it() -> None:
    assert rules.find("ATN101").docs_url == (
        "https://github.com/attncheck/attncheck/blob/main/reports/published/rules.md"
        "#atn101-missing-forward-strategy"
    )


def test_one_result_a_finding() -> None:
    report = sample_report.sample()
    found = run(report)
    assert len(found["results"]) == len(report.findings)
    levels = [result["level"] for result in found["results"]]
    assert levels == sorted(levels, key=["error", "warning", "note"].index)
    by_print = {r["partialFingerprints"]["attncheckFinding/v1"]: r for r in found["results"]}
    ids = [rule["id"] for rule in found["tool"]["driver"]["rules"]]
    for finding in report.findings:
        result = by_print[finding.fingerprint]
        assert result["ruleId"] == finding.rule == ids[result["ruleIndex"]]
        assert result["properties"]["cases"] == len(finding.cases)
        assert result["message"]["text"].startswith(finding.title)
        assert finding.cases[0] in result["message"]["text"]
    flash = by_print[report.findings[0].fingerprint]
    assert flash["properties"]["operators"] == ["flash_attn_func", "flash_attn_qkvpacked_func"]
    assert flash["locations"][0]["logicalLocations"][0]["fullyQualifiedName"] == (
        sample_report.FLASH_FORWARD
    )
    assert [r["kind"] for r in flash["properties"]["remedies"]] == ["operator", "route", "strategy"]
    assert "local_map(" in flash["properties"]["remedies"][1]["code"]


def test_fingerprints_hold_across_versions_and_places(tmp_path: Path) -> None:
    """GitHub knows an alert by `primaryLocationLineHash` alone: not by the line, which a bump changes."""
    report = sample_report.sample()
    bumped = replace(report, environment={"packages": {"torch": "9.9"}}, cases=report.cases[:-9])
    (tmp_path / "requirements.txt").write_text("numpy\ntorch==9.9\n")
    prints = [
        [result["partialFingerprints"] for result in run(r, folder=folder)["results"]]
        for r, folder in ((report, None), (bumped, tmp_path))
    ]
    assert prints[0] == prints[1]
    hashes = {each["primaryLocationLineHash"] for each in prints[0]}
    assert len(hashes) == len(report.findings)  # several of a rule at one line stay several alerts


def test_it_points_at_the_pin(tmp_path: Path) -> None:
    (tmp_path / "my requirements").mkdir()
    (tmp_path / ".git").mkdir()
    folder = tmp_path / "my requirements"
    (folder / "requirements.txt").write_text("torch==2.13.0\n\nflash-attn==2.8.3\n")
    places = {
        result["locations"][0]["logicalLocations"][0]["fullyQualifiedName"]: result["locations"][0][
            "physicalLocation"
        ]
        for result in run(sample_report.sample(), folder=folder)["results"]
        if "logicalLocations" in result["locations"][0]
    }
    flash, cpu = places[sample_report.FLASH_FORWARD], places[sample_report.CPU_FORWARD]
    assert flash["region"]["startLine"] == 3
    assert cpu["region"]["startLine"] == 1
    assert flash["artifactLocation"]["uri"] == "my%20requirements/requirements.txt"


def test_notices_are_told() -> None:
    (invocation,) = run(sample_report.sample())["invocations"]
    told = [n["message"]["text"] for n in invocation["toolExecutionNotifications"]]
    assert "Workers were restarted 2 times." in told


# --- against a baseline --------------------------------------------------------------------------


def results_by_rule(report: Report) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (result["ruleId"], result["message"]["text"].split(" ")[0]): result
        for result in run(report)["results"]
    }


def test_what_a_gate_says_of_each_finding() -> None:
    report = gated_report.gated()
    found = results_by_rule(report)
    states = {key: result.get("baselineState") for key, result in found.items()}
    assert states["ATN101", sample_report.FLASH_FORWARD] == "updated"  # qkvpacked was known
    assert states["ATN201", "sdpa[FLASH_ATTENTION]"] == "new"
    assert states["ATN102", sample_report.FLASH_BACKWARD] == "unchanged"
    assert states["ATN401", "sdpa"] is None  # a baseline holds no notes
    for key, result in found.items():
        assert ("suppressions" in result) == (states[key] == "unchanged"), key
    only = run(report)
    assert only["invocations"][0]["exitCode"] == 1
    assert only["properties"]["changes"]["fixed"] == 6
    assert only["properties"]["changed"]["torch"] == ["2.11.0", "2.13.0+cpu"]


def test_why_it_is_accepted_is_said() -> None:
    report = gated_report.gated()
    justified = {
        finding.kernel_op: results_by_rule(report)[finding.rule, finding.kernel_op]["suppressions"]
        for finding in report.findings
        if finding.kernel_op in (sample_report.CPU_BACKWARD, sample_report.FLASH_BACKWARD)
    }
    known = {"kind": "external", "status": "accepted"}
    where = "known in attncheck-baseline.json"
    assert justified == {
        sample_report.CPU_BACKWARD: [{**known, "justification": f"{where}: {gated_report.REASON}"}],
        sample_report.FLASH_BACKWARD: [{**known, "justification": where}],
    }


def test_an_expired_acceptance_is_not_suppressed() -> None:
    report = gated_report.gated()
    finding = next(f for f in report.findings if f.kernel_op == sample_report.CPU_BACKWARD)
    report = gated_report.with_change(
        report, finding, kind=ChangeKind.NEW, after=Status.MISSING_STRATEGY, gates=True
    )
    result = results_by_rule(report)[finding.rule, finding.kernel_op]
    assert result["baselineState"] == "new"
    assert "suppressions" not in result


def test_without_a_baseline_there_is_no_state() -> None:
    for result in run(sample_report.sample())["results"]:
        assert "baselineState" not in result
        assert "suppressions" not in result


# --- limits, and text from elsewhere -------------------------------------------------------------


def many_findings(number: int) -> Report:
    report = sample_report.sample()
    notes = (report.findings[-1],) * (number // 2)
    findings = [
        replace(finding, fingerprint=f"{i:016x}", cases=(), message=f"the {i}th")
        for i, finding in enumerate((*notes, *(report.findings[0],) * (number - number // 2)))
    ]
    return replace(report, cases=report.cases[:1], findings=tuple(findings))


def test_no_more_results_than_github_shows() -> None:
    (only,) = json.loads(render(many_findings(6000)))["runs"]
    assert len(only["results"]) == 5000
    assert [r["level"] for r in only["results"][:3000]] == ["error"] * 3000
    told = only["invocations"][0]["toolExecutionNotifications"][-1]["message"]["text"]
    assert told == "1000 more findings, none worse, are in --output json."


def test_no_more_bytes_than_github_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lean remedies first, then fewer results: here with a limit of 30 kB instead of 10 MB."""
    plugins.load_format("sarif")
    module = sys.modules["attncheck._shelf.reports.sarif"]
    rich = many_findings(1500)
    before = json.loads(render(rich))["runs"][0]["results"]
    assert len(before[0]["properties"]["remedies"]) == 3
    monkeypatch.setattr(module, "UPLOAD_BYTES", 30_000)
    text = render(rich)
    after = json.loads(text)["runs"][0]["results"]
    assert len(gzip.compress(text.encode())) < 30_000
    assert len(after) == 1000
    assert len(after[0]["properties"]["remedies"]) == 1
    assert [r["ruleId"] for r in after[:750]] == ["ATN101"] * 750


@pytest.mark.parametrize("make", [sample_report.hostile, gated_report.hostile])
@pytest.mark.parametrize("unicode", [True, False])
def test_hostile_text_changes_no_structure(make: Any, unicode: bool) -> None:
    plain, hostile = run(make("plain"), unicode=unicode), run(make(), unicode=unicode)
    assert hostile["results"][0]["message"].keys() == plain["results"][0]["message"].keys()
    text = "\n".join(texts(hostile))
    assert "\x1b" not in text
    assert "\u202e" not in text
    for result in hostile["results"]:
        assert "](" not in result["message"]["text"]  # no link of its own


def test_braces_are_doubled() -> None:
    """A single one would stand for an argument (3.11.5)."""
    (result,) = run(sample_report.hostile("{0} x"))["results"]
    assert "{{0}} x" in result["message"]["text"]
    assert not re.search(r"(?<!\{)\{(?!\{)", result["message"]["text"])


def test_a_rule_of_a_newer_version() -> None:
    report = sample_report.sample()
    newer = replace(report, findings=(replace(report.findings[0], rule="ATN999"),))
    (result,) = run(newer)["results"]
    assert result["ruleId"] == "ATN999"
    assert "ruleIndex" not in result


def test_an_empty_report() -> None:
    assert run(Report({}, (), ()))["results"] == []


@settings(max_examples=30)
@given(gated_report.gated_reports(finite=False))
def test_any_report(report: Report) -> None:
    found = run(report)["results"]
    shown = {f.fingerprint for f in build(report).findings}
    assert len(found) == len(report.findings)
    assert {r["partialFingerprints"]["attncheckFinding/v1"] for r in found} == shown
    assert sum(r["properties"]["cases"] for r in found) == sum(
        len(f.cases) for f in report.findings
    )
