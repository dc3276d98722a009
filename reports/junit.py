"""JUnit XML, for CI systems that show tests: one test case a case.

What a gate fails for is a failure, and without a gate every case with an error; what a baseline knows is
skipped, with what people wrote of it. The elements are those that Jenkins, GitLab and Surefire share
(junit-10.xsd).
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from attncheck.cells import Cell, Matrix
from attncheck.changes import ChangeGroup, word
from attncheck.model import CaseResult, Report, Severity, Status
from attncheck.pinned import by_case, case_name
from attncheck.text import clean, one_line
from attncheck.view import (
    FindingView,
    RenderOptions,
    View,
    build,
    mesh_text,
    setting_name,
    why_not_run,
)

NAME = "junit"
SUMMARY = "for CI that shows tests: JUnit XML, one test case a case"

MESSAGE = 300  # of a failure; its text says the rest
TEXT = 4000  # of a case: thousands of cases can share one long finding
MAX_SECONDS = 1e9

# What XML 1.0 cannot carry, not even as a character reference.
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(report: Report, *, options: RenderOptions) -> str:
    """An XML document. `options.width` and `options.color` mean nothing to it."""
    return _document([_suite(report, build(report), "attncheck")], options)


def render_matrix(matrix: Matrix, *, options: RenderOptions) -> str:
    """The same of a matrix, a test suite for each combination."""
    suites = [
        _suite(cell.report, build(cell.report), _line(cell.name)) if cell.report else _not_run(cell)
        for cell in matrix.cells
    ]
    return _document(suites, options)


def _document(suites: Sequence[ET.Element], options: RenderOptions) -> str:
    root = ET.Element("testsuites", {"name": "attncheck", **_counts(suites)})
    root.extend(suites)
    ET.indent(root, " ")
    text = '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, "unicode") + "\n"
    return text if options.unicode else text.encode("ascii", "xmlcharrefreplace").decode("ascii")


@dataclass(frozen=True)
class Told:
    """A case and what is told of it: its findings, the worst first; held against a baseline or an older
    report (`against`), what became of it, and the `numbers` of that."""

    result: CaseResult
    findings: tuple[FindingView, ...]
    against: str = ""
    change: ChangeGroup | None = None
    numbers: str = ""

    @property
    def errors(self) -> tuple[FindingView, ...]:
        return tuple(f for f in self.findings if f.severity is Severity.ERROR)


def _told(report: Report, view: View) -> Iterator[Told]:
    findings: dict[str, list[FindingView]] = {}
    for finding in sorted(view.findings, key=lambda finding: finding.severity.rank):
        for case in dict.fromkeys(finding.cases):
            findings.setdefault(case, []).append(finding)
    groups = by_case(view.comparison.groups) if view.comparison else {}
    changes = report.comparison.changes if report.comparison else ()
    numbers = {case_name(change.case): _line(change.detail) for change in changes}
    against = (view.comparison.against or "the baseline") if view.comparison else ""
    for result in report.cases:
        name = case_name(result.case.id)
        own = tuple(findings.get(name, ()))
        yield Told(result, own, against, groups.get(name), numbers.get(name, ""))


def _suite(report: Report, view: View, name: str) -> ET.Element:
    suite = _suite_of([_testcase(told) for told in _told(report, view)], name)
    suite.insert(0, _properties(view))
    told = [view.comparison.headline] if view.comparison else [view.exit_line]
    _text(ET.SubElement(suite, "system-out"), "\n".join([*told, *view.notices]))
    return suite


def _not_run(cell: Cell) -> ET.Element:
    """Of a combination without a report: nothing of it is known, and that must not pass for a success."""
    case = ET.Element(
        "testcase",
        {"classname": "attncheck.matrix", "name": _legal(_line(cell.name)), "time": "0.000"},
    )
    problem = clean(cell.problem) or "it did not run"
    case.append(_element("error", problem, problem[:TEXT]))
    return _suite_of([case], _line(cell.name))


def _suite_of(cases: Sequence[ET.Element], name: str) -> ET.Element:
    tags = Counter(child.tag for case in cases for child in case)
    suite = ET.Element(
        "testsuite",
        {
            "name": _legal(name),
            "tests": str(len(cases)),
            "failures": str(tags["failure"]),
            "errors": str(tags["error"]),
            "skipped": str(tags["skipped"]),
            "time": f"{sum(float(case.attrib['time']) for case in cases):.3f}",
        },
    )
    suite.extend(cases)
    return suite


def _counts(suites: Sequence[ET.Element]) -> dict[str, str]:
    counts = {
        name: str(sum(int(suite.attrib[name]) for suite in suites))
        for name in ("tests", "failures", "errors")
    }
    return {**counts, "time": f"{sum(float(suite.attrib['time']) for suite in suites):.3f}"}


def _properties(view: View) -> ET.Element:
    properties = ET.Element("properties")
    pairs = [*view.environment]
    if view.comparison is not None:
        pairs.append(("against", view.comparison.against))
        pairs += [
            (f"changed {d.name}", f"{d.before or 'none'} -> {d.after or 'none'}")
            for d in view.comparison.environment
        ]
    for name, value in pairs:
        ET.SubElement(properties, "property", {"name": _legal(name), "value": _legal(value)})
    return properties


# --- one case ------------------------------------------------------------------------------------


def _testcase(told: Told) -> ET.Element:
    case = told.result.case
    parts = (
        *(setting_name(told.result), case.route, mesh_text(case.mesh).replace(" x ", "x")),
        *(case.placement, case.direction),
    )
    testcase = ET.Element(
        "testcase",
        {
            "classname": _legal(_line(f"{case.probe}.{case.operator}")),
            "name": _legal("/".join(map(_line, parts))),
            "time": f"{_seconds(told.result.outcome.timings):.3f}",
        },
    )
    verdict = _verdict(told)
    if verdict is not None:
        testcase.append(verdict)
    warnings = [f for f in told.findings if f.severity is Severity.WARNING]
    if warnings:
        lines = "\n".join(f"warning {f.rule} {f.name}: {f.title}" for f in warnings)
        _text(ET.SubElement(testcase, "system-out"), lines)
    return testcase


def _verdict(told: Told) -> ET.Element | None:
    """What kept the case from passing; None where it passed."""
    outcome, change, errors = told.result.outcome, told.change, told.errors
    if change is not None and change.gates:
        about = [f for f in told.findings if f.rule in change.rules] or errors
        what = about[0].title if about else told.numbers
        message = f"{word(change.kind)}: {change.change}: {what}".rstrip(": ")
        return _element("failure", message, _said(told, about))
    if outcome.status is Status.UNKNOWN:
        return _element("error", "the check itself failed", _said(told, errors))
    if errors and not told.against:
        return _element("failure", errors[0].title, _said(told, errors))
    if outcome.status is Status.UNAVAILABLE:
        why = why_not_run(outcome)
        return _element("skipped", f"{why}: {_line(outcome.message)}".rstrip(": "), "")
    if errors:
        return _element("skipped", _tolerated(change, told.against), "")
    return None


def _tolerated(change: ChangeGroup | None, against: str) -> str:
    """Why a case with an error does not fail a gate."""
    if change is not None and change.kind.regressed:
        return f"allowed: {word(change.kind)}"
    return f"known: {change.reason}" if change and change.reason else f"known: in {against}"


def _said(told: Told, findings: Sequence[FindingView]) -> str:
    """What the case said itself, then what the first finding says of all its cases, and the way out."""
    lines = [clean(told.result.outcome.message).strip(), told.numbers]
    for finding in findings[:1]:
        lines += ["", f"{finding.rule} {finding.name}: {finding.title}", *finding.details]
        if finding.first_remedy is not None:
            remedy = finding.remedies[finding.first_remedy]
            lines += ["", f"What to do ({remedy.proof}): {remedy.text}", remedy.code]
        lines += ["", f"More: attncheck explain {finding.rule}"]
    # A blank line may stand between parts, not more.
    text = re.sub("\n{3,}", "\n\n", "\n".join(lines)).strip()
    return text if len(text) <= TEXT else text[: TEXT - 3] + "..."


def _seconds(timings: Mapping[str, float]) -> float:
    """The time of the calls; they are measured in milliseconds. A report from elsewhere may hold anything."""
    total = sum(value for value in timings.values() if math.isfinite(value) and value > 0) / 1000
    return min(total, MAX_SECONDS)


# --- text ----------------------------------------------------------------------------------------


def _line(text: str) -> str:
    return one_line(clean(text), MESSAGE)


def _legal(text: str) -> str:
    return _ILLEGAL.sub("", text)


def _element(tag: str, message: str, text: str) -> ET.Element:
    return _text(ET.Element(tag, {"message": _legal(one_line(message, MESSAGE))}), text)


def _text(element: ET.Element, text: str) -> ET.Element:
    element.text = _legal(text) or None
    return element
