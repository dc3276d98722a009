"""The same case through real processes and through simulated ranks: where they disagree, one has a bug.

Pure functions on outcomes; torch-free. Compared is what must not depend on how ranks are run: the status,
the facts behind it, the placements of results, the ops that DTensor refused, and every collective with its
count and bytes. Values are compared by their verdicts: gloo and the simulation add in different orders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from attncheck.model import DIAGNOSES, ENGINES_DISAGREE, Case, Fact, Outcome, Reason, Status

ENGINES = ("processes", "simulated", "both")

NOT_COMPARED = "not_compared"

# What the report says wherever ranks were simulated.
BLIND = (
    "All ranks were simulated in one process. That cannot show ranks that diverge, hang or die alone (one "
    "program with one hash seed runs for all), code that asks for its rank in Python or the environment or "
    "keeps something between calls, functions that are no dispatcher ops, and faults of the real collectives."
)

# Facts that say where or how often, or speak of the process: they may differ between equal verdicts.
_NO_VERDICTS = (*DIAGNOSES, "process_changed")

# Only real ranks can part, wait for each other or be killed by each other.
_NEEDS_PROCESSES = (Status.HANG, Status.CRASH, Status.DIVERGED)
_ON_NUMBERS = (Status.WRONG, Status.DRIFT, Status.REDISTRIBUTED, Status.SUPPORTED)


@dataclass(frozen=True)
class Comparison:
    """What two engines said of a case: where they differ, or why that cannot be asked."""

    differences: tuple[str, ...] = ()
    not_comparable: str = ""


def compare(case: Case, processes: Outcome, simulated: Outcome) -> Comparison:
    """Hold the outcome of simulated ranks against that of real ones."""
    for reason, text in _not_comparable(processes, simulated):
        if reason:
            return Comparison(not_comparable=text)
    said = {
        "status": (_status(processes), _status(simulated)),
        "verdicts on results": (_verdicts(processes), _verdicts(simulated)),
        "placements of results": (_placements(processes), _placements(simulated)),
        "refused ops": (_missing(processes), _missing(simulated)),
        "collectives": (_collectives(processes), _collectives(simulated)),
    }
    differ = {what: pair for what, pair in said.items() if pair[0] != pair[1]}
    judged = processes.status in _ON_NUMBERS and simulated.status in _ON_NUMBERS
    if case.setting.get("dropout") and judged and set(differ) <= {"status", "verdicts on results"}:
        # Masks come from each engine's own random states; what must hold of any mask was judged in both.
        masks = "dropout masks are drawn from other random states where ranks are simulated"
        return Comparison(not_comparable=masks if differ else "")
    return Comparison(
        tuple(
            f"{what}: {_only(a, b)} with processes, {_only(b, a)} simulated"
            for what, (a, b) in differ.items()
        )
    )


def _not_comparable(processes: Outcome, simulated: Outcome) -> Iterable[tuple[bool, str]]:
    yield (
        simulated.reason is Reason.NOT_SIMULATED,
        f"it was not simulated: {simulated.message}",
    )
    yield (
        processes.status in _NEEDS_PROCESSES and processes.status is not simulated.status,
        f"simulated ranks cannot show a {processes.status.value}: they said {simulated.status.value}",
    )
    yield (
        simulated.status is Status.HANG,
        "the simulation, which runs every rank's part one after the other, did not end in time",
    )
    yield (
        Reason.NOT_RUN in (processes.reason, simulated.reason),
        "the scan ended before both engines had run it",
    )
    yield (
        processes.status is Status.UNKNOWN,
        "the check itself failed with processes",
    )


def merged(processes: Outcome, comparison: Comparison) -> Outcome:
    """The outcome of real processes, made `unknown` where the simulation contradicts it."""
    if comparison.differences:
        text = "; ".join(comparison.differences)
        facts = tuple(Fact(ENGINES_DISAGREE, *_split(d)) for d in comparison.differences)
        return replace(
            processes,
            status=Status.UNKNOWN,
            reason=None,
            message=f"real processes and simulated ranks disagree, so one of the two has a bug: {text}",
            facts=facts,  # the others belong to a verdict that is not given
        )
    if comparison.not_comparable:
        fact = Fact(NOT_COMPARED, "", comparison.not_comparable)
        return replace(processes, facts=(*processes.facts, fact))
    return processes


def crosscheck(
    cases: Iterable[Case],
    processes: Mapping[int, Outcome],
    simulated: Mapping[int, Outcome],
) -> dict[int, Outcome]:
    """Outcomes by case index, of those that both engines have run, and of those that only processes have."""
    out = dict(processes)
    for index, case in enumerate(cases):
        if index in processes and index in simulated:
            comparison = compare(case, processes[index], simulated[index])
            out[index] = merged(processes[index], comparison)
        elif index in processes:
            left = Comparison(not_comparable="the scan ended before it was simulated")
            out[index] = merged(processes[index], left)
    return out


def counts(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many cases agree, disagree, and could not be compared."""
    out = {"agree": 0, "disagree": 0, "not_compared": 0}
    for outcome in outcomes:
        codes = {fact.code for fact in outcome.facts}
        key = (
            "disagree"
            if ENGINES_DISAGREE in codes
            else "not_compared"
            if NOT_COMPARED in codes
            else "agree"
        )
        out[key] += 1
    return out


def sentence(counts: Mapping[str, int]) -> str:
    """`counts`, for the report."""
    return (
        f"Each case was run with real processes and with simulated ranks: {counts['agree']} agree, "
        f"{counts['disagree']} disagree, {counts['not_compared']} could not be compared."
    )


# --- what is compared, as sets of texts ------------------------------------------------------------------


def _status(outcome: Outcome) -> set[str]:
    kind = f" ({outcome.exception_type})" if outcome.exception_type else ""
    why = f" ({outcome.reason.value})" if outcome.reason else ""
    return {f"{outcome.status.value}{kind}{why}"}


def _verdicts(outcome: Outcome) -> set[str]:
    return {
        f"{fact.code} {fact.subject}".strip()
        for fact in outcome.facts
        if fact.code not in _NO_VERDICTS
    }


def _placements(outcome: Outcome) -> set[str]:
    return {f"{name} [{', '.join(texts)}]" for name, texts in outcome.outputs.items()}


def _missing(outcome: Outcome) -> set[str]:
    return {f"{m.op} in {m.phase} ({m.kind})" for m in outcome.missing_ops}


def _collectives(outcome: Outcome) -> set[str]:
    return {
        f"{c.count} {c.name} of {c.bytes} B in {c.kernel_op} ({c.phase})"
        for c in outcome.collectives
    }


def _only(mine: set[str], other: set[str]) -> str:
    return ", ".join(sorted(mine - other)) or "nothing of that"


def _split(difference: str) -> tuple[str, str]:
    what, _, said = difference.partition(": ")
    return what, said
