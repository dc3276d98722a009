"""The page for an issue tracker: findings, each with its script and what it printed, in GitHub's Markdown.

It fits into an issue. What gives way is the matrix, then other lists, then whole findings, which are named
instead; a script is never cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from attncheck.markup import ISSUE_LENGTH, block, code, details, prose, table
from attncheck.model import Finding, Report
from attncheck.text import clean, count, one_line
from attncheck.triage.triaging import Reproduction
from attncheck.view import STYLES, Cell, FindingView, Row, View, build

# What says how attention behaves: a maintainer needs no seed of ours, no wall time.
_ENVIRONMENT = ("packages", "python", "platform", "device", "gpu", "attncheck")


@dataclass(frozen=True)
class Entry:
    """One finding: what became of its reproduction, how it is shown, the matrix of its operators in the
    settings in which it shows, and the `standins` that ran there."""

    reproduction: Reproduction
    finding: FindingView
    matrix: View
    standins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """`title` where several findings were asked for; `rest` are those that no more fit; `command` shows one
    of them, its fingerprint behind."""

    entries: tuple[Entry, ...]
    environment: tuple[tuple[str, str], ...]
    title: str = ""
    rest: tuple[FindingView, ...] = ()
    command: str = ""

    @property
    def confirmed(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.reproduction.confirmed)

    @property
    def others(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if not entry.reproduction.confirmed)


@dataclass(frozen=True)
class Shown:
    """How much of the lists: `rows` of the matrix, of them by `settings`; `remedies`, `cases` of evidence,
    `lines` of what the finding says, `rest` of the findings that are only named."""

    rows: int
    settings: int
    remedies: int
    cases: int
    lines: int = 20
    rest: int = 300


SHOWN = (
    Shown(40, 60, 3, 6),
    Shown(20, 30, 3, 4),
    Shown(15, 0, 3, 3),
    Shown(6, 0, 2, 2, lines=6),
    Shown(0, 0, 1, 1, lines=3, rest=100),
    Shown(0, 0, 0, 0, lines=1, rest=40),
)


class Desk:
    """Where pages of one report are put together: what its findings look like is worked out once."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.view = build(report)
        self._by_id = {r.case.id: r for r in report.cases}
        self._shown: dict[str, FindingView] = {}

    def shown(self, finding: Finding) -> FindingView:
        """The finding as every format shows it, free of control characters."""
        # All of it: in a report from elsewhere two findings may have one fingerprint.
        key = repr(finding)
        if key not in self._shown:
            concerned = {*finding.cases, *(c for r in finding.remedies for c in r.evidence)}
            cases = tuple(self._by_id[c] for c in sorted(concerned) if c in self._by_id)
            alone = replace(self.report, cases=cases, findings=(finding,))
            self._shown[key] = build(alone).findings[0]
        return self._shown[key]

    def entry(self, reproduction: Reproduction) -> Entry:
        finding = reproduction.finding
        own = [self._by_id[case] for case in finding.cases if case in self._by_id]
        where = {(r.case.operator, r.case.setting_name) for r in own}
        near = (r for r in self.report.cases if (r.case.operator, r.case.setting_name) in where)
        matrix = build(replace(self.report, cases=tuple(near), findings=()))
        standins = tuple(dict.fromkeys(clean(text) for r in own for text in r.outcome.standins))
        return Entry(reproduction, self.shown(finding), matrix, standins)

    def page(self, entries: Sequence[Entry], title: str = "", command: str = "") -> Page:
        told = dict(self.view.environment)
        pairs = tuple((name, told[name]) for name in _ENVIRONMENT if name in told)
        return Page(tuple(entries), pairs, title, command=command)


def render(page: Page) -> str:
    """The page, with as much as fits into an issue."""
    text = ""
    for shown in SHOWN:
        text = _text(page, shown)
        if len(text) <= ISSUE_LENGTH:
            break
    return text


def fits(page: Page) -> bool:
    """Whether an issue holds the page with some lines of each of its lists."""
    return len(_text(page, SHOWN[3])) <= ISSUE_LENGTH


def _text(page: Page, shown: Shown) -> str:
    environment = _environment(page)
    if page.title:
        entries = [part for entry in page.confirmed for part in _entry(entry, "##", shown)]
        parts = [f"# {prose(page.title)}", _summary(page), environment, *entries]
        parts += _others(page, shown)
    else:
        (entry,) = page.entries
        title, sentence, *rest = _entry(entry, "#", shown)
        parts = [title, sentence, environment, *rest]
    return "\n\n".join(part for part in parts if part) + "\n"


def _environment(page: Page) -> str:
    shown = page.confirmed if page.title else page.entries
    standins = dict.fromkeys(text for entry in shown for text in entry.standins)
    pairs = [*page.environment, *(("stand-in", one_line(text)) for text in standins)]
    lines = (f"- {name}: {prose(text)}" for name, text in pairs)
    return "\n".join(["## Environment of the scan", "", *lines])


def _summary(page: Page) -> str:
    text = f"{count(len(page.confirmed), 'finding')}, each with a script that was run and showed it"
    if page.others:
        text += f"; {len(page.others)} more could not be reproduced here"
    if page.rest:
        text += f"; {len(page.rest)} more are named at the end"
    return f"{text}. The worst first."


# --- a finding -----------------------------------------------------------------------------------------


def _entry(entry: Entry, level: str, shown: Shown) -> Iterable[str]:
    finding, made = entry.finding, entry.reproduction
    yield f"{level} {prose(made.title or finding.title)}"
    yield f"{prose(finding.title)}."
    yield f"{level}# Reproduction"
    if made.confirmed:
        run = f"`torchrun --nproc-per-node {made.ranks} repro.py`"
        yield f"{run}. {prose(made.how)}"
        yield block(made.script.rstrip("\n"), "python")
        yield f"{level}# Expected"
        yield made.expected
        yield f"{level}# Actual"
        yield block(made.actual, "text")
    else:
        yield f"None: {prose(one_line(made.why_not, 1500))}."
    yield f"{level}# Where it shows"
    if lines := finding.details[: shown.lines]:
        yield "\n".join(f"> {prose(one_line(line, 600))}  " for line in lines).rstrip()
    yield from _matrix(entry.matrix, shown)
    yield from _remedies(entry, level, shown)
    name = prose(f"{finding.rule} {finding.name}".strip())
    ends = f"{finding.severity.value}, fingerprint {code(finding.fingerprint)}"
    yield f"Found by attncheck: {name}, {ends}."


def _matrix(view: View, shown: Shown) -> Iterable[str]:
    if not view.compact or not shown.rows:
        return
    yield _grid(view.compact[: shown.rows], view.placements)
    if len(view.compact) > shown.rows:
        yield f"and {len(view.compact) - shown.rows} more rows"
    styles = [STYLES[status] for status in view.legend]
    yield prose(" / ".join(f"{s.symbol} {s.word} ({s.meaning})" for s in styles))
    if shown.settings and len(view.rows) <= shown.settings:
        yield details("every setting", _grid(view.rows, view.placements))


def _grid(rows: Sequence[Row], placements: Sequence[str]) -> str:
    with_setting = any(row.setting for row in rows)
    labels = ["operator", "setting", "direction"] if with_setting else ["operator", "direction"]
    lines = []
    for row in rows:
        names = [code(row.operator), *([code(row.setting)] if with_setting else [])]
        lines.append([*names, prose(row.direction), *map(_cell, row.cells)])
    return table([*labels, *map(code, placements)], lines)


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    style = STYLES[cell.status]
    text = f"{prose(style.symbol)} {style.word}"
    return text if cell.total <= 1 else f"{text} {cell.ok}/{cell.total}"


def _remedies(entry: Entry, level: str, shown: Shown) -> Iterable[str]:
    finding = entry.finding
    ordered = sorted(
        enumerate(finding.remedies), key=lambda r: (r[0] != finding.first_remedy, not r[1].proven)
    )
    if not ordered or not shown.remedies:
        return
    yield f"{level}# What may mend it"
    for at, remedy in ordered[: shown.remedies]:
        yield f"{prose(remedy.text)} (*{prose(remedy.proof)}*)"
        body = block(remedy.code, "shell" if remedy.code.startswith("attncheck ") else "python")
        if remedy.code:
            yield body if at == finding.first_remedy else details("code", body)
        evidence = entry.reproduction.finding.remedies[at].evidence
        if remedy.proven and shown.cases:
            lines = [one_line(case, 300) for case in evidence[: shown.cases]]
            more = len(evidence) - len(lines)
            lines += [f"and {more} more"] if more else []
            yield details("cases that show it working", block("\n".join(lines), "text"))


# --- those without one ---------------------------------------------------------------------------------


def _others(page: Page, shown: Shown) -> Iterable[str]:
    if page.others:
        yield "## Not reproduced here"
        yield "\n".join(
            f"- {_named(e.finding)}: {prose(one_line(e.reproduction.why_not, 400))}."
            for e in page.others[: shown.rest]
        )
    if page.rest:
        yield f"## {len(page.rest)} more"
        yield f"One at a time, with {code(page.command + ' FINGERPRINT')}."
        lines = [f"- {_named(finding)}" for finding in page.rest[: shown.rest]]
        if len(page.rest) > len(lines):
            lines.append(f"- and {len(page.rest) - len(lines)} more")
        yield details("the findings", "\n".join(lines))


def _named(finding: FindingView) -> str:
    where = count(len(finding.cases), "case")
    title = one_line(finding.title, 160)
    return f"{code(finding.fingerprint)} {prose(finding.rule)}: {prose(title)} ({where})"
