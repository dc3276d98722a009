"""The report for a terminal: the answer first, then the matrix, the findings and how to go on.

Lines are laid out as (text, colour) spans at a fixed width; rich is only loaded to colour them.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Sequence

from attncheck import auditview, cellsview
from attncheck.auditview import Section
from attncheck.cells import Matrix
from attncheck.cellsview import Combination, Grid, MatrixView, Move, Shift, Spread, Way
from attncheck.changes import ChangeGroup, ComparisonView, word
from attncheck.model import ChangeKind, Report, Severity, Status
from attncheck.text import count, listing
from attncheck.view import (
    BOTH,
    EXIT_CODES,
    SEVERITY_COLORS,
    STYLES,
    Cell,
    FindingView,
    RemedyView,
    RenderOptions,
    Row,
    Step,
    Usable,
    View,
    Works,
    build,
)

NAME = "table"
SUMMARY = "for a terminal: headline, matrix, findings worst first, next steps"

Line = tuple[tuple[str, str], ...]  # spans of (text, colour); an empty colour is the terminal's own

MIN_WIDTH, MAX_WIDTH = 60, 200
GAP = "  "
# Names of placement patterns where the full ones do not fit the width.
SHORT = {"replicate": "repl", "sequence": "seq", "head_dim": "hdim", "partial": "part"}
DIRECTIONS = {"forward": "fwd", "backward": "bwd", BOTH: "both"}
NAME_WIDTH = 24  # of a column
CODE_LINES, CODE_WIDTH = 20, 400  # of a remedy's code, without -v
DETAIL_LINES, DETAIL_WIDTH = 3, 320  # of a finding's message, without -v
# Findings shown in full without -v; characters of their first remedy, and of how many others.
FULL, REMEDY_WIDTH, OTHERS, OTHER_WIDTH = 12, 240, 2, 150
NARROWEST, OTHERS_SAID = 4, 6  # of an audit: characters of a column, notes without -v
GROUPS, OTHER_GROUPS = 12, 4  # of a comparison, without -v: cases that got worse, and others
# What of the environment is shown without -v.
BRIEF = ("attncheck", "packages", "python", "device", "mesh", "seed", "hash seeds", "stand-ins")
CASES, CASES_VERBOSE = 1, 50
MATRIX_BRIEF = ("attncheck", "python", "device", "mesh", "level", "date", "command", "outcomes")


def render(report: Report, *, options: RenderOptions) -> str:
    """Text no wider than `options.width`, but for code and commands: they must survive a copy."""
    view = build(report)
    page = Page(options)
    whole: tuple[Iterable[Line], ...] = (
        page.headline(view),
        page.audit(view),
        page.changes(view),
        page.missing(view),
        page.matrix(view),
        page.works(view),
        page.findings(view),
        page.not_run(view),
        page.environment(view),
        page.steps(view),
        page.summary(view),
    )
    sections = whole
    if view.comparison is not None:
        # Who gates asks what changed; the whole report is there with -v.
        compared = (page.comparison(view.comparison), page.regressions(view))
        rest = whole if options.verbose else (page.steps(view),)
        sections = (*compared, *rest, page.verdict(view.comparison))
    return _text(sections, options)


def render_matrix(matrix: Matrix, *, options: RenderOptions) -> str:
    """The same of a matrix."""
    view = cellsview.build(matrix)
    page = MatrixPage(options)
    sections: tuple[Iterable[Line], ...] = (
        page.matrix_headline(view),
        page.bisection(view),
        page.combinations(view),
        *(page.operators(view, grid, i) for i, grid in enumerate(view.grids)),
        page.shifts(view),
        page.spreads(view),
        page.idle(view),
        page.surroundings(view),
        page.how_to_go_on(view.steps),
    )
    return _text(sections, options)


def _text(sections: Iterable[Iterable[Line]], options: RenderOptions) -> str:
    blocks = [lines for lines in map(list, sections) if lines]
    lines = [line for block in blocks for line in (*block, ())]
    show = _colored if options.color else _plain
    text = "".join(show(_trimmed(line)) + "\n" for line in lines[:-1])
    return text if options.unicode else text.encode("ascii", "backslashreplace").decode("ascii")


def _trimmed(line: Line) -> Line:
    """The line without blanks at its end, whatever spans they are in."""
    spans = list(line)
    while spans and not spans[-1][0].strip():
        spans.pop()
    return (*spans[:-1], (spans[-1][0].rstrip(), spans[-1][1])) if spans else ()


def _plain(line: Line) -> str:
    return "".join(text for text, _ in line)


def _colored(line: Line) -> str:
    from rich.color import ColorSystem
    from rich.style import Style

    return "".join(
        Style.parse(color).render(text, color_system=ColorSystem.STANDARD) if color else text
        for text, color in line
    )


class Page:
    """Lays out the sections of a view at one width."""

    def __init__(self, options: RenderOptions) -> None:
        self.options = options
        self.width = min(max(options.width, MIN_WIDTH), MAX_WIDTH)

    # --- sections

    def headline(self, view: View) -> Iterable[Line]:
        for sentence in view.headline:
            yield from self.text("", sentence, "bold")
        for notice in view.notices:
            yield from self.text("! ", notice, "yellow")

    def audit(self, view: View) -> Iterable[Line]:
        sections = view.audit.sections if view.audit is not None else ()
        shown = [each for each in sections if self.options.verbose or not each.detail]
        for number, section in enumerate(shown):
            if number:
                yield ()
            yield from self.section(section)

    def section(self, section: Section) -> Iterable[Line]:
        if len(section.title) + len(section.about) + 3 <= self.width:
            yield _heading(section.title, section.about)
        else:
            yield _heading(section.title, "")
            yield from self.text("  ", section.about, "dim")
        limit = len(section.rows) if self.options.verbose else auditview.ROWS
        for number, line in enumerate(self.columned(section.columns, section.rows[:limit])):
            yield (("  ", ""), (line, "bold" if number == 0 else ""))
        if len(section.rows) > limit:
            yield _more(len(section.rows) - limit, "", "  ", "with -v")
        for note in section.notes if self.options.verbose else section.notes[:OTHERS_SAID]:
            yield from self.text("  ", note, "dim")

    def columned(self, names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
        """A table whose widest columns are wrapped until it fits; one without a value is left out."""
        if not rows:
            return []
        from tabulate import tabulate

        cells = [[" ".join(cell.split()) for cell in row] for row in rows]
        kept = [at for at in range(len(names)) if any(row[at] for row in cells)]
        header = [names[at] for at in kept]
        body = [[row[at] for at in kept] for row in cells]
        columns = [*zip(header, *body, strict=True)]
        widths = [max(len(cell) for cell in column) for column in columns]
        words = [max(len(word) for cell in column for word in cell.split()) for column in columns]
        room = self.width - 2 - len(GAP) * len(widths)
        while sum(widths) > room and max(widths) > NARROWEST:
            # Words are broken only where nothing else gives way.
            loose = [w if w > least else 0 for w, least in zip(widths, words, strict=True)]
            widest = loose if any(loose) else widths
            widths[widest.index(max(widest))] -= 1
        # As a row of its own: a header of tabulate's is neither wrapped nor as narrow as its column.
        table = [header, *body]
        text = tabulate(table, tablefmt="plain", maxcolwidths=widths, disable_numparse=True)
        return text.splitlines()

    def comparison(self, comparison: ComparisonView) -> Iterable[Line]:
        yield from self.text("", comparison.headline, "bold")
        if comparison.verdict:
            yield from self.text(
                "  ", f"Against {comparison.against}: {comparison.counted}.", "dim"
            )
        width = max((len(d.name) for d in comparison.environment), default=0)
        for d in comparison.environment:
            change = f"{d.before or 'not there'} -> {d.after or 'not there'}"
            yield from self.text(f"  {d.name:<{width}}  ", change, "cyan")
        for kind in dict.fromkeys(group.kind for group in comparison.groups):
            own = [group for group in comparison.groups if group.kind is kind]
            yield ()
            allowed = kind.regressed and bool(comparison.verdict)
            allowed = allowed and not any(group.gates for group in own)
            yield from self.kind(kind, own, ", allowed" if allowed else "")
        if comparison.stale:
            yield ()
            what = f"{comparison.stale} entries of the baseline are stale: fixed, or no longer run."
            yield from self.text("", what, "dim")

    def kind(self, kind: ChangeKind, groups: Sequence[ChangeGroup], note: str) -> Iterable[Line]:
        """The cases of one kind: those that got worse in full, others in a few lines."""
        total = count(sum(len(group.cases) for group in groups), "case")
        color = "bold red" if any(group.gates for group in groups) else "bold"
        title = "unchanged and accepted" if kind is ChangeKind.UNCHANGED else word(kind)
        yield ((f"{title} ", color), (f"({total}{note})", "dim"))
        limit = len(groups) if self.options.verbose else GROUPS if kind.regressed else OTHER_GROUPS
        for group in groups[:limit]:
            yield from self.text(f"  {group.operator}  ", f"{group.change}; {group.extent}")
            if group.detail:
                yield from self.text("      ", group.detail)
            if group.reason or group.until:
                until = f" (until {group.until})" if group.until else ""
                yield from self.text("      ", f"accepted: {group.reason}{until}")
            if self.options.verbose:
                for case in group.cases[:CASES_VERBOSE]:
                    yield from self.text("      ", case, "dim")
        if len(groups) > limit:
            yield _more(len(groups) - limit, "groups", "  ", "with -v")

    def regressions(self, view: View) -> Iterable[Line]:
        if not view.regressions:
            return
        yield _heading("What to do", "the findings about what got worse")
        shown: dict[str, str] = {}
        for finding in view.regressions:
            yield ()
            yield from self.finding(finding, shown, self.options.verbose)
            main = finding.first_remedy
            if main is not None and finding.remedies[main].code and not self.options.verbose:
                yield from self.code(finding.remedies[main].code, finding.rule, shown)

    def verdict(self, comparison: ComparisonView) -> Iterable[Line]:
        """The last line on the screen says it again."""
        if comparison.verdict:
            yield from self.text("", comparison.verdict, "bold")

    def changes(self, view: View) -> Iterable[Line]:
        if not view.changes:
            return
        yield _heading("Before and after", "what each case was without the fix, and is with it")
        for change in view.changes:
            style = STYLES[change.after]
            text = f"{change.before} -> {style.word}"
            yield ((f"  {len(change.cases):>4}  ", ""), (text, style.color))
            if self.options.verbose:
                for case in change.cases:
                    yield (("          " + case, ""),)

    def missing(self, view: View) -> Iterable[Line]:
        if not view.missing:
            return
        yield _heading(
            "Missing", "kernel ops without a sharding strategy, and how many cases each stops"
        )
        for missing in view.missing:
            text = f"{missing.op}: {listing(missing.operators, 2)}"
            yield from self.text(f"  {missing.cases:>4}  ", text, rest=" " * 10)

    def matrix(self, view: View) -> Iterable[Line]:
        if not view.compact:
            return
        yield _heading("Operators by placement", "worst status, and how many cases are right")
        rows = view.rows if self.options.verbose else view.compact
        yield from self.grid(rows, view.placements)
        yield from self.legend(view.legend)

    def works(self, view: View) -> Iterable[Line]:
        if not view.works:
            return
        yield _heading("What works", "right, forward and backward, in every setting that ran")
        label = max(len(works.placement) for works in view.works)
        nothing = [works.placement for works in view.works if works.nothing]
        for works in view.works:
            if not works.nothing:
                yield from self.works_of(works, min(label, 24))
        if nothing:
            yield from self.text("  ", f"Nothing works with {listing(nothing, len(nothing))}.")

    def findings(self, view: View) -> Iterable[Line]:
        if not view.groups:
            return
        counts = ", ".join(
            count(n, "note" if s is Severity.INFO else s.value) for s, n in view.severities
        )
        yield _heading("Findings", counts)
        shown: dict[str, str] = {}
        number = 0
        for group in view.groups:
            yield ()
            yield from self.text("", group.title, "bold underline")
            for finding in group.findings:
                number += finding.severity is Severity.ERROR
                full = finding.severity is Severity.ERROR and number <= FULL
                yield from self.finding(finding, shown, self.options.verbose or full)

    def not_run(self, view: View) -> Iterable[Line]:
        if not view.not_run:
            return
        total = sum(entry.count for entry in view.not_run)
        yield _heading("Did not run", count(total, "case"))
        shown = view.not_run if self.options.verbose else view.not_run[:6]
        for entry in shown:
            who = f"{count(entry.count, 'case')} of {listing(entry.operators, 3)}"
            detail = f": {entry.detail}" if entry.detail else ""
            yield from self.text("  ", f"{who} ({entry.reason}){detail}", rest="    ")
        if len(shown) < len(view.not_run):
            yield _more(len(view.not_run) - len(shown), "reasons", "  ", "with -v")

    def environment(self, view: View) -> Iterable[Line]:
        if not view.environment and not view.phases:
            return
        yield _heading("Environment", "")
        if not self.options.verbose:
            pairs = [pair for pair in view.environment if pair[0] in BRIEF]
            yield from self.text("  ", "; ".join(f"{label} {text}" for label, text in pairs))
            return
        pairs = [*view.environment]
        if view.phases:
            pairs.append(("phases", ", ".join(f"{name} {time}" for name, time in view.phases)))
        for label, text in pairs:
            yield from self.text(f"  {label:<12}", text)

    def steps(self, view: View) -> Iterable[Line]:
        return self.how_to_go_on(view.steps)

    def how_to_go_on(self, steps: Sequence[Step]) -> Iterable[Line]:
        yield _heading("How to go on", "")
        column = max(len(step.command) for step in steps)
        room = self.width - column - 2 * len(GAP)
        beside = all(len(step.purpose) <= room for step in steps)
        for step in steps:
            command = (f"  {step.command:<{column}}", "bold")
            purpose = (f"  {step.purpose}", "dim")
            yield from [(command, purpose)] if beside else [(command,), (("    ", ""), purpose)]

    def summary(self, view: View) -> Iterable[Line]:
        total = sum(number for _, number in view.summary)
        counts = ", ".join(f"{number} {STYLES[status].word}" for status, number in view.summary)
        yield from self.text("", f"{count(total, 'case')}: {counts}." if total else "No cases.")
        yield from self.text("", f"{view.exit_line} Exit codes: {EXIT_CODES}.")

    # --- the matrix

    def grid(
        self, rows: Sequence[Row], placements: Sequence[str], corner: str = ""
    ) -> Iterable[Line]:
        """Placements across, or versions; short names, stacked labels and several tables where it is narrow.
        `corner`: what stands across."""
        short = [",".join(SHORT.get(p, p) for p in name.split(",")) for name in placements]
        placements = [_middle(name, NAME_WIDTH) for name in placements]
        short = [_middle(name, NAME_WIDTH) for name in short]
        for names, stacked in ((placements, False), (short, False), (short, True)):
            labels = self.labels(rows, stacked)
            widths = self.columns(rows, names)
            room = self.width - len(labels[0]) - len(GAP)
            blocks = _blocks(widths, room)
            if len(blocks) == 1:
                break
        for block in blocks:
            header = GAP.join(f"{names[i]:<{widths[i]}}" for i in block)
            label = f"{_middle(corner, len(labels[0])):>{len(labels[0])}}"
            yield ((label + GAP, "dim" if corner else ""), (header, "bold"))
            yield from self.body(rows, labels, stacked, block, widths)
        if list(names) != list(placements):
            pairs = zip(names, placements, strict=True)
            text = ", ".join(f"{abbr} = {name}" for abbr, name in pairs if abbr != name)
            yield from self.text("  ", text, "dim")

    def body(
        self,
        rows: Sequence[Row],
        labels: Sequence[str],
        stacked: bool,
        block: Sequence[int],
        widths: Sequence[int],
    ) -> Iterable[Line]:
        before = ""
        for label, row in zip(labels, rows, strict=True):
            if stacked and row.operator != before:
                yield ((_middle(row.operator, self.width), ""),)
            before = row.operator
            yield ((label, ""), *self.cells(row, block, widths))

    def columns(self, rows: Sequence[Row], names: Sequence[str]) -> list[int]:
        return [
            max([len(name), *(len(self.cell(row.cells[i])) for row in rows)])
            for i, name in enumerate(names)
        ]

    def cells(
        self, row: Row, block: Sequence[int], widths: Sequence[int]
    ) -> Iterable[tuple[str, str]]:
        for i in block:
            cell = row.cells[i]
            color = STYLES[cell.status].color if cell else ""
            yield (GAP, "")
            yield (f"{self.cell(cell):<{widths[i]}}", color)

    def cell(self, cell: Cell | None) -> str:
        if cell is None:
            return ""
        mark = self.mark(cell.status)
        # A single case is its symbol; nothing is to be counted where nothing ran.
        single = cell.total <= 1 and self.options.verbose
        return mark if cell.total == 0 or single else f"{mark} {cell.ok}/{cell.total}"

    def labels(self, rows: Sequence[Row], stacked: bool) -> list[str]:
        """Operator, setting (if shown) and direction, padded; a repeated name is left blank.

        `stacked`: the operator stands on a line of its own above.
        """
        limit = self.width // 3 - 2
        texts = []
        before = ("", "")
        for row in rows:
            operator = "" if stacked or row.operator == before[0] else _middle(row.operator, limit)
            setting = "" if (row.operator, row.setting) == before else _middle(row.setting, limit)
            before = (row.operator, row.setting)
            texts.append((operator, setting, DIRECTIONS.get(row.direction, row.direction[:3])))
        widths = [max(len(text[i]) for text in texts) for i in range(3)]
        indent = GAP if stacked else ""
        shown = [i for i in range(3) if widths[i]]
        return [indent + GAP.join(f"{text[i]:<{widths[i]}}" for i in shown) for text in texts]

    def legend(self, statuses: Sequence[Status]) -> Iterable[Line]:
        spans: list[tuple[str, str]] = []
        used = 0
        for status in statuses:
            style = STYLES[status]
            text = f"{self.mark(status)} {style.meaning}"
            if spans and used + len(text) + 3 > self.width - 2:
                yield (("  ", ""), *spans)
                spans, used = [], 0
            spans += [(GAP if spans else "", ""), (text[:1], style.color), (text[1:], "dim")]
            used += len(text) + len(GAP)
        if spans:
            yield (("  ", ""), *spans)

    # --- what works

    def works_of(self, works: Works, label: int) -> Iterable[Line]:
        free = [usable for usable in works.both if usable.free]
        costly = [usable for usable in works.both if not usable.free]
        first = f"  {_middle(works.placement, label):<{label}}  "
        # What works in part stands in the matrix: it is worth a line where nothing else works.
        part = works.part if self.options.verbose or not (works.both or works.forward) else ()
        for title, usables in (
            ("no communication: ", free),
            ("with communication: ", costly),
            ("forward only: ", works.forward),
            ("in part: ", part),
        ):
            if usables:
                text = "; ".join(_usable(usable, free=usables is free) for usable in usables)
                yield from self.text(first, title + text, rest=" " * (len(first) + 2))
                first = " " * len(first)

    # --- findings

    def finding(self, finding: FindingView, shown: dict[str, str], full: bool) -> Iterable[Line]:
        color = SEVERITY_COLORS[finding.severity]
        head = f"{finding.severity.value} {finding.rule} "
        yield from self.text(head, finding.title, color, rest="  ", label=color)
        if full:
            yield from self.text("  where  ", finding.where)
            yield from self.details(finding)
        yield from self.remedies(finding, shown, full)
        if full:
            yield from self.cases(finding)

    def details(self, finding: FindingView) -> Iterable[Line]:
        lines = finding.details
        if not self.options.verbose:
            lines = tuple(_cut(line, DETAIL_WIDTH) for line in lines[:DETAIL_LINES])
        first = "  seen   "
        for line in lines:
            yield from self.text(first, line)
            first = " " * len(first)

    def remedies(self, finding: FindingView, shown: dict[str, str], full: bool) -> Iterable[Line]:
        main = finding.first_remedy
        if main is None:
            return
        limit = REMEDY_WIDTH if full else OTHER_WIDTH
        yield from self.remedy("  do     ", finding.remedies[main], limit)
        code = finding.remedies[main].code
        if code and full:
            yield from self.code(code, finding.rule, shown)
        if not full:
            return
        others = [remedy for i, remedy in enumerate(finding.remedies) if i != main]
        kept = others if self.options.verbose else others[:OTHERS]
        for remedy in kept:
            yield from self.remedy("  or     ", remedy, OTHER_WIDTH)
            if remedy.code and self.options.verbose:
                yield from self.code(remedy.code, finding.rule, shown)
        if len(kept) < len(others):
            yield _more(len(others) - len(kept), "", " " * 9, "with -v")

    def remedy(self, first: str, remedy: RemedyView, limit: int) -> Iterable[Line]:
        text = remedy.text if self.options.verbose else _cut(remedy.text, limit)
        color = "green" if remedy.proven else ""
        yield from self.text(first, f"{text} [{remedy.proof}]", color)

    def code(self, code: str, rule: str, shown: dict[str, str]) -> Iterable[Line]:
        """Never wrapped: it is there to be copied. The same code is shown once."""
        if code in shown:
            yield ((f"         (the code shown with {shown[code]} above)", "dim"),)
            return
        shown[code] = rule
        lines = code.split("\n")
        brief = [_cut(line, CODE_WIDTH) for line in lines[:CODE_LINES]]
        kept = lines if self.options.verbose else brief
        for line in kept:
            yield ((f"         {line}", "blue"),)
        if len(kept) < len(lines):
            yield _more(len(lines) - len(kept), "lines", "         ", "with -v")

    def cases(self, finding: FindingView) -> Iterable[Line]:
        limit = CASES_VERBOSE if self.options.verbose else CASES
        first = "  cases  " if self.options.verbose else "  e.g.   "
        for case in finding.cases[:limit]:
            yield from self.text(first, case, "dim")
            first = " " * len(first)
        if len(finding.cases) > limit and self.options.verbose:
            yield _more(len(finding.cases) - limit, "", first, "all in --output json")

    # --- lines

    def mark(self, status: Status) -> str:
        return STYLES[status].mark(self.options.unicode)

    def text(
        self, first: str, text: str, color: str = "", *, rest: str | None = None, label: str = "dim"
    ) -> Iterable[Line]:
        """A paragraph behind a label, wrapped; only a word longer than a line is ever broken."""
        hanging = " " * len(first) if rest is None else rest
        lines = textwrap.wrap(
            text,
            self.width,
            initial_indent=first,
            subsequent_indent=hanging,
            break_on_hyphens=False,
        )
        if not lines:
            yield ((first, label),)
            return
        yield ((first, label), (lines[0][len(first) :], color))
        for line in lines[1:]:
            yield ((line, color),)


# How a way of changing is coloured, and how many of its moves are shown without -v.
WAYS = {
    Way.WORSE: ("bold red", GROUPS),
    Way.GONE: ("yellow", OTHER_GROUPS),
    Way.COSTLIER: ("yellow", 2),
    Way.BETTER: ("green", OTHER_GROUPS),
    Way.CHEAPER: ("green", 2),
    Way.NEW: ("cyan", OTHER_GROUPS),
}


class MatrixPage(Page):
    """Lays out the sections of a matrix."""

    def matrix_headline(self, view: MatrixView) -> Iterable[Line]:
        for sentence in view.headline:
            yield from self.text("", sentence, "bold")
        for notice in view.notices:
            yield from self.text("! ", notice, "yellow")

    def bisection(self, view: MatrixView) -> Iterable[Line]:
        if view.bisection is None:
            return
        yield _heading(
            "Bisection", f"tried: {view.bisection.tried}" if view.bisection.tried else ""
        )
        for who, change, where in view.bisection.turns:
            yield from self.text(f"  {who}  ", f"{change}; {where}")
        for version, why in view.bisection.skipped:
            yield from self.text(f"  {version} gave no answer: ", why, rest="    ")

    def combinations(self, view: MatrixView) -> Iterable[Line]:
        if not view.combinations:
            return
        what = f" with {view.sharded}" if view.placement else ""
        yield _heading(
            "Combinations", f"works: operators of {view.operators}{what}, both directions"
        )
        width = min(max(len(each.name) for each in view.combinations), self.width - 42)
        head = ("works", f"{'right':>9}", "wrong", "died", "not run")
        yield ((" " * (width + 4) + GAP.join(head), "bold"),)
        for each in view.combinations:
            yield from self.combination(each, width, [len(text) for text in head])

    def combination(self, each: Combination, width: int, columns: Sequence[int]) -> Iterable[Line]:
        mark = "*" if each.best else " "
        name = (f"{mark} {_middle(each.name, width):<{width}}", "bold" if each.best else "")
        if not each.ran:
            yield from self.text(
                name[0] + GAP, f"did not run: {each.problem or 'no case ran'}", "dim", label=""
            )
            return
        numbers = (each.works, f"{each.right}/{each.ran}", each.wrong, each.died, each.idle)
        texts = (f"{number:>{column}}" for number, column in zip(numbers, columns, strict=True))
        yield (name, (GAP + GAP.join(texts), ""))

    def operators(self, view: MatrixView, grid: Grid, number: int) -> Iterable[Line]:
        """All operators of the first table; of the second, those between which versions make a difference."""
        rows = grid.rows if self.options.verbose or number == 0 else grid.differing
        if not rows:
            return
        left = len(grid.rows) - len(rows)
        said = "worst status, and how many cases are right"
        note = f"{count(left, 'row')} without a difference: with -v" if left else said
        yield _heading(f"Operators {grid.title}", note)
        grid = dataclasses.replace(grid, rows=tuple(_under_operators(rows)))
        if not self.fits(grid):
            grid = grid.folded
        yield from self.grid(grid.rows, grid.columns, grid.across)
        if number == len(view.grids) - 1:
            yield from self.legend(view.legend)
            if view.unbuilt:
                who = listing((each.name for each in view.unbuilt), 6)
                yield from self.text(
                    "  ", f"Not in these tables, since nothing ran there: {who}.", "dim"
                )

    def fits(self, grid: Grid) -> bool:
        """Whether all versions fit beside each other."""
        room = self.width - len(self.labels(grid.rows, True)[0]) - len(GAP)
        return len(_blocks(self.columns(grid.rows, grid.columns), room)) == 1

    # --- what changed

    def shifts(self, view: MatrixView) -> Iterable[Line]:
        if not view.shifts:
            return
        yield _heading(
            "What changed", "from one version to the next, the other packages being equal"
        )
        for i, shift in enumerate(view.shifts):
            if i:
                yield ()
            yield ((f"{shift.title} ", "bold"), (f"({shift.counted})", "dim"))
            yield from self.shift(shift)

    def shift(self, shift: Shift) -> Iterable[Line]:
        for way, moves in shift.by_way().items():
            color, limit = WAYS[way]
            shown = moves if self.options.verbose else moves[:limit]
            for move in shown:
                yield from self.move(move, color)
            if len(shown) < len(moves):
                yield _more(len(moves) - len(shown), f"{way.value}", "  ", "with -v")

    def move(self, move: Move, color: str) -> Iterable[Line]:
        first = f"  {move.way.value:<8}  "
        yield from self.text(
            first, f"{move.operator}: {move.change}; {move.extent}", rest=" " * 12, label=color
        )
        if self.options.verbose:
            for case in move.cases[:CASES_VERBOSE]:
                yield from self.text(" " * 12, case, "dim")

    # --- findings

    def spreads(self, view: MatrixView) -> Iterable[Line]:
        if not view.findings:
            return
        counts = ", ".join(
            count(n, "note" if s is Severity.INFO else s.value) for s, n in view.severities
        )
        yield _heading("Findings", f"{counts}; as in the newest combination")
        errors = [s for s in view.findings if s.finding.severity is Severity.ERROR]
        shown = view.findings if self.options.verbose else (errors or view.findings)[:FULL]
        codes: dict[str, str] = {}
        for spread in shown:
            if self.options.verbose:
                yield ()
            yield from self.spread(spread, codes)
        if len(shown) < len(view.findings):
            yield _more(len(view.findings) - len(shown), "findings", "", "with -v")

    def spread(self, spread: Spread, codes: dict[str, str]) -> Iterable[Line]:
        finding, verbose = spread.finding, self.options.verbose
        color = SEVERITY_COLORS[finding.severity]
        head = f"{finding.severity.value} {finding.rule} "
        yield from self.text(head, finding.title, color, rest="  ", label=color)
        yield from self.text("  in     ", spread.extent)
        if verbose:
            yield from self.text("  where  ", f"{finding.where} ({spread.of})")
            yield from self.details(finding)
        yield from self.remedies(finding, codes, verbose)
        if verbose:
            yield from self.cases(finding)

    # --- the rest

    def idle(self, view: MatrixView) -> Iterable[Line]:
        if not view.idle:
            return
        yield _heading("Did not run", "cases in each combination")
        shown = view.idle if self.options.verbose else view.idle[:6]
        for entry in shown:
            who = f"{entry.cases} of {listing(entry.operators, 3)}"
            where = f" in {entry.cells}" if entry.cells else ""
            detail = f": {entry.detail}" if entry.detail else ""
            yield from self.text("  ", f"{who} ({entry.reason}){where}{detail}", rest="    ")
        if len(shown) < len(view.idle):
            yield _more(len(view.idle) - len(shown), "reasons", "  ", "with -v")

    def surroundings(self, view: MatrixView) -> Iterable[Line]:
        pairs = dict(view.environment)
        if view.reused:
            pairs["outcomes"] = view.reused
        if not pairs and not self.options.verbose:
            return
        yield _heading("Environment", "of all combinations")
        if not self.options.verbose:
            brief = [f"{name} {pairs[name]}" for name in MATRIX_BRIEF if name in pairs]
            yield from self.text("  ", "; ".join(brief))
            return
        for label, text in pairs.items():
            yield from self.text(f"  {label:<12}  ", text)
        for each in view.combinations:
            yield from self.text("", each.name, "bold")
            for label, text in each.environment:
                yield from self.text(f"  {label:<12}  ", text)
            for notice in each.notices:
                yield from self.text("  ! ", notice, "yellow")


def _under_operators(rows: Iterable[Row]) -> Iterable[Row]:
    """Rows that hold for some versions only, beneath a line for their operator."""
    before = ""
    for row in rows:
        if not row.setting:
            yield row
            continue
        if row.operator != before:
            yield Row(row.operator, "", "", (None,) * len(row.cells))
        before = row.operator
        yield dataclasses.replace(row, operator=GAP + row.setting, setting="")


def _heading(title: str, detail: str) -> Line:
    return ((title, "bold"), (f" ({detail})" if detail else "", "dim"))


def _more(number: int, what: str, indent: str, where: str) -> Line:
    noun = f" {what}" if what else ""
    return ((f"{indent}and {number} more{noun} ({where})", "dim"),)


def _usable(usable: Usable, *, free: bool) -> str:
    notes = [] if free else [usable.cost] * (not usable.free)
    notes += [usable.share] * bool(usable.share)
    return f"{usable.operator} ({'; '.join(notes)})" if notes else usable.operator


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _middle(text: str, limit: int) -> str:
    """Names differ at both ends, so a long one loses its middle."""
    if len(text) <= limit:
        return text
    tail = (limit - 2) // 2
    return f"{text[: limit - 2 - tail]}..{text[-tail:]}"


def _blocks(widths: Sequence[int], room: int) -> list[list[int]]:
    """Columns that fit next to each other, in as few groups as possible; at least one in each."""
    blocks: list[list[int]] = []
    used = 0
    for i, width in enumerate(widths):
        if not blocks or used + width + len(GAP) > room:
            blocks.append([])
            used = 0
        blocks[-1].append(i)
        used += width + len(GAP)
    return blocks
