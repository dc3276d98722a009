"""What is provisioned for a report, and what needs no running."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
from sample_report import sample

from attncheck import plugins, provision
from attncheck.errors import UserError
from attncheck.model import Finding, Report, Severity
from attncheck.triage import issue, triaging

SHELF = plugins.load_probes()


def finding(report: Report, operator: str) -> Finding:
    cases = tuple(r.case.id for r in report.cases if r.case.operator == operator)
    return Finding("ATN101", "name", Severity.ERROR, "title", "aten.x.default", cases, "f" * 16)


def told(with_: object, version: object = "2.8.3.post2") -> Report:
    environment = {"with": with_, "packages": {"flash-attn": version}}
    return replace(sample(), environment=environment)


@pytest.mark.parametrize(
    ("report", "operator", "wanted"),
    [
        (told(["flash-attn"]), "flash_attn_func", ["flash-attn==2.8.3.post2"]),
        (told(["flash-attn==2.8.1"], "2.8.1"), "flash_attn_func", ["flash-attn==2.8.1"]),
        (told(["flash-attn"]), "sdpa", []),  # not what its operators need
        (told([]), "flash_attn_func", []),  # it was installed there: the user's own is taken here
        (told("flash-attn"), "flash_attn_func", []),
        (told(["evil-package"]), "flash_attn_func", []),
        (told(["flash-attn @ https://example.org/x"]), "flash_attn_func", []),
        (told(["flash-attn"], "99.0"), "flash_attn_func", []),
        (told(["flash-attn"], "2.8.3.post2 @ https://example.org"), "flash_attn_func", []),
        (told(["flash-attn"], ["2.8.3.post2"]), "flash_attn_func", []),
        (replace(told(["flash-attn"]), environment={}), "flash_attn_func", []),
    ],
)
def test_a_report_brings_only_versions_that_are_known(
    report: Report,
    operator: str,
    wanted: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    asked: list[str] = []

    def ensure(one: provision.Provision, *, log: object) -> Path:
        asked.append(str(one))
        return tmp_path

    monkeypatch.setattr(provision, "ensure", ensure)
    one = finding(report, operator)
    triaging.workshop(report, [one], SHELF, (), tmp_path, lambda text: None)
    assert asked == wanted


def test_what_is_given_takes_the_place_of_what_the_report_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Unknown package to provision"):
        triaging.workshop(sample(), [], SHELF, ("numpy",), tmp_path, lambda text: None)


def test_a_finding_about_the_environment_runs_nothing(tmp_path: Path) -> None:
    report = sample()
    one = replace(finding(report, "sdpa"), rule="ATN401")
    done = triaging.reproduce(triaging.Workshop(report, SHELF, tmp_path), one, print)
    assert not done.confirmed
    assert "about the environment" in done.why_not
    assert [*tmp_path.iterdir()] == []


def test_without_torch_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report = sample()
    done = triaging.reproduce(
        triaging.Workshop(report, SHELF, tmp_path), finding(report, "sdpa"), print
    )
    assert done.why_not == "torch is not installed here"


def test_a_case_that_nobody_plans_is_not_run(tmp_path: Path) -> None:
    """Of a hostile report nothing is run, and the page says why."""
    report = sample()
    names = {"operator": "__import__('os').system('touch pwned')", "id": "__import__('os')"}
    hostile = replace(
        report, cases=tuple(replace(r, case=replace(r.case, **names)) for r in report.cases[:3])
    )
    one = replace(finding(report, "sdpa"), cases=("__import__('os')",))
    done = triaging.reproduce(triaging.Workshop(hostile, SHELF, tmp_path), one, print)
    assert "no such case here" in done.why_not
    assert [*tmp_path.iterdir()] == []
    asked = issue.Request(replace(hostile, findings=(one,)), "r.json", finding="ATN101")
    assert "None: no such case here" in issue.write(asked, print).text


def test_scripts_are_kept_under_names_of_our_own(tmp_path: Path) -> None:
    one = replace(finding(sample(), "sdpa"), fingerprint="../../etc/passwd")
    written = issue.Issue("", (triaging.Reproduction(one, script="x = 1\n"),))
    issue.keep(written, tmp_path / "scripts", print)
    assert [p.name for p in (tmp_path / "scripts").iterdir()] == ["repro_etcpasswd.py"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        issue.keep(written, tmp_path / "file", print)
