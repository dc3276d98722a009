"""What earlier matrices measured, and when it still holds.

An outcome is kept under its scope, which is all that can affect it beside the case: attncheck's own code, the
file of the probe, the environment, those packages above it that the operator needs, and the machine's device.
One file of JSON lines a scope.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

import attncheck
from attncheck import files, provision, rules
from attncheck.errors import UserError
from attncheck.model import Case, CaseResult, Finding, Outcome, Reason, Status, to_json
from attncheck.runner.rundir import RunConfig


def outcomes_folder() -> Path:
    return provision.cache_root() / "matrix" / "outcomes"


def verdicts_folder() -> Path:
    return provision.cache_root() / "matrix" / "verdicts"


class Store:
    """The outcomes of the scopes that are asked for, each file read once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, dict[str, Outcome]] = {}

    def get(self, scope: str, key: str) -> Outcome | None:
        if scope not in self._known:
            self._known[scope] = _read(self._folder / f"{scope}.jsonl")
        return self._known[scope].get(key)

    def add(self, measured: Iterable[tuple[str, str, Outcome]]) -> None:
        """Keep outcomes by scope and key. A disk that is full costs the memory, not the matrix."""
        lines: dict[str, list[str]] = {}
        for scope, key, outcome in measured:
            if lasting(outcome) and self.get(scope, key) is None:
                self._known[scope][key] = outcome
                line = json.dumps({"key": key, "outcome": to_json(outcome)}, allow_nan=False)
                lines.setdefault(scope, []).append(f"{line}\n")
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            for scope, own in lines.items():
                # One write: two matrices that add to one file do not mix their lines.
                handle = os.open(
                    self._folder / f"{scope}.jsonl", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644
                )
                with os.fdopen(handle, "ab") as file:
                    file.write("".join(own).encode())


class _Line(msgspec.Struct):
    key: str
    outcome: Outcome


def _read(file: Path) -> dict[str, Outcome]:
    """What a file holds; a torn line (a full disk) is left out, and run again."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError:
        return {}
    decoder = msgspec.json.Decoder(_Line)
    known = {}
    for line in lines:
        with contextlib.suppress(msgspec.MsgspecError):
            decoded = decoder.decode(line)
            if lasting(decoded.outcome):
                known[decoded.key] = decoded.outcome
    return known


class Verdicts:
    """What the rules said of the outcomes of a whole cell: they are the same as long as these are, and the
    code of attncheck. One file a cell."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def judge(
        self,
        keys: Sequence[tuple[str, str]],
        results: Sequence[CaseResult],
        select: Sequence[str],
        ignore: Sequence[str],
    ) -> tuple[Finding, ...]:
        """`keys`: where the outcome of each case is kept; beside them, `results` may have entries that no
        case could be planned of."""
        if not all(lasting(result.outcome) for result in results):
            return rules.judge(results, select=select, ignore=ignore)
        beside = [to_json(result) for result in results[len(keys) :]]
        text = json.dumps([all_code(), keys, beside, list(select), list(ignore)])
        file = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            return msgspec.json.decode(file.read_bytes(), type=tuple[Finding, ...])
        findings = rules.judge(results, select=select, ignore=ignore)
        with contextlib.suppress(OSError, UserError):
            self._folder.mkdir(parents=True, exist_ok=True)
            files.write_text(file, json.dumps(to_json(findings), allow_nan=False))
        return findings


def lasting(outcome: Outcome) -> bool:
    """Whether another run would say the same: not where the check itself failed, the case was not run, or a
    deadline was missed, which a loaded machine can do as well as ranks that wait for each other."""
    passing = (Status.UNKNOWN, Status.HANG)
    return outcome.status not in passing and outcome.reason is not Reason.NOT_RUN


def scope(
    environment: str, packages: Iterable[str], probe: str, fixes: Iterable[str], device: str
) -> str:
    """The name of all that can affect the outcomes of an operator, beside its cases."""
    parts = [code(), environment, *sorted(packages), "", probe, *fixes, "", device]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def key(case: Case, config: RunConfig) -> str:
    """The name of a case, and of the values and the deadline that it is run with."""
    run = [config.seed, config.repeats, list(config.hash_seeds), config.case_timeout]
    text = json.dumps([to_json(case), run], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


# --- what the outcomes depend on -----------------------------------------------------------------

# The folders and files of attncheck that a worker runs; tests/unit/matrix/test_outcomes.py looks that
# none of what they import is left out.
WORKERS = (
    "runner",
    "standins",
    "__init__.py",
    "audited.py",
    "errors.py",
    "inventory.py",
    "model.py",
    "ownership.py",
    "plugins.py",
    "probing.py",
    "rings.py",
)


@functools.cache
def code() -> str:
    """A digest of the code of attncheck that a worker runs: a new report format re-runs nothing."""
    return _digest_of_code(WORKERS)


@functools.cache
def all_code() -> str:
    """A digest of all of attncheck's code, without the shelves: what rules say is made of it."""
    return _digest_of_code([""])


def _digest_of_code(names: Iterable[str]) -> str:
    package = Path(attncheck.__file__).resolve().parent
    found = {}
    for name in names:
        place = package / name
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            found[file.relative_to(package).as_posix()] = file
    return digest_of(found)


def digest_of(files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, file in files.items():
        digest.update(f"{name}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
