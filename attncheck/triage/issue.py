"""What `attncheck report --finding` and `--for` write: the page, and the scripts on it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from attncheck import plugins
from attncheck.errors import UserError
from attncheck.files import write_text
from attncheck.model import Finding, Report
from attncheck.triage import choosing, page
from attncheck.triage.triaging import Log, Reproduction, Workshop, reproduce, workshop
from attncheck.view import FindingView

# Findings of a report that are tried for one issue: those that do not show take time and hardly any room.
MOST_TRIED = 100


@dataclass(frozen=True)
class Request:
    """What is asked of a report: one `finding`, or those `of_project`. `name`: of the report's file.

    `probe_files` are the user's own, whose code is run; `with_packages` are to be provisioned, in the place
    of those that the report names.
    """

    report: Report
    name: str
    finding: str = ""
    of_project: str = ""
    probe_files: tuple[str, ...] = ()
    with_packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Issue:
    """The page as Markdown, and what became of each finding that was tried."""

    text: str
    reproductions: tuple[Reproduction, ...]

    @property
    def confirmed(self) -> tuple[Reproduction, ...]:
        return tuple(one for one in self.reproductions if one.confirmed)


def write(request: Request, log: Log) -> Issue:
    """Raises UserError for a finding or a project that there is not, and for packages that cannot be had."""
    findings = _asked_for(request)
    shelf = plugins.load_probes(
        [Path(file) for file in request.probe_files],
        lambda file: log(f"running the code of {file}, which an installed package ships"),
    )
    for _, sentence in shelf.errors:
        log(sentence)
    with tempfile.TemporaryDirectory(prefix="attncheck-triage-") as folder:
        shop = workshop(request.report, findings, shelf, request.with_packages, Path(folder), log)
        desk = page.Desk(request.report)
        if not request.of_project:
            done = reproduce(shop, findings[0], log)
            return Issue(page.render(desk.page([desk.entry(done)])), (done,))
        return _several(request, desk, findings, shop, log)


def _asked_for(request: Request) -> list[Finding]:
    if not request.of_project:
        return [choosing.find(request.report, request.finding)]
    return choosing.of_project(request.report, request.of_project)


def _several(
    request: Request,
    desk: page.Desk,
    findings: Sequence[Finding],
    shop: Workshop,
    log: Log,
) -> Issue:
    """The findings in their order, until an issue holds no more."""
    command = f"attncheck report {request.name} --format markdown --finding"
    title = f"Attention on DTensors: findings for {request.of_project}"
    made = desk.page((), title, command)
    done: list[Reproduction] = []
    for at, finding in enumerate(findings[:MOST_TRIED]):
        log(f"[{at + 1}/{len(findings)}] {finding.rule}")
        reproduction = reproduce(shop, finding, log)
        more = replace(
            made,
            entries=(*made.entries, desk.entry(reproduction)),
            rest=_shown(desk, findings[at + 1 :]),
        )
        if not page.fits(more):
            return Issue(page.render(replace(made, rest=_shown(desk, findings[at:]))), (*done,))
        made = more
        done.append(reproduction)
    return Issue(page.render(made), (*done,))


def _shown(desk: page.Desk, findings: Iterable[Finding]) -> tuple[FindingView, ...]:
    return tuple(map(desk.shown, findings))


def keep(issue: Issue, folder: Path, log: Log) -> None:
    """Write each script that showed its finding into a folder. Raises UserError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot write {folder}: {error.strerror}.") from None
    for one in issue.confirmed:
        # A fingerprint is text of the report, too.
        name = re.sub(r"[^0-9A-Za-z]", "", one.finding.fingerprint)[:16]
        file = folder / f"repro_{name or 'finding'}.py"
        write_text(file, one.script)
        log(f"wrote {file}")
