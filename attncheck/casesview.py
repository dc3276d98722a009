"""The view of single cases, for formats that show them one by one: everything in words, numbers as text.

`attncheck.view` says what a report comes to; here stands each case, ready to be laid out. As there, all
text is free of control characters, and escaping is the format's business. Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from attncheck.changes import word
from attncheck.drawing import Drawing, drawings
from attncheck.model import (
    UNPLANNED,
    CaseChange,
    CaseResult,
    ChangeKind,
    ErrorStat,
    KernelOp,
    Outcome,
    Report,
    Status,
)
from attncheck.surroundings import in_words
from attncheck.text import clean_tree, one_line, size
from attncheck.view import (
    STYLES,
    View,
    communication,
    mesh_text,
    operator_name,
    setting_name,
    why_not_run,
)

T = TypeVar("T")

KERNEL_OPS = 40  # of a case; a synthesised backward reaches hundreds
MESSAGE = 4000


@dataclass(frozen=True)
class ErrorView:
    """The errors of one tensor (`out`, `grad.q`); `beyond`: more than the bound allows."""

    tensor: str
    max: str
    unsharded: str
    bound: str
    ratio: str
    rms: str
    note: str = ""
    beyond: bool = False


@dataclass(frozen=True)
class CollectiveView:
    name: str
    op: str
    phase: str
    count: int
    size: str


@dataclass(frozen=True)
class KernelOpView:
    op: str
    phase: str
    inputs: str
    outputs: str
    calls: int


@dataclass(frozen=True)
class CaseView:
    """A case and what came of it. `drawings`, `kernel_ops` and `findings` are indexes: into the lists of
    `CasesView`, and into `View.findings`. `before` is the status without a fix, where one was verified;
    `change` says what became of the case since another report (a `ChangeKind` in words), `changed` how."""

    id: str
    operator: str
    setting: str
    placement: str
    direction: str
    mesh: str
    dtype: str
    status: Status
    version: str = ""
    function: str = ""
    sizes: str = ""
    placements: str = ""
    message: str = ""
    reason: str = ""
    exception: str = ""
    kernel_op: str = ""
    cost: str = ""
    before: str = ""
    change: str = ""
    changed: str = ""
    errors: tuple[ErrorView, ...] = ()
    collectives: tuple[CollectiveView, ...] = ()
    missing: tuple[tuple[str, str, str], ...] = ()
    facts: tuple[tuple[str, str, str], ...] = ()
    ranks: tuple[tuple[str, str, str], ...] = ()
    outputs: tuple[tuple[str, str], ...] = ()
    timings: str = ""
    standins: str = ""
    drawings: tuple[int, ...] = ()
    kernel_ops: tuple[int, ...] = ()
    kernel_ops_left_out: int = 0
    findings: tuple[int, ...] = ()


@dataclass(frozen=True)
class Facet:
    """Something by which cases can be told apart: `name` is that of a field of `CaseView`."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class CasesView:
    """`cases` in the order of the report; what many of them share stands once, in the other lists."""

    cases: tuple[CaseView, ...]
    drawings: tuple[Drawing, ...] = ()
    kernel_ops: tuple[KernelOpView, ...] = ()
    facets: tuple[Facet, ...] = ()


# What a reader narrows a matrix down by, in this order.
FACETS = ("direction", "mesh", "dtype", "version")


class _Shared(Generic[T]):
    """A list without duplicates."""

    def __init__(self) -> None:
        self._at: dict[T, int] = {}

    def index(self, value: T) -> int:
        return self._at.setdefault(value, len(self._at))

    def all(self) -> tuple[T, ...]:
        return tuple(self._at)


@dataclass(frozen=True)
class Part:
    """A report whose cases are shown among others. `version`: what tells it from these; `findings`: the
    numbers of those about each case, by its id as views write it."""

    report: Report
    version: str
    findings: Mapping[str, Sequence[int]]


def build(report: Report, view: View) -> CasesView:
    """Every case of a report. `view`: what `attncheck.view.build` makes of the same report."""
    findings: dict[str, list[int]] = {}
    for number, finding in enumerate(view.findings):
        for case in finding.cases:
            findings.setdefault(case, []).append(number)
    return build_all([Part(report, _version(clean_tree(report.environment)), findings)])


def build_all(parts: Iterable[Part]) -> CasesView:
    """Every case of several reports."""
    drawn: _Shared[Drawing] = _Shared()
    ops: _Shared[KernelOpView] = _Shared()
    cases = tuple(case for part in parts for case in _cases(part, drawn, ops))
    return CasesView(cases, drawn.all(), ops.all(), facets(cases))


def _cases(part: Part, drawn: _Shared[Drawing], ops: _Shared[KernelOpView]) -> Iterable[CaseView]:
    report = dataclasses.replace(part.report, cases=clean_tree(part.report.cases))
    changes = {change.case: change for change in _changes(report)}
    for result in report.cases:
        yield dataclasses.replace(
            _case(result, drawn, ops),
            version=part.version,
            findings=tuple(part.findings.get(one_line(result.case.id, 300), ())),
            change=_kind(report, changes.get(result.case.id)),
            changed=_changed(changes.get(result.case.id)),
        )


def facets(cases: Iterable[CaseView]) -> tuple[Facet, ...]:
    """Those with more than one value among the cases; nothing can be told apart by the others."""
    planned = [case for case in cases if case.placement != UNPLANNED]
    found = (
        Facet(name, tuple(dict.fromkeys(str(getattr(case, name)) for case in planned)))
        for name in FACETS
    )
    return tuple(facet for facet in found if len(facet.values) > 1)


def _version(environment: Mapping[str, Any]) -> str:
    """`torch 2.13.0, flash-attn 2.8.3.post2`: what was tested, as far as its cases differ by it."""
    packages = environment.get("packages")
    if not isinstance(packages, Mapping):
        return ""
    return one_line(", ".join(f"{name} {in_words(v)}" for name, v in packages.items()), 200)


def _changes(report: Report) -> tuple[CaseChange, ...]:
    return clean_tree(report.comparison.changes) if report.comparison else ()


def _kind(report: Report, change: CaseChange | None) -> str:
    if report.comparison is None:
        return ""
    return word(change.kind if change else ChangeKind.UNCHANGED)


def _changed(change: CaseChange | None) -> str:
    """`supported -> wrong (ATN201): error 2.6, was 3e-07. In the baseline: known, until 2026-12-01.`"""
    if change is None:
        return ""
    before, after = (
        STYLES[status].word if status else "not there" for status in (change.before, change.after)
    )
    rules = f" ({', '.join(change.rules)})" if change.rules else ""
    detail = f": {change.detail}" if change.detail else ""
    until = f"until {change.until}" if change.until else ""
    waived = ", ".join(text for text in (change.reason, until) if text)
    said = f"{before} -> {after}{rules}{detail}." + (
        f" In the baseline: {waived}." if waived else ""
    )
    return one_line(said, 1000)


def _case(result: CaseResult, drawn: _Shared[Drawing], ops: _Shared[KernelOpView]) -> CaseView:
    case, outcome = result.case, result.outcome
    options = {k: v for k, v in case.setting.items() if k not in ("name", "dtype")}
    return CaseView(
        id=case.id,
        operator=operator_name(result),
        setting=setting_name(result),
        placement=one_line(case.placement, 60),
        direction=one_line(case.direction, 20),
        mesh=one_line(mesh_text(case.mesh), 80),
        dtype=one_line(in_words(case.setting.get("dtype")), 40),
        status=outcome.status,
        function=one_line(case.function, 160),
        sizes=one_line(in_words(options)),
        placements=one_line(_by_tensor(case.placements)),
        message=_cut(outcome.message.strip(), MESSAGE),
        reason="" if outcome.status.ran else why_not_run(outcome),
        exception=one_line(outcome.exception_type, 80),
        kernel_op=one_line(outcome.kernel_op, 160),
        cost=communication(outcome),
        before="" if result.before is None else STYLES[result.before].word,
        errors=tuple(_error(name, stat) for name, stat in outcome.errors.items()),
        collectives=tuple(
            CollectiveView(
                one_line(c.name, 60), one_line(c.kernel_op, 160), one_line(c.phase, 20), c.count,
                size(c.bytes),
            )
            for c in outcome.collectives
        ),
        missing=tuple(
            (one_line(op.op, 160), one_line(op.phase, 20), _unless(outcome.message, op.message))
            for op in outcome.missing_ops
        ),
        facts=tuple(
            (one_line(f.code, 60), one_line(f.subject, 80), one_line(f.detail))
            for f in outcome.facts
        ),
        ranks=_ranks(outcome),
        outputs=tuple(
            (one_line(name, 60), one_line(", ".join(placements), 80))
            for name, placements in outcome.outputs.items()
        ),
        timings=", ".join(
            f"{one_line(name, 40)} {value:.3g} ms" for name, value in outcome.timings.items()
        ),
        standins=one_line(", ".join(outcome.standins)),
        drawings=tuple(drawn.index(drawing) for drawing in drawings(case)),
        kernel_ops=tuple(ops.index(_kernel_op(op)) for op in outcome.kernel_ops[:KERNEL_OPS]),
        kernel_ops_left_out=max(0, len(outcome.kernel_ops) - KERNEL_OPS),
    )  # fmt: skip


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _unless(said: str, text: str) -> str:
    """Text on one line; empty where it has been said already."""
    return "" if text == said else one_line(text)


def _by_tensor(placements: Mapping[str, tuple[str, ...]]) -> str:
    """`q S(1), k R, v R`; tensors placed alike stand together."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for tensor, texts in placements.items():
        alike.setdefault(texts, []).append(tensor)
    return "; ".join(f"{', '.join(names)}: {', '.join(texts)}" for texts, names in alike.items())


def _error(name: str, stat: ErrorStat) -> ErrorView:
    return ErrorView(
        tensor=one_line(name, 60),
        max=f"{stat.max:.3g}",
        unsharded=f"{stat.unsharded_max:.3g}",
        bound=f"{stat.bound:.3g}",
        ratio=f"{stat.ratio:.3g}",
        rms=f"{stat.rms:.3g}",
        note=one_line(stat.note),
        beyond=not stat.max <= stat.bound,  # also where there is no number
    )


def _kernel_op(op: KernelOp) -> KernelOpView:
    def tensors(placements: Iterable[tuple[str, ...]]) -> str:
        return one_line("; ".join(", ".join(texts) for texts in placements), 200)

    return KernelOpView(
        one_line(op.op, 160), one_line(op.phase, 20), tensors(op.inputs), tensors(op.outputs), op.calls
    )  # fmt: skip


def _ranks(outcome: Outcome) -> tuple[tuple[str, str, str], ...]:
    """What each rank was doing, where that is what went wrong: all of them say the same otherwise."""
    states = [(rank.last_op, rank.exception) for rank in outcome.ranks]
    if len(set(states)) < 2 and outcome.status not in (Status.HANG, Status.CRASH, Status.DIVERGED):
        return ()
    return tuple(
        (f"{r.rank} (hash seed {r.hash_seed})", one_line(r.last_op, 160), one_line(r.exception))
        for r in outcome.ranks
    )
