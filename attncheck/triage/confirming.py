"""Runs a reproduction under torchrun, in a folder of its own and within a time, and reads what it says."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from attncheck.triage.calls import environment

SECONDS = 180.0
STOP_SECONDS = 10.0
OUTPUT = 20_000  # characters; a script prints a few lines
_KILLED = re.compile(r"Signal \d+ \((SIG\w+)\) received by PID")
# gloo of torch 2.9 says on stdout whom each rank is connected to.
_CONNECTED = re.compile(r"^\[Gloo\] Rank \d+ is connected to .*\n?", re.MULTILINE)
# torchrun ends the other ranks with this one.
_ENDED = "SIGTERM"


@dataclass(frozen=True)
class Run:
    """What came of a script: `shows` is None where it did not come to its last line, and `why` says so."""

    shows: bool | None
    output: str
    why: str = ""


def run(
    script: Path,
    ranks: int,
    path: tuple[str, ...] = (),
    through: Sequence[str] = (),
    crash: bool = False,
    seconds: float = SECONDS,
) -> Run:
    """`through`: what torchrun starts in the place of the script, which is then its last argument, on the
    CPU; `path`: to import from; `crash`: it shows by killing the process."""
    command = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run",
        "--standalone", f"--nproc-per-node={ranks}",
        *through, script.name,
    ]  # fmt: skip
    surroundings = {**environment(path), "OMP_NUM_THREADS": "1"}
    surroundings.pop("PYTHONHASHSEED", None)
    if through:
        surroundings["CUDA_VISIBLE_DEVICES"] = ""
    surroundings.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    with (script.with_suffix(".err")).open("w+b") as errors:
        process = subprocess.Popen(
            command,
            cwd=script.parent,
            env=surroundings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        with _ended(process):
            try:
                data, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                return Run(None, "", f"it was still running after {seconds:.0f} s")
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    return _read(process.returncode, data.decode(errors="replace")[:OUTPUT], said, crash)


def _read(code: int, output: str, errors: str, crash: bool) -> Run:
    """Python exits with 1 for any exception, so an exit code counts only with the line that goes with it."""
    output = _CONNECTED.sub("", output).strip()
    last = output.rpartition("\n")[2]
    killed = [name for name in _KILLED.findall(errors) if name != _ENDED]
    if crash and code and killed:
        return Run(True, f"{output}\nthe process is killed by {killed[0]}".strip())
    if (code, last) == (1, "BUG"):
        return Run(True, output)
    if (code, last) == (0, "ok"):
        return Run(False, output)
    return Run(None, output, f"it did not come to its last line ({_last_words(errors, code)})")


_NOISE = re.compile(
    r"^\s*$|^\s|Traceback|[Ww]arn|^[WEI]\d|^\*+|^=+|^-+$|^Failures|^Root Cause|^torch\.distributed"
    r"|ChildFailedError|NO_OTHER_FAILURES|<NO|FAILED$|^\[rank\d+\]:\s{2,}"
)


def _last_words(errors: str, code: int) -> str:
    lines = [line for line in errors.splitlines() if not _NOISE.search(line)]
    told = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b", line)] or lines
    return told[-1].strip()[:300] if told else f"exit code {code}"


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """However the block is left, torchrun and its workers, which are in sessions of their own, are gone."""
    try:
        yield
    finally:
        if process.poll() is None:
            workers = _descendants(process.pid)
            process.terminate()  # torchrun ends its workers
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            for pid in (process.pid, *workers):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _descendants(pid: int) -> list[int]:
    try:
        listing = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=False
        ).stdout
    except OSError:
        return []
    pairs = [tuple(map(int, line.split())) for line in listing.splitlines()]
    found = [pid]
    for parent in found:
        found += [child for child, of in pairs if of == parent]
    return found[1:]
