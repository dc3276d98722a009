"""The terminal report: it fits the width, reads without colour, and lets nothing through."""

import dataclasses
import re

import pytest
import sample_report

from attncheck import plugins
from attncheck.model import Report
from attncheck.view import RenderOptions, build

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
COPIED = ("attncheck scan", "attncheck fix", "attncheck explain", "from torch", "         ")


def render(report: Report, **options: object) -> str:
    return plugins.load_format("table").render(report, options=RenderOptions(**options))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("table-80.txt", {"width": 80}),
        ("table-100.txt", {"width": 100}),
        ("table-120.txt", {"width": 120}),
        ("table-120-verbose.txt", {"width": 120, "verbose": True}),
        ("table-80-ascii.txt", {"width": 80, "unicode": False}),
        ("table-100-color.txt", {"width": 100, "color": True}),
    ],
)
def test_snapshot(name: str, options: dict) -> None:
    sample_report.check_snapshot(name, render(sample_report.sample(), **options))


@pytest.mark.parametrize("width", [80, 100, 120, 200])
@pytest.mark.parametrize("verbose", [False, True])
def test_no_line_is_wider_than_asked(width: int, verbose: bool) -> None:
    text = render(sample_report.sample(), width=width, verbose=verbose)
    code = {line.strip() for line in sample_report.LOCAL_MAP.split("\n")}
    code |= {step.command for step in build(sample_report.sample()).steps}
    too_wide = [s for s in text.split("\n") if len(s) > width and s.strip() not in code]
    assert too_wide == []


@pytest.mark.parametrize("width", [80, 120])
def test_words_stay_whole(width: int) -> None:
    """Kernel ops are what a reader searches for: no wrapping may cut one."""
    text = render(sample_report.sample(), width=width)
    for op in (sample_report.FLASH_FORWARD, sample_report.CPU_BACKWARD):
        assert op in text


def test_the_answer_is_on_the_first_screen() -> None:
    top = "\n".join(render(sample_report.sample(), width=100).split("\n")[:36])
    assert sample_report.FLASH_FORWARD in top
    assert "works with heads sharded" in top
    assert "flash_attn_func" in top


def test_ascii_only_where_the_output_asks_for_it() -> None:
    for report in (sample_report.sample(), sample_report.hostile("h\u00e4ng \u2713 \U0001f600")):
        assert render(report, unicode=False).isascii()


def test_color_changes_nothing_but_color() -> None:
    colored = render(sample_report.sample(), color=True)
    assert "\x1b[31m" in colored
    assert ESCAPE.sub("", colored) == render(sample_report.sample())


@pytest.mark.parametrize("verbose", [False, True])
def test_hostile_text_is_neutralised(verbose: bool) -> None:
    text = render(sample_report.hostile(), verbose=verbose)
    assert not [c for c in text if (c < " " and c != "\n") or "\x7f" <= c < "\xa0"]
    assert "\u202e" not in text
    text.encode("utf-8")


def test_hostile_text_stays_hostile_free_in_color() -> None:
    text = ESCAPE.sub("", render(sample_report.hostile(), color=True))
    assert "\x1b" not in text
    assert "\x07" not in text


@pytest.mark.parametrize("length", [10_000])
def test_long_messages_are_cut(length: int) -> None:
    text = render(sample_report.hostile("x" * length), width=100)
    assert len(text) < 15_000  # of 300,000 characters in the report
    assert max(map(len, text.split("\n"))) <= 420  # code is cut, not wrapped
    assert "..." in text


def test_code_is_shown_once() -> None:
    text = render(sample_report.sample(), width=100)
    assert text.count("attention = local_map(") == 1
    assert "(the code shown with ATN101 above)" in text


def test_evidence_is_marked() -> None:
    text = " ".join(render(sample_report.sample(), width=120).split())
    assert "[seen working in this scan: 6 cases]" in text
    assert "Call it through `local_map`. [not run in this scan]" in text


def test_long_lists_of_cases_are_cut() -> None:
    report = sample_report.sample()
    finding = dataclasses.replace(report.findings[0], cases=tuple(f"case{i}" for i in range(70)))
    text = render(dataclasses.replace(report, findings=(finding,)), verbose=True)
    assert "and 20 more (all in --output json)" in text


def test_an_empty_report() -> None:
    text = render(Report({}, (), ()))
    assert text.startswith("No case was planned")
    assert text.endswith("\n")
    assert "How to go on" in text


def test_many_meshes_and_placements_fit() -> None:
    report = sample_report.sample()
    names = ("heads,sequence", "batch,heads", "head_dim,partial", "replicate,replicate")
    cases = tuple(
        dataclasses.replace(
            r,
            case=dataclasses.replace(
                r.case, placement=f"{r.case.placement},{name}", id=f"{r.case.id}/{name}"
            ),
        )
        for r in report.cases
        for name in names
    )
    text = render(dataclasses.replace(report, cases=cases, findings=()), width=80)
    assert max(map(len, text.split("\n"))) <= 80


@pytest.mark.parametrize("name", ["table", "markdown"])
def test_every_missing_op_has_a_line(name: str) -> None:
    report = sample_report.with_many_missing()
    text = plugins.load_format(name).render(report, options=RenderOptions(width=100))
    section = text.partition("\n## Missing" if name == "markdown" else "\nMissing (")[2]
    section = section.partition("\n\n#" if name == "markdown" else "\n\n")[0]
    assert "more.attention.default" in section
    assert sample_report.FLASH_FORWARD in section
    assert section.count(".default") >= 7
