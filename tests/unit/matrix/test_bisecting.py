"""The walk to the release in which a status changes, without running any."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attncheck.cells import Cell
from attncheck.errors import UserError
from attncheck.matrix.bisecting import Walk, _axis, parse_selection
from attncheck.matrix.running import MatrixRequest
from attncheck.model import Case, CaseResult, Outcome, Report, Status
from attncheck.plan import Selection
from attncheck.runner.scan import ScanRequest

CASE = Case("id", "p", "o", "dtensor", {"name": "s"}, {"tp": 2}, "heads", {}, "forward")


def cell(version: str, status: Status | None) -> Cell:
    """A cell in which the one case has this status, or which could not be made."""
    if status is None:
        return Cell({"torch": version}, problem="no such release")
    report = Report({}, (CaseResult(CASE, Outcome(status)),), ())
    return Cell({"torch": version}, report)


def walk_over(statuses: list[Status | None]) -> Walk:
    names = tuple(map(str, range(len(statuses))))
    return Walk(names, lambda version: cell(version, statuses[int(version)]))


@given(size=st.integers(min_value=2, max_value=60), data=st.data())
def test_one_change_is_found_in_log2_runs(size: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(min_value=1, max_value=size - 1))
    walk = walk_over([Status.SUPPORTED] * first + [Status.WRONG] * (size - first))
    assert walk.turn() == (first - 1, first)
    assert len(walk.cells) <= 2 + math.ceil(math.log2(size))


@given(statuses=st.lists(st.sampled_from([Status.SUPPORTED, Status.WRONG, None]), min_size=2))
def test_what_it_says_is_so_whatever_changes_and_whatever_is_missing(
    statuses: list[Status | None],
) -> None:
    walk = walk_over(statuses)
    there = [at for at, status in enumerate(statuses) if status is not None]
    if not there:
        with pytest.raises(UserError, match=r"None of .* could be run"):
            walk.turn()
        return
    turn = walk.turn()
    if statuses[there[0]] is statuses[there[-1]]:
        assert turn is None
        return
    assert turn is not None
    low, high = turn
    assert statuses[low] is statuses[there[0]]
    assert statuses[high] not in (None, statuses[there[0]])
    assert all(status is None for status in statuses[low + 1 : high])


def test_a_selection_names_what_scan_does() -> None:
    chosen, mesh = parse_selection(
        "operator=sdpa[MATH], placement=batch,heads, setting=causal,mesh=dp=2,tp=2", Selection()
    )
    assert chosen.operators == ("sdpa[MATH]",)
    assert chosen.placements == ("batch,heads",)
    assert chosen.settings == ("causal",)
    assert mesh == {"dp": 2, "tp": 2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("operator", "'operator' is not NAME=VALUE"),
        ("", "is not NAME=VALUE"),
        ("opreator=sdpa", "Did you mean operator"),
        ("operator=sdpa, mesh=0x2", "size 0"),
    ],
)
def test_a_selection_that_is_none(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_selection(text, Selection())


def test_one_package_is_walked() -> None:
    scan = ScanRequest()
    one = MatrixRequest(scan, ("2.6.0", "2.9.1"), {"flash-attn": ("2.8.3",)})
    assert _axis(one) == ("torch", ("2.6.0", "2.9.1"))
    other = MatrixRequest(scan, ("2.6.0",), {"flash-attn": ("2.7.3", "2.8.3")})
    assert _axis(other) == ("flash-attn", ("2.7.3", "2.8.3"))
    for torch, flash in ((("2.6.0",), ("2.8.3",)), (("2.6.0", "2.9.1"), ("2.7.3", "2.8.3"))):
        with pytest.raises(UserError, match="versions of one package"):
            _axis(MatrixRequest(scan, torch, {"flash-attn": flash}))
