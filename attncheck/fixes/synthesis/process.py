"""Synthesis in a child process, and each op in a fork of that: a kernel may end it on an odd piece.

`python -m attncheck.fixes.synthesis ASKED ANSWER`. The child says into ANSWER what it does before it does
it, so that what ended it can be left out, and the answer at the end.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from attncheck import plugins
from attncheck.errors import UserError
from attncheck.fixes import recording
from attncheck.fixes.recording import Bench, Call
from attncheck.fixes.synthesis.learning import Log, Synthesis, choose, synthesise
from attncheck.fixes.synthesis.search import Row
from attncheck.inventory import Look, RegisteredOp
from attncheck.plan import matches
from attncheck.probing import Operator
from attncheck.runner import compat, inventory
from attncheck.runner.available import Availability

TIMEOUT_SECONDS = 180
# So many calls may end the process before nobody wants to wait any longer.
ENDINGS = 5
ENDINGS_IN_FORKS = 60
CALL_SECONDS = 20
# The child's exit code for a UserError.
BAD_INPUT = 2


@dataclass(frozen=True)
class Request:
    """What ops to synthesise. `imports`: modules whose import registers them; `probe_files`: probes of
    one's own beside the built-in ones; `path` is put in front of sys.path. Operators and kernel ops are
    selected by glob (none: all). PyTorch's own ops, those that have a strategy, and those in `known`, which
    have a signature, are only looked at where `kernel_ops` has their very name."""

    imports: tuple[str, ...] = ()
    probe_files: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    kernel_ops: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Refusal:
    """An op that operators reach and that has no signature, and why, in one sentence."""

    op: str
    why: str


@dataclass(frozen=True)
class Answer:
    """What was found, op by op; `fatal`: calls that ended the process, which are left out."""

    found: tuple[Synthesis, ...] = ()
    refused: tuple[Refusal, ...] = ()
    fatal: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Asked:
    request: Request
    fatal: tuple[str, ...] = ()


def for_operators(request: Request, log: Log = lambda text: None) -> Answer:
    """Synthesise the ops that the selected operators reach, in a child process.

    A call that ends the child is left out, and the child begins again. Raises UserError where that goes on,
    or where the child fails otherwise.
    """
    fatal: tuple[str, ...] = ()
    while True:
        answer = _in_child(_Asked(request, fatal))
        if isinstance(answer, Answer):
            return answer
        doing, how = answer
        if doing in fatal or len(fatal) == ENDINGS:
            raise UserError(f"Nothing can be synthesised: {doing} {how}.")
        log(f"{doing} {how}; it is left out")
        fatal = (*fatal, doing)


def _in_child(asked: _Asked) -> Answer | tuple[str, str]:
    """The answer; or what the child was doing when it ended, and how it ended."""
    with tempfile.TemporaryDirectory(prefix="attncheck-") as folder:
        question, answer = Path(folder, "asked"), Path(folder, "answer")
        question.write_bytes(pickle.dumps(asked))
        child = subprocess.Popen(
            [sys.executable, "-m", "attncheck.fixes.synthesis", str(question), str(answer)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            _, said = child.communicate(timeout=TIMEOUT_SECONDS)
            how = f"ends the process (signal {-child.returncode})"
        except BaseException as error:  # a Ctrl-C, too, must leave none of its forks
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            how = f"does not end within {TIMEOUT_SECONDS} s"
        if child.returncode == 0:
            made = pickle.loads(answer.read_bytes())
            assert isinstance(made, Answer)
            return made
        if child.returncode == BAD_INPUT:
            raise UserError(said.strip().splitlines()[-1])
        doing = answer.read_text(encoding="utf-8") if answer.exists() else "starting"
        if child.returncode > 0:
            raise RuntimeError(f"Synthesis fails at {doing}:\n{said}")
        return doing, how


def _serve(asked: _Asked, doing: _Doing) -> Answer:
    request = asked.request
    torch.set_num_threads(1)  # the tensors are small, and threads wait for each other
    sys.path[:0] = request.path
    modules = _registered_by(request.imports, doing)
    found: list[Synthesis] = []
    refused: list[Refusal] = []
    fatal = list(asked.fatal)
    for op, calls in _calls(asked, doing).items():
        # Values of the second seed are never used to find anything.
        chosen, _ = choose([c for c in calls if f"seed {request.seed + 1}" not in c.label])
        held = [call for call in calls if not any(call is one for one in chosen)]
        work = partial(_work, op, chosen, held, modules.get(op, ""))
        # A fork cannot use a GPU that its parent has used.
        forks = request.device == "cpu"
        made = _in_forks(op, work, doing, fatal) if forks else work(Bench(doing))
        if isinstance(made, Synthesis):
            found.append(made)
        else:
            refused.append(made)
    return Answer(tuple(found), tuple(refused), tuple(fatal))


Work = Callable[[Bench], "Synthesis | Refusal"]


def _work(
    op: str, chosen: Sequence[Call], held: Sequence[Call], imports: str, bench: Bench
) -> Synthesis | Refusal:
    try:
        return synthesise(op, chosen, held, bench=bench, imports=imports)
    except UserError as error:
        return Refusal(op, str(error))


def _in_forks(op: str, work: Work, doing: _Doing, fatal: list[str]) -> Synthesis | Refusal:
    """The work, in a fork of this process: a kernel that ends it costs no new start. What ended it is put
    into `fatal`, and what was found until then is kept. A call that does not end is ended by a signal."""
    with tempfile.TemporaryDirectory(prefix="attncheck-") as folder:
        answer, notes = Path(folder, "answer"), Path(folder, "notes")
        notes.touch()
        for _ in range(ENDINGS_IN_FORKS):
            known = dict(_notes(notes))
            child = os.fork()
            if child == 0:
                _end_with(work, doing, fatal, known, answer, notes)
            _, status = os.waitpid(child, 0)
            if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
                made: Synthesis | Refusal = pickle.loads(answer.read_bytes())
                return made
            if not os.WIFSIGNALED(status):
                raise RuntimeError(f"{doing.now()}: see above")
            fatal.append(doing.now())
    return Refusal(op, f"calling it on pieces ended the process {ENDINGS_IN_FORKS} times.")


def _end_with(
    work: Work,
    doing: _Doing,
    fatal: Sequence[str],
    known: Mapping[str, Row | str],
    answer: Path,
    notes: Path,
) -> NoReturn:
    faulthandler.disable()  # how it ends is told in one line
    try:
        with notes.open("ab") as file:

            def say(text: str) -> None:
                signal.alarm(CALL_SECONDS)
                doing(text)

            def remember(key: str, row: Row | str) -> None:
                pickle.dump((key, row), file)
                file.flush()

            made = work(Bench(say, fatal, known, remember, partial(_apart, answer)))
        answer.write_bytes(pickle.dumps(made))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _apart(answer: Path, work: Callable[[], Any]) -> Any:
    """What the work gives, in a fork of its own; None where that ended."""
    signal.alarm(0)  # until it ends
    child = os.fork()
    if child == 0:
        try:
            answer.write_bytes(pickle.dumps(work()))
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return None
    if os.WEXITSTATUS(status):
        raise RuntimeError("see above")
    return pickle.loads(answer.read_bytes())


def _notes(file: Path) -> Iterator[tuple[str, Row | str]]:
    """What was written before the process ended, perhaps in the middle of an entry."""
    with file.open("rb") as notes:
        while True:
            try:
                yield pickle.load(notes)
            except (EOFError, pickle.UnpicklingError):
                return


def _registered_by(imports: Sequence[str], doing: _Doing) -> dict[str, str]:
    """op -> the module whose import registered it."""
    modules: dict[str, str] = {}
    before = {compat.schema_op_name(schema) for schema in compat.registered_schemas()}
    for module in imports:
        doing(f"importing {module}")
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:
            raise UserError(f"{module} does not import: {type(error).__name__}: {error}") from None
        after = {compat.schema_op_name(schema) for schema in compat.registered_schemas()}
        modules.update(dict.fromkeys(after - before, module))
        before = after
    return modules


def _calls(asked: _Asked, doing: _Doing) -> dict[str, list[Call]]:
    """op -> its calls, of the operators selected, with two seeds and in half precision too."""
    request = asked.request
    availability = Availability(request.device)
    out: dict[str, list[Call]] = {}

    def wanted(op: Any) -> bool:
        name = str(op)
        if name in request.kernel_ops:
            return True
        return (
            recording.is_custom(op)
            and name not in request.known
            and matches(name, request.kernel_ops)
        )

    for operator in _operators(asked, doing):
        if not matches(operator.name, request.operators):
            continue
        doing(f"making {operator.name} available")
        if availability.refusal(operator) is not None:
            continue
        if f"running {operator.name}" in asked.fatal:
            continue
        settings = [s for s in operator.settings if not s.dropout and s.level != "full"]
        halves = [
            replace(s, name=f"{s.name} in half precision", dtype=dtype)
            for dtype in ("bfloat16", "float16")
            for s in settings[:3]
            if s.dtype == "float32"
        ]
        for seed in (request.seed, request.seed + 1):
            doing(f"running {operator.name}")
            for call in recording.record(
                operator, [*settings, *halves], seed, request.device, wanted
            ):
                out.setdefault(call.op, []).append(call)
    return out


def _operators(asked: _Asked, doing: _Doing) -> Iterator[Operator]:
    """Those of the probes, and those made of ops that imports have registered."""
    request = asked.request
    shelf = plugins.load_probes([Path(file) for file in request.probe_files])
    for path, sentence in shelf.errors:
        if str(path) in {str(Path(file).resolve()) for file in request.probe_files}:
            raise UserError(sentence)
    ops: tuple[RegisteredOp, ...] = ()
    if request.imports:
        names = {op for p in shelf.probes for o in p.operators for op in o.kernel_ops}
        look = Look(
            device=request.device,
            call=True,
            known=tuple(names | set(request.known)),
            fatal={
                text.split()[1]: "it ends the process"
                for text in asked.fatal
                if text.startswith("calling ")
            },
        )
        ops = inventory.look(look, doing.file).ops
        ops = tuple(op for op in ops if op.op.partition(".")[0] not in recording.OWN)
    for probe in shelf.probes:
        yield from plugins.with_discovered(probe, ops).operators


class _Doing:
    """The file in which the child says what it does before it does it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._open = file.open("w+b", buffering=0)

    def __call__(self, text: str) -> None:
        data = text.encode()
        os.pwrite(self._open.fileno(), data, 0)
        self._open.truncate(len(data))

    def now(self) -> str:
        return self.file.read_text(encoding="utf-8")


def main() -> None:
    asked = pickle.loads(Path(sys.argv[1]).read_bytes())
    doing = _Doing(Path(sys.argv[2]))
    try:
        made = _serve(asked, doing)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(BAD_INPUT)
    doing.file.write_bytes(pickle.dumps(made))
