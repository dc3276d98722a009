"""The view of a matrix: what is said to work where, what changed, and in which versions a finding is."""

import dataclasses
import subprocess
import sys

import pytest
import sample_matrix
import sample_report
import strategies
from hypothesis import HealthCheck, given, settings

from attncheck import cellsview, view
from attncheck.cells import Bisection, Cell, Matrix
from attncheck.cellsview import MatrixView, Way
from attncheck.model import CaseResult, Outcome, Reason, Report, Status


@pytest.fixture(scope="module")
def sample() -> MatrixView:
    return cellsview.build(sample_matrix.sample())


def matrix_of(*letters: str, versions: tuple[str, ...] = ("2.9.1", "2.13.0", "2.15.0")) -> Matrix:
    """One operator, heads sharded, forward and backward: a letter each for every version of torch."""
    cases = [
        r.case
        for r in sample_report.results()
        if (r.case.operator, r.case.placement) == ("fallback.matmul", "heads")
        and r.case.setting["name"] == "plain"
    ]
    assert [case.direction for case in cases] == ["forward", "backward"]
    cells = []
    for version, pair in zip(versions, letters, strict=False):
        outcomes = [Outcome(sample_report.LETTERS[letter]) for letter in pair]
        results = tuple(map(CaseResult, cases, outcomes))
        cells.append(
            Cell({"torch": version}, Report({}, results, ()) if pair else None, "no wheel")
        )
    return Matrix({}, tuple(cells))


def said(matrix: Matrix) -> str:
    return " ".join(cellsview.build(matrix).headline)


# --- which combination works ---------------------------------------------------------------------


def test_most_and_fewest_are_named() -> None:
    text = said(matrix_of("ms", "ss", "ee"))
    assert (
        "1 of 1 operator is right with heads sharded, forward and backward, in torch 2.13.0" in text
    )
    assert "The fewest, 0, are right in torch 2.9.1 and 2.15.0." in text


def test_of_those_that_work_the_one_that_costs_nothing_comes_first() -> None:
    made = cellsview.build(matrix_of("rr", "ss", "mm"))
    assert [each.best for each in made.combinations] == [False, True, False]
    assert "in torch 2.9.1 and 2.13.0: no combination has more" in made.headline[0]
    assert "First of these: torch 2.13.0, where 2 of 2 cases are right" in made.headline[1]


def test_where_nothing_differs_no_combination_is_preferred() -> None:
    made = cellsview.build(matrix_of("ss", "ss", "ss"))
    assert all(each.best for each in made.combinations)
    assert made.headline[0].endswith("in each of 3 combinations.")
    assert "No case that was right gets worse" in said(matrix_of("ss", "ss", "ss"))


def test_what_was_not_come_to_is_not_said_to_work() -> None:
    matrix = matrix_of("ss", "ss")
    first = matrix.cells[0]
    forward, backward = first.report.cases
    left = Outcome(Status.UNAVAILABLE, reason=Reason.NOT_RUN)
    settings_more = CaseResult(dataclasses.replace(backward.case, id="x"), left)
    report = dataclasses.replace(first.report, cases=(forward, backward, settings_more))
    made = cellsview.build(Matrix({}, (dataclasses.replace(first, report=report), matrix.cells[1])))
    assert [each.works for each in made.combinations] == [0, 1]


def test_what_was_not_built_is_named_with_why_and_stands_in_no_table(sample) -> None:
    (one,) = sample.unbuilt
    assert one.name == "torch 2.9.1 + flash-attn 2.7.4.post1"
    assert any(one.name in text and "no matching distribution" in text for text in sample.headline)
    assert not one.best
    rows = [row for row in sample.grids[0].rows if row.setting == "flash-attn 2.7.4.post1"]
    assert rows
    assert all(row.cells[0] is None for row in rows)


@pytest.mark.parametrize(
    ("matrix", "sentence"),
    [
        (Matrix({}, ()), "The matrix has no combination: nothing was run."),
        (matrix_of("", ""), "Nothing ran, so nothing can be concluded."),
        (matrix_of("uu"), "Nothing ran, so nothing can be concluded."),
        (matrix_of("", "ss"), "in torch 2.13.0: the only combination that ran."),
        (matrix_of("mm", "mm"), "None of 1 operator is right with heads sharded"),
    ],
)
def test_headlines_of_little(matrix: Matrix, sentence: str) -> None:
    assert sentence in said(matrix)


# --- the table -----------------------------------------------------------------------------------


def rows_of(made: MatrixView, operator: str, grid: int = 0) -> list[view.Row]:
    return [row for row in made.grids[grid].rows if row.operator == operator]


def test_heads_come_first_then_every_placement(sample) -> None:
    assert [grid.title for grid in sample.grids] == ["with heads sharded", "with any placement"]
    assert sample.grids[0].columns == ("2.9.1", "2.13.0", "2.15.0")
    assert sample.grids[0].across == "torch"


def test_other_packages_take_rows_only_where_they_matter(sample) -> None:
    """Although one combination was not built: the other versions say nothing else."""
    assert [row.setting for row in rows_of(sample, "flash_attn_func")] == [""]
    own = rows_of(sample, "flash_attn_with_kvcache")
    assert [row.setting for row in own] == ["flash-attn 2.7.4.post1", "flash-attn 2.8.3.post2"]


def test_directions_with_the_same_cells_share_a_row(sample) -> None:
    (row,) = rows_of(sample, "fallback.einsum")
    assert row.direction == view.BOTH
    cells = [(cell.status, cell.ok, cell.total) for cell in row.cells]
    assert cells == [(Status.ERROR, 2, 3), (Status.ERROR, 2, 3), (Status.ERROR, 0, 3)]


def test_columns_that_are_alike_fold() -> None:
    versions = ("2.6.0", "2.7.0", "2.8.0", "2.9.1")
    grid = cellsview.build(matrix_of("ss", "ss", "ss", "mm", versions=versions)).grids[0]
    assert grid.folded.columns == ("2.6.0 to 2.8.0", "2.9.1")
    assert [len(row.cells) for row in grid.folded.rows] == [2] * len(grid.rows)
    assert len(grid.differing) == len(grid.rows)


def test_the_axis_with_most_versions_stands_across() -> None:
    report = matrix_of("ss").cells[0].report
    cells = [Cell({"torch": t, "flash-attn": f}, report) for t in "12" for f in "345"]
    assert cellsview.build(Matrix({}, tuple(cells))).grids[0].across == "flash-attn"


# --- what changed --------------------------------------------------------------------------------


def test_versions_are_compared_from_old_to_new_in_whatever_order_they_come() -> None:
    matrix = matrix_of("ss", "ee", "ms", versions=("2.13.0", "2.15.0", "2.9.1"))
    shifts = cellsview.build(matrix).shifts
    assert [shift.title for shift in shifts] == ["torch 2.9.1 -> 2.13.0", "torch 2.13.0 -> 2.15.0"]
    assert [shift.counted for shift in shifts] == ["1 better", "2 worse"]


def test_what_is_new_in_a_version_is_no_regression() -> None:
    (shift,) = cellsview.build(matrix_of("uu", "mm")).shifts
    assert [move.way for move in shift.moves] == [Way.NEW]
    assert shift.moves[0].change == "unavailable -> missing strategy"


@pytest.mark.parametrize(
    ("before", "after", "way", "lost"),
    [
        ("ss", "ww", Way.WORSE, True),
        ("ss", "rr", Way.COSTLIER, False),
        ("rr", "ss", Way.CHEAPER, False),
        ("mm", "ss", Way.BETTER, False),
        ("ee", "xx", Way.WORSE, False),
        ("ss", "uu", Way.GONE, False),
        ("ss", "??", Way.GONE, False),
        ("uu", "ss", Way.NEW, False),
    ],
)
def test_ways_of_changing(before: str, after: str, way: Way, lost: bool) -> None:
    (shift,) = cellsview.build(matrix_of(before, after)).shifts
    assert {(move.way, move.lost) for move in shift.moves} == {(way, lost)}


@pytest.mark.parametrize("letters", ["ss", "mm", "ww", "uu"])
def test_what_does_not_change_is_not_told(letters: str) -> None:
    shifts = cellsview.build(matrix_of(letters, letters)).shifts
    assert [shift.moves for shift in shifts] in ([()], [])


def test_what_changes_whatever_else_is_there_is_told_once(sample) -> None:
    (shift,) = (s for s in sample.shifts if s.title == "torch 2.13.0 -> 2.15.0")
    worse = [move for move in shift.moves if move.way is Way.WORSE]
    assert [(move.operator, move.change, move.others) for move in worse] == [
        ("fallback.einsum", "supported -> error (ATN504)", ""),
        ("fallback.einsum", "redistributed -> error (ATN504)", ""),
    ]


def test_what_changes_with_one_version_only_says_which() -> None:
    old, new = matrix_of("ss", "ee").cells
    cells = (
        Cell({"torch": "1", "flash-attn": "3"}, old.report),
        Cell({"torch": "1", "flash-attn": "4"}, old.report),
        Cell({"torch": "2", "flash-attn": "3"}, old.report),
        Cell({"torch": "2", "flash-attn": "4"}, new.report),
    )
    shifts = {s.title: s.moves for s in cellsview.build(Matrix({}, cells)).shifts}
    assert [move.others for move in shifts["torch 1 -> 2"]] == ["flash-attn 4"]
    assert [move.others for move in shifts["flash-attn 3 -> 4"]] == ["torch 2"]


# --- findings ------------------------------------------------------------------------------------


def test_a_finding_is_told_once_and_says_where(sample) -> None:
    by_rule = {spread.finding.rule: spread for spread in sample.findings}
    assert len(by_rule) == len(sample.findings)
    assert by_rule["ATN504"].extent == "torch 2.15.0; not in torch 2.9.1 and 2.13.0"
    assert by_rule["ATN101"].extent == "every combination"
    hang = by_rule["ATN502"]
    assert hang.extent == "flash-attn 2.8.3.post2; could not run in flash-attn 2.7.4.post1"
    assert hang.of == "torch 2.15.0 + flash-attn 2.8.3.post2"
    assert sample.findings[0].finding.rule == "ATN502"


def test_a_finding_whose_name_cannot_be_printed_is_found_again() -> None:
    matrix = sample_matrix.sample()
    report = next(cell.report for cell in matrix.cells if cell.report and cell.report.findings)
    odd = dataclasses.replace(report.findings[0], fingerprint="\x1f")
    matrix = Matrix({}, (Cell({"torch": "1"}, dataclasses.replace(report, findings=(odd,))),))
    made = cellsview.build(matrix)
    assert len(made.findings) == 1
    assert cellsview.cases(matrix, made)


# --- a bisection ---------------------------------------------------------------------------------


def test_a_bisection_is_told_first() -> None:
    made = cellsview.build(sample_matrix.bisected())
    assert made.headline[0] == (
        "fallback.einsum changes from supported to error between torch 2.13.0 and 2.15.0 "
        "(4 of 6 releases tried)."
    )
    assert "2.14.0 gave no answer" in made.headline[1]
    assert made.bisection.turns[0][:2] == ("fallback.einsum", "supported -> error")
    assert made.bisection.skipped == (("2.14.0", "torch 2.14.0 could not be installed."),)


def test_a_bisection_of_what_does_not_change_says_so() -> None:
    told = Bisection("torch", "operator=sdpa", ("2.9.1", "2.10.0", "2.11.0"), ("2.9.1", "2.11.0"))
    made = cellsview.build(dataclasses.replace(matrix_of("ss", "ss"), bisection=told))
    assert made.headline[0].startswith(
        "Nothing changes: operator=sdpa is the same in torch 2.9.1 and 2.11.0"
    )
    assert "(2 of 3 releases tried)" in made.headline[0]


# --- how to go on --------------------------------------------------------------------------------


def test_steps_lead_to_the_release_and_to_the_best_combination(sample) -> None:
    commands = [step.command for step in sample.steps]
    assert commands[0] == (
        "attncheck matrix --torch 2.13.0,2.15.0 --flash-attn 2.8.3.post2 "
        "--bisect 'operator=fallback.einsum, placement=batch, direction=forward'"
    )
    assert "attncheck report matrix.json --cell 'torch 2.13.0 + flash-attn 2.8.3.post2'" in commands


def test_cells_that_steps_name_are_found(sample) -> None:
    matrix = sample_matrix.sample()
    assert [matrix.cell(each.name).versions for each in sample.combinations]


# --- anything ------------------------------------------------------------------------------------


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(strategies.matrices(finite=False))
def test_any_matrix_can_be_viewed(matrix: Matrix) -> None:
    made = cellsview.build(matrix)
    assert made.headline
    assert len(made.combinations) == len(matrix.cells)
    assert len(cellsview.cases(matrix, made).cases) == sum(
        len(cell.report.cases) for cell in matrix.cells if cell.report is not None
    )
    for grid in made.grids:
        assert all(len(row.cells) == len(grid.columns) for row in grid.rows)


def test_viewing_a_matrix_imports_no_torch() -> None:
    code = "import sys, attncheck.cellsview, attncheck.saved; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
