"""Starting the workers through torchrun and watching over them from outside. Torch-free.

attncheck writes no launcher: `torch.distributed.run` starts the ranks, restarts all of them when one
dies, and ends them when it is told to. What is here only reads the journal, and gives up when restarts
lead nowhere.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from attncheck.children import END_WITH_PARENT
from attncheck.errors import UserError
from attncheck.runner import journal
from attncheck.runner.rundir import RunConfig, RunDir

POLL_SECONDS = 0.25
# Restarts that finish no case at all: the workers cannot start, and never will.
FRUITLESS_ATTEMPTS = 3
MAX_RESTARTS = 100_000
STOP_SECONDS = 15.0

# Memory that a kernel never writes may hold the right values of an earlier call by chance. glibc fills what
# it hands out with 0x7f bytes under the first of these (3.4e38 in float32 and bfloat16, NaN in float16),
# and small blocks too under the second; other C libraries ignore both.
POISON = {"MALLOC_PERTURB_": "128", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the workers are gone and the journal is kept."""


def command(run: RunDir, ranks: int, python: str = "") -> list[str]:
    """The torchrun command line; the same worker runs under a user's own `torchrun --nnodes N`."""
    return [
        python or sys.executable, "-m", "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        f"--max-restarts={MAX_RESTARTS}",
        "--monitor-interval=0.1",
        "--redirects=3",
        f"--log-dir={run.logs}",
        "-m", "attncheck.runner.bootstrap", str(run.path),
    ]  # fmt: skip


def start(run: RunDir, config: RunConfig) -> subprocess.Popen[bytes]:
    """Start torchrun, which starts the ranks. Whoever starts it also ends it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **config.environment}
    # Names of this machine may not resolve on a laptop without a network; ranks are all local here.
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    for name, value in POISON.items():
        environment.setdefault(name, value)
    shutil.rmtree(run.logs, ignore_errors=True)
    return subprocess.Popen(
        command(run, config.workers, config.python),
        env=environment,
        # `-m` looks in the current folder first; another environment must not see what lies here.
        cwd=run.path if config.python else None,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=(run.path / "torchrun.log").open("wb"),
        start_new_session=True,  # Ctrl-C reaches attncheck alone, which then ends the workers in order
        preexec_fn=END_WITH_PARENT,
    )


def run_workers(
    run: RunDir, config: RunConfig, on_progress: Callable[[journal.Tail], None]
) -> None:
    """Run until every case has an outcome. Raises UserError (could not start or go on) or Interrupted."""
    process = start(run, config)
    with _ended_with(process):
        _watch(run, process, on_progress)


def _watch(
    run: RunDir, process: subprocess.Popen[bytes], on_progress: Callable[[journal.Tail], None]
) -> None:
    tail = journal.Tail(run.journal)
    done_before, attempts_before = -1, 0
    while True:
        code = process.poll()
        if tail.update():
            on_progress(tail)
            if len(tail.ended) != done_before:
                done_before, attempts_before = len(tail.ended), attempts(run)
        if code == 0:
            return
        if code is not None or attempts(run) - attempts_before > FRUITLESS_ATTEMPTS:
            raise UserError(f"The workers could not run: {last_words(run)}")
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _ended_with(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """However the block is left, torchrun and its workers are gone afterwards."""
    try:
        with terminable():
            yield
    except KeyboardInterrupt:
        raise Interrupted from None
    finally:
        end(process)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """In here SIGTERM is what Ctrl-C is: KeyboardInterrupt."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def end(process: subprocess.Popen[bytes]) -> None:
    """torchrun and its workers are gone afterwards."""
    if process.poll() is None:
        process.terminate()  # torchrun ends its workers on SIGTERM
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()  # workers notice that their parent is gone and leave by themselves
            process.wait()


def attempts(run: RunDir) -> int:
    """How often torchrun has started the workers: one log folder each."""
    return sum(1 for _ in run.logs.glob("*/attempt_*"))


_NOISE = re.compile(
    r"^\s*$|^\s|Traceback|UserWarning|warnings\.warn|^W\d|^E\d|^I\d|OMP_NUM_THREADS|\*{5}"
)


def last_words(run: RunDir) -> str:
    """The last line of the last attempt that says something, from the workers' logs or torchrun's."""
    try:
        if shutil.disk_usage(run.path).free < 2**16:
            return f"the disk that holds {run.path} is full."
    except OSError:
        pass
    logs = sorted(run.logs.glob("*/attempt_*/*/stderr.log"), key=_attempt_number)
    for log in [*reversed(logs), run.path / "torchrun.log"]:
        lines = [line for line in _lines(log) if not _NOISE.search(line)]
        if lines:
            return f"{lines[-1][:300]} (logs in {run.path})"
    return f"they left no message (logs in {run.path})."


def _attempt_number(log: Path) -> tuple[int, str]:
    return int(log.parent.parent.name.partition("_")[2] or 0), log.parent.name


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
