"""The file through which a hunt asks its workers, and the clock that it goes by."""

from __future__ import annotations

import json
from pathlib import Path

from attncheck.hunt.hunting import Clock
from attncheck.model import Case, from_json
from attncheck.probing import Setting
from attncheck.runner.rundir import Asked, Queue

SETTING = Setting(
    "hunted",
    {"batch": 1},
    options={"window": [5, 2], "causal": True, "scale": 0.5, "mask": None},
    memory="sliced",
    explicit={"q": ("S(1)", "R")},
)
CASE = Case("id", "p", "o", "dtensor", SETTING.to_dict(), {"tp": 2}, "explicit", {}, "forward")


def test_what_is_asked_arrives_as_it_was(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "queue.jsonl")
    assert queue.line(0) is None
    queue.ask(Asked(CASE, SETTING))
    line = Queue(tmp_path / "queue.jsonl").line(0)
    assert line is not None
    assert from_json(Asked, json.loads(line)) == Asked(CASE, SETTING)


def test_half_a_line_is_none_yet(tmp_path: Path) -> None:
    path = tmp_path / "queue.jsonl"
    reader = Queue(path)
    with path.open("a") as file:
        file.write('{"case"')
        file.flush()
        assert reader.line(0) is None
        file.write(": 1}\nnull\n")
        file.flush()
        assert reader.line(0) == '{"case": 1}'
        assert reader.line(1) == "null"
        assert reader.line(2) is None


def test_the_search_ends_early_by_what_confirming_takes() -> None:
    clock = Clock(100.0, 600.0)
    assert clock.deadline == 100 + 600 - 8
    clock.reserve(20.0)
    assert clock.deadline == 100 + 600 - 24
    clock.reserve(5.0)
    assert clock.deadline == 100 + 600 - 24
    clock.reserve(10_000.0)
    assert clock.deadline == 100 + 0.6 * 600
