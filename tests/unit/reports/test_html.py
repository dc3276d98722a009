"""The HTML report: complete without its script, closed to whatever a report holds, asking for nothing."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import sample_report
from hypothesis import given
from strategies import reports

from attncheck import plugins, view
from attncheck.model import CaseChange, ChangeKind, Comparison, Difference, Report, Status
from attncheck.view import STYLES, RenderOptions

VOID = ("meta", "link", "br", "input", "img", "hr")


def render(report: Report, **options: Any) -> str:
    return plugins.load_format("html").render(report, options=RenderOptions(**options))


@dataclasses.dataclass
class Page(HTMLParser):
    """What a parser sees: tags with the names of their attributes, texts, and what is left open."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []  # (element, text)
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attributes)))
        self.attributes.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def said(self, *but: str) -> str:
        return " ".join(text for tag, text in self.texts if tag not in ("script", "style", *but))


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])


def compared(report: Report, text: str = "base") -> Report:
    first, second = (r.case.id for r in report.cases[:2])
    changes = (
        CaseChange(
            first, ChangeKind.NEW, Status.SUPPORTED, Status.WRONG, (text,), text, text, text, True
        ),
        CaseChange(second, ChangeKind.FIXED, Status.WRONG, Status.SUPPORTED, ("ATN201",)),
        CaseChange("a/gone/case", ChangeKind.BETTER, Status.HANG, None),
    )
    difference = Difference(text, "2.11.0", "2.13.0")
    return dataclasses.replace(
        report, comparison=Comparison(text, (difference,), changes, 7, 2, text, 1)
    )


def test_snapshot() -> None:
    """Without style, script and data: what a reader without a script gets."""
    text = render(short(sample_report.sample()))
    text = re.sub(r"(<(style|script)[^>]*>).*?(</\2>)", r"\1\3", text, flags=re.S)
    sample_report.check_snapshot("html.html", re.sub(r"sha256-[\w+/=]*", "sha256-...", text))


def short(report: Report) -> Report:
    """Three operators: the shape of the page, not its length."""
    wanted = ("sdpa[FLASH_ATTENTION]", "flash_attn_with_kvcache", "fallback.einsum")
    cases = tuple(r for r in report.cases if r.case.operator in wanted)
    return dataclasses.replace(compared(report), cases=cases, findings=report.findings[4:7])


@pytest.mark.parametrize("report", [sample_report.sample(), compared(sample_report.sample())])
def test_parses(report: Report) -> None:
    page = Page(render(report))
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.attributes if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for tag, a in page.attributes if tag == "a"]
    assert targets
    assert set(targets) <= set(ids)


def test_the_answer_comes_first() -> None:
    text = render(compared(sample_report.sample()))
    assert text.index('<div class="lead">') < text.index("<main>")
    assert re.findall(r'<section id="([a-z-]+)"', text) == [
        "compared", "summary", "matrix", "works", "findings", "not-run", "environment", "steps", "cases",
    ]  # fmt: skip


def test_without_a_script_every_case_is_there() -> None:
    report = sample_report.sample()
    text = render(report)
    outside = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    section = outside[outside.index('id="cases"') :]
    assert section.count("<tr><td") == len(report.cases)
    for status, number in report.summary.items():
        words = STYLES[Status(status)].word
        assert section.count(f"</span> {words}</td>") == number
    assert 'id="filters" role="search" aria-label="Cases" hidden' in outside  # no dead controls
    said = Page(outside).said()
    for finding in report.findings:
        for remedy in finding.remedies:
            assert remedy.code in said


def test_a_cell_says_its_status_in_words() -> None:
    """Never by colour alone, nor by a symbol that is read as `not equal to`."""
    report = sample_report.sample()
    page = Page(render(report))
    cells = [a for tag, a in page.attributes if tag == "span" and a.get("class") == "cell"]
    shown = view.build(report)
    assert len(cells) == sum(cell is not None for row in shown.compact for cell in row.cells) > 20
    unseen = render(report).count('<span class="unseen">')
    assert unseen == len(cells)


def test_the_data_is_that_of_the_report() -> None:
    report = sample_report.sample()
    cases = data_of(render(report))["cases"]
    assert [(c["id"], c["status"]) for c in cases] == [
        (r.case.id, r.outcome.status.value) for r in report.cases
    ]


def test_the_policy_allows_this_style_and_this_script_alone() -> None:
    text = render(sample_report.sample())
    page = Page(text)
    policy = next(a["content"] for t, a in page.attributes if a.get("http-equiv"))
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for element in ("style", "script"):
        (body,) = re.findall(rf"<{element}>(.*?)</{element}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy


def test_asks_for_nothing() -> None:
    """No address of anything outside of the page, no inline style or handler, which the policy forbids."""
    page = Page(render(sample_report.sample()))
    for tag, attributes in page.attributes:
        assert not {"src", "srcset", "style", "action"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes), tag
        assert attributes.get("href", "#").startswith(("#", "data:,")), tag


# --- hostile reports -----------------------------------------------------------------------------

HOSTILE = (
    sample_report.HOSTILE,
    "</script><script>alert(1)</script>",
    "<script>alert(1)</script>",
    "<!--<script>",
    "]]>--></style></title></noscript><img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "\" onclick='alert(1)' autofocus onfocus=alert(1) x=\"",
    "{{ 7 * 7 }} {% raw %} ${7*7}",
    "&lt;b&gt; &amp;amp; \u2028 \u2029 \u202e",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_changes_no_structure(text: str) -> None:
    # Lines of a message are paragraphs, in a harmless text as well.
    lines = "\n".join("harmless" * bool(line.strip()) for line in view.clean(text).split("\n"))
    harmless = Page(render(compared(sample_report.hostile(lines), lines)))
    hostile = Page(render(compared(sample_report.hostile(text), text)))
    assert hostile.open == []
    assert without_code(hostile.tags) == without_code(harmless.tags)


def without_code(tags: list[tuple[str, tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...]]]:
    """Backticks around a name are code, in a harmless text as well."""
    return [tag for tag in tags if tag != ("code", ())]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_it_is(text: str) -> None:
    rendered = render(sample_report.hostile(text))
    assert "\x1b" not in rendered
    assert "\u202e" not in rendered
    case = data_of(rendered)["cases"][0]
    assert case["message"] == view.clean(text).strip()
    assert view.one_line(view.clean(text), 300) in Page(rendered).said()


def test_data_cannot_end_its_element() -> None:
    for text in HOSTILE:
        rendered = render(sample_report.hostile(text))
        (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', rendered)
        assert not set(data) & set("<>&\u2028\u2029")


def test_backticks_make_code_and_nothing_else() -> None:
    rendered = render(
        dataclasses.replace(
            sample_report.sample(), environment={"notes": ["x `<b>` y"]}, findings=()
        )
    )
    assert "x `&lt;b&gt;` y" in rendered  # a notice is no prose of ours
    import sys

    prose = sys.modules["attncheck._shelf.reports.html"].prose
    assert prose("a `<b>` & `c") == "a <code>&lt;b&gt;</code> &amp; `c"


# --- other reports -------------------------------------------------------------------------------


def test_a_comparison() -> None:
    report = compared(sample_report.sample())
    page = Page(render(report))
    said = " ".join(page.said().split())
    assert "Compared with base" in said
    assert "supported -> wrong (base)" in said
    assert "2 entries of the baseline are stale" in said
    kinds = [a["data-change"] for _, a in page.attributes if "data-change" in a]
    assert kinds == ["new", "better", "fixed", "unchanged"]
    cases = data_of(render(report))["cases"]
    assert [case["change"] for case in cases[:3]] == ["new", "fixed", "unchanged"]
    assert "Compared" not in Page(render(sample_report.sample())).said("noscript")


def test_an_empty_report() -> None:
    page = Page(render(Report({}, (), ())))
    assert "No case was planned" in page.said()
    assert page.open == []


def test_ascii() -> None:
    report = sample_report.hostile("h\u00e4ng \u2713 <b>")
    ascii_page, page = render(report, unicode=False), render(report)
    assert ascii_page.isascii()
    assert Page(ascii_page).said() == Page(page).said()
    assert data_of(ascii_page) == data_of(page)


def test_names_of_helpers_are_no_formats() -> None:
    assert "html" in plugins.formats()
    assert not any(name.startswith("_") for name in plugins.formats())


@given(reports(finite=False))
def test_any_report(report: Report) -> None:
    rendered = render(report)
    assert Page(rendered).open == []
    cases = data_of(rendered)["cases"] if report.cases else []
    assert [(case["id"], case["status"]) for case in cases] == [
        (view.clean(r.case.id), r.outcome.status.value) for r in report.cases
    ]
    rendered.encode("utf-8")
