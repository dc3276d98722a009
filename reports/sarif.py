"""SARIF 2.1.0, for code scanning: one run, every rule, one result a finding.

Source: Static Analysis Results Interchange Format, OASIS Standard (errata 01). Limits are those of GitHub's
code scanning, the narrowest reader: "SARIF support for code scanning", docs.github.com.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from attncheck import HOMEPAGE, __version__, pinned
from attncheck.model import Report, Severity
from attncheck.pinned import Annotation
from attncheck.rules import RULES, Rule
from attncheck.text import count, listing
from attncheck.view import RemedyView, RenderOptions, View, build

NAME = "sarif"
SUMMARY = "for code scanning: SARIF 2.1.0, one result a finding"

SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
FINGERPRINT = "attncheckFinding/v1"

# An upload: at most 10 MB gzipped and 25,000 results, of which 5,000 are shown. A rule: at most 1,024
# characters a description and 255 a name, 10 tags; ours are far below.
UPLOAD_BYTES = 10_000_000
DESCRIPTION = 1024
NAMED_CASES = 3  # in a message
MESSAGE = 4000
OPERATORS = 100


@dataclass(frozen=True)
class Detail:
    """How much is said: of how many results, and how many remedies of each with how much code."""

    results: int
    remedies: int
    code: int


# From generous to terse; a report takes the first with which it can be uploaded.
DETAILS = (Detail(5000, 10, 4000), Detail(5000, 2, 1000), Detail(1000, 1, 0))

LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}
# GitHub's word for what is no security issue.
PROBLEMS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "recommendation"}


def render(report: Report, *, options: RenderOptions) -> str:
    """One SARIF log. `options.folder` is the project whose lines are pointed at."""
    view = build(report)
    found = pinned.build(report, view, options.folder)
    text = ""
    for detail in DETAILS:
        log = {"$schema": SCHEMA, "version": "2.1.0", "runs": [_run(report, view, found, detail)]}
        text = json.dumps(log, indent=1, ensure_ascii=not options.unicode) + "\n"
        if len(text) < UPLOAD_BYTES or len(gzip.compress(text.encode(), 6)) < UPLOAD_BYTES:
            break
    return text


def _run(report: Report, view: View, found: Sequence[Annotation], detail: Detail) -> dict[str, Any]:
    shown = found[: detail.results]
    notices = [*view.notices]
    if len(shown) < len(found):
        notices.append(
            f"{len(found) - len(shown)} more findings, none worse, are in --output json."
        )
    return {
        "tool": {"driver": _driver(report)},
        "invocations": [_invocation(view, notices)],
        "results": [_result(annotation, detail) for annotation in shown],
        "properties": {
            "environment": dict(view.environment),
            "cases": {status.value: number for status, number in view.summary},
            **_compared(view),
        },
    }


def _driver(report: Report) -> dict[str, Any]:
    version = report.environment.get("attncheck")
    semantic = isinstance(version, str) and re.fullmatch(r"\d+\.\d+\.\d+", version, re.ASCII)
    return {
        "name": "attncheck",
        "informationUri": HOMEPAGE,
        "semanticVersion": version if semantic else __version__,
        "rules": [_rule(rule) for rule in RULES],
    }


def _invocation(view: View, notices: Sequence[str]) -> dict[str, Any]:
    """What the reader must know before trusting the results."""
    ending = (
        {"exitCode": view.comparison.exit_code, "exitCodeDescription": view.comparison.verdict}
        if view.comparison and view.comparison.verdict
        else {"exitCodeDescription": view.exit_line}
    )
    told = [{"level": "warning", "message": {"text": _message(text)}} for text in notices]
    return {
        "executionSuccessful": True,
        **ending,
        **({"toolExecutionNotifications": told} if told else {}),
    }


def _compared(view: View) -> dict[str, Any]:
    """What got better is no result: GitHub would open an alert for each, whatever its `baselineState`."""
    if view.comparison is None:
        return {}
    changes = {kind.value: number for kind, number in view.comparison.counts}
    different = {d.name: [d.before, d.after] for d in view.comparison.environment}
    return {"against": view.comparison.against, "changes": changes, "changed": different}


# --- rules ---------------------------------------------------------------------------------------


def _rule(rule: Rule) -> dict[str, Any]:
    what = _section(rule, "What it does")
    full = f"{what} {_section(rule, 'Why is this bad?')}"
    return {
        "id": rule.id,
        "name": rule.name,
        "shortDescription": {"text": _braces(_cut(re.split(r"(?<=[.:]) ", what)[0], DESCRIPTION))},
        "fullDescription": {"text": _braces(_cut(full, DESCRIPTION))},
        "help": {"text": _braces(rule.docs), "markdown": _braces(rule.docs)},
        "helpUri": rule.docs_url,
        "defaultConfiguration": {"level": LEVELS[rule.severity]},
        "properties": {
            "tags": ["attention", "distributed", rule.id[:4]],
            "precision": "very-high",
            "problem.severity": PROBLEMS[rule.severity],
        },
    }


def _section(rule: Rule, title: str) -> str:
    """A section of a rule's text as one plain paragraph."""
    _, _, after = rule.docs.partition(f"## {title}\n")
    text = after.partition("\n## ")[0]
    return " ".join(re.sub(r"[`*]", "", text).split())


# --- results -------------------------------------------------------------------------------------


def _result(annotation: Annotation, detail: Detail) -> dict[str, Any]:
    finding = annotation.finding
    result: dict[str, Any] = {
        "ruleId": finding.rule,
        "level": LEVELS[finding.severity],
        "message": {"text": _message(_cut(_text(annotation), MESSAGE))},
        "locations": [_location(annotation)],
        # The second is the only one that GitHub heeds. Without it GitHub makes its own of the line, and takes
        # all that a rule finds in one package for one alert, which a bump of the version closes and reopens.
        "partialFingerprints": {
            FINGERPRINT: finding.fingerprint,
            "primaryLocationLineHash": f"{finding.fingerprint}:1",
        },
        "properties": {
            "cases": len(finding.cases),
            "operators": list(annotation.operators[:OPERATORS]),
            "placements": list(annotation.placements),
            "remedies": [_remedy(remedy, detail) for remedy in finding.remedies[: detail.remedies]],
        },
    }
    index = next((i for i, rule in enumerate(RULES) if rule.id == finding.rule), None)
    if index is not None:  # else a newer attncheck wrote the report
        result["ruleIndex"] = index
    if annotation.state is not None:
        result["baselineState"] = annotation.state.value
    if annotation.accepted:
        result["suppressions"] = [
            {"kind": "external", "status": "accepted", "justification": annotation.accepted}
        ]
    return result


def _text(annotation: Annotation) -> str:
    """The title, which is all that a list of alerts shows; then how far it goes, and the way out."""
    finding = annotation.finding
    lines = [finding.title.rstrip(".") + "."]
    if finding.cases:
        lines.append(f"{count(len(finding.cases), 'case')}: {listing(finding.cases, NAMED_CASES)}.")
    lines += finding.details
    if finding.first_remedy is not None:
        first = finding.remedies[finding.first_remedy]
        lines.append(f"What to do: {first.text} ({first.proof})")
    return "\n".join(lines)


def _location(annotation: Annotation) -> dict[str, Any]:
    location: dict[str, Any] = {
        "physicalLocation": {
            "artifactLocation": {
                "uri": quote(annotation.location.path),
                "uriBaseId": "%SRCROOT%",
            },
            "region": {"startLine": annotation.location.line},
        }
    }
    if annotation.kernel_op:
        named = {"fullyQualifiedName": annotation.kernel_op, "kind": "function"}
        location["logicalLocations"] = [named]
    return location


def _remedy(remedy: RemedyView, detail: Detail) -> dict[str, Any]:
    code = _cut(remedy.code, detail.code) if detail.code else ""
    told = {"kind": remedy.kind, "text": remedy.text, "proven": remedy.proven}
    return {**told, "code": code} if code else told


# --- text ----------------------------------------------------------------------------------------


def _message(text: str) -> str:
    """Foreign text as a plain message: without links of its own (3.11.6), braces doubled (3.11.5)."""
    return _braces(text.replace("](", "] ("))


def _braces(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
