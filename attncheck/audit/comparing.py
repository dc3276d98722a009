"""The parallel model with real numbers against the unsharded one: starts the processes, watches over them,
and takes the answer. Torch-free; what they do is in `numeric`."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from attncheck.audit.numeric.calls import SEQUENCE
from attncheck.audit.numeric.folder import Doing, Folder, Raised, put, read_state
from attncheck.audited import Numeric
from attncheck.children import END_WITH_PARENT
from attncheck.errors import UserError
from attncheck.model import from_json
from attncheck.text import count

POLL_SECONDS = 0.05
# How long no rank may come to another module. DTensor can take half a minute to look for a strategy.
STILL_SECONDS = 120.0
# The same, once a rank has ended or raised: it will join no collective any more.
LEFT_SECONDS = 10.0
STOP_SECONDS = 10.0
# A weight in its own dtype, its gradient, and what a call keeps of it; and the same again in float64.
BYTES_PER_PARAMETER = 12
_BOOTSTRAP = "attncheck.audit.numeric.bootstrap"


@dataclass(frozen=True)
class Comparing:
    """What is compared. `target` and `inputs` name functions of the user's; `path`: folders of provisioned
    packages; `fixes`: files that register strategies first; `probe_files`: whose operators' packages and
    stand-ins are put in place; `parameters`: how many the whole model has, where that is known."""

    target: str
    inputs: str
    mesh: Mapping[str, int]
    device: str = "cpu"
    seed: int = 0
    path: tuple[str, ...] = ()
    fixes: tuple[str, ...] = ()
    probe_files: tuple[str, ...] = ()
    parameters: int = 0

    @property
    def ranks(self) -> int:
        return math.prod(self.mesh.values())


@dataclass(frozen=True)
class Answer:
    """Of the process that judges. `error`: what the user's code did wrong, in one sentence."""

    numeric: Numeric | None = None
    error: str = ""


def compare(asked: Comparing, timeout: float) -> Numeric:
    """Runs the user's code on as many processes as the mesh has ranks, and once unsharded. `timeout` in
    seconds, for all of it. Raises UserError for what is wrong with the user's code or with its size; what the
    parallel model itself raises is in the answer's `failure`."""
    _check_memory(asked)
    until = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="attncheck-") as name:
        folder = Folder(Path(name))
        put(folder.asked, asked)
        unsharded = _start_unsharded(folder)
        ranks = _start_ranks(folder, asked.ranks)
        try:
            failure = _watch(asked, folder, unsharded, ranks, until)
            _end(ranks)
            return _answer(asked, folder, unsharded, failure, until)
        finally:
            _end(ranks)
            unsharded.kill()
            unsharded.wait()


def _check_memory(asked: Comparing) -> None:
    needed = asked.parameters * asked.ranks * BYTES_PER_PARAMETER
    free = _free_memory()
    if free is not None and needed > free:
        raise UserError(
            f"{asked.target}: {asked.parameters / 1e6:.0f} million parameters on "
            f"{count(asked.ranks, 'rank')} take about {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB "
            "are free: give a build of reduced size (fewer layers, a smaller width)."
        )


def _free_memory() -> int | None:
    """Bytes; None where the system does not say (Linux says)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    words = next((line.split() for line in lines if line.startswith("MemAvailable:")), None)
    return int(words[1]) * 1024 if words else None


# --- processes -----------------------------------------------------------------------------------


def _environment() -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Names of this machine may not resolve on a laptop without a network; ranks are all local here.
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    return environment


def _start_unsharded(folder: Folder) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", _BOOTSTRAP, "unsharded", str(folder.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=folder.unsharded_log.open("wb"),
        env=_environment(),
        preexec_fn=END_WITH_PARENT,
    )


def _start_ranks(folder: Folder, ranks: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            "--monitor-interval=0.1",
            "--redirects=3",
            f"--log-dir={folder.logs}",
            "-m", _BOOTSTRAP, "rank", str(folder.path),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=folder.torchrun_log.open("wb"),
        env=_environment(),
        start_new_session=True,
        preexec_fn=END_WITH_PARENT,
    )  # fmt: skip


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()  # torchrun ends its workers
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# --- watching ------------------------------------------------------------------------------------


def _watch(
    asked: Comparing,
    folder: Folder,
    unsharded: subprocess.Popen[bytes],
    ranks: subprocess.Popen[bytes],
    until: float,
) -> str:
    """Waits for the ranks; why they came to no end, or ''. Raises UserError."""
    doing: list[Doing] = []
    since = time.monotonic()
    while ranks.poll() is None:
        if unsharded.poll() is not None:
            return ""  # it ended before it was asked: its answer says why
        now, states = time.monotonic(), [read_state(folder.state(r)) for r in range(asked.ranks)]
        if states != doing:
            doing, since = states, now
        waiting = any(each.doing.startswith(("done", "raised")) for each in doing)
        still = now - since > (LEFT_SECONDS if waiting else STILL_SECONDS)
        if now > until or (still and not _at_start(doing)):
            return _stopped(folder, asked, doing, now - since, now > until)
        time.sleep(POLL_SECONDS)
    raised = folder.all_raised()
    if ranks.returncode == 0:
        return _raised(raised, asked.ranks) if raised else ""
    died = _death(folder.torchrun_log.read_text(encoding="utf-8", errors="replace"))
    if died is not None and died.rank not in {each.rank for each in raised}:
        return (
            f"rank {died.rank} died of {died.of} in: {_told(read_state(folder.state(died.rank)))}"
        )
    if raised:
        return _raised(raised, asked.ranks)
    raise UserError(f"The ranks could not be started: {_last_words(folder)}.")


@dataclass(frozen=True)
class Death:
    """What torchrun says of the rank that ended first."""

    rank: int
    of: str


_ROOT_CAUSE = re.compile(r"Root Cause.*?\brank\s*: (\d+).*?exitcode\s*: (-?\d+)", re.DOTALL)


def _death(log: str) -> Death | None:
    match = _ROOT_CAUSE.search(log)
    if match is None:
        return None
    code = int(match[2])
    if code >= 0:
        return Death(int(match[1]), f"exit code {code}")
    known = {each.value: each.name for each in signal.Signals}
    return Death(int(match[1]), known.get(-code, f"signal {-code}"))


def _at_start(doing: Sequence[Doing]) -> bool:
    """Some rank waits for the unsharded model, or is being started: only the timeout is for them."""
    return any(each.call < 0 and not each.doing.startswith("raised") for each in doing)


def _stopped(
    folder: Folder, asked: Comparing, doing: Sequence[Doing], still: float, late: bool
) -> str:
    raised = folder.all_raised()
    if raised:
        return _raised(raised, asked.ranks)
    why = "the time was up" if late else f"no rank moved for {still:.0f} s"
    return f"{why}; {_where(doing)}"


def _raised(raised: Sequence[Raised], ranks: int) -> str:
    """What the first of them raised, which others may have raised too. Raises UserError for what is no
    matter of the model."""
    first = raised[0]
    if first.users:
        raise UserError(first.text)
    same = [each.rank for each in raised if (each.call, each.text) == (first.call, first.text)]
    on = "" if len(same) == ranks else f", on {_ranks(same)} of {ranks}"
    if first.call < 0:
        raise UserError(f"The parallel model could not be made ready: {first.text}.")
    module = f"in {first.module}, " if first.module else ""
    return f"in {SEQUENCE[first.call].mode}, {module}{first.text}{on}"


def _where(doing: Sequence[Doing]) -> str:
    """`rank 0: forward of blocks.0 (training), rank 1: ...`"""
    said: dict[str, list[int]] = {}
    for rank, each in enumerate(doing):
        said.setdefault(_told(each), []).append(rank)
    return ", ".join(f"{_ranks(ranks)}: {what}" for what, ranks in said.items())


def _told(doing: Doing) -> str:
    mode = f" ({SEQUENCE[doing.call].mode})" if doing.call >= 0 else ""
    if doing.doing.endswith((" of", " in")):
        return f"{doing.doing} {doing.module or 'the model'}{mode}"
    return f"{doing.doing}{mode}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _last_words(folder: Folder) -> str:
    """The last line of a rank's log that is none of a traceback's frames, or torchrun's own."""
    for log in [*sorted(folder.logs.glob("*/attempt_0/*/stderr.log")), folder.torchrun_log]:
        lines = [
            line
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
            if line.strip() and not line.startswith((" ", "Traceback", "W0", "W1", "E0", "E1"))
        ]
        if lines:
            return lines[-1][:300]
    return "no message"


def _answer(
    asked: Comparing,
    folder: Folder,
    unsharded: subprocess.Popen[bytes],
    failure: str,
    until: float,
) -> Numeric:
    """Lets the other process judge what the ranks left. Raises UserError."""
    try:
        unsharded.communicate(
            json.dumps(failure).encode() + b"\n", timeout=max(30.0, until - time.monotonic())
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{asked.target}: the time was up before all was compared.") from None
    if not folder.answer.exists():
        lines = folder.unsharded_log.read_text(errors="replace").strip().splitlines()
        why = lines[-1][:300] if lines else f"exit code {unsharded.returncode}"
        raise UserError(f"{asked.target} ended the process that ran it unsharded: {why}.")
    answer = from_json(Answer, json.loads(folder.answer.read_text(encoding="utf-8")), "answer")
    if answer.numeric is None:
        raise UserError(answer.error)
    return answer.numeric
