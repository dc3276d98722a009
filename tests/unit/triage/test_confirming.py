"""What the end of a script says: an exit code counts only with the line that goes with it."""

from __future__ import annotations

import pytest

from attncheck.triage import confirming

SEGFAULT = """\
time      : 2026-01-01
  exitcode  : -11 (pid: 1)
  traceback : Signal 11 (SIGSEGV) received by PID 1
"""
ENDED = "traceback : Signal 15 (SIGTERM) received by PID 2\n"


@pytest.mark.parametrize(
    ("code", "output", "errors", "crash", "shows"),
    [
        (1, "op X has no strategy\nBUG\n", "", False, True),
        (0, "no exception\nok\n", "", False, False),
        (1, "op X has no strategy\n", "", False, None),  # an exception of the script's own
        (1, "ok\n", "", False, None),
        (0, "BUG\n", "", False, None),
        (0, "", "", False, None),
        (1, "BUG, not quite\n", "", False, None),
        (1, "the call begins\n", SEGFAULT, True, True),
        (1, "the call begins\n", SEGFAULT, False, None),
        (1, "the call begins\n", ENDED, True, None),  # torchrun ends the other ranks
        (0, "the call begins\nok", "", True, False),
    ],
)
def test_verdicts(code: int, output: str, errors: str, crash: bool, shows: bool | None) -> None:
    run = confirming._read(code, output, errors, crash)
    assert run.shows is shows
    assert bool(run.why) == (shows is None)


def test_what_gloo_says_is_not_the_scripts() -> None:
    gloo = "[Gloo] Rank {} is connected to 1 peer ranks. Expected number of connected peer ranks is : 1\n"
    output = f"{gloo.format(0)}op X has no strategy\nBUG\n{gloo.format(1)}"
    assert confirming._read(1, output, "", crash=False) == confirming.Run(
        True, "op X has no strategy\nBUG"
    )


def test_why_it_did_not_end_is_what_its_exception_said() -> None:
    errors = (
        "W1129 torchrun noise\n"
        "[rank0]: Traceback (most recent call last):\n"
        '[rank0]:   File "repro.py", line 3, in <module>\n'
        "[rank0]: ModuleNotFoundError: No module named 'flash_attn'\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n"
        "============\nrepro.py FAILED\n"
    )
    run = confirming._read(1, "", errors, crash=False)
    assert "ModuleNotFoundError: No module named 'flash_attn'" in run.why
