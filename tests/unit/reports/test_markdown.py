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


def many_meshes(meshes: int) -> Report:
    """As a scan of all operators on many meshes: placements and cases multiply, and so do other lists."""
    report = sample_report.sample()
    results = tuple(
        replace(
            r,
            case=replace(
                r.case,
                id=f"{r.case.id}/{at}",
                operator=f"{r.case.operator}.{at % 7}",
                placement=",".join([r.case.placement] * (1 + at % 3)),
                mesh={f"axis{n}": 2 for n in range(1 + at % 3)},
            ),
        )
        for at in range(meshes)
        for r in report.cases
    )
    findings = tuple(
        replace(f, fingerprint=f"{at}{f.fingerprint}", message="A line that says much.\n" * 60)
        for at in range(meshes)
        for f in report.findings
    )
    environment = {
        **report.environment,
        "packages": {f"a-package-{at}": "1.2.3" for at in range(meshes * 40)},
        "standins": ["What a stand-in says of itself. " * 10] * meshes,
        "notes": ["A note. " * 30] * meshes,
    }
    return replace(report, cases=results, findings=findings, environment=environment)


@pytest.mark.parametrize("meshes", [3, 20])
@pytest.mark.parametrize("unicode", [True, False])
def test_whatever_is_scanned_the_report_fits_into_an_issue(meshes: int, unicode: bool) -> None:
    report = many_meshes(meshes)
    text = render(report, unicode=unicode)
    assert len(text) < GITHUB_LIMIT
    assert "## Environment" in text
    assert len(render(report, verbose=True)) > GITHUB_LIMIT  # asked for, it is all there


def test_a_report_that_nothing_shortens_says_what_is_left_out() -> None:
    """Thousands of placements make a matrix whose every row is too long."""
    report = sample_report.sample()
    results = tuple(
        replace(r, case=replace(r.case, id=f"{n}", placement=f"placement_{n}"))
        for n, r in enumerate(report.cases * 3)
    )
    text = render(replace(report, cases=results))
    assert len(text) < GITHUB_LIMIT
    assert text.endswith(
        "The rest is left out: an issue would not hold it (all in --output json).\n"
    )
    assert "## Findings" in text
