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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from attncheck import plugins
from attncheck.model import Case, Outcome
from attncheck.probing import Operator
from attncheck.runner import case as cases
from attncheck.runner import compat, journal, judge, recover
from attncheck.runner.available import Availability
from attncheck.runner.case import Prepared, RankRecord
from attncheck.runner.observe import Observer, StateFile
from attncheck.runner.oracle import Expected, disagreement
from attncheck.runner.rundir import RunConfig, RunDir
from attncheck.runner.watchdog import EXIT_STUCK, Watchdog

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
        worker = Worker(run, config, rank, ranks, store, fault_file)
        worker.loop()
    compat.quiet_exit(0)


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
        self.cases = run.cases()
        self.done = set(journal.read(run.journal).outcomes)
        self.journal = journal.Journal(run.journal) if rank == 0 else None
        self.state = StateFile(run.state(rank))
        self.state.set("idle", "")
        self.observer = Observer(self.state)
        self.operators: dict[str, Operator] = {}
        for module in config.imports:
            importlib.import_module(module)
        for file in config.probe_files:
            probe = plugins.load_probe_file(Path(file))
            for operator in plugins.with_discovered(probe, config.registered).operators:
                self.operators[operator.name] = operator
        self.availability = Availability(config.device)
        self.prepared: tuple[tuple[str, str], Prepared] | None = None
        self.expected: tuple[tuple[str, str], dict[str, Expected]] | None = None
        torch.set_num_threads(1)
        _init_group(config, store, rank, ranks)
        names = tuple(config.mesh)
        self.mesh = init_device_mesh(
            config.device, tuple(config.mesh.values()), mesh_dim_names=names
        )
        self.watchdog = Watchdog(run, rank, ranks, self.state, config.case_timeout)
        self.watchdog.start()

    def loop(self) -> None:
        # The decomposition search makes millions of short-lived objects and no cycles to speak of:
        # collecting between cases instead of inside them saves a fifth of its time.
        gc.disable()
        for index, case in enumerate(self.cases):
            if index in self.done:
                continue
            if index % 32 == 0:
                gc.collect()
            self._run(index, case)
        if self.journal is not None:
            peaks = [self._peak(r) for r in range(self.ranks)]
            self.journal.note("finished", peak_rss_mib=peaks)
            self.store.set("finished", "yes")
        else:
            self.store.set(f"peak/{self.rank}", f"{cases.peak_rss_mib():.1f}")
            # The store lives in torchrun's agent; leave together so that nobody's exit looks like a death.
            self.store.wait(["finished"], datetime.timedelta(seconds=60))

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
            record = cases.run_case(
                prepared,
                case,
                self.rank,
                self.mesh,
                self.config.device,
                self.config.seed,
                self.observer,
            )
            record.seconds = {
                "prepare": prepared_at - began,
                "run": time.perf_counter() - prepared_at,
            }
        except (Exception, SystemExit) as error:  # a probe's exit() ends its case, not the scan
            prepared, record = None, cases.failed_record(self.rank, error)
        after = compat.process_state()
        record.changed = tuple(name for name, value in state.items() if after[name] != value)
        self.state.set("done", _raised(record) or None)
        if self.journal is None:
            self.store.set(f"record/{index}/{self.rank}", _pack(record))
            self.watchdog.end()
            faulthandler.cancel_dump_traceback_later()
            again = self._wait(f"end/{index}")
        else:
            again = self._finish(index, case, prepared, record)
        if again == b"restart":
            compat.quiet_exit(EXIT_STUCK)

    def _finish(
        self, index: int, case: Case, prepared: Prepared | None, record: RankRecord
    ) -> bytes:
        """Rank 0: gather, judge, journal, decide."""
        assert self.journal is not None
        began = time.perf_counter()
        records = [record]
        for rank in range(1, self.ranks):
            # The watchdog still runs: a peer that never answers ends this case by its deadline.
            records.append(_unpack(self._wait(f"record/{index}/{rank}")))
            self.store.delete_key(f"record/{index}/{rank}")
        self.watchdog.end()
        faulthandler.cancel_dump_traceback_later()
        gathered = time.perf_counter()
        try:
            outcome = self._judge(case, prepared, records)
        except (Exception, SystemExit) as error:
            failed = [cases.failed_record(self.rank, error)]
            outcome = judge.failed(failed, self.config.seed, self.config.hash_seeds)
        # Ranks out of step, or a process that is not what it was: the next case needs fresh ones.
        changed = judge.changed(records)
        again = b"restart" if changed or judge.collectives_differ(records) else b"go"
        if changed:
            outcome = judge.left_changed(outcome, changed)
        seconds = {
            **record.seconds,
            "wait_for_ranks": gathered - began,
            "judge": time.perf_counter() - gathered,
        }
        self.journal.end(index, outcome, seconds={k: round(v, 4) for k, v in seconds.items()})
        self.store.set(f"end/{index}", again)
        return again

    def _judge(self, case: Case, prepared: Prepared | None, records: list[RankRecord]) -> Outcome:
        if prepared is None:  # this rank's record says why
            return judge.failed(records, self.config.seed, self.config.hash_seeds)
        expected: Mapping[str, Expected] = {}
        if prepared.refused is None:
            expected = self._expect(case, prepared)
        return judge.judge(
            case,
            prepared,
            records,
            expected,
            self.config.seed,
            self.config.hash_seeds,
            self.availability.standins(case.operator),
        )

    def _wait(self, key: str) -> bytes:
        # A peer that died is torchrun's business; a peer that is stuck ends itself by its deadline.
        self.store.wait([key], datetime.timedelta(seconds=self.config.case_timeout + 120))
        value = self.store.get(key)
        return bytes(value)

    def _prepare(self, case: Case) -> Prepared:
        """Consecutive cases share operator and setting, so one slot of memory is enough."""
        key = (case.operator, case.setting_name)
        if self.prepared is None or self.prepared[0] != key:
            operator = self.operators[case.operator]
            setting = next(s for s in operator.settings if s.name == case.setting_name)
            refused = self.availability.refusal(operator)
            if refused is not None:
                made = Prepared(operator, setting, (), {}, {}, refused)
            else:
                made = cases.prepare(operator, setting, self.config.seed, self.config.device)
            self.prepared = (key, made)
        return self.prepared[1]

    def _expect(self, case: Case, prepared: Prepared) -> dict[str, Expected]:
        key = (case.operator, case.setting_name)
        if self.expected is None or self.expected[0] != key:
            reference = cases.run_reference(prepared, self.config.seed)
            made = {
                name: Expected(value, prepared.unsharded[name])
                for name, value in reference.items()
                if name in prepared.unsharded
            }
            faults = [why for name, value in made.items() if (why := disagreement(name, value))]
            if faults and not prepared.setting.dropout:
                raise cases.ProbeError(f"{case.operator}: {faults[0]}")
            self.expected = (key, made)
        return self.expected[1]


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


def _init_group(config: RunConfig, store: Any, rank: int, ranks: int) -> None:
    timeout = datetime.timedelta(seconds=config.case_timeout * 2 + 60)
    backend = "gloo"
    if config.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        # NCCL refuses ranks that share a GPU; gloo stages through the host.
        if torch.cuda.device_count() >= ranks:
            backend = "nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)


def _pack(record: RankRecord) -> bytes:
    buffer = io.BytesIO()
    torch.save(record, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> RankRecord:
    # Written by our own rank of the same run a moment ago: not a file from elsewhere.
    record = torch.load(io.BytesIO(data), weights_only=False)
    assert isinstance(record, RankRecord)
    return record
