"""A matrix in every format that can show one: complete, closed to whatever text it holds, for any matrix."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import sample_matrix
import sample_report
import strategies
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from lxml import etree

from attncheck import cellsview, plugins
from attncheck.cells import Matrix, dump_matrix
from attncheck.cli import main
from attncheck.errors import UserError
from attncheck.model import dump_report
from attncheck.saved import load
from attncheck.view import RenderOptions

ABLE = ("html", "json", "junit", "markdown", "table")
JUNIT = Path(__file__).parents[2] / "schemas" / "junit-10.xsd"
GITHUB_LIMIT = 65_536


def render(name: str, matrix: Matrix, **options: Any) -> str:
    return plugins.load_format(name).render_matrix(matrix, options=RenderOptions(**options))


# --- snapshots -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("snapshot", "form", "options"),
    [
        ("matrix-table-80.txt", "table", {"width": 80}),
        ("matrix-table-100.txt", "table", {"width": 100}),
        ("matrix-table-120-verbose.txt", "table", {"width": 120, "verbose": True}),
        ("matrix-table-80-ascii.txt", "table", {"width": 80, "unicode": False}),
        ("matrix-table-100-color.txt", "table", {"width": 100, "color": True}),
        ("matrix-markdown.md", "markdown", {}),
    ],
)
def test_snapshot(snapshot: str, form: str, options: dict[str, Any]) -> None:
    sample_report.check_snapshot(snapshot, render(form, sample_matrix.sample(), **options))


def test_snapshot_of_a_bisection() -> None:
    text = render("table", sample_matrix.bisected(), width=100)
    sample_report.check_snapshot("matrix-table-100-bisection.txt", text)


# --- the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 100, 200])
@pytest.mark.parametrize("verbose", [False, True])
def test_no_line_is_wider_than_asked(width: int, verbose: bool) -> None:
    matrix = sample_matrix.sample()
    text = render("table", matrix, width=width, verbose=verbose)
    code = {line.strip() for line in sample_report.LOCAL_MAP.split("\n")}
    code |= {step.command for step in cellsview.build(matrix).steps}
    too_wide = [s for s in text.split("\n") if len(s) > width and s.strip() not in code]
    assert too_wide == []


def test_the_answer_is_on_the_first_screen() -> None:
    top = "\n".join(render("table", sample_matrix.sample(), width=100).split("\n")[:36])
    assert "operators" in top
    assert sample_matrix.PROBLEM.rstrip(".") in " ".join(top.split())
    assert "Operators with heads sharded" in top


@pytest.mark.parametrize("form", ["table", "markdown"])
def test_ascii_only_where_the_output_asks_for_it(form: str) -> None:
    for matrix in (sample_matrix.sample(), sample_matrix.hostile("h\u00e4ng \u2713 \U0001f600")):
        assert render(form, matrix, unicode=False).isascii()


# --- hostile text --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ABLE)
@pytest.mark.parametrize("verbose", [False, True])
def test_no_control_character_gets_through(form: str, verbose: bool) -> None:
    text = render(form, sample_matrix.hostile(), verbose=verbose)
    assert not [c for c in text if (c < " " and c not in "\n\t") or "\x7f" <= c < "\xa0"]
    if form != "json":  # which carries everything
        assert "\u202e" not in text
    text.encode("utf-8")


def test_markdown_outside_of_code_is_escaped() -> None:
    text = render("markdown", sample_matrix.hostile())
    outside = re.sub(r"(?<![`\\])`[^`]+`", "", re.sub(r"(?ms)^(`{3,}).*?^\1$", "", text))
    assert "<script" not in outside
    assert not re.search(r"@\w", outside)
    assert not re.search(r"(?<!&)#\d", outside)


def test_markdown_fits_an_issue_unless_everything_is_asked_for() -> None:
    matrix = sample_matrix.hostile("long " * 2000)
    assert len(render("markdown", matrix)) < GITHUB_LIMIT
    assert len(render("markdown", sample_matrix.sample())) < GITHUB_LIMIT


# --- html ----------------------------------------------------------------------------------------


def data_of(text: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    data: dict[str, Any] = json.loads(found)
    return data


def test_the_page_holds_every_case_of_every_combination() -> None:
    matrix = sample_matrix.sample()
    data = data_of(render("html", matrix))
    reports = [cell.report for cell in matrix.cells if cell.report is not None]
    assert len(data["cases"]) == sum(len(report.cases) for report in reports)
    assert len(data["shared"]) == len(reports[0].cases)
    for own, result in zip(data["cases"], (r for one in reports for r in one.cases), strict=True):
        assert data["shared"][own["at"]]["id"] == result.case.id
        assert own["status"] == result.outcome.status.value
    versions = {case["version"] for case in data["cases"]}
    assert {*data["pivots"][0]["values"]} == versions == {
        cell.name for cell in matrix.cells if cell.report is not None
    }  # fmt: skip


def test_the_page_says_everything_without_its_script() -> None:
    text = re.sub(r"<script.*?</script>", "", render("html", sample_matrix.sample()), flags=re.S)
    assert sample_matrix.PROBLEM.rstrip(".") in text
    assert "torch 2.13.0 -&gt; 2.15.0" in text
    assert "In torch 2.15.0; not in torch 2.9.1 and 2.13.0" in text


def test_the_page_is_closed_to_what_a_matrix_holds() -> None:
    text = render("html", sample_matrix.hostile())
    assert "<script>alert" not in text
    assert text.count("<script") == 2
    assert data_of(text)["cases"]


# --- junit ---------------------------------------------------------------------------------------


def test_a_suite_for_each_combination() -> None:
    matrix = sample_matrix.sample()
    root = etree.fromstring(render("junit", matrix).encode())
    etree.XMLSchema(etree.parse(JUNIT)).assertValid(root)
    suites = {suite.get("name"): suite for suite in root.findall("testsuite")}
    assert list(suites) == [cell.name for cell in matrix.cells]
    for cell in matrix.cells:
        tests = suites[cell.name].findall("testcase")
        assert len(tests) == (len(cell.report.cases) if cell.report else 1)
    (unbuilt,) = suites["torch 2.9.1 + flash-attn 2.7.4.post1"].findall("testcase/error")
    assert unbuilt.get("message") == sample_matrix.PROBLEM
    for name in ("tests", "failures", "errors"):
        assert int(root.get(name)) == sum(int(suite.get(name)) for suite in suites.values())


# --- json, and formats that cannot ---------------------------------------------------------------


@pytest.mark.parametrize("unicode", [True, False])
def test_json_is_the_matrix(unicode: bool) -> None:
    assert load(render("json", sample_matrix.sample(), unicode=unicode)) == sample_matrix.sample()


@pytest.mark.parametrize("form", ["sarif", "github"])
def test_other_formats_say_which_can(form: str) -> None:
    with pytest.raises(UserError) as error:
        render(form, sample_matrix.sample())
    assert f"The format {form} shows no matrix: expected one of {', '.join(ABLE)}" in str(
        error.value
    )
    assert f"--cell NAME --format {form}" in str(error.value)


# --- any matrix ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ABLE)
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(matrix=strategies.matrices(finite=False))
def test_any_matrix_can_be_rendered(form: str, matrix: Matrix) -> None:
    assert render(form, matrix)
    assert render(form, matrix, verbose=True, unicode=False, width=80)


# --- commands ------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    (tmp_path / "m.json").write_text(dump_matrix(sample_matrix.sample()), encoding="utf-8")
    (tmp_path / "r.json").write_text(dump_report(sample_report.sample()), encoding="utf-8")
    return tmp_path


CELL = "torch 2.13.0 + flash-attn 2.8.3.post2"


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_report_renders_a_matrix(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # the processes of pytest-xdist have some
    code, text = run("report", saved / "m.json")
    assert (code, text) == (0, render("table", sample_matrix.sample(), width=100))


def test_report_takes_one_cell_out(saved: Path) -> None:
    code, text = run("report", saved / "m.json", "--cell", CELL, "--format", "json")
    assert code == 0
    assert load(text) == sample_matrix.sample().cell(CELL).report


def test_diff_compares_two_cells(saved: Path) -> None:
    newer = "torch 2.15.0 + flash-attn 2.8.3.post2"
    code, text = run("diff", saved / "m.json", "--cell", CELL, "--cell", newer, "--exit-code")
    assert code == 1
    assert f"Against {CELL} of" in " ".join(text.split())
    assert "2.13.0 -> 2.15.0" in text
    code, text = run("diff", saved / "m.json", saved / "m.json", "--cell", CELL)
    assert (code, text.split("\n")[0]) == (0, "Nothing changed.")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("report", "m.json", "--cell", "torch 3"), "No cell is 'torch 3': expected one of"),
        (("report", "r.json", "--cell", "torch 3"), "--cell 'torch 3' needs a matrix"),
        (("report", "m.json", "--cell", "2.9.1+2.7.4.post1"), "has no report of torch 2.9.1 + flash-attn"),
        (("report", "m.json", "--format", "sarif"), "The format sarif shows no matrix"),
        (("report", "m.json", "--finding", "ATN504", "--format", "markdown"), "is a matrix of 6 "),
        (("diff", "m.json"), "expected two reports, or a matrix and two --cell of it"),
        (("diff", "m.json", "r.json"), "m.json is a matrix: expected --cell with one of"),
        (("diff", "r.json", "r.json", "--cell", "torch 3"), "--cell names a combination of one"),
        (("merge", "m.json", "r.json"), "is a matrix of 6 combinations"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(saved: Path, arguments: tuple[str, ...], sentence: str) -> None:
    code, text = run(*(saved / each if each.endswith(".json") else each for each in arguments))
    assert code == 2
    assert sentence in text
    assert len(text.strip().split("\n")) == 1
