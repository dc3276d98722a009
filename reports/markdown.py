"""The report for an issue tracker: the answer and the environment first, cases folded away.

Everything that comes from outside goes through `prose`, `code` or `block`, so that a case id or a
message can neither break a table nor notify somebody. Written for GitHub's Markdown.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tabulate import tabulate

from attncheck.model import Report, Severity
from attncheck.view import (
    EXIT_CODES,
    STYLES,
    Cell,
    FindingView,
    RemedyView,
    RenderOptions,
    Row,
    Usable,
    View,
    Works,
    build,
    count,
    listing,
)

NAME = "markdown"
SUMMARY = "for an issue: headline, environment, findings, matrix; cases folded away"

MATRIX_ROWS = 150
CODE_LENGTH = 8000

# What means something to Markdown anywhere in a line; an underscore does not inside of a word.
_SPECIAL = re.compile(r"[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_PLAIN_CODE = re.compile(r"[\w .,:;=+()\[\]/'@*#?!&^%~-]+", re.ASCII)
_SPAN = re.compile(r"(?<!`)`([\w.:()\[\]=,-]+)`(?!`)", re.ASCII)
_ZERO_WIDTH_SPACE = "&#8203;"


# GitHub refuses an issue of more than 65,536 characters.
ISSUE_LENGTH = 65_000


@dataclass(frozen=True)
class Detail:
    """How much of each finding is shown."""

    cases: int
    remedies: int


VERBOSE = Detail(500, 500)
# From generous to terse; a report takes the first with which it fits into an issue.
DETAILS = (Detail(30, 20), Detail(10, 4), Detail(5, 2), Detail(2, 1), Detail(0, 0))


def render(report: Report, *, options: RenderOptions) -> str:
    """Markdown. `options.width` and `options.color` mean nothing to it."""
    view = build(report)
    if options.verbose:
        return _render(view, options, VERBOSE)
    text = ""
    for detail in DETAILS:
        text = _render(view, options, detail)
        if len(text) <= ISSUE_LENGTH:
            break
    return text


def _render(view: View, options: RenderOptions, detail: Detail) -> str:
    sections: tuple[Iterable[str], ...] = (
        _headline(view),
        _changes(view, detail),
        _missing(view),
        _environment(view),
        _findings(view, detail),
        _works(view),
        _matrix(view, options),
        _not_run(view),
        _summary(view),
    )
    text = "\n\n".join(part for section in sections for part in section) + "\n"
    return text if options.unicode else text.encode("ascii", "xmlcharrefreplace").decode("ascii")


# --- escaping ------------------------------------------------------------------------------------


def prose(text: str) -> str:
    """Foreign text on one line that Markdown shows as it is, in a paragraph or in a table.

    Single words in backticks, as our own rules write names, stay in code font.
    """
    parts = _SPAN.split(" ".join(text.split()))
    # The odd parts are what stood between two lone backticks.
    out = "".join(_escape(p) if i % 2 == 0 else f"`{p}`" for i, p in enumerate(parts))
    # What begins a list, a heading or a rule at the start of a line.
    return re.sub(r"^([#+=-]|\d+(?=[.)]\s))", _escape_start, out)


def _escape(text: str) -> str:
    return _mute(_SPECIAL.sub(r"\\\g<0>", html.escape(text, quote=False)))


def _escape_start(match: re.Match[str]) -> str:
    # Only punctuation can be escaped: a number makes no list where something precedes it.
    return f"&#8203;{match[0]}" if match[0][0].isdigit() else f"\\{match[0]}"


def _mute(escaped: str) -> str:
    # GitHub looks for @name and #123 after resolving entities: only a character between helps.
    escaped = re.sub(r"@(?=\w)", f"@{_ZERO_WIDTH_SPACE}", escaped)
    return re.sub(r"(?<!&)#(?=\d)", f"#{_ZERO_WIDTH_SPACE}", escaped)


def code(text: str) -> str:
    """A name in code font: a code span where that is safe, else escaped HTML."""
    text = " ".join(text.split())
    if not text:
        return ""
    return f"`{text}`" if _PLAIN_CODE.fullmatch(text) else f"<code>{_escape(text)}</code>"


def block(text: str, language: str = "") -> str:
    """A fenced block, behind a fence longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def details(summary: str, body: str) -> str:
    """A fold. Its first line is HTML, not Markdown; the blank lines let Markdown read the body."""
    text = _mute(html.escape(" ".join(summary.split()), quote=False))
    return f"<details><summary>{text}</summary>\n\n{body}\n\n</details>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return tabulate(list(rows), header, tablefmt="github", disable_numparse=True)


# --- sections ------------------------------------------------------------------------------------


def _headline(view: View) -> Iterable[str]:
    yield "# attncheck report"
    yield "\n".join(f"**{prose(sentence)}**" for sentence in view.headline[:1])
    rest = [*view.headline[1:], *(f"Note: {notice}" for notice in view.notices)]
    for sentence in rest:
        yield prose(sentence)


def _changes(view: View, detail: Detail) -> Iterable[str]:
    if not view.changes:
        return
    yield "## Before and after"
    yield "What each case was without the fix, and is with it."
    yield _table(
        ("before", "after", "cases"),
        (
            (prose(change.before), prose(STYLES[change.after].word), str(len(change.cases)))
            for change in view.changes
        ),
    )
    for change in view.changes if detail.cases else ():
        shown = change.cases[: 10 * detail.cases]
        rest = len(change.cases) - len(shown)
        lines = [*shown, *([f"and {rest} more (all in --output json)"] if rest else [])]
        title = (
            f"{count(len(change.cases), 'case')}: {change.before} -> {STYLES[change.after].word}"
        )
        yield details(title, block("\n".join(lines), "text"))


def _missing(view: View) -> Iterable[str]:
    if not view.missing:
        return
    yield "## Missing"
    rows = ((code(m.op), str(m.cases), prose(listing(m.operators, 3))) for m in view.missing)
    yield _table(("kernel op without a sharding strategy", "cases", "operators"), rows)


def _findings(view: View, detail: Detail) -> Iterable[str]:
    if not view.groups:
        return
    shown: set[str] = set()  # code that stands above already
    counts = ", ".join(
        count(n, "note" if severity is Severity.INFO else severity.value)
        for severity, n in view.severities
    )
    yield f"## Findings ({counts})"
    for group in view.groups:
        yield f"### {code(group.kernel_op) or group.title}"
        for finding in group.findings:
            yield from _finding(finding, detail, shown)


def _finding(finding: FindingView, detail: Detail, shown: set[str]) -> Iterable[str]:
    yield f"#### {finding.severity.value} {prose(finding.rule)}: {prose(finding.title)}"
    yield f"Where: {prose(finding.where)}"
    if finding.details and detail.cases:
        yield "\n".join(f"> {prose(line)}  " for line in finding.details).rstrip()
    ordered = sorted(enumerate(finding.remedies), key=lambda r: r[0] != finding.first_remedy)
    for i, remedy in ordered[: detail.remedies]:
        yield from _remedy(remedy, shown, first=i == finding.first_remedy)
    if len(ordered) > detail.remedies:
        yield f"and {len(ordered) - detail.remedies} more ways (all in --output json)"
    yield _cases(finding, detail)


def _remedy(remedy: RemedyView, shown: set[str], *, first: bool) -> Iterable[str]:
    lead = f"{'**Do**' if first else 'Or'} ({prose(remedy.kind)}; *{prose(remedy.proof)}*)"
    text = f"{lead}: {prose(remedy.text)}"
    if not remedy.code:
        yield text
        return
    if remedy.code in shown:
        yield f"{text} (The code stands above.)"
        return
    shown.add(remedy.code)
    lines = remedy.code if len(remedy.code) <= CODE_LENGTH else remedy.code[:CODE_LENGTH] + "\n..."
    body = block(lines, "python")
    if first:
        yield text
        yield body
    else:
        yield text
        yield details("code", body)


def _cases(finding: FindingView, detail: Detail) -> str:
    limit = detail.cases
    lines = list(finding.cases[:limit])
    if len(finding.cases) > limit:
        lines.append(f"and {len(finding.cases) - limit} more (all in --output json)")
    number = count(len(finding.cases), "case")
    summary = f"{number}, {finding.name}, fingerprint {finding.fingerprint}"
    return details(summary, block("\n".join(lines), "text"))


def _works(view: View) -> Iterable[str]:
    if not view.works:
        return
    yield "## What works"
    header = ("placement", "forward and backward", "forward only", "in part")
    yield _table(header, (_works_row(works) for works in view.works))


def _works_row(works: Works) -> tuple[str, ...]:
    kinds = (works.both, works.forward, works.part)
    return (code(works.placement), *("<br>".join(map(_usable, kind)) or "-" for kind in kinds))


def _usable(usable: Usable) -> str:
    notes = "; ".join(note for note in (usable.cost, usable.share) if note)
    return f"{code(usable.operator)} ({prose(notes)})"


def _matrix(view: View, options: RenderOptions) -> Iterable[str]:
    if not view.compact:
        return
    yield "## Operators by placement"
    yield "Worst status, and how many cases are right."
    yield _grid(view.compact, view.placements, options)
    styles = [STYLES[status] for status in view.legend]
    legend = (f"{s.mark(options.unicode)} {s.word} ({s.meaning})" for s in styles)
    yield prose(" / ".join(legend))
    if len(view.rows) <= MATRIX_ROWS or options.verbose:
        yield details("every setting", _grid(view.rows, view.placements, options))
    else:
        yield f"Every setting on its own: {len(view.rows)} rows, left out (all in --output json)."


def _grid(rows: Sequence[Row], placements: Sequence[str], options: RenderOptions) -> str:
    with_setting = any(row.setting for row in rows)
    labels = ["operator", "setting", "direction"] if with_setting else ["operator", "direction"]
    return _table(
        [*labels, *map(code, placements)],
        (
            [
                code(row.operator),
                *([code(row.setting)] if with_setting else []),
                prose(row.direction),
                *(_cell(cell, options) for cell in row.cells),
            ]
            for row in rows
        ),
    )


def _cell(cell: Cell | None, options: RenderOptions) -> str:
    if cell is None:
        return ""
    style = STYLES[cell.status]
    mark = prose(style.mark(options.unicode))
    text = f"{mark} {style.word}"
    return text if cell.total <= 1 else f"{text} {cell.ok}/{cell.total}"


def _not_run(view: View) -> Iterable[str]:
    if not view.not_run:
        return
    yield f"## Did not run ({count(sum(entry.count for entry in view.not_run), 'case')})"
    rows = (
        (str(e.count), prose(listing(e.operators, 5)), prose(e.reason), prose(e.detail))
        for e in view.not_run
    )
    yield _table(("cases", "operators", "reason", "detail"), rows)


def _environment(view: View) -> Iterable[str]:
    pairs = list(view.environment)
    if view.phases:
        pairs.append(("phases", ", ".join(f"{name} {time}" for name, time in view.phases)))
    if pairs:
        yield "## Environment"
        yield _table(("", ""), ((label, prose(text)) for label, text in pairs))


def _summary(view: View) -> Iterable[str]:
    total = sum(number for _, number in view.summary)
    counts = ", ".join(f"{number} {STYLES[status].word}" for status, number in view.summary)
    yield "## Summary"
    yield f"{count(total, 'case')}: {counts}." if total else "No cases."
    yield prose(f"{view.exit_line} Exit codes: {EXIT_CODES}.")
