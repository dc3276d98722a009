"""What is said of a fix: in the head of the module, and to who asked for it."""

from __future__ import annotations

import datetime
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from attncheck import provision
from attncheck.fixes import emit
from attncheck.fixes.notation import NO_STRATEGY_HAS
from attncheck.fixes.verify import Evidence
from attncheck.model import CaseResult, Report, Status
from attncheck.rules import wording

if TYPE_CHECKING:
    from attncheck.fixes.fixing import Fixed


def header(report: Report, evidence: Sequence[Evidence]) -> list[str]:
    """What a module says of how it was verified."""
    env = report.environment
    packages_ = ", ".join(f"{n} {v}" for n, v in dict(env.get("packages") or {}).items())
    meshes = {wording.mesh(r.case.mesh) for r in report.cases}
    dtypes = {str(r.case.setting.get("dtype")) for r in report.cases}
    right = [e for e in evidence if e.verified]
    lines = [
        f"Verified on {datetime.date.today().isoformat()} by `{env.get('command', '')}`:",
        f"{packages_}; Python {env.get('python')}; device {env.get('device')}; meshes",
        f"{', '.join(sorted(meshes))}; {', '.join(sorted(dtypes))}; seed {env.get('seed')}.",
    ]
    lines += [f"Stand-in kernels: {sentence}" for sentence in env.get("standins", ())]
    lines += [line for e in right for line in ("", *_evidence_lines(e))]
    if wrong := [e for e in evidence if not e.verified]:
        lines += ["", "NOT VERIFIED, and shipped because --unverified was given:"]
        lines += [line for e in wrong for line in ("", *_evidence_lines(e))]
    return [part for line in lines for part in _wrapped(line)]


def _wrapped(line: str) -> list[str]:
    indent = "    " if line.startswith(" ") else ""
    return textwrap.wrap(line, emit.WIDTH, subsequent_indent=indent, break_long_words=False) or [""]


def _evidence_lines(e: Evidence) -> list[str]:
    lines = [
        f"{e.op}",
        f"  {e.right} of {wording.count(e.cases, 'case')} right, with errors up to {e.ratio:.2f} of their "
        f"bound; before: {_counts(e.before)}; after: {_counts(e.after)}",
    ]
    lines += [f"  refused in {n}: {why}" for why, n in _reasons(e).items()]
    lines += [f"  fails: {text}" for text in e.failed[:20]]
    if len(e.failed) > 20:
        lines.append(f"  and {len(e.failed) - 20} more")
    if e.elsewhere:
        more = wording.count(len(e.elsewhere), "more case")
        lines.append(
            f"  {more} fail for what this strategy cannot mend, the first: {e.elsewhere[0]}"
        )
    if e.unchanged:
        lines.append(f"  {wording.count(len(e.unchanged), 'case')} fail as they did before")
    return lines


def _reasons(e: Evidence) -> dict[str, int]:
    """Refusals by their reason: those that differ in placements alone are one."""
    cases: Counter[str] = Counter()
    placements: dict[str, list[str]] = {}
    for sentence, n in sorted(e.refused.items()):
        why, found, rest = sentence.removeprefix(e.op).strip(": ").partition(NO_STRATEGY_HAS)
        cases[why] += n
        if found:
            placements.setdefault(why, []).append(rest.partition(":")[0])
    return {
        why + (f"; so placed: {'; '.join(placements[why])}" if why in placements else ""): n
        for why, n in cases.items()
    }


def _counts(counts: Mapping[str, int]) -> str:
    order = [*(s.value for s in Status), "not run"]
    return ", ".join(f"{counts[s]} {s}" for s in order if s in counts)


def summary(fixed: Fixed) -> list[str]:
    """What a user reads: op by op, before and after, and what is left to do."""
    lines = []
    for e in fixed.evidence:
        if e.op in fixed.needless:
            lines.append(f"not needed  {e.op}: what calls it is called on local shards")
            continue
        lines.append(f"{'verified' if e.verified else 'NOT VERIFIED'}  {e.op}")
        lines += _evidence_lines(e)[1:]
    lines += [f"no strategy  {op}: {why}" for op, why in sorted(fixed.unmended.items())]
    if lines:
        return lines
    if not any(r.outcome.status.ran for r in fixed.report.cases):
        return [f"Nothing to mend was found: {reached((), fixed.report.cases)}."]
    return ["Nothing to mend: no kernel op of these cases lacks a strategy."]


def reached(met: Iterable[str], results: Sequence[CaseResult]) -> str:
    """What cases came to, for who asks for something else."""
    if names := wording.listing(met, limit=12):
        return f"they reached {names}"
    why = next((r.outcome.message for r in results if r.outcome.message), "there are none")
    brings = next(
        (f" (--with {name} provisions it)" for name in provision.RECIPES if name in why), ""
    )
    return f"none of them ran: {wording.first_line(why).rstrip('.')}{brings}"
