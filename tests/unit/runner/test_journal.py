"""The journal is the only state: what it promises to whoever reads it after a crash."""

from __future__ import annotations

import json
from pathlib import Path

from attncheck.model import Outcome, Status
from attncheck.runner.journal import INTERRUPTED, Journal, Tail, read

FINE = Outcome(Status.SUPPORTED)


def test_what_was_started_and_not_ended_is_open(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.start(0)
    journal.end(0, FINE, {"run": 0.5})
    journal.start(1)
    progress = read(tmp_path / "j")
    assert progress.outcomes == {0: FINE}
    assert progress.open_case == 1
    assert progress.seconds == {"run": 0.5}


def test_an_interruption_is_no_death(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.start(3)
    journal.note(INTERRUPTED)
    assert read(tmp_path / "j").open_case is None


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.start(0)
    journal.end(0, FINE)
    with (tmp_path / "j").open("a") as file:
        file.write('{"event": "end", "ind')
    assert read(tmp_path / "j").outcomes == {0: FINE}


def test_nothing_yet(tmp_path: Path) -> None:
    progress = read(tmp_path / "none")
    assert (progress.outcomes, progress.open_case, progress.notes) == ({}, None, ())
    assert not Tail(tmp_path / "none").update()


def test_tail_takes_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "j"
    tail = Tail(path)
    line = json.dumps({"event": "start", "index": 7}) + "\n"
    path.write_text(line[:5])
    assert not tail.update()
    path.write_text(line + json.dumps({"event": "end", "index": 7, "outcome": {}}) + "\n")
    assert tail.update()
    assert (tail.open_case, tail.ended) == (7, {7})
    assert not tail.update()
