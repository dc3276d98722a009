"""What a hunt calls a find: which statuses are, what makes two the same, and how one is told."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from attncheck import rules
from attncheck.model import Case, CaseResult, Outcome, Reason, Report, Severity, Status
from attncheck.probing import EXPLICIT, HEADS, KV_HEADS, KV_SEQUENCE, Operator, Setting, Tensor
from attncheck.runner.rundir import Asked

# Ranks that can never meet again are seen as either, by who looks first.
STUCK = (Status.HANG, Status.DIVERGED)
# The kernel op says it all: each is reported once, whatever the case.
REFUSED = (Status.MISSING_STRATEGY, Status.MIXED_TENSOR)
# What a `Kind` of such is called.
REFUSALS = ("strategy", "mixed")
# Each such example costs a start of the workers.
DEAR = (*STUCK, Status.CRASH)
FAILING = (*DEAR, Status.WRONG, *REFUSED, Status.ERROR, Status.DRIFT)

_NUMBER = re.compile(r"0x[0-9a-f]+|\d+")


@dataclass(frozen=True)
class Kind:
    """What two examples have in common that show the same thing, apart from what brings it about.

    `what`: the status, or `stuck` for those that are one and the same; `rule`: the first that names it;
    `op`: the kernel op, or the operator where no op stands out.
    """

    what: str
    rule: str
    op: str


@dataclass(frozen=True)
class Find:
    """A failing case, shrunk. `kind` and `causes` tell it from others; `runs`: what its shrinking took;
    `complete`: whether it was shrunk to the end; `file`: where it is saved, `command` runs that."""

    asked: Asked
    outcome: Outcome
    kind: Kind
    causes: frozenset[str]
    runs: int = 0
    complete: bool = True
    file: Path | None = None
    command: str = ""
    confirmed: CaseResult | None = None
    note: str = ""


@dataclass
class Tally:
    """What was run and what came of it."""

    run: int = 0
    refused: int = 0  # the unsharded call refuses the setting, or the probe cannot make it
    disagreeing: int = 0  # operator and reference disagree on whole tensors
    disagreement: str = ""  # the first of them
    spared: int = 0  # not run: like others that ended the process
    slow: int = 0  # not answered in time where that is no hang: see is_discarded
    unknown: dict[str, Asked] = field(default_factory=dict)  # our own failures, by their text

    @property
    def discarded(self) -> int:
        return self.refused + self.disagreeing + self.slow


def kinds_of(asked: Asked, outcome: Outcome) -> list[Kind]:
    """Every kind of failure that the outcome shows: one, but for refusals, which name several ops."""
    if outcome.status not in FAILING:
        return []
    if outcome.status in REFUSED and outcome.missing_ops:
        return _refusals(outcome)
    result = CaseResult(asked.case, outcome)
    # A cost is not what a case fails of, and the time of a propagation differs between runs.
    found = [f for f in rules.judge([result], ignore=("ATN3",)) if f.severity is not Severity.INFO]
    rule = found[0].rule if found else ""
    what = "stuck" if outcome.status in STUCK else outcome.status.value
    return [
        Kind(
            what,
            "" if outcome.status in DEAR else rule,
            outcome.kernel_op or asked.case.operator,
        )
    ]


def causes_of(asked: Asked, operator: Operator) -> frozenset[str]:
    """What is out of the ordinary about an example, coarsely."""
    case, setting = asked.case, asked.setting
    tensors = operator.tensors(setting)
    out = {f"option {name}" for name, value in setting.options.items() if value}
    if setting.dtype not in ("float32", operator.settings[0].dtype):
        out.add("low precision")
    if setting.memory != "contiguous":
        out.add("memory that is not contiguous")
    if setting.dropout:
        out.add("dropout")
    if HEADS in setting.sizes and setting.sizes.get(KV_HEADS, setting[HEADS]) != setting[HEADS]:
        out.add("grouped queries")
    if len(case.mesh) > 1:
        out.add("mesh of several axes")
    if case.placement == EXPLICIT:
        out.add("placements of its own")
    if any("P(sum)" in texts for texts in case.placements.values()):
        out.add("partial input")
    return frozenset(out | _shard_causes(tensors, case))


def _shard_causes(tensors: Sequence[Tensor], case: Case) -> set[str]:
    out = set()
    for tensor in tensors:
        sizes = list(tensor.sizes)
        for text, parts in zip(case.placements[tensor.name], case.mesh.values(), strict=False):
            if not text.startswith("S("):
                continue
            dim = int(text[2:-1])
            out.add(f"{tensor.dims[dim]} sharded")
            rows = -(-sizes[dim] // parts)
            if sizes[dim] % parts:
                out.add("uneven shards")
            if rows * (parts - 1) >= sizes[dim] and parts > 1:
                out.add("empty shard")
            sizes[dim] = rows
    return out


def refusals_in(report: Report) -> frozenset[Kind]:
    """The ops that a report says DTensor refuses."""
    return frozenset(kind for result in report.cases for kind in _refusals(result.outcome))


def _refusals(outcome: Outcome) -> list[Kind]:
    kinds = {op.op: "mixed" if op.kind == "mixed" else "strategy" for op in outcome.missing_ops}
    return [Kind(what, "", op) for op, what in kinds.items()]


def essential(causes: frozenset[str]) -> frozenset[str]:
    """What of a find's causes tells it from others: which dims are sharded only where nothing else is odd."""
    odd = frozenset(cause for cause in causes if not cause.endswith(" sharded"))
    return odd or causes - {f"{KV_HEADS} sharded", f"{KV_SEQUENCE} sharded"} or causes


def is_known(kind: Kind, causes: frozenset[str], finds: Iterable[Find]) -> bool:
    """Whether a find of this kind is there that less brought about: this one shows nothing new."""
    for find in finds:
        if find.kind != kind:
            continue
        if kind.what in REFUSALS or find.causes <= causes:
            return True
        # What ends the process costs seconds each time: here only the coarsest of causes count.
        if kind.what in ("stuck", "crash") and _coarse(find.causes) <= _coarse(causes):
            return True
    return False


def _coarse(causes: frozenset[str]) -> frozenset[str]:
    return causes & {
        "empty shard",
        "uneven shards",
        "partial input",
        "grouped queries",
        "memory that is not contiguous",
    }


def is_discarded(asked: Asked, outcome: Outcome, tally: Tally, slow: bool) -> bool:
    """Whether nothing can be said of the example; it is counted.

    `slow`: it takes long to propagate its operator's shapes (or its ranks are simulated, one after the
    other, and cannot wait for each other): no answer in time means nothing.
    """
    if outcome.status is Status.HANG and slow:
        tally.slow += 1
        return True
    if outcome.status is Status.UNAVAILABLE:
        tally.refused += 1
        return True
    if outcome.status is not Status.UNKNOWN:
        return False
    if outcome.message.startswith(f"the check failed: {asked.case.operator}: "):
        tally.disagreeing += 1
        tally.disagreement = tally.disagreement or outcome.message
    else:
        tally.unknown.setdefault(_NUMBER.sub("#", outcome.message), asked)
    return True


def unusable(outcome: Outcome) -> bool:
    """Whether the operator is not there at all, whatever the setting."""
    return outcome.status is Status.UNAVAILABLE and outcome.reason is not Reason.SETTING_REFUSED


def in_words(asked: Asked) -> str:
    """`backward, tp=3, heads; batch 1, heads 4, ... float32, causal=True; q S(1), k R, v R`."""
    case, setting = asked.case, asked.setting
    mesh = "x".join(f"{axis}={size}" for axis, size in case.mesh.items())
    named = "each tensor placed by itself" if case.placement == EXPLICIT else case.placement
    parts = [f"{case.direction}, {mesh}, {named}", _setting_words(setting)]
    if case.placement == EXPLICIT:
        parts.append(", ".join(f"{n} {'/'.join(texts)}" for n, texts in case.placements.items()))
    return "; ".join(parts)


def _setting_words(setting: Setting) -> str:
    words = [f"{role} {size}" for role, size in setting.sizes.items()]
    words.append(setting.dtype)
    words += [f"{name}={_value(value)}" for name, value in setting.options.items()]
    if setting.dropout:
        words.append(f"dropout {setting.dropout}")
    if setting.memory != "contiguous":
        words.append(f"{setting.memory} memory")
    return ", ".join(words)


def _value(value: object) -> str:
    return str(value).replace(" ", "")


def seen(find: Find) -> str:
    """What was seen of the find, in one line: of several ops that are refused, of this one."""
    for op in find.outcome.missing_ops:
        if op.op == find.kind.op and find.kind.what in REFUSALS:
            return line(replace(find.outcome, message=op.message))
    return line(find.outcome)


def line(outcome: Outcome, width: int = 240) -> str:
    """The outcome's message, in one line."""
    text = " ".join(outcome.message.split())
    if outcome.exception_type and not text.startswith(outcome.exception_type):
        text = f"{outcome.exception_type}: {text}"
    return text if len(text) <= width else text[: width - 3] + "..."


def mesh_text(mesh: Mapping[str, int]) -> str:
    """As `--mesh` takes it: `tp=3`, `dp=2,tp=2`."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.items())
