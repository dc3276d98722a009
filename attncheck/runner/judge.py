"""From what all ranks recorded of a case to its outcome. Runs on rank 0; no communication."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from attncheck.model import (
    Case,
    Collective,
    Fact,
    KernelOp,
    MissingOp,
    Outcome,
    RankState,
    Status,
)
from attncheck.probing import KV_SEQUENCE, SEQUENCE
from attncheck.runner.case import Local, Prepared, RankRecord
from attncheck.runner.inputs import DTYPES, cotangent
from attncheck.runner.oracle import (
    Expected,
    RankResult,
    Verdict,
    judge_dropout,
    judge_values,
)
from attncheck.runner.placements import shard_dim

_WRONG = {
    "wrong_result",
    "wrong_gradient",
    "nonfinite",
    "local_shape",
    "gradient_missing",
    "plain_result",
    "second_call_differs",
    "dropout_rate",
    "dropout_values",
    "dropout_shared",
}
# Addresses, counters and rank numbers differ between ranks without meaning anything.
_NOISE = re.compile(r"0x[0-9a-f]+|\d+")


def failed(records: Sequence[RankRecord], seed: int, hash_seeds: Sequence[int]) -> Outcome:
    """The outcome where attncheck or the probe failed on some rank."""
    why = next(r.failure for r in records if r.failure)
    ranks = tuple(_rank_state(r, hash_seeds) for r in records)
    return Outcome(Status.UNKNOWN, f"the check failed: {why}", ranks=ranks, seed=seed)


def judge(
    case: Case,
    prepared: Prepared,
    records: Sequence[RankRecord],
    expected: Mapping[str, Expected],
    seed: int,
    hash_seeds: Sequence[int],
    standins: tuple[str, ...],
) -> Outcome:
    """The outcome of one case; `records` in rank order."""
    if any(r.failure for r in records):
        return failed(records, seed, hash_seeds)
    ranks = tuple(_rank_state(r, hash_seeds) for r in records)
    base = Outcome(Status.UNKNOWN, ranks=ranks, seed=seed)
    unavailable = next((r.unavailable for r in records if r.unavailable), None)
    if unavailable:
        reason, text = unavailable
        # Whole: an operator that refuses may say why in many lines (xformers, one for each of its kernels).
        return Outcome(Status.UNAVAILABLE, text.strip()[:2000], reason=reason, seed=seed)

    base = replace(
        base,
        kernel_ops=_kernel_ops(records),
        missing_ops=_missing_ops(records),
        collectives=_collectives(records),
        timings={k: max(r.timings.get(k, 0.0) for r in records) for k in records[0].timings},
        standins=standins,
    )
    diverged = _divergence(records)
    if diverged:
        return replace(
            base, status=Status.DIVERGED, message=diverged, kernel_op=_parting_op(records)
        )
    if base.missing_ops:
        base = replace(base, outputs=_output_placements(records[0].results))
        return _refused(base, records)
    exception = records[0].exception
    if exception:
        kind, text, op = exception
        return replace(base, status=Status.ERROR, exception_type=kind, message=text, kernel_op=op)
    return _judge_numbers(base, case, prepared, records, expected)


def changed(records: Sequence[RankRecord]) -> tuple[str, ...]:
    """What the case left changed in the process of some rank."""
    return tuple(dict.fromkeys(name for record in records for name in record.changed))


def left_changed(outcome: Outcome, names: Sequence[str]) -> Outcome:
    """The outcome with what it left changed, as facts and in words."""
    facts = tuple(Fact("process_changed", name) for name in names)
    text = f"afterwards the process was changed ({', '.join(names)}), so the workers started afresh"
    message = f"{outcome.message}; {text}" if outcome.message else text
    return replace(outcome, facts=(*outcome.facts, *facts), message=message)


def collectives_differ(records: Sequence[RankRecord]) -> bool:
    """Whether the ranks issued different collectives: the group is then out of step and must be rebuilt."""
    return len({tuple(_names(r)) for r in records}) > 1


def _judge_numbers(
    base: Outcome,
    case: Case,
    prepared: Prepared,
    records: Sequence[RankRecord],
    expected: Mapping[str, Expected],
) -> Outcome:
    sizes = tuple(case.mesh.values())
    dtype = DTYPES[prepared.setting.dtype]
    first = _by_name([r.results for r in records])
    wanted = {
        name: value
        for name, value in expected.items()
        if case.direction == "backward" or not name.startswith("grad.")
    }
    verdict = Verdict()
    if prepared.setting.dropout:
        _judge_dropout_case(verdict, case, prepared, first, sizes, dtype, base.seed)
    else:
        verdict = judge_values(first, wanted, sizes)
        second = _by_name([r.warm or {} for r in records])
        verdict.facts += _second_call(verdict, judge_values(second, wanted, sizes))
    unasked = () if prepared.operator.communicates else base.collectives
    status = _numbers_status(verdict, unasked)
    op = _own_kernel_op(prepared, base.kernel_ops) if status is not Status.SUPPORTED else ""
    if status is Status.REDISTRIBUTED:
        op = max(base.collectives, key=lambda c: c.bytes).kernel_op
    return replace(
        base,
        status=status,
        kernel_op=op,
        message=_message(verdict, base.collectives, status),
        outputs=_output_placements(records[0].results),
        errors=verdict.errors,
        facts=tuple(verdict.facts),
    )


def _judge_dropout_case(
    verdict: Verdict,
    case: Case,
    prepared: Prepared,
    results: Mapping[str, RankResult],
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Masks are random: judge what must hold of any of them. dv must use the mask that forward drew."""
    out = results["out"]
    zeros = torch.zeros(out.shape, dtype=torch.float64)
    probe = judge_values({"out": out}, {"out": Expected(zeros, zeros.to(dtype))}, sizes)
    verdict.facts += [
        f for f in probe.facts if f.code in ("local_shape", "plain_result", "replicas_differ")
    ]
    whole = probe.wholes.get("out")
    if whole is None:
        return
    rate = prepared.setting.dropout
    sharded = any(shard_dim(p) is not None for p in out.placements or ())
    verdict.facts += judge_dropout(whole, out.locals, sharded, rate)
    if case.direction == "backward" and "grad.v" in results:
        shape = torch.Size(out.shape)
        dout = cotangent(prepared.operator.name, prepared.setting, shape, dtype, seed)
        rows = _dim(prepared.operator.output_dims, SEQUENCE)
        columns = _dim(next(s.dims for s in prepared.specs if s.name == "v"), KV_SEQUENCE)
        mask, dout = whole.movedim(rows, -2), dout.to(torch.float64).movedim(rows, -2)
        dv = torch.matmul(mask.transpose(-2, -1), dout).movedim(-2, columns)
        want = {"grad.v": Expected(dv, dv.to(dtype))}
        gradient = judge_values({"grad.v": results["grad.v"]}, want, sizes)
        verdict.errors.update(gradient.errors)
        verdict.facts += gradient.facts


def _dim(dims: Sequence[str], role: str) -> int:
    """Where a role lies; the last but one where a probe does not say."""
    return dims.index(role) if role in dims else -2


def _second_call(first: Verdict, second: Verdict) -> list[Fact]:
    """A second call that is worse than the first was served something stale."""
    codes = {(f.code, f.subject) for f in first.facts}
    worse = [f for f in second.facts if (f.code, f.subject) not in codes]
    return [Fact("second_call_differs", f.subject, f"{f.code}: {f.detail}") for f in worse]


def _numbers_status(verdict: Verdict, unasked: Sequence[Collective]) -> Status:
    codes = {fact.code for fact in verdict.facts}
    if codes & _WRONG:
        return Status.WRONG
    if codes & {"drift_result", "drift_gradient", "replicas_differ"}:
        return Status.DRIFT
    return Status.REDISTRIBUTED if unasked else Status.SUPPORTED


def _message(verdict: Verdict, collectives: Sequence[Collective], status: Status) -> str:
    if status in (Status.WRONG, Status.DRIFT):
        return "; ".join(f"{f.code} {f.subject}: {f.detail}" for f in verdict.facts[:4])
    if status is Status.REDISTRIBUTED:
        return "; ".join(f"{c.count} {c.name} in {c.kernel_op} ({c.bytes} B)" for c in collectives)
    return ""


def _refused(base: Outcome, records: Sequence[RankRecord]) -> Outcome:
    strategy = [m for m in base.missing_ops if m.kind != "mixed"]
    first = strategy[0] if strategy else base.missing_ops[0]
    status = Status.MISSING_STRATEGY if strategy else Status.MIXED_TENSOR
    message = first.message
    after = records[0].exception
    if after:
        message += f" (beyond it, with the op replicated, {after[0]}: {after[1].splitlines()[0]})"
    return replace(base, status=status, kernel_op=first.op, message=message)


def _divergence(records: Sequence[RankRecord]) -> str:
    """What the ranks did differently, or ''."""
    ends = [_ending(r) for r in records]
    if len(set(ends)) > 1:
        parts = []
        for record in records:
            ended = (
                f"{record.exception[0]}: {_line(record.exception[1])}"
                if record.exception
                else "finished"
            )
            parts.append(f"rank {record.rank} {ended}")
        return "ranks ended differently: " + "; ".join(parts)
    names = [_names(r) for r in records]
    for step, together in enumerate(zip(*names, strict=False)):
        if len(set(together)) > 1:
            parts = [f"rank {r.rank} {n}" for r, n in zip(records, together, strict=True)]
            return f"collective {step + 1} differs: " + "; ".join(parts)
    if len({len(n) for n in names}) > 1:
        parts = [f"rank {r.rank} {len(n)}" for r, n in zip(records, names, strict=True)]
        return "different numbers of collectives: " + "; ".join(parts)
    placed = [{k: v.placements for k, v in r.results.items()} for r in records]
    if any(p != placed[0] for p in placed):
        return f"ranks disagree on output placements: {placed}"
    return ""


def _ending(record: RankRecord) -> tuple[str, str]:
    if record.exception is None:
        return "", ""
    kind, text, _ = record.exception
    return kind, _NOISE.sub("#", _line(text))


def _names(record: RankRecord) -> list[str]:
    # With sizes: DTensor pads uneven shards, so ranks in step send equally much.
    return [entry.replace(":", " of ") + " B" for entry in record.trace.sequence]


def _line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0] if lines else ""


def _rank_state(record: RankRecord, hash_seeds: Sequence[int]) -> RankState:
    exception = f"{record.exception[0]}: {_line(record.exception[1])}" if record.exception else ""
    return RankState(
        record.rank,
        hash_seeds[record.rank % len(hash_seeds)],
        record.trace.last_op,
        exception,
        len(record.trace.sequence),
    )


def _kernel_ops(records: Sequence[RankRecord]) -> tuple[KernelOp, ...]:
    return records[0].trace.kernel_ops()


def _missing_ops(records: Sequence[RankRecord]) -> tuple[MissingOp, ...]:
    merged: dict[tuple[str, str, str], MissingOp] = {}
    for record in records:
        for op in record.trace.missing_ops():
            merged.setdefault((op.op, op.phase, op.kind), op)
    return tuple(merged.values())


def _collectives(records: Sequence[RankRecord]) -> tuple[Collective, ...]:
    """Counts of rank 0, bytes of the rank that sends most (uneven shards)."""
    largest: dict[tuple[str, str, str], Collective] = {}
    for record in records:
        for c in record.trace.communication():
            key = (c.name, c.kernel_op, c.phase)
            if key not in largest or c.bytes > largest[key].bytes:
                largest[key] = c
    return tuple(largest.values())


def _parting_op(records: Sequence[RankRecord]) -> str:
    """The first kernel op that ranks saw with other placements; else where a rank raised, or ended."""
    for together in zip(*(r.trace.ops for r in records), strict=False):
        if len(set(together)) > 1:
            return str(together[0][0])
    return next((r.trace.last_op for r in records if r.exception), records[0].trace.last_op)


def _own_kernel_op(prepared: Prepared, ops: Sequence[KernelOp]) -> str:
    """The operator's kernel op, where it has one and this case reached it; else nobody stands out."""
    reached = [op for op in prepared.operator.kernel_ops if any(k.op == op for k in ops)]
    return reached[0] if len(prepared.operator.kernel_ops) <= 2 and reached else ""


def _by_name(per_rank: Sequence[Mapping[str, Local]]) -> dict[str, RankResult]:
    out = {}
    for name, first in per_rank[0].items():
        if all(name in results for results in per_rank):
            locals_by_rank = [results[name].tensor for results in per_rank]
            out[name] = RankResult(locals_by_rank, first.shape, first.placements)
    return out


def _output_placements(results: Mapping[str, Local]) -> dict[str, tuple[str, ...]]:
    return {name: local.placements or ("plain",) for name, local in results.items()}
