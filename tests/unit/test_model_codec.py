"""The report's JSON: what goes in comes out, the schema describes it, errors name the place."""

import json
from pathlib import Path

import jsonschema
import pytest
import sample_report
import strategies
from hypothesis import HealthCheck, given, settings

import attncheck
from attncheck.errors import UserError
from attncheck.model import Report, Status, dump_report, to_json
from attncheck.saved import load_report

SCHEMA = Path(attncheck.__file__).parent / "schema" / "report.schema.json"
few = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def sample_document() -> dict:
    return to_json(sample_report.sample())


@few
@given(strategies.reports())
def test_round_trip(report: Report) -> None:
    assert load_report(dump_report(report)) == report


@few
@given(strategies.reports(finite=False))
def test_round_trip_with_nan(report: Report) -> None:
    # NaN is unlike itself, so the texts are compared
    text = dump_report(report)
    assert dump_report(load_report(text)) == text


@few
@given(report=strategies.reports(finite=False))
def test_schema_accepts_every_report(validator, report: Report) -> None:
    validator.validate(json.loads(dump_report(report)))


def test_schema_accepts_the_sample(validator) -> None:
    validator.validate(sample_document())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("cases", 0, "outcome", "status"), "great"),
        (("cases", 0, "mesh", "tp"), "two"),
        (("cases", 0, "outcome", "timings", "first"), "fast"),
        (("findings", 0, "severity"), "fatal"),
        (("summary", "great"), 1),
        (("schema_version",), 2),
        (("environment",), []),
    ],
)
def test_schema_refuses_what_the_codec_refuses(validator, path, value) -> None:
    document = sample_document()
    put(document, path, value)
    assert not validator.is_valid(document)


def test_schema_names_every_field_of_the_model(validator) -> None:
    """A field added to the model must be added to the schema."""
    import dataclasses

    from attncheck import audited, model

    defs = validator.schema["$defs"]
    kinds = {
        "case": model.Case,
        "outcome": model.Outcome,
        "kernel_op": model.KernelOp,
        "missing_op": model.MissingOp,
        "collective": model.Collective,
        "error_stat": model.ErrorStat,
        "fact": model.Fact,
        "rank": model.RankState,
        "finding": model.Finding,
        "remedy": model.Remedy,
        "audit": audited.Audit,
        "module_op": audited.ModuleOp,
        "module_communication": audited.ModuleCommunication,
        "uneven_shard": audited.UnevenShard,
        "rank_difference": audited.RankDifference,
        "attention_call": audited.AttentionCall,
        "numeric": audited.Numeric,
        "unequal": audited.Unequal,
        "uncompared": audited.Uncompared,
        "fit": audited.Fit,
        "degrees": audited.Degrees,
    }
    for name, kind in kinds.items():
        fields = {f.name for f in dataclasses.fields(kind)}
        beside = {f.name for f in dataclasses.fields(model.CaseResult)} if name == "case" else set()
        assert set(defs[name]["properties"]) == fields | beside - {"case"}, name
    assert defs["status"]["enum"] == [status.value for status in Status]


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        (("cases", 3, "outcome", "status"), "great", "report.cases[3].outcome.status"),
        (("cases", 3, "outcome"), None, "report.cases[3].outcome"),
        (("cases", 3), 7, "report.cases[3]"),
        (("cases", 3, "mesh", "tp"), "two", "report.cases[3].mesh.tp"),
        (("cases", 3, "mesh", "tp"), True, "report.cases[3].mesh.tp"),
        (("cases", 3, "placements", "q"), "R", "report.cases[3].placements.q"),
        (("cases", 3, "outcome", "errors"), {"out": {"max": 1}}, "'mean' is missing"),
        (("cases",), {}, "report.cases"),
        (("findings", 0, "remedies", 0, "evidence"), 3, "report.findings[0].remedies[0].evidence"),
        (("environment",), "linux", "report.environment"),
    ],
)
def test_errors_name_the_place(path, value, place) -> None:
    document = sample_document()
    put(document, path, value)
    with pytest.raises(UserError) as error:
        load_report(json.dumps(document))
    assert place in str(error.value)


def test_missing_field_is_named() -> None:
    document = sample_document()
    del document["cases"][1]["operator"]
    with pytest.raises(UserError, match=r"report\.cases\[1\]: the field 'operator' is missing"):
        load_report(json.dumps(document))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "old.json is not JSON"),
        ("[]", "old.json is not an attncheck report: it has no schema_version."),
        ('{"schema_version": 99}', "old.json has schema_version 99; this attncheck reads 1."),
    ],
)
def test_what_is_no_report(text: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        load_report(text, "old.json")
    assert sentence in str(error.value)


def test_unknown_fields_are_ignored() -> None:
    """A field that a later version adds does not make an older reader fail."""
    document = sample_document()
    document["cases"][0]["outcome"]["temperature"] = 12
    assert load_report(json.dumps(document)) == load_report(json.dumps(sample_document()))


def put(document, path, value) -> None:
    for key in path[:-1]:
        document = document[key]
    document[path[-1]] = value
