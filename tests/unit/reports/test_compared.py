"""A report that was held against a baseline, for people: the table and Markdown, for any report and text."""

from __future__ import annotations

import re
from dataclasses import replace

import gated_report
import pytest
import sample_report
from hypothesis import given, settings
from markdown_it import MarkdownIt

from attncheck import plugins
from attncheck.model import Comparison, Report
from attncheck.view import RenderOptions

MARKDOWN = MarkdownIt("commonmark").enable("table")
# The only HTML that the format writes itself.
OURS = re.compile(r"</?(details|summary|code|br)>|<details><summary>[^<]*</summary>")


def render(name: str, report: Report, **options: object) -> str:
    return plugins.load_format(name).render(report, options=RenderOptions(**options))


@pytest.mark.parametrize(
    ("form", "file"), [("table", "table-gated.txt"), ("markdown", "markdown-gated.md")]
)
def test_snapshot(form: str, file: str) -> None:
    sample_report.check_snapshot(file, render(form, gated_report.gated()))


@pytest.mark.parametrize("form", ["table", "markdown"])
def test_the_verdict_comes_first_and_the_environments_next(form: str) -> None:
    text = render(form, gated_report.gated())
    first, *lines = text.splitlines()
    assert first.lstrip("# ") == "The gate fails: 31 worse, 14 costlier. Exit code 1."
    said = " ".join(" ".join(lines[:12]).replace("|", " ").split())
    assert re.search(r"torch 2\.11\.0 (-> )?2\.13\.0\+cpu", said)
    assert re.search(r"flash-attn 2\.7\.4\.post1 (-> )?2\.8\.3\.post2", said)


def test_what_was_there_before_is_told_with_v_alone() -> None:
    """One screen: of nine findings, the two about what got worse."""
    brief, whole = (render("table", gated_report.gated(), verbose=v) for v in (False, True))
    assert "ATN502" not in brief
    assert "ATN502" in whole
    assert len(brief.splitlines()) < 75 < len(whole.splitlines())


def test_what_is_accepted_is_shown_with_its_reason() -> None:
    for form in ("table", "markdown"):
        assert f"accepted: {gated_report.REASON}" in render(form, gated_report.gated())


@pytest.mark.parametrize("form", ["table", "markdown"])
def test_nothing_changed(form: str) -> None:
    """The healthy twin: nothing is worse, and nothing is to be done."""
    text = render(form, gated_report.passing())
    assert text.lstrip("# ").startswith("The gate passes: nothing is worse than the baseline.")
    assert "What to do" not in text
    same = replace(sample_report.sample(), comparison=Comparison("old.json", unchanged=412))
    assert render(form, same).lstrip("# ").startswith("Nothing changed.")


few = settings(max_examples=40)


@few
@given(gated_report.gated_reports(finite=False))
def test_any_table(report: Report) -> None:
    for options in ({}, {"verbose": True, "width": 60}, {"unicode": False}):
        text = render("table", report, **options)
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)


@few
@given(gated_report.gated_reports(finite=False))
def test_any_markdown(report: Report) -> None:
    """It reads back as what was written: our headings, our HTML, and no link, image or list of anybody's."""
    for verbose in (False, True):
        check_markdown(render("markdown", report, verbose=verbose))


def test_hostile_markdown() -> None:
    check_markdown(render("markdown", gated_report.hostile()))


def check_markdown(text: str) -> None:
    tokens = MARKDOWN.parse(text)
    assert tokens[0].type == "heading_open"
    inline = [child for token in tokens for child in token.children or ()]
    kinds = {token.type for token in (*tokens, *inline)}
    assert not kinds & {"link_open", "image", "bullet_list_open", "ordered_list_open", "hr"}
    for token in (*tokens, *inline):
        if token.type in ("html_block", "html_inline"):
            left = OURS.sub("", token.content).strip()
            assert not left.startswith("<"), token.content
