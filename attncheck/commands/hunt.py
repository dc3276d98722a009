"""`attncheck hunt`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attncheck.commands.common import (
    EXIT_FINDINGS,
    EXIT_INCONCLUSIVE,
    EXIT_INTERRUPTED,
    FAIL_ON,
    exit_code,
    guarded,
    log,
    many,
    parse_outputs,
    positive,
    progress_line,
    write,
)
from attncheck.errors import UserError, unknown

if TYPE_CHECKING:
    from attncheck.model import Report


@click.command()
@many("--operator", "-k", metavar="GLOB", help="Operators to hunt in, e.g. 'sdpa*' (repeatable).")
@click.option("--minutes", type=float, default=5.0, metavar="N", help="How long (default 5).")
@click.option(
    "--examples",
    type=int,
    metavar="N",
    help="End after so many examples (default: run the time out).",
)
@many("--with", "with_", metavar="PACKAGE", help="Provision it first, as scan does (repeatable).")
@many("--probe", "probes", metavar="FILE", help="A probe file of your own. Its code is run.")
@click.option(
    "--engine",
    metavar="NAME",
    help="What runs the examples: simulated (default where torch can, from 2.10), or processes, which also "
    "sees ranks that part. Finds are always confirmed with processes.",
)
@click.option("--seed", type=int, help="Seed of the search and of all values (default: fresh).")
@click.option("--case-timeout", type=float, metavar="SECONDS", help="Deadline of an example.")
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    default=Path("attncheck-hunt"),
    metavar="FOLDER",
    help="Where each find is saved as a probe file (default attncheck-hunt).",
)
@many(
    "--known",
    type=click.Path(path_type=Path),
    metavar="REPORT",
    help="A JSON report (of a scan, or a hunt): the ops that it says DTensor refuses are no finds.",
)
@click.option("--fail-on", default="error", metavar="SEVERITY", help="As for scan.")
@many("--output", "-o", metavar="FORMAT[:PATH]", help="Write a report of the finds, as scan does.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("-v", "--verbose", is_flag=True, help="Tracebacks for internal errors.")
@click.pass_context
def hunt(ctx: click.Context, /, **given: Any) -> None:
    """Search for cases that fail, shrink each to its smallest, and save it as a probe file.

    Draws operators, sizes, dtypes, meshes, placements and memory layouts at random, those of real models
    first.
    """
    outputs = parse_outputs(given["output"])
    if given["fail_on"] not in FAIL_ON:
        raise unknown("severity", given["fail_on"], FAIL_ON)
    if not given["minutes"] > 0:
        raise UserError(f"--minutes is {given['minutes']:g}: expected a number above 0.")

    def run() -> Report:
        from attncheck.hunt import hunting

        for code in given["probes"]:
            log(f"running the code of {code}")
        with progress_line(given["quiet"]) as told:
            request = hunting.HuntRequest(
                operators=given["operator"],
                minutes=given["minutes"],
                with_packages=given["with_"],
                probe_files=given["probes"],
                engine=given["engine"] or hunting.default_engine(),
                seed=given["seed"],
                case_timeout=positive("--case-timeout", given["case_timeout"])
                or hunting.CASE_SECONDS,
                save=given["save"],
                examples=given["examples"],
                known=given["known"],
                command="attncheck " + " ".join(sys.argv[1:]),
            )
            hunted = hunting.hunt(request, log, told)
        summary = hunting.render(hunted)
        click.echo(summary, nl=False, err=any(path is None for _, path in outputs))
        write(hunted.report, outputs, given["verbose"])
        if hunted.stopped:
            ctx.exit(EXIT_INTERRUPTED)
        if not hunted.tally.run or hunted.tally.unknown:
            ctx.exit(EXIT_INCONCLUSIVE if not hunted.finds else EXIT_FINDINGS)
        return hunted.report

    ctx.exit(exit_code(guarded(run, given["verbose"], ctx), given["fail_on"]))
