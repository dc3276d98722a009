"""The report for an issue tracker: the answer and the environment first, cases folded away.

Everything that comes from outside goes through `attncheck.markup`. Written for GitHub's Markdown; unless
everything is asked for, it fits into an issue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from attncheck import cellsview
from attncheck.cells import Matrix
from attncheck.cellsview import Combination, Grid, MatrixView, Shift, Spread, Way
from attncheck.changes import ChangeGroup, ComparisonView, word
from attncheck.markup import ISSUE_LENGTH, block, code, details, prose, table
from attncheck.model import Report, Severity, Status
from attncheck.text import count, listing, one_line
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
)

NAME = "markdown"
SUMMARY = "for an issue: headline, environment, findings, matrix; cases folded away"

CODE_LENGTH = 8000
LEFT_OUT = "The rest is left out: an issue would not hold it (all in --output json)."


@dataclass(frozen=True)
class Detail:
    """How much is shown: of each finding its `cases`, `remedies` and `lines` of details, of the matrices
    `settings` and `rows` (the second of operators alone), in a cell of what works its `names`, of an
    environment entry its `words` (characters), and how many `findings`."""

    cases: int
    remedies: int
    lines: int = 100
    settings: int = 150
    rows: int = 200
    names: int = 100
    words: int = 2000
    findings: int = 500


EVERYTHING = 10**9
VERBOSE = Detail(500, 500, settings=EVERYTHING, rows=EVERYTHING, findings=EVERYTHING)
# From generous to terse; a report takes the first with which it fits into an issue.
DETAILS = (
    Detail(30, 20),
    Detail(10, 4, words=1000),
    Detail(5, 2, settings=0, words=600),
    Detail(2, 1, settings=0, rows=60, names=8, words=400),
    Detail(1, 1, lines=2, settings=0, rows=40, names=4, words=300, findings=100),
    Detail(0, 0, lines=1, settings=0, rows=20, names=2, words=200, findings=60),
    Detail(0, 0, lines=0, settings=0, rows=10, names=1, words=100, findings=30),
)


def render(report: Report, *, options: RenderOptions) -> str:
    """Markdown. `options.width` and `options.color` mean nothing to it."""
    view = build(report)
    return _fitted(lambda detail: _parts(view, options, detail), options)


def render_matrix(matrix: Matrix, *, options: RenderOptions) -> str:
    """The same of a matrix."""
    view = cellsview.build(matrix)
    return _fitted(lambda detail: _matrix_parts(view, options, detail), options)


def _fitted(made: Callable[[Detail], list[str]], options: RenderOptions) -> str:
    """As much as fits into an issue; everything where that is asked for."""
    if options.verbose:
        return _text(made(VERBOSE), options)
    for detail in DETAILS:
        parts = made(detail)
        text = _text(parts, options)
        if len(text) <= ISSUE_LENGTH:
            return text
    return _text(_that_fit(parts, options), options)


def _that_fit(parts: Sequence[str], options: RenderOptions) -> list[str]:
    """The first parts of a report that is too long however little is shown of each."""
    kept: list[str] = []
    left = ISSUE_LENGTH - len(LEFT_OUT) - 3
    for part in parts:
        left -= len(_text([part], options)) + 1
        if left < 0:
            break
        kept.append(part)
    return [*kept, LEFT_OUT]


def _parts(view: View, options: RenderOptions, detail: Detail) -> list[str]:
    answer: tuple[Iterable[str], ...] = (
        _headline(view, detail),
        _audit(view, options, detail),
        _changes(view, detail),
        _missing(view, detail),
        _environment(view, detail),
        _findings(view, detail),
        _works(view, detail),
    )
    if view.comparison is not None:
        # Who gates asks what changed: the findings that were there before are told with -v.
        compared = (_comparison(view.comparison, detail), _regressions(view, detail))
        answer = (*compared, *(answer if options.verbose else (_environment(view, detail),)))
    rest = (_matrix(view, options, detail), _not_run(view, detail), _summary(view))
    return [part for section in (*answer, *rest) for part in section]


def _text(parts: Iterable[str], options: RenderOptions) -> str:
    text = "\n\n".join(parts) + "\n"
    return text if options.unicode else text.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _more(number: int, noun: str) -> list[str]:
    return [f"and {count(number, noun)} more (all in --output json)"] if number > 0 else []


# --- sections ------------------------------------------------------------------------------------


def _headline(view: View, detail: Detail) -> Iterable[str]:
    yield "## The whole report" if view.comparison is not None else "# attncheck report"
    yield "\n".join(f"**{prose(sentence)}**" for sentence in view.headline[:1])
    rest = [*view.headline[1:], *(f"Note: {notice}" for notice in view.notices)]
    for sentence in rest[: detail.rows]:
        yield prose(one_line(sentence, detail.words))
    yield from _more(len(rest) - detail.rows, "note")


def _audit(view: View, options: RenderOptions, detail: Detail) -> Iterable[str]:
    for section in view.audit.sections if view.audit is not None else ():
        if section.detail and not options.verbose:
            continue
        yield f"## {prose(section.title)}"
        yield prose(section.about[:1].upper() + section.about[1:] + ".")
        if section.rows:
            cells = (
                tuple(prose(one_line(cell, detail.words)) for cell in row)
                for row in section.rows[: detail.rows]
            )
            yield table([prose(name) for name in section.columns], cells)
        yield from _more(len(section.rows) - detail.rows, "row")
        for note in section.notes[: detail.rows]:
            yield prose(one_line(note, detail.words))


def _comparison(comparison: ComparisonView, detail: Detail) -> Iterable[str]:
    yield f"# {prose(comparison.headline)}"
    if comparison.verdict:
        yield prose(f"Against {comparison.against}: {comparison.counted}.")
    if comparison.environment:
        changed = comparison.environment[: detail.rows]
        rows = (
            (
                prose(d.name),
                prose(one_line(d.before, detail.words)),
                prose(one_line(d.after, detail.words)),
            )
            for d in changed
        )
        yield table(("environment", "before", "now"), rows)
        yield from _more(len(comparison.environment) - len(changed), "difference")
    if comparison.groups:
        shown = comparison.groups[: detail.rows]
        yield table(("", "operator", "change", "where", ""), (_change(g, detail) for g in shown))
        yield from _more(len(comparison.groups) - len(shown), "group")
    if comparison.stale:
        yield f"{comparison.stale} entries of the baseline are stale: fixed, or no longer run."


def _change(group: ChangeGroup, detail: Detail) -> tuple[str, ...]:
    until = f" (until {group.until})" if group.until else ""
    accepted = f"accepted: {group.reason}{until}" if group.reason or until else ""
    notes = "; ".join(note for note in (group.detail, accepted) if note)
    kind = word(group.kind)
    return (
        f"**{kind}**" if group.gates else kind,
        code(group.operator),
        prose(group.change),
        prose(one_line(group.extent, detail.words)),
        prose(one_line(notes, detail.words)),
    )


def _regressions(view: View, detail: Detail) -> Iterable[str]:
    if not view.regressions:
        return
    yield "## What to do"
    shown: set[str] = set()
    for finding in view.regressions[: detail.findings]:
        yield from _finding(finding, detail, shown)
    yield from _more(len(view.regressions) - detail.findings, "finding")


def _changes(view: View, detail: Detail) -> Iterable[str]:
    if not view.changes:
        return
    yield "## Before and after"
    yield "What each case was without the fix, and is with it."
    yield table(
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


def _missing(view: View, detail: Detail) -> Iterable[str]:
    if not view.missing:
        return
    yield "## Missing"
    shown = view.missing[: detail.rows]
    rows = ((code(m.op), str(m.cases), prose(listing(m.operators, 3))) for m in shown)
    yield table(("kernel op without a sharding strategy", "cases", "operators"), rows)
    yield from _more(len(view.missing) - len(shown), "op")


def _findings(view: View, detail: Detail) -> Iterable[str]:
    if not view.groups:
        return
    shown: set[str] = set()  # code that stands above already
    counts = ", ".join(
        count(n, "note" if severity is Severity.INFO else severity.value)
        for severity, n in view.severities
    )
    yield f"## Findings ({counts})"
    left = detail.findings
    for group in view.groups:
        if left <= 0:
            break
        yield f"### {code(group.kernel_op) or group.title}"
        for finding in group.findings[:left]:
            yield from _finding(finding, detail, shown)
        left -= len(group.findings)
    yield from _more(len(view.findings) - detail.findings, "finding")


def _finding(finding: FindingView, detail: Detail, shown: set[str]) -> Iterable[str]:
    yield f"#### {finding.severity.value} {prose(finding.rule)}: {prose(finding.title)}"
    yield f"Where: {prose(finding.where)}"
    if lines := finding.details[: detail.lines]:
        yield "\n".join(f"> {prose(one_line(line, detail.words))}  " for line in lines).rstrip()
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


def _works(view: View, detail: Detail) -> Iterable[str]:
    if not view.works:
        return
    yield "## What works"
    header = ("placement", "forward and backward", "forward only", "in part")
    shown = view.works[: detail.rows]
    yield table(header, (_works_row(works, detail.names) for works in shown))
    yield from _more(len(view.works) - len(shown), "placement")


def _works_row(works: Works, names: int) -> tuple[str, ...]:
    kinds = (works.both, works.forward, works.part)
    return (code(works.placement), *(_usables(kind, names) for kind in kinds))


def _usables(kind: Sequence[Usable], names: int) -> str:
    more = [f"and {len(kind) - names} more"] if len(kind) > names else []
    return "<br>".join([*map(_usable, kind[:names]), *more]) or "-"


def _usable(usable: Usable) -> str:
    notes = "; ".join(note for note in (usable.cost, usable.share) if note)
    return f"{code(usable.operator)} ({prose(notes)})"


def _matrix(view: View, options: RenderOptions, detail: Detail) -> Iterable[str]:
    if not view.compact:
        return
    yield "## Operators by placement"
    yield "Worst status, and how many cases are right."
    yield _grid(view.compact[: detail.rows], view.placements, options)
    yield from _more(len(view.compact) - detail.rows, "row")
    yield _legend(view.legend, options)
    if len(view.rows) <= detail.settings:
        yield details("every setting", _grid(view.rows, view.placements, options))
    else:
        yield f"Every setting on its own: {len(view.rows)} rows, left out (all in --output json)."


def _legend(statuses: Iterable[Status], options: RenderOptions) -> str:
    styles = [STYLES[status] for status in statuses]
    return prose(" / ".join(f"{s.mark(options.unicode)} {s.word} ({s.meaning})" for s in styles))


def _grid(rows: Sequence[Row], placements: Sequence[str], options: RenderOptions) -> str:
    with_setting = any(row.setting for row in rows)
    labels = ["operator", "setting", "direction"] if with_setting else ["operator", "direction"]
    return table(
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


def _not_run(view: View, detail: Detail) -> Iterable[str]:
    if not view.not_run:
        return
    yield f"## Did not run ({count(sum(entry.count for entry in view.not_run), 'case')})"
    rows = (
        (
            str(e.count),
            prose(listing(e.operators, 5)),
            prose(e.reason),
            prose(one_line(e.detail, detail.words)),
        )
        for e in view.not_run[: detail.rows]
    )
    yield table(("cases", "operators", "reason", "detail"), rows)
    yield from _more(len(view.not_run) - detail.rows, "reason")


def _environment(view: View, detail: Detail) -> Iterable[str]:
    pairs = [(label, one_line(text, detail.words)) for label, text in view.environment]
    if view.phases:
        pairs.append(("phases", ", ".join(f"{name} {time}" for name, time in view.phases)))
    if pairs:
        yield "## Environment"
        yield table(("", ""), ((label, prose(text)) for label, text in pairs))


def _summary(view: View) -> Iterable[str]:
    total = sum(number for _, number in view.summary)
    counts = ", ".join(f"{number} {STYLES[status].word}" for status, number in view.summary)
    yield "## Summary"
    yield f"{count(total, 'case')}: {counts}." if total else "No cases."
    yield prose(f"{view.exit_line} Exit codes: {EXIT_CODES}.")


# --- a matrix ------------------------------------------------------------------------------------


def _matrix_parts(view: MatrixView, options: RenderOptions, detail: Detail) -> list[str]:
    sections: tuple[Iterable[str], ...] = (
        _matrix_headline(view, detail),
        _bisection(view, detail),
        _combinations(view, detail),
        _operators(view, options, detail),
        _shifts(view, detail),
        _spreads(view, detail),
        _idle(view, detail),
        _surroundings(view, detail),
        _steps(view),
    )
    return [part for section in sections for part in section]


def _matrix_headline(view: MatrixView, detail: Detail) -> Iterable[str]:
    yield "# attncheck matrix"
    yield "\n".join(f"**{prose(sentence)}**" for sentence in view.headline[:1])
    rest = [*view.headline[1:], *(f"Note: {notice}" for notice in view.notices)]
    for sentence in rest[: detail.rows]:
        yield prose(one_line(sentence, detail.words))
    yield from _more(len(rest) - detail.rows, "note")


def _bisection(view: MatrixView, detail: Detail) -> Iterable[str]:
    told = view.bisection
    if told is None:
        return
    yield "## Bisection"
    if told.turns:
        shown = told.turns[: detail.rows]
        rows = ((code(who), prose(change), prose(where)) for who, change, where in shown)
        yield table(("operator", "change", "where"), rows)
        yield from _more(len(told.turns) - len(shown), "change")
    if told.tried:
        yield f"Tried, in this order: {prose(one_line(told.tried, detail.words))}."
    for version, why in told.skipped[: detail.rows]:
        yield f"{prose(version)} gave no answer: {prose(one_line(why, detail.words))}"


def _combinations(view: MatrixView, detail: Detail) -> Iterable[str]:
    if not view.combinations:
        return
    yield "## Combinations"
    what = f"with {view.sharded}, of {view.operators}" if view.placement else ""
    yield prose(
        f"Operators that work: forward and backward {what}. Wrong: wrong numbers, no error. Died: hang, "
        "crash, or ranks that diverged."
    )
    header = ("combination", "operators that work", "cases right", "wrong", "died", "not run", "")
    shown = view.combinations[: detail.rows]
    yield table(header, (_combination(each, detail) for each in shown))
    yield from _more(len(view.combinations) - len(shown), "combination")


def _combination(each: Combination, detail: Detail) -> tuple[str, ...]:
    name = f"**{prose(each.name)}**" if each.best else prose(each.name)
    problem = prose(one_line(each.problem, detail.words))
    if not each.ran:
        return (name, "", "", "", "", "", f"did not run: {problem or 'no case ran'}")
    numbers = (each.works, f"{each.right}/{each.ran}", each.wrong, each.died, each.idle)
    return (name, *map(str, numbers), problem)


def _operators(view: MatrixView, options: RenderOptions, detail: Detail) -> Iterable[str]:
    for i, grid in enumerate(view.grids):
        text = _versions(grid, options, detail)
        if i == 0:
            yield f"## Operators {prose(grid.title)}"
            yield "Worst status, and how many cases are right."
            yield text
            yield _legend(view.legend, options)
            if view.unbuilt:
                who = listing((each.name for each in view.unbuilt), 6)
                yield prose(f"Not in the table, since nothing ran there: {who}.")
        elif detail.settings:
            yield details(f"Operators {grid.title}", text)


def _versions(grid: Grid, options: RenderOptions, detail: Detail) -> str:
    rows = grid.rows[: detail.rows]
    others = any(row.setting for row in rows)
    labels = ["operator", *(["with"] if others else []), "direction"]
    cells = (
        [
            code(row.operator),
            *([prose(row.setting)] if others else []),
            prose(row.direction),
            *(_short_cell(cell, options) for cell in row.cells),
        ]
        for row in rows
    )
    text = table([*labels, *(prose(f"{grid.across} {column}") for column in grid.columns)], cells)
    return "\n\n".join([text, *_more(len(grid.rows) - len(rows), "row")])


def _short_cell(cell: Cell | None, options: RenderOptions) -> str:
    if cell is None:
        return ""
    mark = prose(STYLES[cell.status].mark(options.unicode))
    return f"{mark} {cell.ok}/{cell.total}" if cell.total else mark


# What is told in full of each shift; the rest is folded away.
_OPEN = (Way.WORSE, Way.GONE)


def _shifts(view: MatrixView, detail: Detail) -> Iterable[str]:
    if not view.shifts:
        return
    yield "## What changed"
    yield "From one version to the next, the other packages being equal."
    for shift in view.shifts[: detail.rows]:
        yield f"### {prose(shift.title)} ({shift.counted})"
        for ways, folded in ((_OPEN, False), (tuple(w for w in Way if w not in _OPEN), True)):
            text = _moves(shift, ways, detail)
            if text:
                title = ", ".join(way.value for way in ways if way in shift.by_way())
                yield details(title, text) if folded else text


def _moves(shift: Shift, ways: Sequence[Way], detail: Detail) -> str:
    moves = [move for move in shift.moves if move.way in ways]
    limit = min(detail.rows, 10 * detail.remedies)
    if not moves or not limit:
        return "\n".join(_more(len(moves), "change"))
    rows = (
        (
            f"**{move.way.value}**" if move.lost else move.way.value,
            code(move.operator),
            prose(move.change),
            prose(one_line(move.extent, detail.words)),
        )
        for move in moves[:limit]
    )
    text = table(("", "operator", "change", "where"), rows)
    return "\n\n".join([text, *_more(len(moves) - limit, "change")])


def _spreads(view: MatrixView, detail: Detail) -> Iterable[str]:
    if not view.findings:
        return
    counts = ", ".join(
        count(n, "note" if severity is Severity.INFO else severity.value)
        for severity, n in view.severities
    )
    yield f"## Findings ({counts})"
    yield "Each as it is in the newest combination that has it."
    # Cells are many, and each has the same: a line for each, unless everything is asked for.
    full = detail.findings >= EVERYTHING
    shown = view.findings[: detail.findings if full else min(detail.findings, FINDINGS)]
    codes: set[str] = set()
    if not full:
        yield table(("", "finding", "in", "do"), (_spread(spread, detail) for spread in shown))
    for spread in shown if full else ():
        yield from _finding(spread.finding, detail, codes)
        yield f"In {prose(spread.extent)}. As above in {prose(spread.of)}."
    yield from _more(len(view.findings) - len(shown), "finding")


FINDINGS = 40  # of a matrix, unless everything is asked for


def _spread(spread: Spread, detail: Detail) -> tuple[str, ...]:
    finding = spread.finding
    first = finding.first_remedy
    remedy = finding.remedies[first] if first is not None else None
    return (
        finding.severity.value,
        prose(f"{finding.rule}: {finding.title}"),
        prose(one_line(spread.extent, detail.words)),
        prose(one_line(f"{remedy.text} [{remedy.proof}]", min(detail.words, 300)))
        if remedy
        else "",
    )


def _idle(view: MatrixView, detail: Detail) -> Iterable[str]:
    if not view.idle:
        return
    yield "## Did not run"
    shown = view.idle[: detail.rows]
    rows = (
        (
            entry.cases,
            prose(listing(entry.operators, 5)),
            prose(entry.cells or "every combination"),
            prose(entry.reason),
            prose(one_line(entry.detail, detail.words)),
        )
        for entry in shown
    )
    yield table(("cases in each", "operators", "in", "reason", "detail"), rows)
    yield from _more(len(view.idle) - len(shown), "reason")


def _surroundings(view: MatrixView, detail: Detail) -> Iterable[str]:
    pairs = [(name, one_line(text, detail.words)) for name, text in view.environment]
    pairs += [("outcomes", view.reused)] if view.reused else []
    if pairs:
        yield "## Environment"
        yield table(("", ""), ((prose(name), prose(text)) for name, text in pairs[: detail.rows]))
    own = (
        (prose(each.name), prose(name), prose(one_line(text, detail.words)))
        for each in view.combinations[: detail.rows]
        for name, text in (*each.environment, *(("note", notice) for notice in each.notices))
    )
    rows = [*own][: detail.rows]
    if rows and detail.settings:
        yield details("of each combination", table(("combination", "", ""), rows))


def _steps(view: MatrixView) -> Iterable[str]:
    yield "## How to go on"
    for step in view.steps:
        yield f"{prose(step.purpose)}:\n\n{block(step.command, 'shell')}"
