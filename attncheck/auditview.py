"""What an audit comes to, laid out as sentences and tables: `attncheck.view` has it, formats only draw it.

All text is cleaned here: a report may come from elsewhere. Torch-free.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from attncheck.audited import (
    FAKE,
    OBSERVED,
    PRESET,
    AttentionCall,
    Audit,
    ModuleCommunication,
    Numeric,
)
from attncheck.model import CaseResult, Status, worst
from attncheck.text import clean, clean_tree, count, listing, one_line, size

WHY = {
    "strategy": "no sharding strategy",
    "propagation": "no sharding strategy (it cannot run on Meta tensors)",
    "mixed": "a plain tensor met a DTensor",
    "error": "raised",
}
ROWS = 12  # of a table, where not everything is asked for
WORDS, RAISED = 200, 110  # characters of a sentence, and of one in a table


@dataclass(frozen=True)
class Section:
    """A table with what it is about. `notes` stand below it; `detail`: shown only where everything is."""

    title: str
    about: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()
    detail: bool = False


@dataclass(frozen=True)
class AuditView:
    headline: tuple[str, ...]
    sections: tuple[Section, ...]
    steps: tuple[tuple[str, str], ...]


def build(audit: Audit, cases: Sequence[CaseResult], command: str = "") -> AuditView:
    """`cases`: those of the report; `command`: the command line that made it."""
    audit = clean_tree(audit)
    statuses = {r.case.id: r.outcome.status for r in cases}
    directions = {r.case.id: r.case.direction for r in cases}
    sections = (
        _calls_of_preset(audit),
        _degrees(audit),
        _fits(audit),
        _refused(audit),
        _numeric(audit.numeric),
        _attention(audit, statuses, directions),
        _communication(audit),
        _uneven(audit),
        _differences(audit),
        _ops(audit),
    )
    return AuditView(
        headline=tuple(_headline(audit, statuses)),
        sections=tuple(section for section in sections if section is not None),
        steps=tuple(_steps(audit, clean(command))),
    )


# --- the answer ----------------------------------------------------------------------------------


def _headline(audit: Audit, statuses: Mapping[str, Status]) -> Iterable[str]:
    mesh = _mesh(audit.mesh)
    if audit.kind == PRESET:
        yield from _preset(audit, statuses)
        return
    refused = [op for op in audit.ops if op.problem]
    if refused:
        first = refused[0]
        at = f" ({first.line})" if first.line else ""
        others = len({op.op for op in refused}) - 1
        more = f"; {count(others, 'more op')} refused after it" if others else ""
        yield (
            f"{audit.target} on {mesh} stops at {first.module or 'the model'}{at}: {_short(first.op)}, "
            f"{WHY.get(first.problem, first.problem)}{more}."
        )
    elif audit.failure:
        yield f"{audit.target} on {mesh} stops: {_sentence(audit.failure)}"
    elif audit.numeric is not None and audit.numeric.unequal:
        unequal = audit.numeric.unequal
        where = next((each.module for each in unequal if each.module), "")
        yield (
            f"{audit.target} on {mesh} is not equal to the unsharded model"
            f"{f', from {where} on' if where else ''}: {count(len(unequal), 'tensor')} "
            f"{'differs' if len(unequal) == 1 else 'differ'}."
        )
    else:
        seen = "DTensor refuses none of its ops" if audit.ops else "none of its ops meets a DTensor"
        yield f"{audit.target} on {mesh} goes through: {seen}."
    if audit.numeric is not None and audit.numeric.failure:
        what = "Against the unsharded model it came to no end"
        if not audit.numeric.reference:  # it did not begin
            what = "It was not held against the unsharded model"
        yield f"{what}: {_sentence(audit.numeric.failure)}"
    yield _passed(audit)
    ran = [call for call in audit.attention if _ran(call, statuses)]
    if ran:
        wrong = [call for call in ran if not _works(call, statuses)]
        if wrong:
            fail = "fails" if len(wrong) == 1 else "fail"
            calls = f"{len(wrong)} of {count(len(ran), 'distinct attention call')} {fail}"
        else:
            calls = f"{count(len(ran), 'distinct attention call')} {'works' if len(ran) == 1 else 'work'}"
        others = len(audit.attention) - len(ran)
        more = f"; {count(others, 'other')} could not be run" if others else ""
        yield f"With real numbers, at a reduced size, {calls}{more}."
    own = [each for each in audit.communication if not each.asked]
    if own:
        first_own = max(own, key=lambda each: each.bytes)
        total = size(sum(each.bytes for each in own))
        yield (
            f"DTensor communicates {total} a rank and step that nobody asked for, most of it in "
            f"{first_own.module or 'the model'} for {_short(first_own.kernel_op)}."
        )
    if audit.failure and refused and audit.kind == FAKE:
        yield f"The pass ended before its end: {_sentence(audit.failure)}"
    yield from audit.notes


def _preset(audit: Audit, statuses: Mapping[str, Status]) -> Iterable[str]:
    """Of a known model: who can run its calls."""
    operators: dict[str, list[AttentionCall]] = {}
    for call in audit.attention:
        if _ran(call, statuses):
            operators.setdefault(call.operator, []).append(call)
    working = [name for name, own in operators.items() if all(_works(c, statuses) for c in own)]
    on = f"{audit.target} on {_mesh(audit.mesh)}"
    if not operators:
        yield f"{on}: no attention call of it could be run here."
    elif working:
        told = f"{len(working)} of {count(len(operators), 'operator')} that ran"
        yield f"{on}: {told} take its attention calls as DTensors: {listing(working, 4)}."
    else:
        yield f"{on}: none of {count(len(operators), 'operator')} that ran takes its attention calls."
    hard = [fit for fit in audit.fits if fit.verdict != "works"]
    for fit in hard[:3]:
        yield f"{fit.call} by {fit.way}: {_sentence(fit.why or fit.verdict)}"


def _degrees(audit: Audit) -> Section | None:
    if not audit.degrees:
        return None

    def numbers(given: Sequence[int]) -> str:
        return listing(map(str, given), 20) or "none"

    return Section(
        "Degrees",
        "over how many ranks each way splits the hardest of its calls",
        ("way", "works", "needs kv heads copied", "uneven"),
        tuple(
            (each.way, numbers(each.works), numbers(each.replicate_kv), numbers(each.uneven))
            for each in audit.degrees
        ),
    )


def _fits(audit: Audit) -> Section | None:
    if not audit.fits:
        return None
    return Section(
        "This mesh",
        f"what {_mesh(audit.mesh)} does to each call",
        ("call", "way", "ranks of heads", "of the sequence", "verdict", "why"),
        tuple(
            (
                fit.call,
                fit.way,
                str(fit.heads_ranks),
                str(fit.sequence_ranks),
                fit.verdict.replace("_", " "),
                fit.why,
            )
            for fit in audit.fits
        ),
    )


def _passed(audit: Audit) -> str:
    layers = _layers(audit.layers)
    told = [f"{count(layers, 'layer')}"] if layers > 1 else []
    if audit.parameters:
        told.append(f"{_number(audit.parameters)} parameters, {size(audit.parameter_bytes)} a rank")
    if audit.inputs:
        told.append(f"inputs {one_line(audit.inputs, WORDS)}")
    what = f": {'; '.join(told)}" if told else ""
    if audit.kind == FAKE:
        cost = f" ({audit.seconds:.1f} s, {audit.peak_mib:.0f} MiB)" if audit.seconds else ""
        return f"One pass on fake tensors, forward and backward{cost}{what}."
    return f"{count(audit.steps, 'step')} of the real run{what}."


def _ran(call: AttentionCall, statuses: Mapping[str, Status]) -> list[Status]:
    """What came of the cases of a call that ran."""
    return [statuses[case] for case in call.cases if case in statuses and statuses[case].ran]


def _layers(layers: Mapping[str, int]) -> int:
    """How many there are of what a model has most of: of the modules with a number, those that hold most."""
    numbered = [name for name in layers if name.endswith("*")]
    held = {name: sum(other.startswith(f"{name}.") for other in layers) for name in numbered}
    return max(((held[name], layers[name]) for name in numbered), default=(0, 0))[1]


def _works(call: AttentionCall, statuses: Mapping[str, Status]) -> bool:
    """Of a call that ran."""
    return all(status.usable for status in _ran(call, statuses))


# --- tables --------------------------------------------------------------------------------------


def _refused(audit: Audit) -> Section | None:
    rows = tuple(
        (
            op.module or "-",
            _short(op.op),
            op.phase,
            str(op.calls),
            _placements(op.inputs),
            f"{WHY.get(op.problem, op.problem)}"
            + (f": {one_line(op.message, RAISED)}" if op.problem == "error" else ""),
            op.line,
        )
        for op in audit.ops
        if op.problem
    )
    if not rows:
        return None
    went_on = "" if audit.failure else "; the pass went on past each"
    return Section(
        "Refused",
        count(sum(op.calls for op in audit.ops if op.problem), "call")
        + (went_on if audit.kind == FAKE else "; the first ends the run"),
        ("module", "kernel op", "phase", "calls", "placements", "why", "line"),
        rows,
    )


def _attention(
    audit: Audit, statuses: Mapping[str, Status], directions: Mapping[str, str]
) -> Section | None:
    if not audit.attention:
        return None
    if audit.kind == PRESET:
        return _by_operator(audit, statuses, directions)
    # Beside a real job nothing is run.
    not_run = "" if audit.kind == OBSERVED else "not run"
    came = (
        ""
        if audit.kind == OBSERVED
        else ", and what came of it with real numbers at a reduced size"
    )
    rows, notes = [], []
    for call in audit.attention:
        ran = [case for case in call.cases if case in statuses]
        name = call.setting or "-"
        rows.append(
            (
                name,
                listing(call.modules, 3) or "-",
                str(call.calls),
                call.function if call.function != call.kernel_op else _short(call.kernel_op),
                _sizes(call.sizes),
                ", ".join(f"{flag} {_value(value)}" for flag, value in call.options.items())
                if call.sizes
                else "",
                "; ".join(f"{t} {' '.join(texts)}" for t, texts in call.placements.items()),
                _verdict(ran, statuses, directions) if ran else not_run,
            )
        )
        if call.note:
            notes.append(f"{name if call.setting else _short(call.kernel_op)}: {call.note}.")
    return Section(
        "Attention calls",
        f"each distinct one of a step{came}",
        ("call", "module", "calls", "function", "sizes", "flags", "placements", "run"),
        tuple(rows),
        tuple(notes),
    )


def _by_operator(
    audit: Audit, statuses: Mapping[str, Status], directions: Mapping[str, str]
) -> Section:
    """Of a known model: operators down, its calls across."""
    names = list(dict.fromkeys(listing(call.modules, 1) for call in audit.attention))
    table: dict[str, dict[str, str]] = {}
    notes: dict[str, None] = {}
    for call in audit.attention:
        name = listing(call.modules, 1)
        ran = [case for case in call.cases if case in statuses]
        told = _verdict(ran, statuses, directions) if ran else "not run"
        table.setdefault(call.operator, {})[name] = told
        if call.note:
            notes.setdefault(f"{call.operator}, {name}: {call.note}.")
    return Section(
        "Operators",
        "what came of each call with real numbers, at a reduced size",
        ("operator", *names),
        tuple((operator, *(own.get(n, "-") for n in names)) for operator, own in table.items()),
        tuple(notes),
    )


def _calls_of_preset(audit: Audit) -> Section | None:
    if audit.kind != PRESET:
        return None
    rows = dict.fromkeys(
        (
            *(listing(call.modules, 1).rsplit(" (", 1)[0], str(call.calls), _sizes(call.sizes)),
            ", ".join(f"{option} {value}" for option, value in call.options.items()),
        )
        for call in audit.attention
    )
    return Section(
        "Its attention calls", "of one step", ("call", "layers", "sizes", "mask"), tuple(rows)
    )


def _verdict(
    cases: Sequence[str], statuses: Mapping[str, Status], directions: Mapping[str, str]
) -> str:
    by_direction: dict[str, list[Status]] = {}
    for case in cases:
        by_direction.setdefault(directions[case], []).append(statuses[case])
    told = {direction: _word(worst(own)) for direction, own in by_direction.items()}
    if len(set(told.values())) == 1:
        return next(iter(told.values()))
    return "; ".join(f"{direction} {word}" for direction, word in told.items())


def _word(status: Status) -> str:
    return "right" if status is Status.SUPPORTED else status.value.replace("_", " ")


def _communication(audit: Audit) -> Section | None:
    if not audit.communication:
        return None
    ordered = sorted(audit.communication, key=lambda each: (each.asked, -each.bytes))
    asked = sum(each.bytes for each in ordered if each.asked)
    own = sum(each.bytes for each in ordered if not each.asked)
    return Section(
        "Communication",
        f"a rank and step: {size(asked)} that the model and its plan ask for, {size(own)} of DTensor's own",
        ("module", "collective", "phase", "calls", "bytes", "a call", "for", "line"),
        tuple(_traffic(each) for each in ordered),
    )


def _traffic(each: ModuleCommunication) -> tuple[str, ...]:
    return (
        each.module or "-",
        each.name,
        each.phase,
        str(each.calls),
        size(each.bytes),
        size(each.bytes / max(1, each.calls)),
        "the plan" if each.asked else f"{_short(each.kernel_op)} (not asked for)",
        each.line,
    )


def _uneven(audit: Audit) -> Section | None:
    rows = tuple(
        (
            each.tensor,
            str(each.dim),
            str(each.size),
            f"{each.axis}={each.ranks}",
            f"{each.first} and {each.last}",
        )
        for each in audit.uneven
    )
    if not rows:
        return None
    return Section(
        "Uneven shards",
        "dims that the ranks do not divide; of activations where they are met first",
        ("tensor", "dim", "size", "axis", "first and last rank"),
        rows,
    )


def _differences(audit: Audit) -> Section | None:
    if not audit.differences:
        return None
    return Section(
        "Ranks differ",
        "what the first and the last rank did differently",
        ("module", "first rank", "last rank"),
        tuple((each.module or "-", each.first, each.last) for each in audit.differences),
    )


def _numeric(numeric: Numeric | None) -> Section | None:
    if numeric is None:
        return None
    about = f"{numeric.reference}, on {count(numeric.ranks, 'rank')}"
    notes = [f"{each.name}: not compared, {each.why}." for each in numeric.uncompared]
    if numeric.failure:
        notes.insert(0, f"It came to no end: {numeric.failure}.")
    if not numeric.unequal and not numeric.failure:
        notes.insert(0, f"Equal: {count(numeric.compared, 'output and gradient')} compared.")
    rows, last = [], ""
    for each in numeric.unequal:
        cause = each.cause or "not known"
        rows.append(
            (
                each.mode,
                each.subject,
                each.module or "-",
                f"{each.error:.2g}",
                f"{each.bound:.2g}",
                cause if cause != last else "the same",
            )
        )
        last = cause
    return Section(
        "Equal or not",
        f"the parallel model with real numbers against {about}",
        ("in", "tensor", "first module", "error", "bound", "likely cause"),
        tuple(rows),
        (*notes, *numeric.notes),
    )


def _ops(audit: Audit) -> Section | None:
    rows = tuple(
        (
            op.module or "-",
            _short(op.op),
            op.phase,
            str(op.calls),
            _placements(op.inputs),
            _placements(op.outputs),
        )
        for op in audit.ops
        if not op.problem
    )
    if not rows:
        return None
    return Section(
        "Kernel ops",
        "every one that met DTensors",
        ("module", "kernel op", "phase", "calls", "inputs", "outputs"),
        rows,
        detail=True,
    )


# --- how to go on --------------------------------------------------------------------------------


def _steps(audit: Audit, command: str) -> Iterable[tuple[str, str]]:
    mesh = _on_mesh(audit.mesh)
    given = _options(command)
    brings = [each for name, each in given if name in BRINGING]
    fixes = [each for name, each in given if name == "--fix"]
    known = "the same with the strategies that attncheck knows"
    if audit.kind == PRESET:
        axes = [f"{shlex.quote(f'--{axis}')} {ranks}" for axis, ranks in audit.mesh.items()]
        own = _line("attncheck audit --model", shlex.quote(audit.target), *axes)
        if not any(name == "--with" for name, _ in given):
            purpose = "with flash-attn's Python on CPU stand-ins"
            yield _line(own, *brings, "--with flash-attn"), purpose
        if not fixes:
            yield _line(own, *brings, "--fix known"), known
        yield _line("attncheck audit BUILD", mesh), "the model itself: BUILD(mesh) returns it"
        return
    refused = [op for op in audit.ops if op.problem in ("strategy", "propagation")]
    if audit.kind != FAKE:
        # What was run is no build function: an audit of the model by itself needs one.
        own = _line("attncheck audit BUILD", mesh, *brings)
        yield (
            own,
            "BUILD(mesh) returns the model: every op that is refused, not the first",
        )
        if refused:
            yield _line(own, "--fix known"), known
        return
    own = _line("attncheck audit", shlex.quote(audit.target), mesh, *brings)
    if refused and not fixes:
        yield _line(own, "--fix known"), known
        with_ = [each for name, each in given if name == "--with"]
        ops = f"--kernel-op {shlex.quote(_namespace(refused[0].op))}"
        yield (
            _line("attncheck fix", *with_, ops, "--write attncheck_fixes.py"),
            "a module that registers them, verified; import it before the model",
        )
    if audit.numeric is None and not refused:
        small = _on_mesh({axis: min(2, ranks) for axis, ranks in audit.mesh.items()})
        yield (
            _line("attncheck audit SMALL_BUILD", small, "--numeric"),
            "is the parallel model equal to the unsharded one, forward and backward?",
        )
    yield _line(own, *fixes, "-v"), "every kernel op with its placements, by module"
    yield (
        _line(own, *fixes, "--output json:report.json"),
        "everything, for CI or other formats",
    )


# Options of an audit without which its model, or what it calls, is not there.
BRINGING = ("--inputs", "--with", "--probe", "--device")


def _options(command: str) -> list[tuple[str, str]]:
    """(name, the option as it is given again) for each option with a value of a command line.

    >>> _options("attncheck audit m:build --with=flash-attn --inputs m:small -v")
    [('--with', '--with flash-attn'), ('--inputs', '--inputs m:small')]
    """
    try:
        words = shlex.split(command)
    except ValueError:
        return []
    parts = [word.split("=", 1) if word.startswith("--") else [word] for word in words]
    pairs = itertools.pairwise(itertools.chain.from_iterable(parts))
    wanted = {*BRINGING, "--fix"}
    return [(name, f"{name} {shlex.quote(value)}") for name, value in pairs if name in wanted]


def _line(*parts: str) -> str:
    return " ".join(parts)


def _on_mesh(mesh: Mapping[str, int]) -> str:
    return f"--mesh {shlex.quote(','.join(f'{axis}={ranks}' for axis, ranks in mesh.items()))}"


def _namespace(op: str) -> str:
    namespace = op.partition(".")[0]
    return op if namespace == "aten" else f"{namespace}.*"


# --- words ---------------------------------------------------------------------------------------


def _sentence(text: str) -> str:
    return one_line(text, WORDS).rstrip(".") + "."


def _mesh(mesh: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={ranks}" for axis, ranks in mesh.items())


def _short(op: str) -> str:
    return op.removesuffix(".default")


def _placements(tensors: Sequence[Sequence[str]]) -> str:
    return ", ".join(" ".join(each) for each in tensors)


def _value(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{role} {number}" for role, number in sizes.items())


def _number(number: int) -> str:
    for unit, factor in (("B", 10**9), ("M", 10**6)):
        if number >= factor:
            return f"{number / factor:.4g} {unit}"
    return str(number)
