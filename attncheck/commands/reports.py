"""Commands that run nothing: saved reports and what can be said of them."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

import click

from attncheck.commands.common import (
    EXIT_CLEAN,
    EXIT_FINDINGS,
    EXIT_INCONCLUSIVE,
    log,
    many,
    parse_outputs,
    write,
)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--format", "format_", default="table", metavar="NAME", help="table, markdown or json."
)
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write to this file.")
@click.option("-v", "--verbose", is_flag=True, help="List every case.")
def report(file: Path, format_: str, output: Path | None, verbose: bool) -> None:
    """Render a saved JSON report again, in another format. Runs nothing, needs no torch."""
    from attncheck import plugins
    from attncheck.saved import read_report

    form = plugins.load_format(format_)
    write(read_report(file), [(form, output)], verbose)


@click.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@many(
    "--output",
    "-o",
    metavar="FORMAT[:PATH]",
    help="Write the newer report with the comparison: table (default), markdown, html, json, ... (repeatable; "
    "no PATH is stdout).",
)
@click.option("--exit-code", is_flag=True, help="Exit 1 where a case got worse.")
@click.option("-v", "--verbose", is_flag=True, help="List every case, and the whole newer report.")
@click.pass_context
def diff(
    ctx: click.Context,
    old: Path,
    new: Path,
    output: tuple[str, ...],
    exit_code: bool,
    verbose: bool,
) -> None:
    """What changed between two JSON reports: environments first, then cases. Runs nothing, needs no torch."""
    from attncheck import compare
    from attncheck.saved import read_report

    outputs = parse_outputs(output or ("table",))
    before, after = read_report(old), read_report(new)
    comparison = compare.compare_reports(before, after, str(old))
    write(dataclasses.replace(after, comparison=comparison), outputs, verbose)
    worse = any(change.kind.regressed for change in comparison.changes)
    ctx.exit(EXIT_FINDINGS if exit_code and worse else EXIT_CLEAN)


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
    help="Write the joined report: json (default), table, markdown (repeatable; no PATH is stdout).",
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
