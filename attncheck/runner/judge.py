"""From what all ranks recorded of a case to its outcome. Runs on rank 0; no communication."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from attncheck.model import (
    DIAGNOSES,
    Case,
    Collective,
    Fact,
    KernelOp,
    MissingOp,
    Outcome,
    RankState,
    Spread,
    Status,
)
from attncheck.probing import KV_SEQUENCE, SEQUENCE
from attncheck.runner import repeats
from attncheck.runner.case import Local, Prepared, RankRecord
from attncheck.runner.drift import Expected
from attncheck.runner.inputs import DTYPES, cotangent
from attncheck.runner.oracle import (
    RankResult,
    Verdict,
    judge_dropout,
    judge_values,
)
from attncheck.runner.placements import coordinates, shard_dim

_WRONG = {
    "wrong_result",
    "wrong_gradient",
    "nonfinite",
    "replica_wrong",
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


@dataclass(frozen=True)
class Values:
    """One set of values: its seed, the whole arguments, and what is expected of every result."""

    seed: int
    prepared: Prepared
    expected: Mapping[str, Expected]


def failed(records: Sequence[RankRecord], seed: int, hash_seeds: Sequence[int]) -> Outcome:
    """The outcome where attncheck or the probe failed on some rank."""
    why = next(r.failure for r in records if r.failure)
    ranks = tuple(_rank_state(r, hash_seeds) for r in records)
    return Outcome(Status.UNKNOWN, f"the check failed: {why}", ranks=ranks, seed=seed)


def judge(
    case: Case,
    values: Sequence[Values],
    records: Sequence[RankRecord],
    hash_seeds: Sequence[int],
    standins: tuple[str, ...],
) -> Outcome:
    """The outcome of one case; `records` in rank order, `values` as in the records: the first set is that
    of the first two calls."""
    seed = values[0].seed
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
    illegal = _illegal(records)
    diverged = _divergence(records, tuple(case.mesh.values()))
    if diverged:
        op = _parting_op(records, _own_kernel_op(values[0].prepared, base.kernel_ops))
        if illegal:  # what ranks do with a tensor that is not there says nothing of them
            op = illegal[0].subject
            diverged = f"local_shape {op}: {illegal[0].detail}; beyond it {diverged}"
        return replace(base, status=Status.DIVERGED, message=diverged, kernel_op=op, facts=illegal)
    if base.missing_ops:
        base = replace(base, outputs=_output_placements(records[0].results))
        return _refused(base, records)
    exception = records[0].exception
    if exception:
        kind, text, op = exception
        if illegal:  # what raises beyond it was handed what is not there
            op = illegal[0].subject
            text = f"local_shape {op}: {illegal[0].detail}; beyond it {kind}: {text}"
            return replace(base, status=Status.WRONG, message=text, kernel_op=op, facts=illegal)
        return replace(base, status=Status.ERROR, exception_type=kind, message=text, kernel_op=op)
    return _judge_numbers(base, case, values, records)


def changed(records: Sequence[RankRecord]) -> tuple[str, ...]:
    """What the case left changed in the process of some rank."""
    return tuple(dict.fromkeys(name for record in records for name in record.changed))


def left_changed(outcome: Outcome, names: Sequence[str]) -> Outcome:
    """The outcome with what it left changed, as facts and in words."""
    facts = tuple(Fact("process_changed", name) for name in names)
    text = f"afterwards the process was changed ({', '.join(names)}), so the workers started afresh"
    message = f"{outcome.message}; {text}" if outcome.message else text
    return replace(outcome, facts=(*outcome.facts, *facts), message=message)


def collectives_differ(records: Sequence[RankRecord], mesh: Sequence[int]) -> bool:
    """Whether the ranks issued different collectives: the group is then out of step and must be rebuilt."""
    return len({tuple(names) for names in _names(records, mesh)}) > 1


def _judge_numbers(
    base: Outcome, case: Case, values: Sequence[Values], records: Sequence[RankRecord]
) -> Outcome:
    first, *others = values
    verdict = _verdict(case, first, [r.results for r in records])
    if not first.prepared.setting.dropout:
        warm = _verdict(case, first, [r.warm or {} for r in records])
        verdict.facts += _second_call(verdict, warm)
    unrepeatable = {name for record in records for name in record.unrepeatable}
    if not any(fact.code == "second_call_differs" for fact in verdict.facts):
        detail = "the same values gave other bits in another call"
        verdict.facts += [Fact("order_dependent", name, detail) for name in sorted(unrepeatable)]
    spread = {}
    if others:
        more = [
            (other.seed, _verdict(case, other, [r.repeats[at] for r in records]))
            for at, other in enumerate(others)
        ]
        spread = _spread([(first.seed, verdict), *more], unrepeatable)
        _take_worst(verdict, more)
    illegal = _illegal(records)
    if not any(fact.code == "local_shape" for fact in verdict.facts):
        verdict.facts = [*illegal, *verdict.facts]
    unasked = () if first.prepared.operator.communicates else base.collectives
    status = _numbers_status(verdict, unasked)
    op = ""
    if illegal:
        op = illegal[0].subject
    elif status is not Status.SUPPORTED:
        op = _own_kernel_op(first.prepared, base.kernel_ops, verdict.facts)
    if status is Status.REDISTRIBUTED:
        op = max(base.collectives, key=lambda c: c.bytes).kernel_op
    return replace(
        base,
        status=status,
        kernel_op=op,
        message=_message(verdict, base.collectives, status),
        outputs=_output_placements(records[0].results),
        errors=verdict.errors,
        spread=spread,
        facts=tuple(verdict.facts),
    )


def _verdict(case: Case, values: Values, per_rank: Sequence[Mapping[str, Local]]) -> Verdict:
    results = _by_name(per_rank)
    sizes = tuple(case.mesh.values())
    if values.prepared.setting.dropout:
        verdict = Verdict()
        dtype = DTYPES[values.prepared.setting.dtype]
        _judge_dropout_case(verdict, case, values.prepared, results, sizes, dtype, values.seed)
        return verdict
    wanted = {
        name: value
        for name, value in values.expected.items()
        if case.direction == "backward" or not name.startswith("grad.")
    }
    partial = any("P(sum)" in texts for texts in case.placements.values())
    summed = DTYPES[values.prepared.setting.dtype] if partial else None
    return judge_values(results, wanted, sizes, summed)


def _spread(
    verdicts: Sequence[tuple[int, Verdict]], unrepeatable: Collection[str]
) -> dict[str, Spread]:
    """The spread of each tensor that was judged with every set of values."""
    names = [n for n in verdicts[0][1].errors if all(n in v.errors for _, v in verdicts)]
    return {
        name: repeats.spread(
            [(seed, v.errors[name]) for seed, v in verdicts], name not in unrepeatable
        )
        for name in names
    }


def _take_worst(verdict: Verdict, more: Sequence[tuple[int, Verdict]]) -> None:
    """Make `verdict` that of the worst set of values, tensor by tensor; new facts name their seed."""
    for seed, other in more:
        known = {(f.code, f.subject) for f in verdict.facts}
        verdict.facts += [
            replace(fact, detail=f"{fact.detail} (seed {seed})")
            for fact in other.facts
            if (fact.code, fact.subject) not in known
        ]
        for name, stat in other.errors.items():
            if name not in verdict.errors or stat.ratio > verdict.errors[name].ratio:
                verdict.errors[name] = stat


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
    # Only what is no value of its own is taken from this; the size of the values bounds the replicas.
    even = torch.full(out.shape, 1.0 / max(out.shape[-1], 1), dtype=torch.float64)
    probe = judge_values({"out": out}, {"out": Expected(even, even.to(dtype))}, sizes)
    codes = ("local_shape", "plain_result", "replicas_differ", "replica_wrong")
    verdict.facts += [f for f in probe.facts if f.code in codes]
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
    worse = [
        f for f in second.facts if (f.code, f.subject) not in codes and f.code not in DIAGNOSES
    ]
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


def _divergence(records: Sequence[RankRecord], mesh: Sequence[int]) -> str:
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
    names = _names(records, mesh)
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


def _names(records: Sequence[RankRecord], mesh: Sequence[int]) -> list[list[str]]:
    """The collectives of each rank, with sizes: DTensor pads uneven shards, so the ranks of a process group
    send equally much. On a mesh of several axes other groups hold other shards, and may send more or less
    while all ranks run the same ops on the same placements: such steps go by their name alone."""
    sequences = [record.trace.sequence for record in records]
    same_path = len({tuple(record.trace.ops.items()) for record in records}) == 1
    names: list[list[str]] = [[] for _ in records]
    for step in range(max(map(len, sequences))):
        entries = [seq[step] if step < len(seq) else "" for seq in sequences]
        by_group = same_path and "" not in entries and _agree_in_groups(entries, mesh)
        for mine, entry in zip(names, entries, strict=True):
            name, _, size = entry.partition(":")
            if name:
                mine.append(name if by_group else f"{name} of {size} B")
    return names


def _agree_in_groups(entries: Sequence[str], mesh: Sequence[int]) -> bool:
    """Whether all ranks issued the same collective, and the ranks along some mesh axis equally much, but
    not those along all."""
    if len(set(entries)) == 1 or len({entry.partition(":")[0] for entry in entries}) > 1:
        return False
    for axis in range(len(mesh)):
        groups: dict[tuple[int, ...], set[str]] = {}
        for coordinate, entry in zip(coordinates(mesh), entries, strict=True):
            others = (*coordinate[:axis], *coordinate[axis + 1 :])
            groups.setdefault(others, set()).add(entry)
        if mesh[axis] > 1 and all(len(sizes) == 1 for sizes in groups.values()):
            return True
    return False


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


def _parting_op(records: Sequence[RankRecord], own: str) -> str:
    """The first kernel op that ranks saw with other placements; else where a rank raised; else the
    operator's `own`, or the last one seen."""
    for together in zip(*(r.trace.ops for r in records), strict=False):
        if len(set(together)) > 1:
            return str(together[0][0])
    raised = next((r for r in records if r.exception), None)
    if raised is not None and raised.exception is not None:
        return raised.exception[2] or raised.trace.last_op
    return own or records[0].trace.last_op


def _illegal(records: Sequence[RankRecord]) -> tuple[Fact, ...]:
    """The first kernel op that gave a local tensor whose shape is not what its placements say."""
    for record in records:
        for (op, _), why in record.trace.illegal.items():
            return (Fact("local_shape", op, f"an output of it: {why}"),)
    return ()


def _own_kernel_op(prepared: Prepared, ops: Sequence[KernelOp], facts: Sequence[Fact] = ()) -> str:
    """The operator's kernel op, where this case reached one in the direction that is at fault; else nobody
    stands out."""
    judged = [f.subject for f in facts if f.code not in DIAGNOSES]
    backward = bool(judged) and all(subject.startswith("grad.") for subject in judged)
    phases = ("backward",) if backward else ("forward",)
    for among in (phases, ("forward", "backward")):
        reached = [
            op
            for op in prepared.operator.kernel_ops
            if any(k.op == op and k.phase in among for k in ops)
        ]
        if reached:
            return reached[0] if len(reached) == 1 or len(prepared.operator.kernel_ops) <= 2 else ""
    return ""


# What values say that are wrong from the first call on: an op can be asked about it.
_ASKABLE = {"wrong_result", "wrong_gradient", "nonfinite", "local_shape", "replicas_differ"}


def wants_blame(outcome: Outcome, dropout: bool) -> bool:
    """Whether asking each kernel op by itself can say more of who is at fault."""
    codes = {fact.code for fact in outcome.facts}
    known = outcome.kernel_op in {f.subject for f in outcome.facts if f.code == "local_shape"}
    return outcome.status is Status.WRONG and bool(codes & _ASKABLE) and not (known or dropout)


def blamed(outcome: Outcome, op: str, all_asked: bool) -> Outcome:
    """The outcome with the op that is at fault, or, where all were asked and none is, with none."""
    if op:
        return replace(outcome, kernel_op=op)
    if not all_asked:
        return outcome
    text = "each kernel op gave on shards what it gives on whole ones: the fault lies around them"
    fact = Fact("around_the_ops", "", text)
    message = f"{outcome.message}; {text}"
    return replace(outcome, kernel_op="", message=message, facts=(*outcome.facts, fact))


def _by_name(per_rank: Sequence[Mapping[str, Local]]) -> dict[str, RankResult]:
    out = {}
    for name, first in per_rank[0].items():
        if all(name in results for results in per_rank):
            locals_by_rank = [results[name].tensor for results in per_rank]
            out[name] = RankResult(locals_by_rank, first.shape, first.placements)
    return out


def _output_placements(results: Mapping[str, Local]) -> dict[str, tuple[str, ...]]:
    return {name: local.placements or ("plain",) for name, local in results.items()}
