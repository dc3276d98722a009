"""From findings to a module: which ops need a strategy, where it comes from, whether it is right."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from attncheck import environment
from attncheck.errors import UserError, unknown
from attncheck.fixes import emit, packages, synthesis, telling, verify
from attncheck.fixes.notation import Signature
from attncheck.fixes.verify import Evidence, Progress
from attncheck.model import BYPASSES_DISPATCHER, MODEL, CaseResult, Report
from attncheck.plan import Selection, matches
from attncheck.probing import Operator, Setting
from attncheck.rules import wording
from attncheck.runner import scan
from attncheck.runner.scan import ScanRequest
from attncheck.saved import read_report

# Ways to shard that held on some values and not on others, of which so many are told.
TOLD = 5

Log = Callable[[str], None]


@dataclass(frozen=True)
class FixRequest:
    """What to mend. `report`: a saved one, None to scan first; `scan`: how (of a saved report: what its
    environment does not say); `kernel_ops`: globs, empty for all that need it; `unverified`: write also
    what failed; `name`: what the module will be called."""

    report: Path | None
    scan: ScanRequest
    kernel_ops: tuple[str, ...] = ()
    unverified: bool = False
    name: str = "attncheck_fixes"


@dataclass(frozen=True)
class Fixed:
    """What came of it. `text`: the module, '' where there is nothing to write; `report`: the cases with
    the fix, each with its status before; `evidence`: for each op that was asked for; `unmended`: ops for
    which there is no strategy, and why; `needless`: those without a verified one that no case misses, since
    a function is wrapped that calls them."""

    text: str
    report: Report
    evidence: tuple[Evidence, ...]
    unmended: Mapping[str, str]
    needless: frozenset[str] = frozenset()


def fix(request: FixRequest, log: Log, on_progress: Progress) -> Fixed:
    """Find, synthesise, verify. Raises UserError, or launch.Interrupted.

    Functions are wrapped for what strategies do not mend, so they come second.
    """
    request, found = _found(request, log, on_progress)
    wanted = wanted_ops(found.cases, request.kernel_ops)
    known = {s.op for s in packages.known()}
    signatures = [s for s in packages.known() if s.op in wanted]
    made, unmended = _synthesised(request, found, [op for op in wanted if op not in known], log)
    verification = _Verification(request, found, log, on_progress)
    shipped = verification.settle([*signatures, *made])
    functions = wanted_functions(verification.latest(), request.kernel_ops)
    shipped += verification.settle(functions, beside=shipped)
    report = verification.report()
    text = ""
    if shipped:
        ops = {s.op for s in shipped}
        evidence = [e for e in verification.evidence if e.op in ops]
        text = _module(shipped, telling.header(report, evidence), request.name)
    return Fixed(
        text,
        report,
        tuple(verification.evidence),
        {op: why for op, why in unmended.items() if verification.is_missed(op)},
        verification.needless(),
    )


# --- what to mend --------------------------------------------------------------------------------


def _found(request: FixRequest, log: Log, on_progress: Progress) -> tuple[FixRequest, Report]:
    """The report to start from, and the request with what a saved one says of how it was made."""
    if request.report is not None:
        found = read(request.report)
        asked = _as_scanned(request.scan, found)
        if found.audit is not None:
            # The model itself is not run again, its attention calls are.
            cases = tuple(r for r in found.cases if r.case.probe != MODEL)
            found = dataclasses.replace(found, cases=cases)
            asked = dataclasses.replace(asked, settings=_settings(cases))
        return dataclasses.replace(request, scan=asked), found
    asked = request.scan
    if request.kernel_ops and not asked.selection.operators:
        operators = scan.operators_of(asked)
        names = tuple(o.name for o in operators if _reaching(o, request.kernel_ops))
        if not names:
            ops = (op for o in operators for op in (*o.kernel_ops, o.function))
            raise unknown("kernel op", request.kernel_ops[0], [op for op in ops if op])
        selection = dataclasses.replace(asked.selection, operators=names)
        asked = dataclasses.replace(asked, selection=selection)
    log("scanning what is to be mended")
    found = scan.scan(asked, log, on_progress)
    seed = int(found.environment["seed"])
    return dataclasses.replace(request, scan=dataclasses.replace(request.scan, seed=seed)), found


def read(path: Path) -> Report:
    """A saved report that was made with the torch that is here. Raises UserError."""
    report = read_report(path)
    theirs = dict(report.environment.get("packages") or {}).get("torch", "none")
    ours = environment.packages().get("torch", "none")
    if theirs != ours:
        raise UserError(
            f"{path} was made with torch {theirs}, and here is {ours}: strategies differ between versions, "
            "so scan again here."
        )
    return report


def _as_scanned(request: ScanRequest, report: Report) -> ScanRequest:
    """How the report was made. Code that it names (probes, imports) is run only where it is asked for."""
    env = report.environment
    mesh = env.get("mesh") or {"tp": 2}
    return dataclasses.replace(
        request,
        selection=Selection(level=str(env.get("level") or "default")),
        meshes=tuple(mesh) if isinstance(mesh, list) else (mesh,),
        seed=int(env.get("seed", 0)),
        device=str(env.get("device") or "cpu"),
        with_packages=request.with_packages or tuple(map(str, env.get("with", ()))),
    )


def _settings(results: Sequence[CaseResult]) -> dict[str, tuple[Setting, ...]]:
    """The settings of an audit's cases, by operator: no probe has them."""
    made: dict[str, dict[str, Setting]] = {}
    for case in (r.case for r in results):
        placed = {name: texts for name, texts in case.placements.items() if texts != ("plain",)}
        own = made.setdefault(case.operator, {})
        own.setdefault(case.setting_name, Setting.from_dict(case.setting, placed))
    return {operator: tuple(own.values()) for operator, own in made.items()}


def wanted_ops(results: Sequence[CaseResult], globs: Sequence[str]) -> list[str]:
    """The ops that need a strategy: refused ones, those whose own is known to be wrong, and what runs in
    the other direction of either.

    Raises UserError for a glob that no op of the report matches.
    """
    overridden = {s.op for s in packages.known() if s.overrides is not None}
    refused = {op for r in results for op in verify.refused_ops(r.outcome)}
    broken = {
        r.outcome.kernel_op
        for r in results
        if r.outcome.status.ran
        and not r.outcome.status.usable
        and r.outcome.kernel_op in overridden
    }
    met = {k.op for r in results for k in r.outcome.kernel_ops} | refused | broken
    functions = {r.case.function for r in results}
    for glob in globs:
        if not any(_matches(op, glob) for op in met | functions):
            raise UserError(
                f"No kernel op of these cases matches {glob!r}; {telling.reached(met, results)}."
            )
    need = refused | broken
    asked = {op for op in need if not globs or any(_matches(op, glob) for glob in globs)}
    # Who mends a forward wants to train, whatever he asked for.
    return sorted(asked | {partner for op in asked if (partner := _other_direction(op, met))})


def wanted_functions(results: Sequence[CaseResult], globs: Sequence[str]) -> list[Signature]:
    """Functions that attncheck can call on local shards, and that no strategy mends: they are no dispatcher
    ops, put ordinary tensors of their own beside the DTensors, or reach an op that can have no strategy."""
    names: dict[str, set[str]] = {}  # function -> what it can be asked for by
    for r in results:
        if not verify.reaches(r, r.case.function):  # a version that needs no wrapper
            continue
        hopeless = verify.refused_ops(r.outcome) & {*packages.NO_STRATEGY}
        bypasses = r.outcome.exception_type == BYPASSES_DISPATCHER
        if hopeless or bypasses or _mixes_by_itself(r):
            names.setdefault(r.case.function, {r.case.function}).update(hopeless)
    return [
        f
        for f in packages.functions()
        if f.op in names
        and (not globs or any(_matches(name, glob) for name in names[f.op] for glob in globs))
    ]


def _mixes_by_itself(result: CaseResult) -> bool:
    mixed = any(m.kind == "mixed" for m in result.outcome.missing_ops)
    return mixed and ("plain",) not in result.case.placements.values()


def _other_direction(op: str, met: Iterable[str]) -> str:
    """The op of the other direction, by the names that the field uses, where attncheck knows it."""
    known = {s.op for s in packages.known()} & {*met}
    for a, b in (("forward", "backward"), ("fwd", "bwd")):
        for swapped in (op.replace(a, b), op.replace(b, a)):
            if swapped != op and swapped in known:
                return swapped
    base, dot, overload = op.rpartition(".")
    other = base.removesuffix("_backward") if base.endswith("_backward") else f"{base}_backward"
    return f"{other}{dot}{overload}" if f"{other}{dot}{overload}" in known else ""


def _matches(op: str, glob: str) -> bool:
    # `my::attention` is how its author writes it, `my.attention.default` how PyTorch does.
    pattern = glob.replace("::", ".")
    return matches(op, (pattern, f"{pattern}.default"))


def _reaching(operator: Operator, globs: Sequence[str]) -> bool:
    reached = (*operator.kernel_ops, operator.function)
    return any(_matches(op, glob) for op in reached for glob in globs)


# --- strategies that nobody described ------------------------------------------------------------


def _synthesised(
    request: FixRequest, found: Report, ops: Sequence[str], log: Log
) -> tuple[list[Signature], dict[str, str]]:
    """Signatures found by running the ops, and why there is none of the others."""
    own = [op for op in ops if op.startswith(("aten.", "higher_order."))]
    unmended = {op: _NOT_SYNTHESISED[op.partition(".")[0]] for op in own}
    unmended |= {op: packages.NO_STRATEGY[op] for op in ops if op in packages.NO_STRATEGY}
    asked = [op for op in ops if op not in unmended]
    if not asked:
        return [], unmended
    log(f"finding out how {wording.listing(asked)} can be sharded")
    answer = synthesis.for_operators(
        synthesis.Request(
            imports=request.scan.imports,
            probe_files=request.scan.probe_files,
            path=tuple(scan.provisioned(request.scan, log)),
            operators=tuple(sorted(_reaching_any(found, asked))),
            kernel_ops=tuple(asked),
            known=tuple(s.op for s in packages.known()),
            seed=request.scan.seed or 0,
            device=request.scan.device,
        ),
        log,
    )
    signatures: list[Signature] = []
    for made in answer.found:
        signatures += made.signatures
        log(
            f"{made.signature.op}: {made.found.valid} of {made.found.tried} combinations hold, "
            f"{wording.count(made.found.held_out, 'check')} on other values, {made.found.seconds:g} s"
        )
        for way in made.rejected[:TOLD]:
            log(f"{made.signature.op}: not offered: {way.way}: {way.why}")
    unmended |= {refusal.op: refusal.why for refusal in answer.refused}
    described = {s.op for s in signatures}
    unmended |= {
        op: "nothing could be learned of it" for op in asked if op not in described | {*unmended}
    }
    return signatures, unmended


_NOT_SYNTHESISED = {
    "aten": "it is PyTorch's own, and attncheck has no signature of it",
    "higher_order": "it is a higher-order op, and takes functions besides tensors: no strategy can be "
    "registered",
}


def _reaching_any(found: Report, ops: Sequence[str]) -> set[str]:
    """The operators whose cases reached one of these."""
    return {r.case.operator for r in found.cases for op in ops if verify.reaches(r, op)}


# --- verification --------------------------------------------------------------------------------


class _Verification:
    """What was run with a fix so far, and what it says of each op."""

    def __init__(self, request: FixRequest, found: Report, log: Log, on_progress: Progress) -> None:
        self.request = request
        self.found = found
        self.log = log
        self.on_progress = on_progress
        self.reports: list[Report] = []
        self.before = {r.case.id: r.outcome.status for r in found.cases}
        self.evidence: list[Evidence] = []

    def report(self) -> Report:
        """All that was run with the fix as one report; what was found, where nothing was."""
        return verify.joined(self.reports) if self.reports else self.found

    @functools.cached_property
    def operators(self) -> list[Operator]:
        return scan.operators_of(self.request.scan)

    def settle(
        self, asked: Sequence[Signature], beside: Sequence[Signature] = ()
    ) -> list[Signature]:
        """Those that are verified together, with what was settled before beside them; all of them where
        the request takes unverified ones."""
        if not asked:
            return []
        evidence = self._verify(asked, beside)
        failed = {e.op for e in evidence if not e.verified}
        kept = [s for s in asked if s.op not in failed]
        if self.request.unverified:
            kept = list(asked)
        elif kept and (wrong := [e for e in evidence if e.failed]):
            for e in wrong:
                self.log(f"{e.op} is left out: {e.failed[0]}")
            # What is left must be right without the others. (One that no case could ask changes nothing.)
            evidence = [*self._verify(kept, beside), *(e for e in evidence if e.op in failed)]
            kept = [s for s in kept if any(e.op == s.op and e.verified for e in evidence)]
        self.evidence += evidence
        return kept

    def needless(self) -> frozenset[str]:
        """Ops without a verified strategy that no case fails for any more."""
        ops = {e.op for e in self.evidence if not e.verified}
        run = verify.latest(self.reports)
        now = (verify.evidence(op, ops, run) for op in ops)
        return frozenset(e.op for e in now if not e.failed and not e.elsewhere)

    def is_missed(self, op: str) -> bool:
        """Whether a case fails for want of a strategy for it, as things stand."""
        return any(op in verify.refused_ops(r.outcome) for r in self.latest())

    def latest(self) -> list[CaseResult]:
        """What is known of each case: with the fix where it was run with it, else what was found."""
        return verify.latest([self.found, *self.reports])

    def _verify(self, asked: Sequence[Signature], beside: Sequence[Signature]) -> list[Evidence]:
        """Run the cases that reach these, and say what came of it."""
        ops = list(dict.fromkeys(s.op for s in asked))
        reached = _reaching_any(self.found, ops)
        operators = [o for o in self.operators if o.name in reached]
        if missing := sorted(reached - {o.name for o in operators}):
            raise UserError(
                f"The report has cases of {missing[0]}, which is not here: give its --probe or --import "
                "again."
            )
        with tempfile.TemporaryDirectory(prefix="attncheck-fix-") as folder:
            file = Path(folder, "candidate.py")
            file.write_text(_module((*beside, *asked)), encoding="utf-8")
            report = verify.verify(
                operators, file, self.before, self.request.scan, self.log, self.on_progress
            )
        self.before |= {r.case.id: r.before for r in report.cases if r.before is not None}
        self.reports.append(report)
        registered = {s.op for s in (*beside, *asked)}
        return [verify.evidence(op, registered, report.cases) for op in ops]


def _module(signatures: Sequence[Signature], lines: Sequence[str] = (), name: str = "fix") -> str:
    """The module that registers these, functions among them."""
    wrapped = {s.op for s in packages.functions()}
    ops = [s for s in signatures if s.op not in wrapped]
    return emit.module(ops, [s for s in signatures if s.op in wrapped], lines, name)
