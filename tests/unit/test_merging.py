"""Joined shards are the scan that they are shards of; what does not belong together is not joined."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import sample_report
import strategies
from hypothesis import given, settings

from attncheck import merging, rules, sharding, view, waivers
from attncheck.errors import UserError
from attncheck.model import (
    UNPLANNED,
    Case,
    CaseResult,
    Outcome,
    Reason,
    Report,
    Status,
    dump_report,
    to_json,
)
from attncheck.runner import crosscheck
from attncheck.saved import load_report

TODAY = datetime.date(2026, 8, 1)


OPERATORS = ("flash_attn_func", "sdpa[MATH]", "fallback.matmul", "flash_attn_with_kvcache")


@functools.cache
def scanned() -> Report:
    """A part of the sample as a scan leaves it: judged by our rules, in an environment with all its keys."""
    sample = sample_report.sample()
    cases = tuple(r for r in sample.cases if r.case.operator in OPERATORS)
    known = {
        "engine": "processes",
        "repeats": 1,
        "with": ["flash-attn"],
        "select": [],
        "ignore": ["ATN302"],
        "restarts": 1,
        "fixes": {"/a/fixes.py": {"x::y": "registered"}},
    }
    return Report(
        {**sample.environment, **known}, cases, rules.judge(cases, ignore=known["ignore"])
    )


def shards(report: Report, of: int) -> list[tuple[str, Report]]:
    """The reports of its shards, as saved and read again."""
    cases = [result.case for result in report.cases]
    out = []
    for index in range(1, of + 1):
        share = sharding.share(cases, sharding.Shard(index, of), len)
        own = tuple(report.cases[at] for at in share.positions)
        env = {**report.environment, "shard": to_json(share)}
        part = Report(env, own, rules.judge(own, ignore=env["ignore"]))
        out.append((f"{index}.json", load_report(dump_report(part))))
    return out


def merge(parts: Sequence[tuple[str, Report]], allow_mixed: bool = False) -> Report:
    return merging.merge(parts, TODAY, allow_mixed)


def changed(part: tuple[str, Report], **environment: Any) -> tuple[str, Report]:
    name, report = part
    return name, dataclasses.replace(report, environment={**report.environment, **environment})


def beside(status: Status = Status.UNAVAILABLE, message: str = "nobody knows") -> CaseResult:
    """An entry of what no case could be planned of."""
    case = Case(
        id="registered/registered.x/-/dtensor/-/-/-",
        probe="registered",
        operator="registered.x",
        route="dtensor",
        setting={"name": UNPLANNED},
        mesh={"tp": 2},
        placement=UNPLANNED,
        placements={},
        direction=UNPLANNED,
    )
    return CaseResult(case, Outcome(status, message, reason=Reason.SIGNATURE_UNKNOWN))


def with_case(part: tuple[str, Report], result: CaseResult) -> tuple[str, Report]:
    return part[0], dataclasses.replace(part[1], cases=(*part[1].cases, result))


# --- the whole again --------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_the_shards_are_the_scan_case_by_case(of: int) -> None:
    whole = scanned()
    joined = merge(shards(whole, of))
    assert joined.cases == load_report(dump_report(whole)).cases
    assert joined.findings == whole.findings
    assert joined.summary == whole.summary
    assert joined.environment["shards"] == [
        {"of": of, "joined": list(range(1, of + 1)), "missing": []}
    ]
    assert "shard" not in joined.environment
    assert joined.environment["notes"] == whole.environment["notes"]


def test_findings_of_the_shards_are_not_those_of_the_whole() -> None:
    """The twin: without judging anew the test above would fail."""
    whole = scanned()
    parts = shards(whole, 3)
    assert sum(len(report.findings) for _, report in parts) > len(whole.findings)


def test_the_order_in_which_they_are_given_does_not_matter() -> None:
    results = {dump_report(merge(parts)) for parts in itertools.permutations(shards(scanned(), 3))}
    assert len(results) == 1


def test_what_was_spent_is_added_up_and_what_is_common_stays() -> None:
    spent = (
        {"wall_seconds": 10.5, "restarts": 0, "phases": {"cases": 3.0}, "peak_rss_mib": [100, 90]},
        {
            "wall_seconds": 20,
            "restarts": 2,
            "phases": {"cases": 4.5, "rules": 1},
            "peak_rss_mib": [80],
        },
    )
    parts = [changed(part, **env) for part, env in zip(shards(scanned(), 2), spent, strict=True)]
    joined = merge(parts).environment
    assert joined["wall_seconds"] == 30.5
    assert joined["restarts"] == 2
    assert joined["phases"] == {"cases": 7.5, "rules": 1}
    assert joined["peak_rss_mib"] == [100, 90]
    for key in ("attncheck", "packages", "mesh", "ranks", "seed", "with", "ignore", "fixes"):
        assert joined[key] == scanned().environment[key]


def test_a_report_given_twice_is_one() -> None:
    one, two = shards(scanned(), 2)
    assert merge([one, two, one, ("copy.json", two[1])]) == merge([one, two])


def test_other_scans_of_the_same_environment_follow_each_other() -> None:
    report = scanned()
    half = len(report.cases) // 2
    parts = [
        (name, dataclasses.replace(report, cases=cases))
        for name, cases in (("a", report.cases[half:]), ("b", report.cases[:half]))
    ]
    joined = merge(parts)
    assert joined.cases == (*report.cases[half:], *report.cases[:half])
    assert joined.findings == report.findings
    assert "shards" not in joined.environment


def test_meshes_are_all_there() -> None:
    (name, report), other = shards(scanned(), 2)
    cases = tuple(
        CaseResult(dataclasses.replace(r.case, mesh={"tp": 4}), r.outcome) for r in report.cases
    )
    joined = merge([(name, dataclasses.replace(report, cases=cases)), other]).environment
    assert joined["ranks"] == 4
    assert sorted(mesh["tp"] for mesh in joined["mesh"]) == [2, 4]


def test_seeds_of_their_own_are_listed() -> None:
    parts = [changed(p, seed=seed) for p, seed in zip(shards(scanned(), 2), (5, 7), strict=True)]
    joined = merge(parts)
    assert joined.environment["seeds"] == [5, 7]
    assert "The reports drew their values from seeds 5, 7." in view.build(joined).notices


def test_a_command_is_told_without_what_is_of_one_job() -> None:
    command = (
        "attncheck scan --with flash-attn --shard 1/2 -k 'sdpa*' -o json:1.json "
        "--output=table --seed 4 --run-dir /tmp/x -q --level quick"
    )
    joined = merge([changed(p, command=command) for p in shards(scanned(), 2)]).environment
    assert joined["command"] == "attncheck scan --with flash-attn -k 'sdpa*' --level quick"


def test_cross_checks_are_counted_together() -> None:
    counts = (
        {"agree": 3, "disagree": 0, "not_compared": 1},
        {"agree": 4, "disagree": 1, "not_compared": 0},
    )
    parts = [
        changed(p, engine="both", crosscheck=c, notes=[crosscheck.sentence(c), "of all"])
        for p, c in zip(shards(scanned(), 2), counts, strict=True)
    ]
    joined = merge(parts).environment
    assert joined["crosscheck"] == {"agree": 7, "disagree": 1, "not_compared": 1}
    assert joined["notes"] == ["of all", crosscheck.sentence(joined["crosscheck"])]


def test_an_op_that_a_fix_registered_in_one_shard_is_registered() -> None:
    states = ("absent", "registered")
    parts = [
        changed(p, fixes={"/a/fixes.py": {"x::y": state}})
        for p, state in zip(shards(scanned(), 2), states, strict=True)
    ]
    assert merge(parts).environment["fixes"] == {"/a/fixes.py": {"x::y": "registered"}}


# --- what no case could be planned of ---------------------------------------------------------------


def test_what_could_not_be_planned_is_there_once_and_last() -> None:
    whole = scanned()
    one, two = shards(whole, 2)
    joined = merge(
        [with_case(one, beside(message="in /a")), with_case(two, beside(message="in /b"))]
    )
    assert [r.case.id for r in joined.cases] == [
        *(r.case.id for r in whole.cases),
        beside().case.id,
    ]
    assert joined.cases[-1].outcome.message == "in /a"


def test_two_opinions_of_it_are_refused() -> None:
    one, two = shards(scanned(), 2)
    with pytest.raises(UserError, match=r"registered\.x.* with two outcomes"):
        merge([with_case(one, beside()), with_case(two, beside(Status.UNKNOWN))])


# --- what does not belong together ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"attncheck": "0.2.0"}, ["attncheck 0.1.0", "0.2.0"]),
        ({"python": "3.12.1"}, ["Python 3.11", "3.12"]),
        ({"packages": {"torch": "2.11.0"}}, ["torch 2.13.0+cpu", "2.11.0"]),
        ({"device": "cuda"}, ["device cpu", "cuda"]),
        ({"gpu": "NVIDIA H200"}, ["GPU none", "NVIDIA H200"]),
        ({"engine": "simulated"}, ["engine processes", "simulated"]),
        ({"hash_seeds": [6, 8]}, ["hash seeds 6, 7", "6, 8"]),
        ({"repeats": 20}, ["repeats 1", "20"]),
        ({"with": []}, ["--with flash-attn", "none"]),
        ({"level": "full"}, ["level default", "full"]),
        ({"fixes": {}}, ["fixes fixes.py", "none"]),
        ({"select": ["ATN1"]}, ["--select none", "ATN1"]),
        ({"ignore": []}, ["--ignore ATN302", "none"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_environment_is_refused_in_one_sentence(
    environment: dict[str, Any], words: list[str]
) -> None:
    one, two = shards(scanned(), 2)
    if "packages" in environment:
        environment = {"packages": {**one[1].environment["packages"], **environment["packages"]}}
    with pytest.raises(UserError) as error:
        merge([one, changed(two, **environment)])
    sentence = str(error.value)
    assert all(word in sentence for word in [*words, "1.json", "2.json", "--allow-mixed"])
    joined = merge([one, changed(two, **environment)], allow_mixed=True)
    (note,) = view.build(joined).notices[-1:]
    assert note.startswith("Joined from different environments: ")
    assert all(word in note for word in words)
    assert joined.cases == load_report(dump_report(scanned())).cases


@pytest.mark.parametrize(
    "environment",
    [
        {"platform": "another"},
        {"cpus": 64},
        {"python": "3.11.1"},
        {"seed": 8},
        {"wall_seconds": 1.0},
        {"date": "2026-08-02T00:00:00+00:00"},
        {"command": "attncheck scan --shard 2/2"},
        {"restarts": 3},
        {"peak_rss_mib": [1.0]},
        {"fixes": {"/another/folder/fixes.py": {"x::y": "registered"}}},
        {"standins": ["flash_attn_2_cuda"]},
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_another_machine_is_no_other_environment(environment: dict[str, Any]) -> None:
    one, two = shards(scanned(), 2)
    assert len(merge([one, changed(two, **environment)]).cases) == len(scanned().cases)


def test_versions_of_both_are_told_of_a_mixed_one() -> None:
    one, two = shards(scanned(), 2)
    other = {**one[1].environment["packages"], "torch": "2.11.0"}
    joined = merge([one, changed(two, packages=other)], allow_mixed=True)
    assert joined.environment["packages"]["torch"] == "2.13.0+cpu / 2.11.0"


def test_a_case_with_two_outcomes_is_refused() -> None:
    one, two = shards(scanned(), 2)
    first = one[1].cases[0]
    other = CaseResult(first.case, dataclasses.replace(first.outcome, message="another"))
    environment = {k: v for k, v in two[1].environment.items() if k != "shard"}
    extra = Report(environment, (other,), ())
    for allow_mixed in (False, True):
        with pytest.raises(UserError) as error:
            merge([one, ("extra.json", extra)], allow_mixed)
        assert all(word in str(error.value) for word in (first.case.id, "1.json", "extra.json"))
    same = dataclasses.replace(extra, cases=(first,))
    assert merge([one, two, ("extra.json", same)]).cases == merge([one, two]).cases


def test_shards_of_different_plans_lack_the_others_of_theirs() -> None:
    whole = scanned()
    half = len(whole.cases) // 2
    first = dataclasses.replace(whole, cases=whole.cases[:half])
    second = dataclasses.replace(whole, cases=whole.cases[half:])
    joined = merge([shards(first, 2)[0], ("other.json", shards(second, 3)[2][1])])
    assert merging.missing_shards(joined.environment) == ("2/2", "1/3", "2/3")


def test_a_missing_shard_is_said() -> None:
    one, _, three = shards(scanned(), 3)
    joined = merge([three, one])
    assert merging.missing_shards(joined.environment) == ("2/3",)
    note = "Incomplete: no report was given of shard 2/3."
    assert note in view.build(joined).notices
    assert merging.missing_shards(merge(shards(scanned(), 3)).environment) == ()


def test_shards_that_were_cut_otherwise_are_refused() -> None:
    """As where an operator was there for one job only, and its cases were taken for dear by that one."""
    whole = scanned()
    cases = [result.case for result in whole.cases]
    ((name, one), _) = shards(whole, 2)
    share = sharding.share(cases, sharding.Shard(2, 2), lambda cases: 1.0)
    own = tuple(whole.cases[at] for at in share.positions)
    two = Report({**whole.environment, "shard": to_json(share)}, own, ())
    with pytest.raises(UserError, match=r"All 2 shards are given, but \d+ cases of the plan"):
        merge([(name, one), ("2.json", two)])


def test_what_lacks_a_shard_is_not_joined_again() -> None:
    one, two, three = shards(scanned(), 3)
    torn = ("m.json", merge([one, three]))
    with pytest.raises(UserError, match=r"m\.json was joined without shard 2/3"):
        merge([torn, two])


@pytest.mark.parametrize(
    "wrong",
    [
        3,
        {},
        {"positions": [0]},
        {"positions": "all"},
        {"index": 4},
        {"planned": 1},
        {"of": "two"},
    ],
)
def test_a_shard_that_no_scan_made_is_refused(wrong: Any) -> None:
    one, two = shards(scanned(), 2)
    note = {**one[1].environment["shard"], **wrong} if isinstance(wrong, dict) and wrong else wrong
    with pytest.raises(UserError, match=r"1\.json: environment\.shard"):
        merge([changed(one, shard=note), two])


# --- waivers ----------------------------------------------------------------------------------------


def test_waivers_hold_in_the_joined_report_as_in_the_whole() -> None:
    given = (
        waivers.Waiver("ATN101", "ticket", (("placement", "heads"),)),
        waivers.Waiver("ATN203", "no end", until=datetime.date(2026, 7, 1)),
    )
    parts = [(name, waivers.apply(report, given, TODAY)) for name, report in shards(scanned(), 3)]
    whole = waivers.apply(scanned(), given, TODAY)
    joined = merge(parts)
    assert joined.findings == whole.findings
    assert joined.environment["ignored"] == whole.environment["ignored"]
    assert whole.findings != scanned().findings


def test_judging_again_undoes_waivers() -> None:
    given = [waivers.Waiver("*", "everything")]
    silent = waivers.apply(scanned(), given, TODAY)
    assert silent.findings == ()
    assert merging.judged_again(silent, "a.json") == scanned()


# --- reports from elsewhere -------------------------------------------------------------------------


@settings(max_examples=30)
@given(strategies.reports(finite=False), strategies.reports())
def test_any_reports_are_joined_or_refused(one: Report, two: Report) -> None:
    try:
        joined = merge([("a", one), ("b", two)], allow_mixed=True)
    except UserError:
        return
    ids = {result.case.id for report in (one, two) for result in report.cases}
    assert {result.case.id for result in joined.cases} == ids
    assert view.build(joined).notices is not None
    assert load_report(dump_report(joined)).environment == joined.environment


def test_cases_that_cannot_be_judged_are_refused() -> None:
    report = scanned()
    first = next(r for r in report.cases if r.outcome.status is Status.MISSING_STRATEGY)
    odd = dataclasses.replace(first.case, mesh={"dp": 2, "tp": 2})  # placements are of one axis
    with pytest.raises(UserError, match="cannot be judged"):
        merge([("a.json", dataclasses.replace(report, cases=(CaseResult(odd, first.outcome),)))])
