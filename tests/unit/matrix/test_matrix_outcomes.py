"""What a matrix remembers, and what makes it forget."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import attncheck
from attncheck.matrix import outcomes
from attncheck.matrix.outcomes import Store, Verdicts
from attncheck.model import Case, CaseResult, Finding, Outcome, Reason, Severity, Status
from attncheck.runner.rundir import RunConfig

PACKAGE = Path(attncheck.__file__).parent
RIGHT = Outcome(Status.SUPPORTED, message="fine", timings={"first": 1.5})
CASE = Case(
    id="p/o/s/dtensor/tp=2/heads/forward",
    probe="p",
    operator="o",
    route="dtensor",
    setting={"name": "s", "heads": 4},
    mesh={"tp": 2},
    placement="heads",
    placements={"q": ("S(1)",)},
    direction="forward",
)
CONFIG = RunConfig(
    seed=0,
    mesh={"tp": 2},
    device="cpu",
    case_timeout=120.0,
    hash_seeds=(6, 7),
    probe_files=(),
)


def test_what_was_measured_is_there_for_the_next_one(tmp_path: Path) -> None:
    Store(tmp_path).add([("scope", "key", RIGHT)])
    store = Store(tmp_path)
    assert store.get("scope", "key") == RIGHT
    assert store.get("scope", "other") is None
    assert store.get("other", "key") is None


def test_an_outcome_is_written_once(tmp_path: Path) -> None:
    for store in (Store(tmp_path), Store(tmp_path)):
        store.add([("scope", "key", RIGHT), ("scope", "key", RIGHT)])
    assert len((tmp_path / "scope.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(Status.UNKNOWN, "the check failed"),
        Outcome(Status.HANG, "no end after 120 s"),
        Outcome(Status.UNAVAILABLE, "ended before", reason=Reason.NOT_RUN),
    ],
)
def test_what_another_run_may_say_otherwise_is_not_kept(tmp_path: Path, outcome: Outcome) -> None:
    store = Store(tmp_path)
    store.add([("scope", "key", outcome)])
    assert store.get("scope", "key") is None
    assert not list(tmp_path.iterdir())


@given(cut=st.integers(min_value=1, max_value=200))
def test_a_torn_line_is_run_again_and_the_others_are_not(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("outcomes")
    Store(folder).add([("scope", "one", RIGHT), ("scope", "two", RIGHT)])
    file = folder / "scope.jsonl"
    whole = file.read_bytes()
    last = len(whole.splitlines()[-1])
    file.write_bytes(whole[: -min(cut, last)])
    store = Store(folder)
    assert store.get("scope", "one") == RIGHT
    # Less its newline alone, the line is whole.
    assert store.get("scope", "two") == (RIGHT if cut == 1 else None)


def test_a_torn_line_spoils_no_line_that_comes_after_it(tmp_path: Path) -> None:
    Store(tmp_path).add([("scope", "one", RIGHT), ("scope", "two", RIGHT)])
    file = tmp_path / "scope.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    for _ in range(2):  # what was appended to the torn line is lost with it, once
        Store(tmp_path).add([("scope", "two", RIGHT), ("scope", "three", RIGHT)])
    store = Store(tmp_path)
    assert store.get("scope", "two") == RIGHT
    assert store.get("scope", "three") == RIGHT


@pytest.mark.parametrize(
    "other",
    [
        (replace(CASE, setting={"name": "s", "heads": 8}), CONFIG),
        (replace(CASE, placements={"q": ("S(2)",)}), CONFIG),
        (CASE, replace(CONFIG, seed=1)),
        (CASE, replace(CONFIG, repeats=3)),
        (CASE, replace(CONFIG, hash_seeds=(6, 8))),
        (CASE, replace(CONFIG, case_timeout=5.0)),
    ],
)
def test_another_case_or_other_values_are_another_key(other: tuple[Case, RunConfig]) -> None:
    assert outcomes.key(*other) != outcomes.key(CASE, CONFIG)
    assert outcomes.key(CASE, replace(CONFIG, python="/x", path=("/y",))) == outcomes.key(
        CASE, CONFIG
    )


def test_the_scope_is_all_that_can_affect_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    base = ("env", ["flash-attn==2.8.3"], "probe", ["fix"], "cpu none")
    scopes = {outcomes.scope(*base)}
    for at, value in enumerate(["env2", ["flash-attn==2.8.2"], "probe2", [], "cuda H200"]):
        scopes.add(outcomes.scope(*base[:at], value, *base[at + 1 :]))  # type: ignore[arg-type]
    monkeypatch.setattr(outcomes, "code", lambda: "another attncheck")
    scopes.add(outcomes.scope(*base))  # type: ignore[arg-type]
    assert len(scopes) == 7


def _file(module: str) -> Path | None:
    place = PACKAGE.parent.joinpath(*module.split("."))
    files = (place.with_suffix(".py"), place / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def _imported(file: Path) -> set[Path]:
    """What a file of attncheck imports of it, in functions too, and for more than its annotations."""
    names: set[str] = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If)]
    idle = {id(n) for b in blocks if "TYPE_CHECKING" in ast.dump(b.test) for n in ast.walk(b)}
    for node in ast.walk(tree):
        if id(node) in idle:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    own = [name for name in names if name.partition(".")[0] == "attncheck"]
    return {found for name in own if (found := _file(name)) is not None}


def test_no_code_that_a_worker_runs_is_left_out_of_its_digest() -> None:
    roots = ("runner.bootstrap", "runner.worker", "runner.serve", "standins")
    waiting = {file for root in roots if (file := _file(f"attncheck.{root}"))}
    waiting |= set((PACKAGE / "standins").glob("*.py"))
    waiting |= {f for p in (PACKAGE.parent / "probes").glob("*.py") for f in _imported(p)}
    found: set[Path] = set()
    while waiting:
        file = waiting.pop()
        found.add(file)
        if file != PACKAGE / "__init__.py":  # `observe` imports what it needs when users call it
            waiting |= _imported(file) - found
    left_out = {
        file.relative_to(PACKAGE).as_posix()
        for file in found
        if file.relative_to(PACKAGE).parts[0] not in outcomes.WORKERS
    }
    assert not left_out
    assert len(found) > 30


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("x = 1\n")
    first = outcomes.digest_of({"a.py": file})
    assert outcomes.digest_of({"b.py": file}) != first
    file.write_text("x = 2\n")
    assert outcomes.digest_of({"a.py": file}) != first


def test_lines_are_json_that_others_can_read(tmp_path: Path) -> None:
    Store(tmp_path).add([("scope", "key", RIGHT)])
    line = json.loads((tmp_path / "scope.jsonl").read_text())
    assert line == {
        "key": "key",
        "outcome": {"status": "supported", "message": "fine", "timings": {"first": 1.5}},
    }


def test_rules_are_asked_once_about_the_same_outcomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def judge(results: Sequence[CaseResult], **_: object) -> tuple[Finding, ...]:
        asked.append(len(results))
        return (Finding("ATN101", "n", Severity.ERROR, "t", "op", (CASE.id,), "f"),)

    monkeypatch.setattr(outcomes.rules, "judge", judge)
    results = (CaseResult(CASE, RIGHT),)
    first = Verdicts(tmp_path).judge([("scope", "key")], results, (), ())
    assert Verdicts(tmp_path).judge([("scope", "key")], results, (), ()) == first
    assert len(asked) == 1
    # Other outcomes, other rules, an entry beside the plan, another attncheck: asked anew.
    Verdicts(tmp_path).judge([("scope", "other")], results, (), ())
    Verdicts(tmp_path).judge([("scope", "key")], results, ("ATN1",), ())
    Verdicts(tmp_path).judge([("scope", "key")], (*results, CaseResult(CASE, RIGHT)), (), ())
    monkeypatch.setattr(outcomes, "all_code", lambda: "another attncheck")
    Verdicts(tmp_path).judge([("scope", "key")], results, (), ())
    assert len(asked) == 5


def test_what_may_be_otherwise_next_time_is_judged_each_time(tmp_path: Path) -> None:
    results = (CaseResult(CASE, Outcome(Status.UNKNOWN, "failed")),)
    Verdicts(tmp_path).judge([("scope", "key")], results, (), ())
    assert not list(tmp_path.iterdir())
