"""The page: what a maintainer gets of a finding, and that it fits into an issue whatever the report holds."""

from __future__ import annotations

import re
from dataclasses import replace

from hypothesis import given
from sample_report import hostile, sample
from strategies import reports

from attncheck.markup import ISSUE_LENGTH
from attncheck.model import Finding, Report
from attncheck.triage import page
from attncheck.triage.triaging import Reproduction

FENCED = re.compile(r"^(`{3,})\w*\n.*?^\1$", re.MULTILINE | re.DOTALL)
SCRIPT = "import torch\n" + "print('a line of a script')\n" * 40


def confirmed(finding: Finding, script: str = SCRIPT) -> Reproduction:
    return Reproduction(
        finding,
        title="`aten.bmm` has no sharding strategy",
        script=script,
        case="a/case",
        ranks=4,
        expected="The call goes through.",
        actual="NotImplementedError: no strategy\nBUG",
        how="Confirmed with torch 2.13.0 on a CPU, as it is.",
    )


def of(report: Report, *reproductions: Reproduction, title: str = "") -> page.Page:
    desk = page.Desk(report)
    entries = [desk.entry(reproduction) for reproduction in reproductions]
    return desk.page(entries, title, "attncheck report r.json --finding")


def first(report: Report, rule: str = "ATN101") -> Finding:
    return next(f for f in report.findings if f.rule == rule)


def test_a_finding_has_what_a_maintainer_asks_for() -> None:
    report = sample()
    finding = first(report)
    text = page.render(of(report, confirmed(finding)))
    parts = (
        "# `aten.bmm` has no sharding strategy\n",
        "## Environment of the scan\n\n- packages: ",
        "`torchrun --nproc-per-node 4 repro.py`. Confirmed with torch 2.13.0 on a CPU, as it is.",
        f"```python\n{SCRIPT.rstrip()}\n```",
        "## Expected\n\nThe call goes through.",
        "## Actual\n\n```text\nNotImplementedError: no strategy\nBUG\n```",
        "| operator ",
        "## What may mend it",
        f"fingerprint `{finding.fingerprint}`",
    )
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_only_the_operators_of_the_finding_are_in_its_matrix() -> None:
    report = sample()
    text = page.render(of(report, confirmed(first(report))))
    assert "flash_attn_func" in text
    assert "fallback.matmul" not in text.split("## Where it shows")[1].split("## What")[0]


def test_what_was_not_confirmed_has_words_and_no_script() -> None:
    report = sample()
    one = Reproduction(first(report), why_not="a/case: the script does not show it here")
    text = page.render(of(report, one))
    assert "## Reproduction\n\nNone: a/case: the script does not show it here.\n" in text
    assert "```python\nimport torch" not in text
    assert "## Actual" not in text


def test_several_in_one_issue_and_the_rest_by_name() -> None:
    report = sample()
    made = of(
        report,
        confirmed(report.findings[0]),
        Reproduction(report.findings[1], why_not="torch is not installed here"),
        title="Findings for pytorch",
    )
    desk = page.Desk(report)
    made = replace(made, rest=tuple(map(desk.shown, report.findings[2:])))
    text = page.render(made)
    assert text.startswith("# Findings for pytorch\n\n1 finding, each with a script")
    assert text.count("### Reproduction") == 1
    assert "## Not reproduced here" in text
    assert "torch is not installed here" in text
    assert "`attncheck report r.json --finding FINGERPRINT`" in text
    for finding in report.findings[2:]:
        assert f"`{finding.fingerprint}`" in text


def big(cases: int = 400) -> Report:
    """As a scan on many meshes: every case of the sample many times, under other operators."""
    report = sample()
    results = tuple(
        replace(r, case=replace(r.case, id=f"{at}/{r.case.id}", operator=f"{r.case.operator}.{at}"))
        for at in range(cases // 20)
        for r in report.cases
    )
    ids = tuple(r.case.id for r in results)
    finding = replace(first(report), cases=ids, message="A line that says much.\n" * 400)
    return replace(report, cases=results, findings=(finding,))


def test_the_matrix_gives_way_and_never_the_script() -> None:
    report = big()
    script = "print('a line of a script')\n" * 2000
    text = page.render(of(report, confirmed(report.findings[0], script)))
    assert 55_000 < len(script) < len(text) <= ISSUE_LENGTH
    assert script.rstrip() in text
    small = page.render(of(report, confirmed(report.findings[0])))
    assert small.count("\n| ") > text.count("\n| ")


def test_hostile_text_is_text() -> None:
    report = hostile()
    for finding in report.findings:
        text = page.render(of(report, Reproduction(finding, why_not="@everyone <b>no</b> | `x`")))
        text = FENCED.sub("", text)
        assert "<script" not in text
        assert "@everyone" not in text
        assert "<b>" not in text
        assert "\x1b" not in text


@given(reports())
def test_any_report_makes_a_page(report: Report) -> None:
    made = [confirmed(f) if at % 2 else Reproduction(f) for at, f in enumerate(report.findings)]
    assert page.render(of(report, *made, title="Several"))
    for one in made:
        assert len(page.render(of(report, one))) <= ISSUE_LENGTH
