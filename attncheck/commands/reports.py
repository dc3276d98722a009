"""Commands on saved reports. They run nothing, but for the scripts of `report --finding` and `--for`."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attncheck.commands.common import (
    EXIT_CLEAN,
    EXIT_FINDINGS,
    EXIT_INCONCLUSIVE,
    guarded,
    log,
    many,
    parse_outputs,
    write,
)
from attncheck.errors import UserError
from attncheck.text import clean, count, listing, one_line

if TYPE_CHECKING:
    from attncheck.cells import Matrix
    from attncheck.model import Report


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format_",
    default="table",
    metavar="NAME",
    help="table (default), markdown, html, json, sarif, junit or github.",
)
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write to this file.")
@click.option(
    "--cell",
    metavar="NAME",
    help="Of a matrix, the report of one combination, by versions that no other has: 'torch 2.13.0'.",
)
@click.option("-v", "--verbose", is_flag=True, help="List every case.")
@click.option(
    "--finding",
    metavar="ID",
    help="With --format markdown: one finding for its maintainers, by fingerprint, rule or case, with a "
    "script that is run to see that it shows it.",
)
@click.option(
    "--for",
    "project",
    metavar="PROJECT",
    help="The same of the findings of pytorch, flash-attn or xformers, worst first, until an issue is full.",
)
@many(
    "--probe",
    "probes",
    metavar="FILE",
    help="With these: a probe file of your own. Its code is run.",
)
@many(
    "--with",
    "with_",
    metavar="PACKAGE",
    help="With these: provision it, in the place of what the report was made with.",
)
@click.option(
    "--write-repro",
    "scripts",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="With these: write the scripts here too.",
)
@click.pass_context
def report(
    ctx: click.Context,
    /,
    file: Path,
    format_: str,
    output: Path | None,
    cell: str | None,
    verbose: bool,
    finding: str | None,
    project: str | None,
    **for_scripts: Any,
) -> None:
    """Render a saved JSON report or matrix again, in another format. Runs nothing and needs no torch, but
    for the scripts of --finding and --for.

    Exit code 3 where none of these scripts shows its finding here.
    """
    from attncheck import plugins
    from attncheck.saved import read

    if finding is None and project is None:
        if any(for_scripts.values()):
            raise UserError("--probe, --with and --write-repro need --finding or --for.")
        form = plugins.load_format(format_)
        saved = read(file) if cell is None else _report_in(file, cell)
        write(saved, [(form, output)], verbose)
        return
    if format_ != "markdown":
        raise UserError("--finding and --for write an issue: they need --format markdown.")
    if finding is not None and project is not None:
        raise UserError("--finding and --for exclude each other: give one.")
    shown = guarded(
        lambda: _issue(file, cell, finding or "", project or "", output, **for_scripts),
        verbose,
        ctx,
    )
    ctx.exit(EXIT_CLEAN if shown else EXIT_INCONCLUSIVE)


def _report_in(file: Path, cell: str | None) -> Report:
    """The report of a file; of a matrix, that of one cell, which has to be named. Raises UserError."""
    from attncheck.cells import Matrix
    from attncheck.saved import read, read_report

    if cell is None:
        return read_report(file)
    saved = read(file)
    if not isinstance(saved, Matrix):
        raise UserError(f"{file} is the report of one scan: --cell {cell!r} needs a matrix.")
    return _cell_of(saved, cell, file)[1]


def _issue(
    file: Path,
    cell: str | None,
    finding: str,
    project: str,
    output: Path | None,
    probes: tuple[str, ...],
    with_: tuple[str, ...],
    scripts: Path | None,
) -> bool:
    """Whether any script shows its finding."""
    from attncheck.files import write_text
    from attncheck.runner.launch import terminable
    from attncheck.triage import issue

    for probe in probes:
        log(f"running the code of {probe}")
    request = issue.Request(_report_in(file, cell), file.name, finding, project, probes, with_)
    with terminable():
        written = issue.write(request, log)
    if scripts is not None:
        issue.keep(written, scripts, log)
    if output is None:
        click.echo(written.text, nl=False)
    else:
        write_text(output, written.text)
        log(f"wrote {output}")
    return bool(written.confirmed)


@click.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path), required=False)
@many(
    "--cell",
    "cells",
    metavar="NAME",
    help="Of a matrix, the combination to compare. Give two to compare two of one matrix, or a different "
    "one of each.",
)
@many(
    "--output",
    "-o",
    metavar="FORMAT[:PATH]",
    help="Write the newer report with the comparison: table (default), or as scan does (repeatable; no PATH "
    "is stdout).",
)
@click.option("--exit-code", is_flag=True, help="Exit 1 where a case got worse.")
@click.option("-v", "--verbose", is_flag=True, help="List every case, and the whole newer report.")
@click.pass_context
def diff(
    ctx: click.Context,
    old: Path,
    new: Path | None,
    cells: tuple[str, ...],
    output: tuple[str, ...],
    exit_code: bool,
    verbose: bool,
) -> None:
    """What changed between two JSON reports: environments first, then cases. Runs nothing, needs no torch.

    Two combinations of one matrix are compared with --cell:

    attncheck diff matrix.json --cell 'torch 2.9.1' --cell 'torch 2.13.0'
    """
    from attncheck import compare

    outputs = parse_outputs(output or ("table",))
    against, before, after = _compared(old, new, cells)
    comparison = compare.compare_reports(before, after, against)
    write(dataclasses.replace(after, comparison=comparison), outputs, verbose)
    worse = any(change.kind.regressed for change in comparison.changes)
    ctx.exit(EXIT_FINDINGS if exit_code and worse else EXIT_CLEAN)


def _compared(old: Path, new: Path | None, cells: tuple[str, ...]) -> tuple[str, Report, Report]:
    """What the older report is called, and both. Raises UserError where `cells` do not say which."""
    from attncheck.cells import Matrix
    from attncheck.saved import read

    if len(cells) > 2 or (new is None and len(cells) < 2):
        raise UserError(
            f"{'One file is' if new is None else 'Two files are'} given and {count(len(cells), '--cell')}: "
            "expected two reports, or a matrix and two --cell of it, the older first."
        )
    files = (old, new or old)
    saved = [read(file) for file in files]
    matrices = sum(isinstance(each, Matrix) for each in saved)
    if len(cells) > matrices:
        raise UserError(
            f"{count(len(cells), '--cell')} {'is' if len(cells) == 1 else 'are'} given, and "
            f"{count(matrices, 'matrix').replace('matrixs', 'matrices')}: --cell names a combination of one."
        )
    # A single one is meant of both.
    named = iter(cells * 2 if len(cells) < matrices else cells)
    found = [
        _cell_of(each, next(named, ""), file) if isinstance(each, Matrix) else (str(file), each)
        for file, each in zip(files, saved, strict=True)
    ]
    (against, before), (_, after) = found
    return against, before, after


def _cell_of(matrix: Matrix, name: str, file: Path) -> tuple[str, Report]:
    """What the cell of this name is called, and its report. Raises UserError where it has none."""
    if not name:
        names = listing((repr(cell.name) for cell in matrix.cells), 12)
        raise UserError(f"{file} is a matrix: expected --cell with one of {names}.")
    cell = matrix.cell(name)
    if cell.report is None:
        problem = one_line(clean(cell.problem)) or "it did not run."
        raise UserError(f"{file} has no report of {clean(cell.name)}: {problem}")
    return f"{cell.name} of {file}", cell.report


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--allow-mixed",
    is_flag=True,
    help="Join reports of different environments too; the joined one says where they differ.",
)
@many(
    "--output",
    "-o",
    metavar="FORMAT[:PATH]",
    help="Write the joined report: json (default), or as scan does (repeatable; no PATH is stdout).",
)
@click.option("-v", "--verbose", is_flag=True, help="List every case.")
@click.pass_context
def merge(
    ctx: click.Context,
    files: tuple[Path, ...],
    allow_mixed: bool,
    output: tuple[str, ...],
    verbose: bool,
) -> None:
    """Join JSON reports: the shards of a scan, or scans of different cases in one environment.

    The joined report is that of one scan of all the cases: in the order of the plan, findings judged over
    all of them. Runs nothing, needs no torch.

    Exit codes: 0 written, whatever was found (attncheck gate judges that); 3 written, but the report of a
    shard is missing; 2 the reports do not belong together.
    """
    from attncheck import merging
    from attncheck.saved import read_report

    outputs = parse_outputs(output or ("json",))
    reports = [(str(file), read_report(file)) for file in files]
    joined = merging.merge(reports, datetime.date.today(), allow_mixed)
    write(joined, outputs, verbose)
    missing = merging.missing_shards(joined.environment)
    if missing:
        log(f"no report was given of shard {', '.join(missing)}")
    ctx.exit(EXIT_INCONCLUSIVE if missing else EXIT_CLEAN)
