"""The matrix document: what goes in comes out, cells are found by name, errors name the place."""

import dataclasses
import json
from pathlib import Path

import jsonschema
import pytest
import referencing
import sample_matrix
import sample_report
import strategies
from hypothesis import HealthCheck, given, settings

import attncheck
from attncheck import cells, model
from attncheck.cells import Cell, Matrix, dump_matrix
from attncheck.errors import UserError
from attncheck.model import Report, dump_report, to_json
from attncheck.saved import load, load_report, read, read_report

SCHEMAS = Path(attncheck.__file__).parent / "schema"
few = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema, report = (
        json.loads((SCHEMAS / f"{name}.schema.json").read_text()) for name in ("matrix", "report")
    )
    jsonschema.Draft202012Validator.check_schema(schema)
    resource = referencing.Resource.from_contents(report)
    registry = referencing.Registry().with_resource("report.schema.json", resource)
    return jsonschema.Draft202012Validator(schema, registry=registry)


def document() -> dict:
    return json.loads(dump_matrix(sample_matrix.sample()))


# --- round trip ----------------------------------------------------------------------------------


@few
@given(strategies.matrices())
def test_round_trip(matrix: Matrix) -> None:
    assert load(dump_matrix(matrix)) == matrix


@few
@given(strategies.matrices(finite=False))
def test_round_trip_with_nan(matrix: Matrix) -> None:
    # NaN is unlike itself, so the texts are compared
    text = dump_matrix(matrix)
    assert dump_matrix(load(text)) == text


@pytest.mark.parametrize("matrix", [sample_matrix.sample(), sample_matrix.bisected()])
def test_the_sample_comes_back(matrix: Matrix) -> None:
    assert load(dump_matrix(matrix)) == matrix


def test_what_cells_share_stands_once() -> None:
    """A case stands once; so does an outcome that another cell has as well."""
    written = document()
    matrix = sample_matrix.sample()
    reports = [cell.report for cell in matrix.cells if cell.report is not None]
    assert len(written["cases"]) == len(reports[0].cases)
    assert len(written["outcomes"]) < sum(len(report.cases) for report in reports) / 2


def test_cases_that_share_an_id_only_stay_apart() -> None:
    """Another version of a package may call another function."""
    one, *_ = sample_report.results()
    other = dataclasses.replace(one, case=dataclasses.replace(one.case, function="elsewhere.f"))
    reports = [Report({}, (result,), ()) for result in (one, other)]
    matrix = Matrix({}, tuple(Cell({"torch": str(i)}, r) for i, r in enumerate(reports)))
    assert load(dump_matrix(matrix)) == matrix


# --- the schema ----------------------------------------------------------------------------------


@few
@given(matrix=strategies.matrices(finite=False))
def test_schema_accepts_every_matrix(validator, matrix: Matrix) -> None:
    validator.validate(json.loads(dump_matrix(matrix)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("outcomes", 0, "status"), "great"),
        (("cells", 1, "cases", 0), -1),
        (("cells", 1, "versions", "torch"), 2),
        (("cells", 1, "findings", 0, "severity"), "fatal"),
        (("cases", 0, "mesh", "tp"), "two"),
        (("schema_version",), 2),
    ],
)
def test_schema_refuses_what_the_codec_refuses(validator, path, value) -> None:
    changed = document()
    validator.validate(changed)
    put(changed, path, value)
    assert not validator.is_valid(changed)
    with pytest.raises(UserError):
        load(json.dumps(changed))


def test_schema_names_every_field(validator) -> None:
    """A field that is added must be added to the schema."""
    defs = validator.schema["$defs"]
    kinds = {
        "case": model.Case,
        "cell": cells._CellDocument,
        "bisection": cells.Bisection,
        "turn": cells.Turn,
    }
    for name, kind in kinds.items():
        assert set(defs[name]["properties"]) == {f.name for f in dataclasses.fields(kind)}, name
    whole = {f.name for f in dataclasses.fields(cells.MatrixDocument)}
    assert set(validator.schema["properties"]) == whole


# --- what is no matrix ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("cells", 1, "cases", 2), 9999, r"m\.cells\[1\]\.cases: expected an index below \d+, found 9999"),
        (("cells", 1, "outcomes", 0), -1, r"m\.cells\[1\]\.outcomes: expected an index below \d+, found -1"),
        (("cells", 1, "cases"), [], r"m\.cells\[1\]: expected as many outcomes as cases \(0\), found \d+"),
        (("cells", 1, "versions"), "torch", r"m\.cells\[1\]\.versions: expected an object"),
        (("outcomes", 3, "status"), "great", r"m\.outcomes\[3\]\.status"),
        (("schema_version",), 99, "m has schema_version 99; this attncheck reads 1"),
        (("bisection",), [], r"m\.bisection: expected an object"),
    ],
)  # fmt: skip
def test_errors_name_the_place(path, value, sentence) -> None:
    changed = document()
    put(changed, path, value)
    with pytest.raises(UserError, match=sentence):
        load(json.dumps(changed), "m")


def test_a_report_is_read_as_a_report(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(dump_report(sample_report.sample()), encoding="utf-8")
    assert read(file) == sample_report.sample()


def test_where_one_report_is_expected_a_matrix_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    file.write_text(dump_matrix(sample_matrix.sample()), encoding="utf-8")
    for asked in (lambda: read_report(file), lambda: load_report(file.read_text(), str(file))):
        with pytest.raises(UserError, match=r"is a matrix of 6 combinations.*--cell NAME") as error:
            asked()
        assert str(file) in str(error.value)


def test_nothing_of_a_matrix_is_taken_for_a_report() -> None:
    with pytest.raises(UserError, match="is a matrix of 0 combinations"):
        load_report(dump_matrix(Matrix({}, ())))
    assert to_json(sample_report.sample())["cases"]


# --- cells by name -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "torch 2.13.0 + flash-attn 2.8.3.post2",
        "flash-attn 2.8.3.post2 + torch 2.13.0",
        "torch==2.13.0+flash-attn==2.8.3.post2",
        "2.13.0 + 2.8.3.post2",
    ],
)
def test_a_cell_by_its_versions(name: str) -> None:
    found = sample_matrix.sample().cell(name)
    assert found.versions == {"torch": "2.13.0", "flash-attn": "2.8.3.post2"}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("torch 2.13.0", "2 cells are 'torch 2.13.0': expected one of 'torch 2.13.0 [+] flash-attn 2.7.4"),
        ("torch 3", "No cell is 'torch 3': expected one of 'torch 2.9.1 "),
        ("", "No cell is ''"),
    ],
)  # fmt: skip
def test_a_name_that_is_not_one(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        sample_matrix.sample().cell(name)


def test_the_exact_name_wins() -> None:
    plain, more = Cell({"torch": "2.9.1"}), Cell({"torch": "2.9.1", "flash-attn": "2.8.3"})
    assert Matrix({}, (plain, more)).cell("torch 2.9.1") is plain


def test_axes_are_the_packages_that_differ() -> None:
    versions = (
        {"torch": "1", "a": "1"},
        {"torch": "2", "a": "1"},
        {"torch": "2", "a": "1", "b": "3"},
    )
    matrix = Matrix({}, tuple(map(Cell, versions)))
    assert matrix.axes == {"torch": ("1", "2"), "b": ("", "3")}


def put(changed, path, value) -> None:
    for key in path[:-1]:
        changed = changed[key]
    changed[path[-1]] = value
