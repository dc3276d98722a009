"""Workflow commands: what GitHub's runner reads of them is what was meant, and text makes none of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import click
import gated_report
import pytest
import sample_report
from hypothesis import given, settings
from hypothesis import strategies as st

from attncheck import plugins
from attncheck.commands import common
from attncheck.model import ChangeKind, Report, Severity
from attncheck.text import clean
from attncheck.view import RenderOptions


def render(report: Report, **options: object) -> str:
    return plugins.load_format("github").render(report, options=RenderOptions(**options))


@dataclass(frozen=True)
class Read:
    """A command as the runner takes it."""

    level: str
    properties: dict[str, str]
    message: str

    @property
    def title(self) -> str:
        return self.properties["title"]


# ActionCommand.TryParseV2 of github.com/actions/runner: what follows `::`, up to the next `::`, is the
# command and, after a blank, its properties.
_COMMAND = re.compile(r"::(?P<name>[a-z-]+) (?P<properties>.*?)::(?P<message>.*)", re.DOTALL)


def unescape(text: str, more: bool = False) -> str:
    for escaped, plain in ((":", "%3A"), (",", "%2C")) if more else ():
        text = text.replace(plain, escaped)
    return text.replace("%0D", "\r").replace("%0A", "\n").replace("%25", "%")


def read(text: str) -> list[Read]:
    """Every line must be one command."""
    assert text.endswith("\n")
    found = []
    for line in text[:-1].split("\n"):
        match = _COMMAND.fullmatch(line)
        assert match, line
        pairs = [pair.split("=", 1) for pair in match["properties"].split(",")]
        properties = {name: unescape(value, more=True) for name, value in pairs}
        found.append(Read(match["name"], properties, unescape(match["message"])))
    return found


def commands(report: Report, **options: object) -> list[Read]:
    return read(render(report, **options))


# --- a report ------------------------------------------------------------------------------------


def test_snapshots() -> None:
    sample_report.check_snapshot("github.txt", render(sample_report.sample()))
    sample_report.check_snapshot("github-gated.txt", render(gated_report.gated()))


def test_one_annotation_a_finding_worst_first() -> None:
    report = sample_report.sample()
    *found, last = commands(report)
    assert len(found) == len(report.findings)
    levels = [command.level for command in found]
    assert levels == sorted(levels, key=["error", "warning", "notice"].index)
    titles = {(command.title, command.message.split("\n")[0]) for command in found}
    assert titles == {(f"{f.rule} {f.name}", f.title) for f in report.findings}
    assert (last.level, last.title) == ("notice", "attncheck")
    assert last.message == "7 errors: exit code 1 with the default --fail-on error."


def test_it_points_at_the_pin(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    folder = tmp_path / "a,b: 100%"
    folder.mkdir()
    (folder / "requirements.txt").write_text("torch==2.13.0\nflash-attn==2.8.3\n")
    first = commands(sample_report.sample(), folder=folder)[0]
    assert first.title == "ATN101 missing-forward-strategy"
    assert first.properties["file"] == "a,b: 100%/requirements.txt"
    assert first.properties["line"] == "2"


def test_no_more_than_github_shows() -> None:
    """Ten of each level of a step: each kernel op has its worst finding there before any has its second."""
    report = sample_report.sample()
    finding = report.findings[0]
    many = tuple(
        replace(
            finding,
            rule=f"ATN1{n:02}",
            kernel_op=f"my.op{n % 9}.default",
            severity=severity,
            fingerprint=f"{n}{severity.value}",
            cases=(),
        )
        for severity in Severity
        for n in range(27)
    )
    found = commands(replace(report, findings=many))
    by_level = [[c for c in found if c.level == level] for level in ("error", "warning", "notice")]
    assert list(map(len, by_level)) == [10, 10, 10]
    assert len({c.title for c in by_level[0]}) == 10
    assert found[-1].message.endswith(
        f"{81 - 29} more in the step's summary: GitHub shows 10 of a kind."
    )


# --- a gate --------------------------------------------------------------------------------------


def test_a_gate_annotates_only_what_it_fails_for() -> None:
    report = gated_report.gated()
    assert report.comparison is not None
    *found, last = commands(report)
    assert [command.title for command in found] == [
        "worse: ATN101 missing-forward-strategy",
        "worse: ATN201 wrong-result",
        "costlier: redistributed",
    ]
    assert {command.level for command in found} == {"error"}
    assert "supported -> missing strategy (ATN101): 30 cases of flash_attn_func" in found[0].message
    assert "(2 times)" in found[2].message
    assert last.message.startswith(report.comparison.verdict)
    assert "torch 2.11.0 -> 2.13.0+cpu, flash-attn 2.7.4.post1 -> 2.8.3.post2" in last.message


def test_operators_that_changed_alike_share_a_line() -> None:
    report = gated_report.gated()
    finding = next(f for f in report.findings if f.kernel_op == sample_report.FLASH_BACKWARD)
    more = gated_report.with_change(report, finding, kind=ChangeKind.NEW, gates=True)
    (line,) = [c for c in commands(more) if c.title == "new: ATN102 missing-backward-strategy"]
    assert "38 cases of flash_attn_func, flash_attn_qkvpacked_func" in line.message


def test_a_gate_that_passes() -> None:
    (only,) = commands(gated_report.passing())
    assert only.level == "notice"
    assert "The gate passes" in only.message


def test_a_gate_that_fails_without_a_regression_says_so_in_red() -> None:
    report = gated_report.passing()
    assert report.comparison is not None
    comparison = replace(report.comparison, exit_code=3, verdict="Nothing ran. Exit code 3.")
    (only,) = commands(replace(report, comparison=comparison))
    assert (only.level, only.message) == ("error", "Nothing ran. Exit code 3.")


# --- text from elsewhere -------------------------------------------------------------------------

ATTACKS = [
    "::set-output name=a::b",
    "x\n::error::forged",
    "x\r\n::stop-commands::token\r",
    "x\u2028::error::forged\x85::error::forged",
    "\x1b[0m::add-mask::a",
    "100%0A::error::forged %25 %3A",
    "a,title=forged::b,line=9",
    "##[error]forged",
    " \t::warning::forged",
]


@pytest.mark.parametrize("text", [*ATTACKS, sample_report.HOSTILE])
@pytest.mark.parametrize("make", [sample_report.hostile, gated_report.hostile])
@pytest.mark.parametrize("unicode", [True, False])
def test_text_makes_no_command(make, text: str, unicode: bool) -> None:
    plain, hostile = (commands(make(t), unicode=unicode) for t in ("plain", text))
    assert [c.level for c in hostile] == [c.level for c in plain]
    assert [sorted(c.properties) for c in hostile] == [sorted(c.properties) for c in plain]
    for command in hostile:
        assert command.properties.get("line", "1") == "1"


@pytest.mark.parametrize("text", ATTACKS)
def test_text_comes_back(text: str) -> None:
    """What is escaped is what is read, on one line."""
    first = commands(sample_report.hostile(text))[0]
    assert first.message.split("\n")[0] == " ".join(clean(text).split())


def test_the_reader_sees_a_forged_command() -> None:
    """The check of the check: without escaping it would be one."""
    with pytest.raises(AssertionError):
        read("::error title=a::b\nplain text\n")
    assert len(read("::error title=a::b\n::error title=forged::c\n")) == 2


@settings(max_examples=30)
@given(gated_report.gated_reports(finite=False), st.booleans())
def test_any_report(report: Report, unicode: bool) -> None:
    found = commands(report, unicode=unicode)
    assert found[-1].title == "attncheck"
    if report.comparison is None:
        assert len(found) == len(report.findings) + 1


# --- the summary ---------------------------------------------------------------------------------


def test_the_summary_is_the_markdown_report() -> None:
    options = RenderOptions()
    report = gated_report.gated()
    summary = plugins.load_format("github").step_summary(report, options=options)
    assert summary == plugins.load_format("markdown").render(report, options=options)


def test_the_summary_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    report = sample_report.sample()
    form = plugins.load_format("github")
    assert len(form.step_summary(report, options=RenderOptions()).encode()) < 1024 * 1024
    long = "\u2713" * 600_000
    monkeypatch.setattr(plugins.Format, "render", lambda self, report, options: long)
    assert form.step_summary(report, options=RenderOptions()).startswith("# attncheck report\n")


def test_other_formats_have_no_summary() -> None:
    report = sample_report.sample()
    assert plugins.load_format("json").step_summary(report, options=RenderOptions()) is None


def outputs(*texts: str) -> list:
    return common.parse_outputs(texts)


def test_the_command_line_adds_to_the_summary_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "summary.md"
    file.write_text("Another step was here.\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(file))
    monkeypatch.chdir(tmp_path)
    both = outputs("github", "github:annotations.txt", "json:report.json")
    common.write(sample_report.sample(), both, verbose=False)
    text = file.read_text()
    assert text.startswith("Another step was here.\n# attncheck report\n")
    assert text.count("# attncheck report\n") == 1
    assert len(read(capsys.readouterr().out)) == 10
    assert (tmp_path / "annotations.txt").read_text().startswith("::error ")


def test_no_summary_without_the_format_or_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    common.write(sample_report.sample(), outputs("github:a.txt"), verbose=False)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    common.write(sample_report.sample(), outputs("json:a.json"), verbose=False)
    assert not (tmp_path / "summary.md").exists()


def test_a_summary_that_cannot_be_written_costs_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    common.write(sample_report.sample(), outputs("github:a.txt"), verbose=False)
    assert "cannot write the step summary" in click.unstyle(capsys.readouterr().err)
