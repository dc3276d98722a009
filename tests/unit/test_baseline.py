"""The baseline file: what goes in comes out, a rewrite changes what changed, bad input is one sentence."""

from __future__ import annotations

import datetime
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import sample_report
import strategies
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from attncheck import baseline, compare
from attncheck.baseline import Baseline
from attncheck.compare import Accepted, Policy
from attncheck.errors import UserError
from attncheck.model import Report, Status

TODAY = datetime.date(2026, 11, 29)
# To shrink two whole reports takes many minutes: a failure is shown as it was found.
few = settings(max_examples=25, phases=(Phase.explicit, Phase.reuse, Phase.generate))


def written(report: Report, old: Baseline | None = None) -> str:
    return baseline.dump(baseline.updated(old or Baseline({}), report).baseline)


@few
@given(strategies.reports(finite=False))
def test_round_trip(report: Report) -> None:
    text = written(report)
    assert baseline.dump(baseline.load(text)) == text


@few
@given(strategies.reports(finite=False))
def test_what_was_just_written_passes_or_nothing_ran(report: Report) -> None:
    known = baseline.load(written(report))
    comparison = baseline.gate(known, report, Policy(strict=True), TODAY)
    assert comparison.exit_code in (0, 3)
    idle = [r for r in report.cases if r.outcome.status is Status.UNKNOWN]
    ran = any(r.outcome.status.ran for r in report.cases)
    assert (comparison.exit_code == 3) == bool(idle or not ran)


@few
@given(strategies.reports(finite=False), strategies.reports(finite=False))
def test_writing_twice_changes_nothing(first: Report, second: Report) -> None:
    once = written(second, baseline.load(written(first)))
    assert written(second, baseline.load(once)) == once


def test_one_entry_a_line_sorted() -> None:
    text = written(sample_report.sample())
    lines = [line.rstrip(",") for line in text.splitlines() if line.startswith('{"operator')]
    entries = [json.loads(line) for line in lines]
    keys = [
        tuple(e[k] for k in ("operator", "setting", "route", "mesh", "placement")) for e in entries
    ]
    assert len(entries) >= len(sample_report.sample().cases) - 2  # two have no verdict
    assert keys == sorted(keys)
    assert json.loads(text)["schema_version"] == 1
    assert "2.13.0" not in "".join(lines)  # no version in what is tested


def test_the_order_of_a_scan_does_not_matter() -> None:
    report = sample_report.sample()
    turned = replace(report, cases=report.cases[::-1], findings=report.findings[::-1])
    assert written(turned) == written(report)


def entry(**changed: object) -> dict[str, object]:
    known = {
        "operator": "sdpa", "setting": "causal", "route": "dtensor", "mesh": "tp=2",
        "placement": "heads", "direction": "forward", "rule": "ATN101", "status": "missing_strategy",
    }  # fmt: skip
    return {k: v for k, v in {**known, **changed}.items() if v is not None}


def document(*entries: object, **changed: object) -> str:
    return json.dumps({"schema_version": 1, "environment": {}, "entries": list(entries), **changed})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "b.json is not JSON: Expecting value: line 1 column 1 (char 0)."),
        (document(entry())[:-9], "b.json is not JSON: "),
        ("[" * 100_000, "b.json is not JSON: "),
        ("[]", "b.json is no attncheck baseline: it has no schema_version."),
        ('{"schema_version": 2, "entries": []}', "b.json has schema_version 2; this attncheck reads 1."),
        ('{"schema_version": 1, "cases": []}', "b.json is a report; a baseline has entries"),
        ('{"schema_version": 1}', "b.json is no baseline: one has entries"),
        (document(environment=[]), "b.json: environment must be an object of strings."),
        (document(entries={}), "b.json: entries must be a list."),
        (document(7), "b.json, entry 1 must be an object."),
        (document(entry(), entry()), "b.json, entry 2 says the same case and rule as entry 1."),
        (document(entry(statis="x")), "Unknown field in b.json, entry 1: 'statis'. Did you mean status"),
        (document(entry(operator=None)), "b.json, entry 1: operator must be a string, found None"),
        (document(entry(mesh={"tp": 2})), "b.json, entry 1: mesh must be a string"),
        (document(entry(status="bad")), "Unknown status in b.json, entry 1: 'bad'."),
        (document(entry(until="soon")), "b.json, entry 1: until must be a date like 2027-01-31, found"),
        (document(entry(until=7)), "b.json, entry 1: until must be a date like 2027-01-31, found 7."),
        (document(entry(reason=7)), "b.json, entry 1: reason must be a string, found 7."),
        (document(entry(bytes=-1)), "b.json, entry 1: bytes must be a number from 0 on, found -1."),
        (document(entry(bytes=True)), "b.json, entry 1: bytes must be a number from 0 on, found True."),
        (document(entry(bytes=10**400)), "b.json, entry 1: bytes must be a number from 0 on"),
        (document(entry(ratio=1.0)), "b.json, entry 1: error must be a number from 0 on, found None."),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        baseline.load(text, "b.json")
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@given(st.text(max_size=40) | st.binary(max_size=40))
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content) -> None:
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
    with pytest.raises(UserError):
        baseline.read(file)


def test_no_baseline_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no baseline .*none\.json; `attncheck baseline write`"):
        baseline.read(tmp_path / "none.json")


@pytest.fixture
def accepted() -> Baseline:
    """The sample, every ATN101 of which somebody accepted."""
    known = baseline.load(written(sample_report.sample()))
    mark = {"ATN101": Accepted("vendor ticket 7", datetime.date(2027, 1, 31))}
    return replace(
        known,
        known={
            key: replace(one, accepted=mark) if "ATN101" in one.rules else one
            for key, one in known.known.items()
        },
    )


def test_what_people_wrote_stays(accepted: Baseline) -> None:
    text = baseline.dump(accepted)
    assert '"reason": "vendor ticket 7", "until": "2027-01-31"' in text
    assert baseline.load(text) == accepted
    assert written(sample_report.sample(), accepted) == text


def test_noise_changes_no_line(accepted: Baseline) -> None:
    """Other values, other errors: within noise the committed file stays as it is."""
    report = sample_report.sample()

    def other(result):
        stats = result.outcome.errors.items()
        errors = {n: replace(s, max=s.max * 1.4, ratio=s.ratio * 1.4) for n, s in stats}
        return replace(result, outcome=replace(result.outcome, errors=errors))

    again = replace(report, cases=tuple(map(other, report.cases)))
    assert written(again, accepted) == baseline.dump(accepted)


def test_cases_that_a_scan_did_not_run_are_kept_until_pruned(accepted: Baseline) -> None:
    report = sample_report.sample()
    part = replace(report, cases=tuple(r for r in report.cases if r.case.operator == "sdpa"))
    rewritten = baseline.updated(accepted, part)
    assert rewritten.baseline.known == accepted.known
    assert rewritten.kept == len(accepted.known) - len(part.cases)
    pruned = baseline.pruned(accepted, part).baseline
    assert {key.operator for key in pruned.known} == {"sdpa"}


def test_an_environment_without_the_package_spoils_no_baseline(accepted: Baseline) -> None:
    """Everything unavailable: the file stays, and no gate passes."""
    report = sample_report.sample()
    gone = replace(
        report,
        findings=(),
        cases=tuple(
            replace(r, outcome=replace(r.outcome, status=Status.UNAVAILABLE)) for r in report.cases
        ),
    )
    rewritten = baseline.updated(accepted, gone)
    assert {k: v for k, v in rewritten.baseline.known.items() if v.status.ran} == {
        k: v for k, v in accepted.known.items() if v.status.ran
    }
    comparison = baseline.gate(accepted, gone, Policy(), TODAY)
    assert comparison.exit_code == 3
    assert "Nothing ran" in comparison.verdict


def test_an_empty_report_never_passes(accepted: Baseline) -> None:
    for known in (accepted, Baseline({})):
        assert baseline.gate(known, Report({}, (), ()), Policy(), TODAY).exit_code == 3


def test_known_cases_that_could_not_be_run(accepted: Baseline) -> None:
    """One package is gone, the rest is as it was: inconclusive, and not failed."""
    report = sample_report.sample()
    some = replace(report, cases=tuple(r for r in report.cases if "flash" not in r.case.operator))
    comparison = baseline.gate(accepted, some, Policy(), TODAY)
    assert comparison.exit_code == 3
    assert re.search(r"\d+ known cases could not be run", comparison.verdict)


def test_a_part_of_a_scan_is_no_pass() -> None:
    """Whatever the baseline knows: what was not scanned may be anything."""
    report = sample_report.sample()
    report = replace(
        report, cases=tuple(r for r in report.cases if r.outcome.status is not Status.UNKNOWN)
    )
    known = baseline.load(written(report))
    assert baseline.gate(known, report, Policy(), TODAY).exit_code == 0
    part = baseline.gate(known, report, Policy(), TODAY, incomplete="shard 2/3 is missing")
    assert part.exit_code == 3
    assert "shard 2/3 is missing" in part.verdict


def test_stale_entries_fail_under_strict_alone(accepted: Baseline) -> None:
    report = sample_report.sample()
    mended = replace(report, findings=report.findings[1:])  # whose finding is gone
    mended = replace(
        mended,
        cases=tuple(
            replace(r, outcome=replace(r.outcome, status=Status.SUPPORTED))
            if r.case.id in report.findings[0].cases
            else r
            for r in report.cases
            if r.outcome.status is not Status.UNKNOWN
        ),
    )
    known = replace(accepted, known={k: v for k, v in accepted.known.items() if v.status.ran})
    assert baseline.gate(known, mended, Policy(), TODAY).exit_code == 0
    comparison = baseline.gate(known, mended, Policy(strict=True), TODAY)
    assert (comparison.exit_code, comparison.stale > 0) == (1, True)
    pruned = baseline.pruned(known, mended).baseline
    assert baseline.gate(pruned, mended, Policy(strict=True), TODAY).exit_code == 0


def test_summary_shows_what_expired(accepted: Baseline) -> None:
    late = baseline.summary(accepted, datetime.date(2027, 2, 1))
    assert "vendor ticket 7" in late
    assert "2027-01-31 (expired: counts as new)" in late
    assert "expired" not in baseline.summary(accepted, TODAY)


def test_hostile_text_stays_text() -> None:
    text = written(sample_report.hostile())
    assert baseline.dump(baseline.load(text)) == text
    assert "\x1b" not in baseline.summary(baseline.load(text), TODAY)
    assert compare.recall(sample_report.hostile())
