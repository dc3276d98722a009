"""The parent's side of a comparison: memory, processes that end, the words for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from attncheck.audit import comparing
from attncheck.audit.comparing import Comparing, compare
from attncheck.audit.numeric import calls
from attncheck.audit.numeric.folder import Doing, Folder, Raised, State, put, read_state
from attncheck.errors import UserError

TORCHRUN = """
============================================================
Root Cause (first observed failure):
[0]:
  time      : 2026-08-11_10:00:00
  host      : laptop
  rank      : 3 (local_rank: 3)
  exitcode  : {code} (pid: 4711)
  error_file: <N/A>
"""


def test_a_model_that_does_not_fit_is_refused_before_it_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(comparing, "_free_memory", lambda: 8 * 2**30)
    asked = Comparing("m:build", "m:inputs", {"tp": 8}, parameters=14_000_000_000)
    with pytest.raises(UserError, match=r"14000 million parameters on 8 ranks .* reduced size"):
        compare(asked, 1.0)


def test_no_rank_is_started_for_what_is_no_module() -> None:
    with pytest.raises(UserError, match="no module 'no_such_module'"):
        compare(Comparing("no_such_module:build", "no_such_module:inputs", {"tp": 2}), 60.0)


@pytest.mark.parametrize(
    ("code", "of"), [("3", "exit code 3"), ("-11", "SIGSEGV"), ("-9", "SIGKILL")]
)
def test_what_a_rank_died_of(code: str, of: str) -> None:
    assert comparing._death(TORCHRUN.format(code=code)) == comparing.Death(3, of)
    assert comparing._death("nothing of the kind") is None


def test_a_state_outlives_its_rank(tmp_path: Path) -> None:
    path = tmp_path / "rank0.state"
    assert read_state(path) == Doing()
    state = State(path)
    state.call = 1
    state.set("backward of", "blocks.0.attn")
    state.set("forward of", "x")
    assert read_state(path) == Doing(1, "forward of", "x")
    assert comparing._where([Doing(1, "forward of", "x"), Doing(), Doing(1, "forward of", "")]) == (
        "rank 0: forward of x (second call), rank 1: starting, rank 2: forward of the model (second call)"
    )


def raised(folder: Folder, *each: Raised) -> str:
    for one in each:
        put(folder.raised(one.rank, one.call), one)
    return comparing._raised(folder.all_raised(), 2)


def test_the_first_to_raise_is_told(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    said = raised(
        folder,
        Raised(0, 0, "core", "RuntimeError: connection closed", when=2.0),
        Raised(1, 0, "core", "ValueError at m.py:3: no", when=1.0),
    )
    assert said == "in training, in core, ValueError at m.py:3: no, on rank 1 of 2"


def test_what_all_raise_is_said_of_none(tmp_path: Path) -> None:
    said = raised(Folder(tmp_path), *(Raised(rank, 3, "", "ValueError: no") for rank in (0, 1)))
    assert said == "in evaluation, ValueError: no"


def test_what_the_user_s_functions_raise_is_an_error_of_the_request(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="build raised KeyError"):
        raised(Folder(tmp_path), Raised(0, -1, "", "m:build raised KeyError.", users=True))


def test_flags_are_flipped_in_the_call_that_says_so() -> None:
    given = {"x": 1, "causal": False, "mask": None}
    assert calls.flags(given) == ["causal"]
    assert calls.keywords(given, calls.FLIPPED) == {"x": 1, "causal": True, "mask": None}
    assert calls.keywords(given, calls.BACK) == given


def test_the_second_call_is_of_the_model_of_the_first_and_evaluation_of_a_fresh_one() -> None:
    assert calls.TRAINING.model == calls.FLIPPED.model == calls.BACK.model != calls.EVALUATION.model
    assert [call.mode for call in calls.SEQUENCE] == [
        "training",
        "second call",
        "second call",
        "evaluation",
    ]
