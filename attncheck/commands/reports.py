"""Commands on saved reports. They run nothing, but for the scripts of `report --finding` and `--for`."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

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
    verbose: bool,
    finding: str | None,
    project: str | None,
    **for_scripts: Any,
) -> None:
    """Render a saved JSON report again, in another format. Runs nothing and needs no torch, but for the
    scripts of --finding and --for.

    Exit code 3 where none of these scripts shows its finding here.
    """
    from attncheck import plugins
    from attncheck.saved import read_report

    if finding is None and project is None:
        if any(for_scripts.values()):
            raise UserError("--probe, --with and --write-repro need --finding or --for.")
        form = plugins.load_format(format_)
        write(read_report(file), [(form, output)], verbose)
        return
    if format_ != "markdown":
        raise UserError("--finding and --for write an issue: they need --format markdown.")
    if finding is not None and project is not None:
        raise UserError("--finding and --for exclude each other: give one.")
    shown = guarded(
        lambda: _issue(file, finding or "", project or "", output, **for_scripts), verbose, ctx
    )
    ctx.exit(EXIT_CLEAN if shown else EXIT_INCONCLUSIVE)


def _issue(
    file: Path,
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
    from attncheck.saved import read_report
    from attncheck.triage import issue

    for probe in probes:
        log(f"running the code of {probe}")
    request = issue.Request(read_report(file), file.name, finding, project, probes, with_)
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
@click.argument("new", type=click.Path(path_type=Path))
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
