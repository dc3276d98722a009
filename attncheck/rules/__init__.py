"""Rules judge outcomes. One file per rule: its text, its metadata and its `judge` together."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from attncheck.errors import unknown
from attncheck.model import CaseResult, Finding, worst
from attncheck.rules import (
    atn101_missing_forward_strategy,
    atn102_missing_backward_strategy,
    atn103_mixed_tensor,
    atn104_bypasses_dispatcher,
    atn201_wrong_result,
    atn202_wrong_gradient,
    atn203_drift,
    atn204_replicas_differ,
    atn205_dropout_mask,
    atn206_illegal_placement,
    atn207_stale_second_call,
    atn209_placement_lost,
    atn301_implicit_redistribution,
    atn302_slow_propagation,
    atn401_operator_unavailable,
    atn402_extension_not_loadable,
    atn403_version_unsupported,
    atn404_probe_not_loadable,
    atn405_requirement_unmet,
    atn406_known_incompatibility,
    atn407_wheel_for_another_build,
    atn408_package_clash,
    atn409_no_prebuilt_wheel,
    atn501_crash,
    atn502_hang,
    atn503_diverged,
    atn504_unexpected_exception,
    atn505_check_failed,
    atn506_engines_disagree,
)
from attncheck.rules.base import Rule

if TYPE_CHECKING:
    from attncheck.static.installed import Installation

__all__ = ["RULES", "Rule", "examine", "expand", "find", "judge"]

# Ordered by id. An id that was published is never given to another rule.
RULES: tuple[Rule, ...] = (
    atn101_missing_forward_strategy.RULE,
    atn102_missing_backward_strategy.RULE,
    atn103_mixed_tensor.RULE,
    atn104_bypasses_dispatcher.RULE,
    atn201_wrong_result.RULE,
    atn202_wrong_gradient.RULE,
    atn203_drift.RULE,
    atn204_replicas_differ.RULE,
    atn205_dropout_mask.RULE,
    atn206_illegal_placement.RULE,
    atn207_stale_second_call.RULE,
    atn209_placement_lost.RULE,
    atn301_implicit_redistribution.RULE,
    atn302_slow_propagation.RULE,
    atn401_operator_unavailable.RULE,
    atn402_extension_not_loadable.RULE,
    atn403_version_unsupported.RULE,
    atn404_probe_not_loadable.RULE,
    atn405_requirement_unmet.RULE,
    atn406_known_incompatibility.RULE,
    atn407_wheel_for_another_build.RULE,
    atn408_package_clash.RULE,
    atn409_no_prebuilt_wheel.RULE,
    atn501_crash.RULE,
    atn502_hang.RULE,
    atn503_diverged.RULE,
    atn504_unexpected_exception.RULE,
    atn505_check_failed.RULE,
    atn506_engines_disagree.RULE,
)

_FAMILY = "ATN"


def find(id_or_name: str) -> Rule:
    """The rule of this id or name, whatever its case. Raises UserError naming the nearest."""
    wanted = id_or_name.strip().lower()
    for rule in RULES:
        if wanted in (rule.id.lower(), rule.name):
            return rule
    # Ids are written in capitals: the nearest one must be looked for in the same case.
    raise unknown("rule", wanted.upper() if wanted.startswith("atn") else wanted, _known())


def expand(selectors: Iterable[str]) -> set[str]:
    """Ids of the rules that ids, names, id prefixes (`ATN1`) and globs (`missing-*`) stand for.

    Raises UserError for a selector that stands for none.
    """
    ids = set()
    for selector in selectors:
        matched = {rule.id for rule in RULES if _matches(rule, selector.strip())}
        if not matched:
            find(selector)  # raises, with the nearest names
        ids |= matched
    return ids


def _matches(rule: Rule, selector: str) -> bool:
    upper, lower = selector.upper(), selector.lower()
    if upper.startswith(_FAMILY) and rule.id.startswith(upper):
        return True
    return fnmatch.fnmatchcase(rule.id, upper) or fnmatch.fnmatchcase(rule.name, lower)


def _known() -> list[str]:
    return [name for rule in RULES for name in (rule.id, rule.name)]


def judge(
    results: Iterable[CaseResult], *, select: Sequence[str] = (), ignore: Sequence[str] = ()
) -> tuple[Finding, ...]:
    """What the rules find, worst first: by severity, worst status, number of cases, rule id.

    `select` (empty for all) and `ignore` hold what `expand` takes; `ignore` wins. The order of
    `results` does not matter. Raises UserError for an unknown selector.
    """
    by_id = sorted(results, key=lambda result: result.case.id)
    wanted = (expand(select) if select else {rule.id for rule in RULES}) - expand(ignore)
    findings = [finding for rule in RULES if rule.id in wanted for finding in rule.judge(by_id)]
    statuses = {result.case.id: result.outcome.status for result in by_id}

    def order(finding: Finding) -> tuple[int, int, int, str, str]:
        status = worst(statuses[case] for case in finding.cases)
        # The title last: it holds the subject, and no two findings of a rule share one.
        return (
            finding.severity.rank,
            status.rank,
            -len(finding.cases),
            finding.rule,
            finding.title,
        )

    return tuple(sorted(findings, key=order))


def examine(
    installation: Installation, *, select: Sequence[str] = (), ignore: Sequence[str] = ()
) -> tuple[Finding, ...]:
    """What the rules find in an environment by its files or planned versions alone: worst first, then by
    rule and title. No finding has cases. `select` and `ignore` are those of `judge`."""
    wanted = (expand(select) if select else {rule.id for rule in RULES}) - expand(ignore)
    findings = [
        finding
        for rule in RULES
        if rule.id in wanted and rule.examine is not None
        for finding in rule.examine(installation)
    ]
    return tuple(sorted(findings, key=lambda f: (f.severity.rank, f.rule, f.title)))
