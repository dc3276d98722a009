"""`attncheck fix`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attncheck.commands.common import (
    device,
    guarded,
    log,
    many,
    merged,
    meshes,
    parse_outputs,
    progress,
    write,
)

if TYPE_CHECKING:
    from attncheck.fixes.fixing import Fixed, FixRequest
    from attncheck.fixes.output import Target


@click.command()
@click.option(
    "--from",
    "from_",
    type=click.Path(path_type=Path),
    metavar="REPORT",
    help="A JSON report of a scan (default: scan first).",
)
@many("--kernel-op", metavar="GLOB", help="Kernel ops to mend, e.g. 'flash_attn.*' (repeatable).")
@many("--operator", "-k", metavar="GLOB", help="Operators to scan, where no report is given.")
@click.option(
    "--write",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the module to this file.",
)
@click.option(
    "--diff",
    type=click.Path(path_type=Path),
    is_flag=False,
    flag_value=Path("attncheck_fixes.py"),
    metavar="[FILE]",
    help="Show what --write FILE would change (default attncheck_fixes.py).",
)
@click.option(
    "--force",
    is_flag=True,
    help="Overwrite a file that attncheck did not write, or that was changed since; FILE.bak keeps it.",
)
@click.option(
    "--unverified",
    is_flag=True,
    help="Write also what fails verification, and say so in its header.",
)
@many("--mesh", metavar="SHAPE", help="Device mesh to scan first (repeatable).")
@click.option("--device", metavar="NAME", help="cpu (default) or cuda.")
@many("--with", "with_", metavar="PACKAGE", help="Provision it first, as scan does (repeatable).")
@many("--probe", "probes", metavar="FILE", help="A probe file of your own. Its code is run.")
@many("--import", "imports", metavar="MODULE", help="Import it, as scan does. Its code is run.")
@click.option("--seed", type=int, help="Seed of all values (default: fresh, or the report's).")
@many(
    "--output",
    "-o",
    metavar="FORMAT[:PATH]",
    help="Write a report of the verification, each case before and after (as scan does).",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("-v", "--verbose", is_flag=True, help="Tracebacks for internal errors.")
@click.pass_context
def fix(ctx: click.Context, /, **given: Any) -> None:
    """Write a module that registers the missing sharding strategies, once it is verified.

    Takes the findings of a scan, describes each kernel op by named dims (or finds out by running it), runs
    the failing cases and their neighbours again with the strategies registered, and writes what is right.
    Without --write or --diff the module goes to stdout.

    Exit codes: 0 every op has a verified strategy, 1 some have none, 2 usage or internal error, 3 nothing
    ran.
    """
    from attncheck import config
    from attncheck.fixes import fixing, output, telling

    configured = config.load(Path.cwd())
    options = merged(
        {k: configured[k] for k in ("with", "probes", "imports") if k in configured}, given
    )
    target = output.target(options["write"], options["diff"], options["force"])
    outputs = parse_outputs(options["output"])

    def run() -> Fixed:
        for code in (*options["probes"], *options["imports"]):
            log(f"running the code of {code}")
        with progress(options["quiet"]) as show:
            return fixing.fix(_fix_request(options, target), log, show)

    fixed = guarded(run, options["verbose"], ctx)
    for line in telling.summary(fixed):
        click.echo(line, err=True)
    click.echo(target.put(fixed.text), nl=False)
    if target.write and fixed.text:
        log(f"wrote {target.file}")
    write(fixed.report, outputs, options["verbose"])
    ctx.exit(output.exit_code(fixed))


def _fix_request(options: dict[str, Any], target: Target) -> FixRequest:
    from attncheck.fixes.fixing import FixRequest
    from attncheck.plan import Selection, parse_mesh
    from attncheck.runner.scan import ScanRequest

    # `my::attention` is an op, and no operator's name.
    ops = tuple(name for name in options["operator"] if "::" in name)
    operators = tuple(name for name in options["operator"] if "::" not in name)
    return FixRequest(
        report=options["from"],
        scan=ScanRequest(
            selection=Selection(operators=operators),
            meshes=meshes(options["mesh"], None, parse_mesh),
            device=device(options["device"] or "cpu"),
            seed=options["seed"],
            with_packages=options["with"],
            probe_files=options["probes"],
            imports=options["imports"],
            command="attncheck " + " ".join(sys.argv[1:]),
        ),
        kernel_ops=(*options["kernel-op"], *ops),
        unverified=options["unverified"],
        name=target.module_name,
    )


# --- reports -------------------------------------------------------------------------------------
