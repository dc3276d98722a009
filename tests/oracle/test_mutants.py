"""The mutation score, asserted: each planted bug is found and rightly named, each twin is silent."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import catalogue
import score as scoring
from score import Score

BY_FILE = catalogue.load()
MUTANTS = {mutant.name: mutant for mutants in BY_FILE.values() for mutant in mutants}
# What ends processes costs a start of the workers each: of these, test_planted.py has one for each rule, and
# the others are slow.
NAMES = [
    pytest.param(name, marks=[pytest.mark.slow] if mutant.family == "process" else [])
    for name, mutant in MUTANTS.items()
]


@pytest.fixture(scope="module")
def score(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Score:
    """The score of the mutants that this run asks about."""
    here = [item for item in request.session.items if item.path == Path(__file__)]
    asked = {item.callspec.params["name"] for item in here if hasattr(item, "callspec")}
    chosen = {f: [m for m in mutants if m.name in asked] for f, mutants in BY_FILE.items()}
    return scoring.measure(chosen, tmp_path_factory.mktemp("mutants"))


@pytest.mark.parametrize("name", NAMES)
def test_found_by_its_rules_and_no_other_and_names_the_op(score: Score, name: str) -> None:
    verdict = next(v for v in score.verdicts if v.mutant.name == name)
    assert not verdict.missed, verdict.missed


@pytest.mark.parametrize("name", NAMES)
def test_the_twin_is_silent(score: Score, name: str) -> None:
    verdict = next(v for v in score.verdicts if v.mutant.name == name)
    assert not verdict.alarm, verdict.alarm


@pytest.mark.slow
def test_readme_shows_what_was_measured(tmp_path: Path) -> None:
    score = scoring.measure(BY_FILE, tmp_path)
    shown = scoring.block(scoring.README.read_text(encoding="utf-8"))
    if shown is None:
        pytest.skip(f"the README has no {scoring.BEGIN} yet")
    wanted = scoring.tables(score).splitlines()
    assert [line for line in shown.splitlines() if line.startswith("|")] == [*filter(None, wanted)]


def test_the_catalogue_is_large_and_wide() -> None:
    mutants = MUTANTS.values()
    assert len(mutants) == sum(len(group) for group in BY_FILE.values()), "a name is used twice"
    assert len(mutants) >= 60
    assert all(m.twin.name != m.operator.name for m in mutants)
    assert {(m.family, m.direction) for m in mutants} == {
        (family, direction)
        for family in ("strategy", "kernel", "process")
        for direction in ("forward", "backward")
    }
    assert {m.layer for m in mutants} == {"aten", "custom"}
    assert {m.mesh for m in mutants} >= {"2", "3", "2x2"}


def test_every_twin_is_healthy_code_for_another_mistake() -> None:
    mutated = {mutant.operator.name for mutant in MUTANTS.values()}
    assert not {mutant.twin.name for mutant in MUTANTS.values()} & mutated
