"""`attncheck audit`."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attncheck.commands.common import (
    FAIL_ON,
    device,
    exit_code,
    guarded,
    log,
    many,
    merged,
    parse_outputs,
    positive,
    progress,
    write,
)
from attncheck.commands.scan import fix_files
from attncheck.errors import UserError, unknown

if TYPE_CHECKING:
    from attncheck.model import Report


@click.command()
@click.argument("build", required=False, default="")
@click.option("--mesh", metavar="SHAPE", help="The model's device mesh, e.g. tp=8 or dp=2,tp=4.")
@click.option(
    "--inputs",
    metavar="MODULE:FUNCTION",
    help="inputs(mesh) -> a tuple or dict of tensors (default: `inputs` beside BUILD).",
)
@click.option("--device", metavar="NAME", help="Where the calls are run: cpu (default) or cuda.")
@many(
    "--with",
    "with_",
    metavar="PACKAGE",
    help="Provision a package's Python part and run it on CPU stand-ins: flash-attn or xformers, each with "
    "[==VERSION].",
)
@many(
    "--fix", "fixes", metavar="FILE", help="Register the strategies of this file first, or `known`."
)
@many("--probe", "probes", metavar="FILE", help="A probe file of your own. Its code is run.")
@click.option(
    "--seed", type=int, help="Seed of all values (default: fresh; the report records it)."
)
@click.option("--case-timeout", type=float, metavar="SECONDS", help="Deadline of a single case.")
@many("--select", metavar="RULE", help="Only these rules (ATN101, ATN1, missing-*).")
@many("--ignore", metavar="RULE", help="All but these rules.")
@click.option(
    "--fail-on",
    metavar="SEVERITY",
    help="Lowest severity that exits 1: error (default), warning, info, never.",
)
@many(
    "--output",
    "-o",
    metavar="FORMAT[:PATH]",
    help="Write a report: table, markdown, html, json, sarif, junit, github (repeatable).",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option(
    "-v", "--verbose", is_flag=True, help="List every op; tracebacks for internal errors."
)
@click.pass_context
def audit(ctx: click.Context, /, **given: Any) -> None:
    """Look at a whole model and its parallel plan before it is deployed: no GPU, no weights.

    BUILD names a function of yours, package.module:function or file.py:function; build(mesh) returns the
    model, already parallelised. It is RUN, on fake tensors and a process group that connects nobody; then
    each distinct attention call is run with real numbers at a reduced size.
    """
    from attncheck import config, waivers

    configured = config.load(Path.cwd())
    options = merged(configured, given)
    outputs = parse_outputs(options["output"] or ("table",))
    fail_on = options["fail-on"] or "error"
    if fail_on not in FAIL_ON:
        raise unknown("severity", fail_on, FAIL_ON)
    report = guarded(lambda: run_audit(options), options["verbose"], ctx)
    report = waivers.apply(report, configured.get("waivers", ()), datetime.date.today())
    write(report, outputs, options["verbose"])
    ctx.exit(exit_code(report, fail_on))


def run_audit(options: dict[str, Any]) -> Report:
    """An audit with the options of the command line over those of pyproject.toml. Raises UserError."""
    from attncheck.audit.auditing import AuditRequest
    from attncheck.audit.auditing import audit as run
    from attncheck.plan import parse_mesh
    from attncheck.runner.scan import ScanRequest

    if not options["build"]:
        raise UserError("Nothing to audit: name a build function, package.module:function.")
    mesh = options["mesh"]
    if isinstance(mesh, (list, tuple)):  # pyproject.toml's, of scans
        mesh = mesh[0] if mesh else None
    if not mesh:
        raise UserError("An audit needs the model's mesh, e.g. --mesh tp=8.")
    with progress(options["quiet"]) as show:
        fixes = fix_files(options["fixes"])
        for code in (*options["probes"], *fixes):
            log(f"running the code of {code}")
        request = AuditRequest(
            target=options["build"],
            mesh=parse_mesh(mesh),
            inputs=options["inputs"] or "",
            scan=ScanRequest(
                device=device(options["device"] or "cpu"),
                seed=options["seed"],
                case_timeout=positive("--case-timeout", options["case-timeout"]),
                with_packages=options["with"],
                probe_files=options["probes"],
                select_rules=options["select"],
                ignore_rules=options["ignore"],
                command="attncheck " + " ".join(sys.argv[1:]),
                fixes=fixes,
            ),
        )
        return run(request, log, show)
