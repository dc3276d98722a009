"""The Markdown report: complete, foldable, and closed to whatever text a report holds."""

import re
from dataclasses import replace

import pytest
import sample_report

from attncheck import plugins
from attncheck.model import Report
from attncheck.view import RenderOptions

GITHUB_LIMIT = 65_536


def render(report: Report, **options: object) -> str:
    return plugins.load_format("markdown").render(report, options=RenderOptions(**options))


def functions():
    """The module itself, for its escaping functions."""
    import sys

    plugins.load_format("markdown")
    return sys.modules["attncheck._shelf.reports.markdown"]


@pytest.mark.parametrize(
    ("name", "options"),
    [("markdown.md", {}), ("markdown-ascii.md", {"unicode": False})],
)
def test_snapshot(name: str, options: dict) -> None:
    sample_report.check_snapshot(name, render(sample_report.sample(), **options))


def test_fits_an_issue() -> None:
    assert len(render(sample_report.sample())) < GITHUB_LIMIT


def test_order_of_sections() -> None:
    heads = re.findall(r"^## (\w+)", render(sample_report.sample()), re.M)
    assert heads == ["Environment", "Findings", "What", "Operators", "Did", "Summary"]


def test_folds_are_closed() -> None:
    for report in (sample_report.sample(), sample_report.hostile()):
        lines = outside_of_fences(render(report))
        opened = sum(line.startswith("<details>") for line in lines)
        assert opened == sum(line == "</details>" for line in lines) > 0


def outside_of_fences(text: str) -> list[str]:
    lines, fence = [], ""
    for line in text.split("\n"):
        run = re.match(r"`{3,}", line)
        if fence:
            fence = "" if line == fence else fence
        elif run:
            fence = run[0]
        else:
            lines.append(line)
    assert not fence, "a fence is open at the end"
    return lines


def outside_of_code(text: str) -> str:
    return re.sub(r"(?<![`\\])`[^`]+`", "", "\n".join(outside_of_fences(text)))


def test_hostile_text_outside_of_code_is_escaped() -> None:
    text = outside_of_code(render(sample_report.hostile()))
    assert "<script" not in text
    assert not re.search(r"@\w", text)
    assert not re.search(r"(?<!&)#\d", text)
    assert "\x1b" not in text
    for line in text.split("\n"):
        if not line.startswith("<details>"):
            assert not re.search(r"(?<!\\)`", line), line
            assert not re.search(r"(?<!\\)\[", line), line


def test_tables_keep_their_columns() -> None:
    """A bar in a name must not make a cell of its own."""
    header = 0
    for line in outside_of_fences(render(sample_report.hostile())):
        bars = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert bars == header or header == 0 or bars == 0, line
        header = bars


def test_foreign_text_never_starts_a_line_with_markup() -> None:
    for line in outside_of_fences(render(sample_report.hostile("# heading\n- item\n1. one\n> q"))):
        assert not re.match(r"(# heading|- item|1\. one|> q)", line), line


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b", r"a\|b"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("@octocat", "@&#8203;octocat"),
        ("see #12", "see #&#8203;12"),
        ("x\ny", "x y"),
        ("aten._flash_attn_x.default_", r"aten.\_flash_attn_x.default\_"),
        ("sdpa[MATH]", r"sdpa\[MATH\]"),
        ("use `local_map` now", "use `local_map` now"),
        ("```", r"\`\`\`"),
        ("`<b>`", r"\`&lt;b&gt;\`"),
        ("- item", r"\- item"),
        ("1. item", "&#8203;1. item"),
        ("2.13.0+cpu", "2.13.0+cpu"),
        ("\\", r"\\"),
    ],
)
def test_prose(text: str, escaped: str) -> None:
    assert functions().prose(text) == escaped


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("sdpa[MATH]", "`sdpa[MATH]`"),
        ("a|b", r"<code>a\|b</code>"),
        ("tick`tick", r"<code>tick\`tick</code>"),
        ("", ""),
    ],
)
def test_code(text: str, escaped: str) -> None:
    assert functions().code(text) == escaped


def test_a_fence_is_longer_than_any_inside() -> None:
    assert functions().block("a ```` b") == "`````\na ```` b\n`````"


def test_long_messages_are_cut() -> None:
    assert len(render(sample_report.hostile("x" * 10_000))) < GITHUB_LIMIT


def test_an_empty_report() -> None:
    assert "No case was planned" in render(Report({}, (), ()))


def test_ascii() -> None:
    assert render(sample_report.hostile("h\u00e4ng \u2713"), unicode=False).isascii()


def test_a_long_report_still_fits_into_a_github_issue() -> None:
    report = sample_report.sample()
    finding = report.findings[0]
    many = tuple(
        replace(finding, rule=f"ATN1{n:02}", fingerprint=f"{n:016x}", cases=finding.cases * 60)
        for n in range(60)
    )
    text = render(replace(report, findings=many))
    assert len(text) < GITHUB_LIMIT
    assert all(f"ATN1{n:02}" in text for n in range(60))
