"""An audit from request to report: look at the model, run what it calls, say what follows. Torch-free
itself."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from attncheck import environment, plugins, rules
from attncheck.audit import calls, comparing, target
from attncheck.audit.asked import Answer, Pass
from attncheck.audited import Audit, ModuleOp, Numeric, RankDifference
from attncheck.children import END_WITH_PARENT
from attncheck.errors import UserError
from attncheck.model import (
    MODEL,
    Case,
    CaseResult,
    Collective,
    Fact,
    KernelOp,
    MissingOp,
    Outcome,
    Report,
    Status,
    case_id,
    from_json,
    to_json,
)
from attncheck.plan import Selection
from attncheck.probing import EXPLICIT
from attncheck.runner import scan

NUMERIC = "numeric"
TIMEOUT_SECONDS = 900.0
_STATUSES = {
    "strategy": Status.MISSING_STRATEGY,
    "propagation": Status.MISSING_STRATEGY,
    "mixed": Status.MIXED_TENSOR,
}


@dataclass(frozen=True)
class AuditRequest:
    """`target` and `inputs` name functions of the user's; `mesh` is the model's own, of any size. `scan` says
    how the attention calls are run: its selection, meshes and settings are the audit's own. `numeric`: hold
    the parallel model with real numbers against the unsharded one."""

    target: str
    mesh: Mapping[str, int]
    inputs: str = ""
    timeout: float = TIMEOUT_SECONDS
    numeric: bool = False
    scan: scan.ScanRequest = field(default_factory=scan.ScanRequest)


def audit(request: AuditRequest, log: scan.Log, on_progress: scan.Progress) -> Report:
    """Raises UserError for what is wrong with the request or with the user's code."""
    scan.check_request(request.scan)
    module, _ = target.parse(request.target, "audit")
    inputs = request.inputs or f"{module}:inputs"
    target.parse(inputs, "--inputs")
    if math.prod(request.mesh.values()) < 2:
        raise UserError("An audit needs a mesh of at least 2 ranks, e.g. --mesh tp=8.")
    path = tuple(scan.provisioned(request.scan, log))
    ranks = math.prod(request.mesh.values())
    log(f"running the code of {request.target} on fake tensors, as ranks 0 and {ranks - 1}")
    probes = plugins.load_probes([Path(file) for file in request.scan.probe_files])
    probe_files = tuple(str(file) for file in probes.files)
    first, last = _look(request, inputs, (0, ranks - 1), path, probe_files)
    assert first.audit is not None
    assert last.audit is not None
    planned = calls.plan(first.attention, request.mesh)
    audit = replace(
        first.audit,
        differences=_differences(first.audit, last.audit),
        attention=tuple(each.call for each in planned),
        seconds=max(first.audit.seconds, last.audit.seconds),
        peak_mib=max(first.audit.peak_mib, last.audit.peak_mib),
        notes=(*first.audit.notes, *_notes(first)),
    )
    report = _run(request, planned, path, log, on_progress)
    ids: dict[str, list[str]] = {}
    for result in report.cases:
        ids.setdefault(result.case.setting_name, []).append(result.case.id)
    attention = tuple(
        replace(call, cases=tuple(ids.get(call.setting, ()))) for call in audit.attention
    )
    audit = replace(audit, attention=attention)
    if request.numeric:
        numeric = _numeric(request, inputs, path, probe_files, audit, log)
        if first.sdpa and request.scan.device == "cpu":
            told = "F.scaled_dot_product_attention ran on CPU kernels of attncheck's, as those ops."
            numeric = replace(numeric, notes=(*numeric.notes, told))
        audit = replace(audit, numeric=numeric)
    results = (*model_case(audit), *numeric_case(audit), *report.cases)
    findings = rules.judge(
        results, select=request.scan.select_rules, ignore=request.scan.ignore_rules
    )
    return Report(report.environment, results, findings, audit=audit)


# --- the pass ------------------------------------------------------------------------------------


def _look(
    request: AuditRequest,
    inputs: str,
    ranks: Sequence[int],
    path: tuple[str, ...],
    probe_files: tuple[str, ...],
) -> list[Answer]:
    """What each of these ranks sees; they are looked at at the same time."""
    asked = [
        Pass(
            target=request.target,
            inputs=inputs,
            default_inputs=not request.inputs,
            mesh=request.mesh,
            rank=rank,
            path=path,
            fixes=_fixes(request),
            probe_files=probe_files,
        )
        for rank in ranks
    ]
    with tempfile.TemporaryDirectory(prefix="attncheck-") as folder:
        children = [_start(Path(folder, str(at)), one) for at, one in enumerate(asked)]
        try:
            answers = [_answer(child, request) for child in children]
        finally:
            for child in children:
                child.process.kill()
                child.process.wait()
    for answer in answers:
        if answer.error:
            raise UserError(answer.error)
    return answers


@dataclass(frozen=True)
class _Child:
    process: subprocess.Popen[bytes]
    folder: Path
    rank: int


def _start(folder: Path, asked: Pass) -> _Child:
    folder.mkdir()
    (folder / "asked.json").write_text(json.dumps(to_json(asked)), encoding="utf-8")
    files = (str(folder / "asked.json"), str(folder / "answer.json"))
    command = [sys.executable, "-m", "attncheck.audit.fakepass", *files]
    with (folder / "stderr").open("wb") as said:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=END_WITH_PARENT,
        )
    return _Child(process, folder, asked.rank)


def _answer(child: _Child, request: AuditRequest) -> Answer:
    try:
        child.process.wait(timeout=request.timeout)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{request.target} did not come to an end on fake tensors within {request.timeout:g} s."
        ) from None
    answer = child.folder / "answer.json"
    if child.process.returncode != 0 or not answer.exists():
        lines = (child.folder / "stderr").read_text(errors="replace").strip().splitlines()
        why = lines[-1][:300] if lines else f"exit code {child.process.returncode}"
        raise UserError(f"{request.target} ended the process that ran it on fake tensors: {why}.")
    return from_json(Answer, json.loads(answer.read_text(encoding="utf-8")), "answer")


def _differences(first: Audit, last: Audit) -> tuple[RankDifference, ...]:
    """What the two ranks did differently: ops, their placements, collectives. Shapes and bytes may differ."""
    out = []
    if first.failure != last.failure:
        out.append(
            RankDifference("", first.failure or "goes through", last.failure or "goes through")
        )
    ours, theirs = _by_module(first), _by_module(last)
    for module in dict.fromkeys((*ours, *theirs)):
        one, other = ours.get(module, {}), theirs.get(module, {})
        if one != other:
            out.append(RankDifference(module, _told(one, other), _told(other, one)))
    return tuple(out)


def _by_module(audit: Audit) -> dict[str, dict[str, int]]:
    """How often each op with its placements, and each collective, in each module."""
    out: dict[str, dict[str, int]] = {}

    def add(module: str, name: str, calls: int) -> None:
        counts = out.setdefault(module, {})
        counts[name] = counts.get(name, 0) + calls

    for op in audit.ops:
        placements = ", ".join(" ".join(texts) for texts in op.inputs)
        add(op.module, f"{op.op} [{placements}] {op.problem}".strip(), op.calls)
    for each in audit.communication:
        reason = f" for {each.kernel_op}" if each.kernel_op else ""
        add(each.module, f"{each.name} in {each.phase}{reason}", each.calls)
    return out


def _told(own: Mapping[str, int], other: Mapping[str, int]) -> str:
    told = [f"{count} {name}" for name, count in own.items() if other.get(name) != count]
    return ", ".join(told[:3]) or "none of these"


def _notes(answer: Answer) -> tuple[str, ...]:
    if not answer.sdpa:
        return ()
    counts = ", ".join(f"{kernel} for {count} calls" for kernel, count in answer.sdpa.items())
    return (
        f"F.scaled_dot_product_attention is taken as CUDA would choose for this dtype and mask: {counts}.",
    )


def _fixes(request: AuditRequest) -> tuple[str, ...]:
    return tuple(str(Path(file).resolve()) for file in request.scan.fixes)


def _numeric(
    request: AuditRequest,
    inputs: str,
    path: tuple[str, ...],
    probe_files: tuple[str, ...],
    audit: Audit,
    log: scan.Log,
) -> Numeric:
    ranks = math.prod(request.mesh.values())
    if any(op.problem for op in audit.ops):
        why = "not run: what DTensor refuses in the pass would end it"
        return Numeric(ranks, "", failure=why)
    log(f"running {request.target} with real numbers on {ranks} ranks, and unsharded")
    asked = comparing.Comparing(
        target=request.target,
        inputs=inputs,
        mesh=request.mesh,
        device=request.scan.device,
        seed=request.scan.seed or 0,
        path=path,
        fixes=_fixes(request),
        probe_files=probe_files,
        parameters=audit.parameters,
    )
    return comparing.compare(asked, request.timeout)


# --- its attention calls -------------------------------------------------------------------------


def _run(
    request: AuditRequest,
    planned: Sequence[calls.Planned],
    path: tuple[str, ...],
    log: scan.Log,
    on_progress: scan.Progress,
) -> Report:
    """A scan of the calls alone; a report without cases where none can be run."""
    settings: dict[str, list[calls.Planned]] = {}
    for each in planned:
        if each.setting is not None:
            settings.setdefault(each.call.operator, []).append(each)
    if not settings:
        return Report(environment.describe(path), (), ())
    meshes = {tuple(each.mesh.items()): each.mesh for each in planned if each.setting is not None}
    return scan.scan(
        replace(
            request.scan,
            selection=Selection(operators=tuple(settings), placements=(EXPLICIT,), level="quick"),
            meshes=tuple(meshes.values()),
            settings={
                operator: tuple(each.setting for each in own if each.setting is not None)
                for operator, own in settings.items()
            },
            only={
                operator: tuple(each.call.setting for each in own)
                for operator, own in settings.items()
            },
        ),
        log,
        on_progress,
    )


# --- the model as a case -------------------------------------------------------------------------


def model_case(audit: Audit) -> tuple[CaseResult, ...]:
    """The model as a case, where something was refused: one that goes through says nothing of values."""
    refused = [op for op in audit.ops if op.problem]
    if not refused and not audit.failure:
        return ()
    first = refused[0] if refused else None
    status = _STATUSES.get(first.problem, Status.ERROR) if first else Status.ERROR
    message = first.message if first else audit.failure
    outcome = Outcome(
        status,
        message=f"{message}{_place(first)}" if first else message,
        kernel_op=first.op if first else "",
        kernel_ops=tuple(_kernel_ops(audit)),
        missing_ops=tuple(_missing(refused)),
        collectives=tuple(_collectives(audit)),
    )
    return (CaseResult(_case(audit, audit.kind), outcome),)


def _case(audit: Audit, setting: str) -> Case:
    return Case(
        id=case_id(MODEL, audit.target, setting, "dtensor", audit.mesh, "plan", "backward"),
        probe=MODEL,
        operator=audit.target,
        route="dtensor",
        setting={"name": setting},
        mesh=audit.mesh,
        placement="plan",
        placements={},
        direction="backward",
        function=audit.target,
    )


def _place(op: ModuleOp) -> str:
    places = [f"in {op.module}"] * bool(op.module) + [f"at {op.line}"] * bool(op.line)
    return f" ({', '.join(places)})" if places else ""


def numeric_case(audit: Audit) -> tuple[CaseResult, ...]:
    """The model with real numbers as a case: right, wrong, or with what ended it."""
    numeric = audit.numeric
    if numeric is None or not numeric.reference:
        return ()
    case = _case(audit, NUMERIC)
    if numeric.failure:
        return (CaseResult(case, Outcome(Status.ERROR, message=numeric.failure)),)
    facts = tuple(
        Fact(
            "wrong_result" if each.subject.startswith("output") else "wrong_gradient",
            each.subject,
            "; ".join(
                part
                for part in (
                    f"in {each.mode} off by {each.error:.2g}, where {each.bound:.2g} is rounding",
                    f"first in {each.module}" if each.module else "",
                    each.cause,
                )
                if part
            ),
        )
        for each in numeric.unequal
    )
    status = Status.WRONG if facts else Status.SUPPORTED
    message = next((each.cause for each in numeric.unequal if each.cause), "")
    return (CaseResult(case, Outcome(status, message=message, facts=facts)),)


def _kernel_ops(audit: Audit) -> list[KernelOp]:
    counts: dict[
        tuple[str, str, tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]], int
    ] = {}
    for op in audit.ops:
        key = (op.op, op.phase, op.inputs, op.outputs)
        counts[key] = counts.get(key, 0) + op.calls
    return [KernelOp(*key, calls=count) for key, count in counts.items()]


def _missing(refused: Sequence[ModuleOp]) -> list[MissingOp]:
    found = {(op.op, op.phase, op.problem): op.message for op in refused if op.problem in _STATUSES}
    return [MissingOp(*key, message) for key, message in found.items()]


def _collectives(audit: Audit) -> list[Collective]:
    """Those that nobody asked for."""
    counts: dict[tuple[str, str, str], list[int]] = {}
    for each in audit.communication:
        if not each.asked:
            own = counts.setdefault((each.name, each.kernel_op, each.phase), [0, 0])
            own[0] += each.calls
            own[1] += each.bytes
    return [Collective(*key, count, size) for key, (count, size) in counts.items()]
