"""The view model: what is counted, what is called usable, what is said first."""

import dataclasses
import json
import subprocess
import sys

import pytest
import sample_report
import strategies
from hypothesis import HealthCheck, given, settings

from attncheck import view
from attncheck.model import (
    CaseResult,
    Collective,
    Finding,
    Outcome,
    Reason,
    Remedy,
    Report,
    Severity,
    Status,
)


@pytest.fixture(scope="module")
def sample() -> view.View:
    return view.build(sample_report.sample())


def cell(sample: view.View, operator: str, direction: str, placement: str) -> view.Cell | None:
    row = next(
        r
        for r in sample.compact
        if r.operator == operator and r.direction in (direction, view.BOTH)
    )
    return row.cells[sample.placements.index(placement)]


def part_of(*letters: str, **changes: object) -> Report:
    """The sample's cases of these statuses only."""
    wanted = {sample_report.LETTERS[letter] for letter in letters}
    cases = tuple(r for r in sample_report.results() if r.outcome.status in wanted)
    return Report(**{"environment": {}, "cases": cases, "findings": (), **changes})


def unloadable() -> Finding:
    """An error although nothing ran: the environment is what is broken."""
    case = part_of("u").cases[0].case.id
    return Finding(
        rule="ATN402",
        name="extension-not-loadable",
        severity=Severity.ERROR,
        title="the compiled extension does not load",
        kernel_op="",
        cases=(case,),
        fingerprint="0" * 16,
    )


def test_every_status_has_a_style_of_its_own() -> None:
    assert set(view.STYLES) == set(Status)
    for mark in ("symbol", "ascii", "word"):
        marks = [getattr(style, mark) for style in view.STYLES.values()]
        assert len(set(marks)) == len(marks)
    assert all(style.ascii.isascii() for style in view.STYLES.values())


def test_placements_in_the_order_of_the_patterns(sample) -> None:
    assert sample.placements == (
        "replicate", "batch", "heads", "sequence", "query", "head_dim", "partial",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("operator", "direction", "placement", "expected"),
    [
        ("sdpa", "forward", "heads", view.Cell(Status.MISSING_STRATEGY, 5, 6)),  # 1 unavailable
        ("sdpa", "forward", "partial", view.Cell(Status.WRONG, 3, 5)),
        ("sdpa[FLASH_ATTENTION]", "backward", "query", view.Cell(Status.DIVERGED, 4, 5)),
        ("fallback.matmul", "forward", "sequence", view.Cell(Status.UNKNOWN, 2, 3)),
        ("flash_attn_with_kvcache", "forward", "heads", view.Cell(Status.HANG, 0, 1)),
        ("flash_attn_func", "forward", "head_dim", None),
    ],
)
def test_compact_cells(sample, operator, direction, placement, expected) -> None:
    assert cell(sample, operator, direction, placement) == expected


def test_a_failed_check_hides_a_pass_but_never_a_failure() -> None:
    results = sample_report.results()[:2]

    def status(*pair: Status) -> Status:
        changed = [
            dataclasses.replace(r, outcome=Outcome(s)) for r, s in zip(results, pair, strict=True)
        ]
        return view.cell_of(changed).status

    assert status(Status.SUPPORTED, Status.UNKNOWN) is Status.UNKNOWN
    assert status(Status.DRIFT, Status.UNKNOWN) is Status.DRIFT
    assert status(Status.SUPPORTED, Status.UNAVAILABLE) is Status.SUPPORTED
    assert status(Status.UNAVAILABLE, Status.UNAVAILABLE) is Status.UNAVAILABLE


def test_equal_directions_share_a_row_and_different_ones_do_not() -> None:
    compact = view.build(sample_report.sample()).compact
    directions: dict[str, list[str]] = {}
    for row in compact:
        directions.setdefault(row.operator, []).append(row.direction)
    assert [view.BOTH] in directions.values()
    assert ["forward", "backward"] in directions.values()


def test_an_operator_of_which_nothing_ran_takes_no_row() -> None:
    first, *rest = sample_report.results()
    case = dataclasses.replace(first.case, operator="gone")
    gone = CaseResult(case, Outcome(Status.UNAVAILABLE, "no", reason=Reason.DEVICE_MISSING))
    names = [r.operator for r in view.build(Report({}, (gone, *rest), ())).compact]
    assert "gone" not in names
    assert [r.operator for r in view.build(Report({}, (gone,), ())).compact] == ["gone"]


def test_rows_cover_every_case_once(sample) -> None:
    for rows in (sample.rows, sample.compact):
        total = sum(
            cell.total * (2 if row.direction == view.BOTH else 1)
            for row in rows
            for cell in row.cells
            if cell
        )
        unavailable = dict(sample.summary)[Status.UNAVAILABLE]
        assert total + unavailable == sum(n for _, n in sample.summary)
    assert len(sample.rows) > len(sample.compact)


def works(sample: view.View, placement: str) -> view.Works:
    return next(w for w in sample.works if w.placement == placement)


def test_what_works(sample) -> None:
    heads = works(sample, "heads")
    assert [(u.operator, u.cost, u.free) for u in heads.both] == [
        ("fallback.matmul", "no communication", True)
    ]
    assert ("sdpa[MATH]", "4 of 7 settings") in [(u.operator, u.share) for u in heads.part]
    query = works(sample, "query")
    assert query.both[0].cost == "1 all_gather, 27 KiB a rank"
    assert [(u.operator, u.share) for u in query.forward] == [
        ("sdpa[FLASH_ATTENTION]", "backward in 4 of 5 settings")
    ]


def test_a_check_that_failed_is_not_something_that_works(sample) -> None:
    sequence = works(sample, "sequence")
    assert "fallback.matmul" not in [u.operator for u in sequence.both]


def test_headline_names_what_is_missing_and_what_works(sample) -> None:
    missing, also, usable, way_out = sample.headline
    assert "stands below under Findings" in way_out
    assert missing.startswith(
        "6 kernel ops have no sharding strategy: flash_attn._flash_attn_forward.default, "
    )
    assert "wrong numbers without any error in 5 cases" in also
    assert usable == (
        "1 of 9 operators works with heads sharded, forward and backward: fallback.matmul."
    )


def test_more_missing_ops_than_a_headline_can_hold_are_listed(sample) -> None:
    assert sample.missing == ()
    many = view.build(sample_report.with_many_missing())
    assert many.headline[0].startswith(
        "7 kernel ops have no sharding strategy, all listed under Missing: "
    )
    assert len({m.op for m in many.missing}) == 7
    assert view.Missing("more.attention.default", 1, ("more_attention",)) in many.missing
    largest = many.missing[0]
    assert largest.op == sample_report.FLASH_FORWARD
    stopped = [
        r
        for r in sample_report.results()
        if any(m.op == largest.op for m in view._missing_ops(r.outcome))
    ]
    assert largest.cases == len(stopped) > 1


def test_null_pointers_are_no_other_exceptions() -> None:
    result = part_of("e").cases[0]
    outcome = dataclasses.replace(result.outcome, exception_type="BypassesDispatcher")
    report = part_of("e", cases=(dataclasses.replace(result, outcome=outcome),))
    (first, *_) = view.build(report).headline
    assert first.startswith("Found: functions that DTensors would reach as null pointers in 1 case")
    assert "other exceptions" not in first


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        (part_of(), "No case was planned: nothing was checked."),
        (part_of("u"), "Nothing ran: 8 cases (the operator refuses this setting)."),
        (part_of("?"), "Nothing ran: 2 cases (the check itself failed)."),
        (part_of("s"), "Every case that ran gave right results."),
        (part_of("w"), "Found: wrong numbers without any error in 5 cases"),
    ],
)
def test_headlines(report: Report, sentence: str) -> None:
    assert view.build(report).headline[0].startswith(sentence)


def test_findings_by_kernel_op_what_stops_most_first_then_the_worst(sample) -> None:
    assert [group.title for group in sample.groups][:3] == [
        "flash_attn._flash_attn_forward.default",
        "No single kernel op",
        "aten._scaled_dot_product_flash_attention.default",
    ]
    assert [f.rule for f in sample.groups[1].findings] == ["ATN502", "ATN501", "ATN401"]
    assert sample.severities == (
        (Severity.ERROR, 7), (Severity.WARNING, 1), (Severity.INFO, 1),
    )  # fmt: skip
    assert len(sample.findings) == 9


def test_remedies_say_whether_they_were_seen_working() -> None:
    by_id = {r.case.id: r for r in sample_report.results()}
    right = [case for case, r in by_id.items() if r.outcome.status.usable][:2]
    wrong = [case for case, r in by_id.items() if r.outcome.status is Status.WRONG]

    def shown(text: str, *evidence: str) -> tuple[bool, str, str]:
        remedy = view._remedy(Remedy("route", text, "", evidence), by_id)
        return remedy.proven, remedy.proof, remedy.text

    assert shown("Use it.", *right) == (True, "seen working in this scan: 2 cases", "Use it.")
    assert shown("Use it. Not run in this scan.") == (False, "not run in this scan", "Use it.")
    absent = (False, "its evidence is not in this report", "Use it.")
    assert shown("Use it.", "elsewhere") == absent
    assert shown("Use it.", wrong[0]) == absent


def test_the_first_remedy_is_the_best_one_that_has_code() -> None:
    right = next(r for r in sample_report.results() if r.outcome.status.usable)

    def first(*remedies: Remedy) -> int | None:
        finding = dataclasses.replace(sample_report.sample().findings[0], remedies=remedies)
        return view.finding_view(finding, {right.case.id: right}).first_remedy

    plain, code = Remedy("report", "tell"), Remedy("route", "x", "code")
    proven = Remedy("route", "y", "code", (right.case.id,))
    assert first() is None
    assert first(plain) == 0
    assert first(plain, code) == 1
    assert first(plain, code, proven) == 1  # rules rank them
    assert first(plain, plain) == 0


def test_cases_that_did_not_run(sample) -> None:
    assert [(n.count, n.reason, n.operators) for n in sample.not_run] == [
        (6, "the operator refuses this setting", ("sdpa",)),
        (2, "the operator refuses this setting", ("flash_attn_with_kvcache",)),
        (2, "the check itself failed", ("fallback.matmul",)),
    ]


def test_of_a_refusal_in_many_lines_the_first_is_shown() -> None:
    text = "No operator found:\n  shape=(2, 4)\n  device=cpu"
    refused = Outcome(Status.UNAVAILABLE, text, reason=Reason.SETTING_REFUSED)
    assert view._detail(refused) == "No operator found:"
    assert view._detail(Outcome(Status.UNKNOWN, text)) == (
        "No operator found: shape=(2, 4) device=cpu"
    )


def test_environment(sample) -> None:
    lines = dict(sample.environment)
    assert lines["packages"] == "torch 2.13.0+cpu, flash-attn 2.8.3.post2, numpy 2.1.0"
    assert lines["hash seeds"] == "6, 7"
    assert lines["peak memory"] == "612 MiB in the largest of 2 ranks"
    assert dict(sample.phases)["rules"] == "40 ms"
    assert "Workers were restarted 2 times." in sample.notices


@pytest.mark.parametrize("value", [None, 3, "text", [1, "x"], {"a": {"b": [1.5]}}, True])
def test_any_environment_is_shown(value) -> None:
    keys = [*sample_report.environment(), "something_else"]
    view.build(Report(dict.fromkeys(keys, value), (), ()))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(strategies.reports(finite=False))
def test_any_report_has_a_view(report: Report) -> None:
    view.build(report)


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (part_of("u"), "exit code 3"),
        (part_of("s", "?"), "exit code 3"),
        (part_of("s"), "exit code 0"),
        (part_of("u", findings=(unloadable(),)), "1 error: exit code 1"),
        (sample_report.sample(), "7 errors: exit code 1"),
    ],
)
def test_exit_line_agrees_with_the_exit_code(report: Report, words: str) -> None:
    from attncheck.commands.common import exit_code

    line = view.build(report).exit_line
    assert words in line
    assert f"exit code {exit_code(report, 'error')}" in line


def test_steps_can_be_pasted(sample) -> None:
    commands = [step.command for step in sample.steps]
    assert commands[:3] == [
        "attncheck explain ATN101",
        "attncheck fix --with flash-attn --kernel-op 'flash_attn.*' --write attncheck_fixes.py",
        "attncheck scan --with flash-attn --operator flash_attn_func -v",
    ]
    bracket = [f for f in sample_report.sample().findings if f.rule == "ATN201"]
    steps = view.build(dataclasses.replace(sample_report.sample(), findings=tuple(bracket))).steps
    assert "--operator 'sdpa[FLASH_ATTENTION]' -v" in steps[1].command


@pytest.mark.parametrize(
    ("command", "scan"),
    [
        ("attncheck scan", "attncheck scan --operator"),
        ("attncheck scan --with flash-attn==2.6.3 -q", "scan --with flash-attn==2.6.3 --operator"),
        ("attncheck scan --import=a --ranks 4", "scan --import a --ranks 4 --operator"),
        ("attncheck scan --probe 'my kernel.py'", "scan --probe 'my kernel.py' --operator"),
        ("attncheck scan --with 'torn", "attncheck scan --operator"),
    ],
)
def test_a_scan_of_one_operator_keeps_what_brings_it(command: str, scan: str) -> None:
    report = sample_report.sample()
    environment = {**report.environment, "command": command}
    steps = view.build(dataclasses.replace(report, environment=environment)).steps
    assert scan in steps[2].command
    brought = scan.removeprefix("attncheck ").removeprefix("scan").partition(" --ranks")[0]
    assert f"attncheck fix{brought.removesuffix(' --operator')} --kernel-op" in steps[1].command


def test_costs_add_up_over_kernel_ops() -> None:
    moved = tuple(Collective("all_gather", op, "forward", 2, 1024) for op in ("a", "b"))
    outcome = Outcome(Status.REDISTRIBUTED, collectives=moved)
    assert view.communication(outcome) == "4 all_gather, 2 KiB a rank"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07x\x1b]8;;http://e\x1b\\link", "xlink"),
        ("\x9b31mred", "red"),
        ("a\rb\r\nc\x85d", "a\nb\nc\nd"),
        ("\u202ereversed\u2069", "reversed"),
        ("\ud800\x00\x07\x7f", ""),
        ("\x1b", ""),
        ("tab\tend", "tab end"),
    ],
)
def test_clean(text: str, cleaned: str) -> None:
    assert view.clean(text) == cleaned


def test_no_string_of_a_view_holds_control_characters() -> None:
    shown = json.dumps(dataclasses.asdict(view.build(sample_report.hostile())), ensure_ascii=False)
    assert not [c for c in shown if c < " " or "\x7f" <= c < "\xa0" or c == "\u202e"]


@pytest.mark.parametrize("name", ["table", "markdown", "json"])
def test_rendering_imports_no_torch(name: str) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests/unit'); import sample_report\n"
        "from attncheck import plugins, view\n"
        f"text = plugins.load_format({name!r}).render("
        "sample_report.sample(), options=view.RenderOptions())\n"
        "assert len(text) > 1000\n"
        "assert 'torch' not in sys.modules\n"
        "assert 'rich' not in sys.modules\n"
    )
    root = sample_report.SNAPSHOTS.parent.parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)


def test_a_fix_in_place_is_said_at_once_and_its_changes_are_counted() -> None:
    report = sample_report.sample()
    fixes = {
        "/tmp/x/mine.py": {"a.b.default": "registered", "c.d.default": "absent", "e": "absent"}
    }
    first, *rest = report.cases
    changed = dataclasses.replace(first, before=Status.MISSING_STRATEGY)
    fixed = dataclasses.replace(
        report, environment={**report.environment, "fixes": fixes}, cases=(changed, *rest)
    )
    seen = view.build(fixed)
    assert "With the fix mine.py in place: 2 absent, 1 registered." in seen.notices
    assert sum(len(change.cases) for change in seen.changes) == len(report.cases)
    of_first = next(change for change in seen.changes if first.case.id in change.cases)
    assert (of_first.before, of_first.after) == ("missing strategy", first.outcome.status)
    assert not view.build(report).changes
    for broken in ("x", {"f": "x"}, {"f": {"op": 3}}, [1]):
        view.build(dataclasses.replace(report, environment={"fixes": broken}))
