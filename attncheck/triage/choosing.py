"""Which findings are asked for, and which of their cases to show: always ones that our own planner makes.

A report may come from anywhere. What is taken of it is which of our cases it means, by their ids; what runs
is made from the probes that are loaded here.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attncheck.errors import UserError, unknown
from attncheck.model import Case, CaseResult, Finding, Report, Status
from attncheck.plan import DIRECTIONS, Selection, plan
from attncheck.plugins import ProbeShelf
from attncheck.probing import EXPLICIT, PATTERNS, Operator, Setting
from attncheck.text import clean, one_line
from attncheck.triage.claims import Claim, Kind, claim

# Ranks that a laptop can run.
MOST_RANKS = 16

# Whose a kernel op is, by its namespace; PyTorch's are those that are nobody else's here.
PROJECTS: Mapping[str, tuple[str, ...]] = {
    "pytorch": ("aten", "torch_attn", "higher_order", "c10d", "_c10d_functional", "torch", "prims"),
    "flash-attn": ("flash_attn", "flash_attn_2_cuda", "flash_attn_3", "flash_attn_interface"),
    "xformers": ("xformers", "xformers_flash", "xformers_flash3"),
}
# The same of a package from which an operator's function comes.
_FUNCTIONS = {"torch": "pytorch", "flash_attn": "flash-attn", "flash_attn_interface": "flash-attn"}


# --- which findings ----------------------------------------------------------------------------------


def find(report: Report, wanted: str) -> Finding:
    """The finding of a fingerprint (or the beginning of one), a rule id, or a case id.

    Raises UserError where there is none, or more than one.
    """
    findings = report.findings
    if not wanted.strip():
        raise UserError("--finding is empty; expected a fingerprint, a rule id or a case id.")
    exact = [f for f in findings if f.fingerprint == wanted]
    if len(exact) == 1:
        return exact[0]
    by_rule = [f for f in findings if f.rule.lower() == wanted.lower()]
    by_case = [f for f in findings if wanted in f.cases]
    by_start = [f for f in findings if f.fingerprint.startswith(wanted)]
    for found, what in ((by_rule, "rule"), (by_case, "case"), (by_start, "fingerprint")):
        if len(found) == 1:
            return found[0]
        if found:
            raise _ambiguous(wanted, what, found)
    known = {f.fingerprint for f in findings} | {f.rule for f in findings}
    cases = {case for f in findings for case in f.cases}
    raise unknown("finding", wanted, cases if "/" in wanted and cases else known)


def _ambiguous(wanted: str, what: str, found: Sequence[Finding]) -> UserError:
    shown = [
        one_line(clean(f"{f.fingerprint} ({f.rule} {f.kernel_op or f.name})"), 200)
        for f in found[:3]
    ]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return UserError(
        f"--finding {wanted!r} is the {what} of {len(found)} findings; expected a fingerprint: "
        f"{', '.join(shown)}{more}."
    )


def of_project(report: Report, project: str) -> list[Finding]:
    """The findings that belong to a project and say something of its code, worst first.

    Raises UserError for a project that is not known.
    """
    if project not in PROJECTS:
        raise unknown("project", project, PROJECTS)
    by_id = {r.case.id: r for r in report.cases}
    found = [f for f in report.findings if project_of(f, by_id) == project]
    return sorted(found, key=lambda f: _badness(f, by_id))


def _badness(finding: Finding, by_id: Mapping[str, CaseResult]) -> tuple[int, int, int, str, str]:
    ranks = [by_id[case].outcome.status.rank for case in finding.cases if case in by_id]
    worst = min(ranks, default=len(Status))
    return (finding.severity.rank, worst, -len(finding.cases), finding.rule, finding.fingerprint)


def project_of(finding: Finding, by_id: Mapping[str, CaseResult]) -> str:
    """By the namespace of its kernel op, else by where the functions of its operators come from; '' for a
    finding about the environment, and where nobody can be told."""
    if not finding.rule.startswith(("ATN1", "ATN2", "ATN3", "ATN5")) or finding.rule in (
        "ATN505",
        "ATN506",
    ):
        return ""
    namespace = finding.kernel_op.partition(".")[0]
    for project, namespaces in PROJECTS.items():
        if namespace in namespaces:
            return project
    tops = {by_id[c].case.function.partition(".")[0] for c in finding.cases if c in by_id}
    projects = {_FUNCTIONS.get(top, top if top in PROJECTS else "") for top in tops}
    return projects.pop() if len(projects) == 1 and not namespace else ""


# --- which cases -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """One case of a finding as our planner makes it, and what it would show. `result` is what the report
    says of it. `file`: of its probe. `by_itself`: the op must be called alone, for another one is refused in
    front of it."""

    case: Case
    operator: Operator
    setting: Setting
    file: Path
    claim: Claim
    result: CaseResult
    by_itself: bool = False


def candidates(report: Report, finding: Finding, shelf: ProbeShelf) -> Iterator[Candidate]:
    """The cases of a finding that can be planned here, the simplest first."""
    by_id = {r.case.id: r for r in report.cases}
    results = [by_id[case] for case in dict.fromkeys(finding.cases) if case in by_id]
    found = [c for c in (_candidate(finding, r, shelf) for r in results) if c is not None]
    often = Counter(candidate.operator.name for candidate in found)
    yield from _spread(sorted(found, key=lambda c: _complexity(c, often[c.operator.name])))


def _spread(ordered: Sequence[Candidate]) -> Iterator[Candidate]:
    """The best of each operator before the second best of any: where one cannot be written down, the next of
    its kind cannot either."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in ordered:
        groups.setdefault(candidate.operator.name, []).append(candidate)
    for row in itertools.zip_longest(*groups.values()):
        yield from (candidate for candidate in row if candidate is not None)


def _candidate(finding: Finding, result: CaseResult, shelf: ProbeShelf) -> Candidate | None:
    planned = planned_case(result.case, shelf)
    about = claim(finding, result)
    if planned is None or about is None:
        return None
    case, operator, setting, file = planned
    # The planner's own direction counts, whatever the report says.
    about = replace(about, backward=case.direction == "backward")
    refused = [op.op for op in result.outcome.missing_ops]
    behind = about.kind is Kind.REFUSED and bool(refused) and refused[0] != about.op
    return Candidate(case, operator, setting, file, about, result, behind)


def planned_case(told: Case, shelf: ProbeShelf) -> tuple[Case, Operator, Setting, Path] | None:
    """The case of this id, as our planner makes it of the loaded probes; None where there is none."""
    for probe, file in zip(shelf.probes, shelf.files, strict=True):
        operator = next((o for o in probe.operators if o.name == told.operator), None)
        if probe.name != told.probe or operator is None:
            continue
        setting = next((s for s in operator.settings if s.name == told.setting.get("name")), None)
        if setting is None or not _plannable(told):
            return None
        selection = Selection(
            operators=(operator.name,),
            settings=(setting.name,),
            placements=(told.placement,),
            directions=(told.direction,),
            level="full",
        )
        try:
            cases = plan([replace(probe, operators=(operator,))], dict(told.mesh), selection)
        except UserError:
            return None
        case = next((c for c in cases if c.id == told.id), None)
        return None if case is None else (case, operator, setting, file)
    return None


def _plannable(told: Case) -> bool:
    """Whether mesh, placement and direction are what a planner can make sense of."""
    patterns = told.placement.split(",")
    return (
        told.direction in DIRECTIONS
        and all(p in PATTERNS or p == EXPLICIT for p in patterns)
        and 0 < len(told.mesh) <= 3
        and all(re.fullmatch(r"[A-Za-z_]\w{0,30}", axis, re.ASCII) for axis in told.mesh)
        and all(size > 0 for size in told.mesh.values())
        and math.prod(told.mesh.values()) <= MOST_RANKS
    )


# What a reader takes in at a glance, before what takes explaining.
_PLACEMENTS = ("heads", "batch", "replicate", "sequence", "query", "head_dim", "partial")
_SHARED = ("attncheck ",)  # attention written out in a probe, where the function is no import path


def _complexity(candidate: Candidate, often: int) -> tuple[Any, ...]:
    """The order in which to try. `often`: the finding's cases of the same operator: the one that it is most
    about is the one that its readers know."""
    case, setting, claimed = candidate.case, candidate.setting, candidate.claim
    names = case.placement.split(",")
    order = [_PLACEMENTS.index(n) if n in _PLACEMENTS else len(_PLACEMENTS) for n in names]
    others = {c.kernel_op for c in candidate.result.outcome.collectives} - {claimed.op}
    return (
        candidate.by_itself,
        # Counts are those of the whole call: of a case in which nothing else communicates they say it all.
        claimed.kind is Kind.COMMUNICATES and bool(others),
        math.prod(case.mesh.values()),
        case.direction == "backward",
        not candidate.operator.function or candidate.operator.function.startswith(_SHARED),
        "[" in candidate.operator.name,
        -often,
        setting.dtype != "float32",
        len(setting.options),
        len(candidate.operator.tensors(setting)),
        order,
        setting.name != "plain",
        case.id,
    )
