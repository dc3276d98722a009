"""The worker: one process a rank, all cases in order, one outcome in the journal for each.

Ranks agree on a case's end through the store, never through a collective: when one rank raised and
another did not, a collective would hang. Rank 0 judges, because it alone needs all shards; it writes the
journal and tells the others whether to go on in this process or to start afresh.
"""

from __future__ import annotations

import datetime
import faulthandler
import gc
import importlib
import io
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from attncheck import plugins
from attncheck.model import Case, Outcome
from attncheck.probing import Operator, Setting
from attncheck.runner import blame, compat, journal, judge, recover
from attncheck.runner import case as cases
from attncheck.runner.available import Availability
from attncheck.runner.blame import OpCall
from attncheck.runner.case import Prepared, RankRecord
from attncheck.runner.drift import Expected, disagreement
from attncheck.runner.judge import Values
from attncheck.runner.observe import StateFile
from attncheck.runner.processes import Processes
from attncheck.runner.rundir import Queue, RunConfig, RunDir
from attncheck.runner.simulate import Simulated
from attncheck.runner.watchdog import EXIT_STUCK, Watchdog

# One set of values: its seed, and the operator ready to run with them.
Drawn = tuple[int, Prepared]

# TCPStore takes no value above 8 MiB: it drops the connection (2.13), and the rank dies.
STORE_BYTES = 2**22

# A rank that is not up by then never will be; torchrun tries again, and the parent counts.
START_SECONDS = 120.0


def work(run: RunDir, config: RunConfig, rank: int) -> None:
    """Run every case that the journal does not have yet. Never returns: leaves with an exit code."""
    attempt = f"{config.launch}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store, rank, ranks = compat.rendezvous_store(attempt)
    # Rank 0 reads what the last attempt left behind before anybody overwrites it.
    if rank == 0:
        log = journal.Journal(run.journal)
        _recover(run, config, attempt, log)
        log.note("worker_up", attempt=attempt)
        store.set("recovered", "yes")
    else:
        store.wait(["recovered"], datetime.timedelta(seconds=600))
    with run.fault(rank, attempt).open("w", encoding="utf-8") as fault_file:
        faulthandler.enable(fault_file)
        faulthandler.dump_traceback_later(START_SECONDS, exit=True, file=fault_file)
        worker = _kind(config)(run, config, rank, ranks, store, fault_file)
        worker.loop()
    compat.quiet_exit(0)


def _kind(config: RunConfig) -> type[Worker]:
    if not config.serve:
        return Worker
    from attncheck.runner.serve import Server  # it builds on this module

    return Server


def _recover(run: RunDir, config: RunConfig, attempt: str, log: journal.Journal) -> None:
    open_case = journal.read(run.journal).open_case
    if open_case is not None:
        log.end(open_case, recover.outcome_of_dead_case(run, config, open_case, attempt))


class Worker:
    """State of one rank: group, mesh, what was prepared, and the journal (rank 0)."""

    def __init__(
        self,
        run: RunDir,
        config: RunConfig,
        rank: int,
        ranks: int,
        store: Any,
        fault_file: io.TextIOWrapper,
    ) -> None:
        self.config = config
        self.rank = rank
        self.ranks = ranks
        self.store = store
        self.fault_file = fault_file
        self.cases = () if config.serve else run.cases()
        self.queue = Queue(run.queue)
        self.done = set(journal.read(run.journal).outcomes)
        self.journal = journal.Journal(run.journal) if rank == 0 else None
        self.state = StateFile(run.state(rank))
        self.state.set("idle", "")
        self.operators: dict[str, Operator] = {}
        for module in config.imports:
            importlib.import_module(module)
        for file in config.probe_files:
            probe = plugins.load_probe_file(Path(file))
            for operator in plugins.with_discovered(probe, config.registered).operators:
                self.operators[operator.name] = operator
        for name, settings in config.settings.items():
            own = self.operators[name]
            self.operators[name] = replace(own, settings=(*own.settings, *settings))
        self.availability = Availability(config.device)
        self.fixed = False
        # Consecutive cases share operator and setting, so one slot of memory is enough.
        self.prepared: tuple[tuple[str, str], list[Drawn]] | None = None
        self.values: tuple[tuple[str, str], list[Values]] | None = None
        torch.set_num_threads(1)
        self.engine: Processes | Simulated = (
            Simulated(config, self.state)
            if config.engine == "simulated"
            else Processes(config, self.state, store, rank, ranks)
        )
        self.watchdog = Watchdog(run, rank, ranks, self.state, config.case_timeout)
        self.watchdog.start()

    def loop(self) -> None:
        # The decomposition search makes millions of short-lived objects and no cycles to speak of:
        # collecting between cases instead of inside them saves a fifth of its time.
        gc.disable()
        for index, case in enumerate(self.cases):
            if index in self.done or case.mesh != self.config.mesh:
                continue
            if index >= self.config.fix_from and not self.fixed:
                self._register_fixes()
            if index % 32 == 0:
                gc.collect()
            self._run(index, case)
        self._leave()

    def _leave(self) -> None:
        """All ranks together, once there is nothing more to run."""
        if self.journal is not None:
            peaks = [self._peak(r) for r in range(self.ranks)]
            self.journal.note("finished", peak_rss_mib=peaks)
            self.store.set("finished", "yes")
        else:
            self.store.set(f"peak/{self.rank}", f"{cases.peak_rss_mib():.1f}")
            # The store lives in torchrun's agent; leave together so that nobody's exit looks like a death.
            self.store.wait(["finished"], datetime.timedelta(seconds=60))

    def _register_fixes(self) -> None:
        """Once what registers the ops is here, stand-ins included: a fix is for ops that there are."""
        self.fixed = True
        if not self.config.fixes:
            return
        for name in dict.fromkeys(case.operator for case in self.cases):
            self.availability.refusal(self.operators[name])
        for file in self.config.fixes:
            became = plugins.register_fix(Path(file))
            if self.journal is not None:
                self.journal.note("fix", file=file, ops=became)
        self.forget_prepared()  # a function that a fix stands in front of is another one

    def forget_prepared(self) -> None:
        self.prepared = None
        self.values = None

    def _peak(self, rank: int) -> float:
        if rank == 0:
            return round(cases.peak_rss_mib(), 1)
        self.store.wait([f"peak/{rank}"], datetime.timedelta(seconds=60))
        return float(self.store.get(f"peak/{rank}"))

    def _run(self, index: int, case: Case) -> None:
        if self.journal is not None:
            self.journal.start(index)
            self.store.set(f"start/{index}", "go")
        else:
            self._wait(f"start/{index}")
        self.state.case = index
        self.state.collectives = 0
        self.state.set("op", "")
        self.watchdog.begin(index)
        faulthandler.dump_traceback_later(
            self.config.case_timeout + 15, exit=True, file=self.fault_file
        )
        began = time.perf_counter()
        state = compat.process_state()
        try:
            prepared = self._prepare(case)
            prepared_at = time.perf_counter()
            records = self.engine.run(case, prepared)
            records[0].seconds = {
                "prepare": prepared_at - began,
                "run": time.perf_counter() - prepared_at,
            }
        except (Exception, SystemExit) as error:  # a probe's exit() ends its case, not the scan
            prepared, records = None, [cases.failed_record(self.rank, error)]
        after = compat.process_state()
        mine = records[0]
        mine.changed = tuple(name for name, value in state.items() if after[name] != value)
        self.state.set("done", _raised(mine) or None)
        if self.journal is None:
            self._send(f"record/{index}/{self.rank}", _pack(mine))
            self.watchdog.end()
            faulthandler.cancel_dump_traceback_later()
            again = self._wait(f"end/{index}")
            if again == b"show":
                self._send(f"calls/{index}/{self.rank}", _pack(self.engine.calls().to_send()))
                again = self._wait(f"end/{index}/shown")
        else:
            again = self._finish(index, case, prepared, records)
        if again == b"restart":
            compat.quiet_exit(EXIT_STUCK)

    def _finish(
        self, index: int, case: Case, prepared: list[Drawn] | None, own: Sequence[RankRecord]
    ) -> bytes:
        """Rank 0: gather what it does not have, judge, journal, decide."""
        assert self.journal is not None
        began = time.perf_counter()
        records = [*own]
        for rank in range(1, self.ranks):
            # The watchdog still runs: a peer that never answers ends this case by its deadline.
            records.append(_unpack(self._receive(f"record/{index}/{rank}")))
        self.watchdog.end()
        faulthandler.cancel_dump_traceback_later()
        gathered = time.perf_counter()
        try:
            outcome = self._judge(case, prepared, records)
        except (Exception, SystemExit) as error:
            failed = [cases.failed_record(self.rank, error)]
            outcome = judge.failed(failed, self.config.seed, self.config.hash_seeds)
        end = f"end/{index}"
        if prepared and judge.wants_blame(outcome, bool(prepared[0][1].setting.dropout)):
            outcome = self._blame(index, case, outcome)
            end = f"end/{index}/shown" if self.ranks > 1 else end
        # Ranks out of step, or a process that is not what it was: the next case needs fresh ones.
        changed = judge.changed(records)
        out_of_step = judge.collectives_differ(records, tuple(case.mesh.values()))
        again = b"restart" if changed or out_of_step else b"go"
        if changed:
            outcome = judge.left_changed(outcome, changed)
        seconds = {
            **own[0].seconds,
            "wait_for_ranks": gathered - began,
            "judge": time.perf_counter() - gathered,
        }
        self.journal.end(index, outcome, seconds={k: round(v, 4) for k, v in seconds.items()})
        self.store.set(end, again)
        return again

    def _blame(self, index: int, case: Case, outcome: Outcome) -> Outcome:
        """The outcome with the kernel op that is at fault, as far as what the ranks kept of it tells."""
        self.store.set(f"end/{index}", "show")
        calls = [self.engine.calls().calls]
        for rank in range(1, self.ranks):
            calls.append(_unpack_calls(self._receive(f"calls/{index}/{rank}")))
        try:
            op, all_asked = blame.first_at_fault(calls, tuple(case.mesh.values()))
        except (Exception, SystemExit) as error:  # the verdict stands without it
            cases.failed_record(self.rank, error)
            return outcome
        return judge.blamed(outcome, op, all_asked)

    def _judge(
        self, case: Case, prepared: list[Drawn] | None, records: list[RankRecord]
    ) -> Outcome:
        if prepared is None:  # this rank's record says why
            return judge.failed(records, self.config.seed, self.config.hash_seeds)
        return judge.judge(
            case,
            self._expect(case, prepared),
            records,
            self.config.hash_seeds,
            self.availability.standins(case.operator),
        )

    def _wait(self, key: str) -> bytes:
        # A peer that died is torchrun's business; a peer that is stuck ends itself by its deadline.
        self.store.wait([key], datetime.timedelta(seconds=self.config.case_timeout + 120))
        value = self.store.get(key)
        return bytes(value)

    def _send(self, key: str, data: bytes) -> None:
        """Leave `data` for a peer's `_receive`, in parts that the store takes."""
        parts = [data[at : at + STORE_BYTES] for at in range(0, len(data), STORE_BYTES)]
        for number, part in enumerate(parts):
            self.store.set(f"{key}/part/{number}", part)
        self.store.set(key, str(len(parts)))

    def _receive(self, key: str) -> bytes:
        parts = [f"{key}/part/{number}" for number in range(int(self._wait(key)))]
        data = b"".join(bytes(self.store.get(part)) for part in parts)
        for name in (*parts, key):
            self.store.delete_key(name)
        return data

    def _prepare(self, case: Case) -> list[Drawn]:
        """The operator in its setting with each set of values, by seed; the scan's own seed first."""
        key = (case.operator, case.setting_name)
        if self.prepared is None or self.prepared[0] != key:
            operator = self.operators[case.operator]
            setting = next(s for s in operator.settings if s.name == case.setting_name)
            self.prepared = (key, self._draw(operator, setting))
        return self.prepared[1]

    def _draw(self, operator: Operator, setting: Setting) -> list[Drawn]:
        seed = self.config.seed
        refused = self.availability.refusal(operator)
        if refused is not None:
            return [(seed, Prepared(operator, setting, (), {}, {}, refused))]
        drawn = [(seed, cases.prepare(operator, setting, seed, self.config.device))]
        for other in range(seed + 1, seed + self.config.repeats):
            if drawn[0][1].refused is None:
                made = cases.prepare(operator, setting, other, self.config.device)
                drawn.append((other, made))
        return drawn

    def _expect(self, case: Case, prepared: list[Drawn]) -> list[Values]:
        key = (case.operator, case.setting_name)
        if self.values is None or self.values[0] != key:
            self.values = (key, [_values(case, seed, made) for seed, made in prepared])
        return self.values[1]


def _values(case: Case, seed: int, prepared: Prepared) -> Values:
    """Raises ProbeError where the operator on whole tensors is not what its reference says."""
    if prepared.refused is not None:
        return Values(seed, prepared, {})
    reference = cases.run_reference(prepared, seed)
    expected = {
        name: Expected(value, prepared.unsharded[name])
        for name, value in reference.items()
        if name in prepared.unsharded
    }
    # What a reference does not say of an argument that is written into, the operator itself does.
    for spec in prepared.specs:
        if spec.mutable and spec.name in prepared.unsharded and spec.name not in expected:
            own = prepared.unsharded[spec.name]
            expected[spec.name] = Expected(own.to(torch.float64), own)
    faults = [why for name, value in expected.items() if (why := disagreement(name, value))]
    if faults and not prepared.setting.dropout:
        raise cases.ProbeError(f"{case.operator}: {faults[0]}")
    return Values(seed, prepared, expected)


def _raised(record: RankRecord) -> str:
    """`RuntimeError: heads do not divide in aten.bmm.default`, or '': what a peer that waits for this rank,
    and never hears from it, will want to know."""
    if record.exception is None:
        return ""
    kind, text, op = record.exception
    words = " ".join(
        text.partition("\n")[0].split()
    )  # no tab: it separates the fields of the state file
    return f"{kind}: {words[:120]} in {op or record.trace.last_op or 'no op'}"


def _pack(record: RankRecord | list[OpCall]) -> bytes:
    buffer = io.BytesIO()
    torch.save(record, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> RankRecord:
    # Written by our own rank of the same run a moment ago: not a file from elsewhere.
    record = torch.load(io.BytesIO(data), weights_only=False)
    assert isinstance(record, RankRecord)
    return record


def _unpack_calls(data: bytes) -> list[OpCall]:
    calls = torch.load(io.BytesIO(data), weights_only=False)
    assert isinstance(calls, list)
    return calls
