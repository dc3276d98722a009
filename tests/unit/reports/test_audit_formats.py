"""Reports of an audit, in every format: what they say, and that nothing of a report is markup."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from html.parser import HTMLParser
from typing import Any

import pytest
import sample_audit
import sample_report
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import reports

from attncheck import auditview, plugins
from attncheck.audited import PRESET, Audit, Numeric
from attncheck.model import Outcome, Report, Status
from attncheck.saved import load_report
from attncheck.view import RenderOptions, build

FORMATS = tuple(sorted(plugins.formats()))
VOID = ("meta", "link", "br", "input", "img", "hr")
REPORTS = {
    "audit": sample_audit.sample(),
    "observed": sample_audit.observed(),
    "preset": sample_audit.preset(),
}


def render(report: Report, name: str, **options: Any) -> str:
    return plugins.load_format(name).render(report, options=RenderOptions(**options))


def view_of(report: Report) -> auditview.AuditView:
    shown = build(report).audit
    assert shown is not None
    return shown


def audit_of(report: Report) -> Audit:
    assert report.audit is not None
    return report.audit


def changed(report: Report | None = None, **fields: Any) -> Report:
    report = report or sample_audit.sample()
    return dataclasses.replace(report, audit=dataclasses.replace(audit_of(report), **fields))


def headline(report: Report) -> str:
    return " ".join(view_of(report).headline)


# --- as it looks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form", "options"),
    [
        ("audit-table-100.txt", "table", {"width": 100}),
        ("audit-table-120-verbose.txt", "table", {"width": 120, "verbose": True}),
        ("audit-markdown.md", "markdown", {}),
    ],
)
def test_snapshot(name: str, form: str, options: dict[str, Any]) -> None:
    sample_report.check_snapshot(name, render(sample_audit.sample(), form, **options))


@pytest.mark.parametrize("kind", ["observed", "preset"])
def test_snapshots_of_other_audits(kind: str) -> None:
    text = render(REPORTS[kind], "table", width=100)
    sample_report.check_snapshot(f"audit-{kind}-table-100.txt", text)


@pytest.mark.parametrize("kind", sorted(REPORTS))
@pytest.mark.parametrize("form", ["table", "markdown", "html"])
def test_every_section_is_there(kind: str, form: str) -> None:
    text = render(REPORTS[kind], form, verbose=True)
    sections = view_of(REPORTS[kind]).sections
    assert len(sections) >= 4
    for section in sections:
        assert section.title in text
        for row in section.rows:
            assert len(row) == len(section.columns)


@pytest.mark.parametrize("form", ["table", "markdown"])
def test_kernel_ops_are_for_who_asks(form: str) -> None:
    assert "Kernel ops" not in render(sample_audit.sample(), form)
    assert "Kernel ops" in render(sample_audit.sample(), form, verbose=True)


def test_the_json_is_the_report() -> None:
    for report in REPORTS.values():
        assert load_report(render(report, "json")) == report


def test_no_line_of_the_table_is_wider_than_asked() -> None:
    commands = {step.command for step in build(sample_audit.sample()).steps}
    for width in (80, 100, 120):
        for line in render(sample_audit.sample(), "table", width=width).splitlines():
            assert len(line) <= width or line.strip() in commands, line


# --- what is said --------------------------------------------------------------------------------


def test_the_headline_of_a_model_that_stops() -> None:
    said = view_of(sample_audit.sample()).headline
    assert said[0] == (
        "wan.py:build on tp=8 stops at blocks.*.self_attn.attn (wan.py:41): "
        "flash_attn._flash_attn_forward, no sharding strategy; 2 more ops refused after it."
    )
    assert said[1].startswith(
        "One pass on fake tensors, forward and backward (9.4 s, 331 MiB): 40 "
    )
    assert "14.29 B parameters, 3.328 GiB a rank" in said[1]
    assert "most of it in blocks.*.norm for aten._fused_rms_norm_backward." in headline(
        sample_audit.sample()
    )


def test_the_headline_of_a_model_that_goes_through() -> None:
    report = changed(ops=(), communication=(), numeric=None)
    assert view_of(report).headline[0] == (
        "wan.py:build on tp=8 goes through: none of its ops meets a DTensor."
    )
    assert "communicates" not in headline(report)


def test_only_calls_that_ran_are_judged() -> None:
    """One that no package is there for neither works nor fails."""
    assert (
        "With real numbers, at a reduced size, 1 of 2 distinct attention calls fails; "
        "2 others could not be run." in view_of(sample_audit.sample()).headline
    )
    report = sample_audit.sample()
    cases = tuple(dataclasses.replace(r, outcome=Outcome(Status.UNAVAILABLE)) for r in report.cases)
    assert "With real numbers" not in headline(dataclasses.replace(report, cases=cases))
    assert "With real numbers" not in headline(dataclasses.replace(report, cases=()))
    (section,) = (s for s in view_of(report).sections if s.title == "Attention calls")
    assert [row[-1] for row in section.rows] == [
        "missing strategy",
        "forward right; backward redistributed",
        "unavailable",
        "not run",
    ]


def test_one_call_works() -> None:
    report = sample_audit.sample()
    report = changed(report, attention=audit_of(report).attention[1:2])
    assert "at a reduced size, 1 distinct attention call works." in headline(report)


@pytest.mark.parametrize(
    ("unequal", "said"),
    [(2, "from blocks.0 on: 2 tensors differ."), (1, "from blocks.0 on: 1 tensor differs.")],
)
def test_the_headline_of_unequal_models(unequal: int, said: str) -> None:
    numeric = audit_of(sample_audit.sample()).numeric
    assert numeric is not None
    numeric = dataclasses.replace(numeric, unequal=numeric.unequal[:unequal])
    first = view_of(changed(ops=(), numeric=numeric)).headline[0]
    assert first == f"wan.py:build on tp=8 is not equal to the unsharded model, {said}"


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("the same model", "Against the unsharded model it came to no end: ValueError: sizes."),
        ("", "It was not held against the unsharded model: ValueError: sizes."),
    ],
)
def test_a_comparison_that_came_to_no_end_is_said(reference: str, said: str) -> None:
    numeric = Numeric(2, reference, failure="ValueError: sizes")
    assert said in view_of(changed(ops=(), numeric=numeric)).headline


def test_a_pass_that_ended_did_not_go_on_past_each() -> None:
    whole = view_of(sample_audit.sample()).sections
    ended = view_of(changed(failure="ValueError at wan.py:3: sizes")).sections
    about = [next(s.about for s in own if s.title == "Refused") for own in (whole, ended)]
    assert about == ["120 calls; the pass went on past each", "120 calls"]


def test_an_audit_of_nothing() -> None:
    report = Report({}, (), (), audit=Audit("m:build", {"tp": 2}))
    assert view_of(report).headline == (
        "m:build on tp=2 goes through: none of its ops meets a DTensor.",
        "One pass on fake tensors, forward and backward.",
    )
    for form in FORMATS:
        render(report, form)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [(12, "12"), (999_999, "999999"), (1_500_000, "1.5 M"), (999_960_000, "1000 M"),
     (14_288_491_584, "14.29 B"), (671_000_000_000, "671 B")],
)  # fmt: skip
def test_numbers_of_parameters(parameters: int, said: str) -> None:
    assert f"{said} parameters" in headline(changed(parameters=parameters))


# --- how to go on --------------------------------------------------------------------------------


def commands(report: Report) -> list[str]:
    return [command for command, _ in view_of(report).steps]


def with_command(command: str, report: Report | None = None) -> Report:
    report = report or sample_audit.sample()
    return dataclasses.replace(report, environment={**report.environment, "command": command})


def test_steps_bring_what_the_model_needs() -> None:
    own = "attncheck audit wan.py:build --mesh tp=8"
    brings = "--with flash-attn --inputs wan.py:inputs_real"
    assert commands(sample_audit.sample()) == [
        f"{own} {brings} --fix known",
        "attncheck fix --with flash-attn --kernel-op 'flash_attn.*' --write attncheck_fixes.py",
        f"{own} {brings} -v",
        f"{own} {brings} --output json:report.json",
    ]


def test_steps_of_a_run_with_a_fix_keep_it() -> None:
    report = with_command("attncheck audit wan.py:build --mesh=tp=8 --fix=known --device cuda")
    assert commands(report) == [
        "attncheck audit wan.py:build --mesh tp=8 --device cuda --fix known -v",
        "attncheck audit wan.py:build --mesh tp=8 --device cuda --fix known "
        "--output json:report.json",
    ]


def test_steps_of_a_model_that_goes_through() -> None:
    report = changed(with_command("attncheck audit"), ops=(), numeric=None, mesh={"dp": 4, "tp": 8})
    assert commands(report)[0] == "attncheck audit SMALL_BUILD --mesh dp=2,tp=2 --numeric"


def test_steps_of_other_kinds() -> None:
    """What was run is no build function, and a known model has none."""
    observed = "attncheck audit BUILD --mesh tp=8 --with flash-attn --inputs wan.py:inputs_real"
    assert commands(sample_audit.observed()) == [observed, f"{observed} --fix known"]
    assert commands(with_command("attncheck audit", sample_audit.preset())) == [
        "attncheck audit --model wan2.1-t2v-14b --tp 8 --cp 2 --with flash-attn",
        "attncheck audit --model wan2.1-t2v-14b --tp 8 --cp 2 --fix known",
        "attncheck audit BUILD --mesh tp=8,cp=2",
    ]


HOSTILE = "tp; rm -rf / `id` $(id)"


@pytest.mark.parametrize("kind", sorted(REPORTS))
def test_commands_can_be_pasted_whoever_wrote_the_report(kind: str) -> None:
    """Every word of a report is one word to a shell."""
    op = dataclasses.replace(audit_of(sample_audit.sample()).ops[0], op=f"{HOSTILE}.x.default")
    report = changed(
        with_command(
            shlex.join(["attncheck", "--with", HOSTILE, "--inputs", HOSTILE]), REPORTS[kind]
        ),
        target=HOSTILE,
        mesh={HOSTILE: 8},
        ops=(op,),
    )
    assert commands(report)
    for command in commands(report):
        words = shlex.split(command)
        assert words[0] == "attncheck"
        assert not {"rm", "-rf", "id"} & {*words}
        assert not re.search(r"(?<!')[;`$]", re.sub(r"'[^']*'", "", command)), command


# --- hostile text --------------------------------------------------------------------------------

MARKUP = sample_report.HOSTILE


def hostile(kind: str) -> Report:
    """A report whose every free text is markup."""
    report = REPORTS[kind]

    def spoil(value: Any) -> Any:
        if isinstance(value, str):
            return MARKUP
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            kept = ("problem", "phase", "kind", "cases")
            own = {
                f.name: getattr(value, f.name) if f.name in kept else spoil(getattr(value, f.name))
                for f in dataclasses.fields(value)
            }
            return type(value)(**own)
        if isinstance(value, tuple):
            return tuple(map(spoil, value))
        if isinstance(value, dict):
            return dict.fromkeys((MARKUP,), spoil(next(iter(value.values())))) if value else {}
        return value

    return dataclasses.replace(report, audit=spoil(audit_of(report)))


@pytest.mark.parametrize("kind", sorted(REPORTS))
@pytest.mark.parametrize("form", ["table", "markdown", "html"])
def test_no_control_characters(kind: str, form: str) -> None:
    text = render(hostile(kind), form, verbose=True)
    assert not [c for c in text if (c < " " and c != "\n") or "\x7f" <= c < "\xa0" or c == "\u202e"]
    text.encode("utf-8")


@pytest.mark.parametrize("kind", sorted(REPORTS))
def test_nothing_in_markdown_is_markup(kind: str) -> None:
    text = render(hostile(kind), "markdown", verbose=True)
    outside = re.sub(r"```.*?```", "", text, flags=re.S)
    assert "<script" not in outside
    assert not re.search(r"@\w", outside)
    assert not re.search(r"(?<!\\)\[link", outside)
    header = 0
    for line in outside.split("\n"):  # a bar in a name makes no cell of its own
        bars = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert bars == header or header == 0 or bars == 0, line
        header = bars


class Page(HTMLParser):
    """Tags, and texts by the element that they stand in."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def said(self) -> str:
        return " ".join(text for tag, text in self.texts if tag not in ("script", "style"))


@pytest.mark.parametrize("kind", sorted(REPORTS))
def test_nothing_in_html_is_markup(kind: str) -> None:
    page, harmless = Page(render(hostile(kind), "html")), Page(render(REPORTS[kind], "html"))
    assert [tag for tag, _ in page.tags].count("script") == 2  # data and the page's own
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in harmless.tags} | {
        "details",
        "summary",
    }
    assert "<script>alert(1)</script>" in page.said()


# --- the page ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(REPORTS))
def test_the_page_leads_to_each_section(kind: str) -> None:
    page = Page(render(REPORTS[kind], "html"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"][1:] for tag, attributes in page.tags if tag == "a"]
    assert {*links} <= {*ids}
    sections = view_of(REPORTS[kind]).sections
    assert [link for link in links if link.startswith("audit-")] == [
        "audit-1",
        *(f"audit-{number}" for number, _ in enumerate(sections, 1)),
    ]


def test_the_page_shows_every_cell_without_a_script() -> None:
    text = render(sample_audit.sample(), "html")
    said = " ".join(Page(re.sub(r"<script.*?</script>", "", text, flags=re.S)).said().split())
    for section in view_of(sample_audit.sample()).sections:
        for cell in (cell for row in section.rows for cell in row):
            assert " ".join(cell.split()) in said
        for note in section.notes:
            assert note in said


def test_details_are_folded_away() -> None:
    text = render(sample_audit.sample(), "html")
    section = text[text.index(">Kernel ops</h2>") :].partition("</section>")[0]
    assert "<summary>2 rows: every one that met DTensors</summary>" in section
    assert section.index("<details>") < section.index("<table")
    refused = text[text.index(">Refused</h2>") :].partition("</section>")[0]
    assert "<details>" not in refused
    assert "<caption>120 calls; the pass went on past each</caption>" in refused


def test_a_page_of_a_scan_has_none_of_it() -> None:
    text = render(sample_report.sample(), "html")
    assert 'id="audit-' not in text
    assert '<a class="skip" href="#matrix">' in text


# --- anything ------------------------------------------------------------------------------------


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(reports(finite=False).filter(lambda report: report.audit is not None), st.booleans())
def test_any_audit_renders_in_every_format(report: Report, preset: bool) -> None:
    if preset:
        report = changed(report, kind=PRESET)
    for form in FORMATS:
        for verbose in (False, True):
            text = render(report, form, verbose=verbose)
            assert text
            if form == "html":
                Page(text)
            elif form == "json":
                json.loads(text)
