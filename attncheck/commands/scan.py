"""`attncheck scan`."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Sequence
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
    meshes,
    parse_outputs,
    positive,
    progress,
    repeats,
    write,
)
from attncheck.errors import unknown

if TYPE_CHECKING:
    from attncheck.model import Report


# Options that other commands have, too.
WITH = many(
    "--with",
    "with_",
    metavar="PACKAGE",
    help="Provision a package's Python part and run it on CPU stand-ins: flash-attn or xformers, "
    "each with [==VERSION].",
)
PROBE = many("--probe", "probes", metavar="FILE", help="A probe file of your own. Its code is run.")
FIX = many(
    "--fix",
    "fixes",
    metavar="FILE",
    help="Register the strategies of this file, written by attncheck fix, before the first case; `known` "
    "stands for all that attncheck knows. Its code is run.",
)
SEED = click.option(
    "--seed", type=int, help="Seed of all values (default: fresh; the report records it)."
)
CASE_TIMEOUT = click.option(
    "--case-timeout", type=float, metavar="SECONDS", help="Deadline of a single case."
)
SELECT = many("--select", metavar="RULE", help="Only these rules (ATN101, ATN1, missing-*).")
IGNORE = many("--ignore", metavar="RULE", help="All but these rules.")
FAIL_AT = click.option(
    "--fail-on",
    metavar="SEVERITY",
    help="Lowest severity that exits 1: error (default), warning, info, never.",
)
OUTPUT = many(
    "--output",
    "-o",
    metavar="FORMAT[:PATH]",
    help="Write a report: table, markdown, html, json, sarif, junit, github (repeatable; no PATH is "
    "stdout).",
)
QUIET = click.option("-q", "--quiet", is_flag=True, help="No progress.")

# What `attncheck scan` takes, and every command that scans first.
OPTIONS = (
    many("--operator", "-k", metavar="GLOB", help="Operators to run, e.g. 'sdpa*' (repeatable)."),
    many("--setting", metavar="GLOB", help="Settings to run, e.g. causal, '*mask*'."),
    many(
        "--placement",
        metavar="GLOB",
        help="Placements: replicate, batch, heads, sequence, query, head_dim, partial.",
    ),
    many("--direction", metavar="NAME", help="forward or backward."),
    many("--route", metavar="NAME", help="How the operator is distributed: dtensor."),
    click.option("--level", metavar="NAME", help="quick, default or full."),
    click.option("--ranks", type=int, help="Processes to run (default 2)."),
    many("--mesh", metavar="SHAPE", help="Device mesh, e.g. 2x2 or dp=2,tp=2 (repeatable)."),
    click.option(
        "--repeats",
        type=int,
        metavar="N",
        help="Run each case with N sets of values: tells rounding from a bug (default 1).",
    ),
    click.option(
        "--engine",
        metavar="NAME",
        help="processes (default): a real process for each rank; simulated: all ranks in one process, for "
        "worlds that do not fit this machine, blind to ranks that diverge or hang and to code that asks for "
        "its rank; both: one held against the other.",
    ),
    click.option("--device", metavar="NAME", help="cpu (default) or cuda."),
    WITH,
    PROBE,
    many(
        "--import",
        "imports",
        metavar="MODULE",
        help="Import it, and scan the attention ops that it registers. Its code is run.",
    ),
    FIX,
    SEED,
    click.option(
        "--hash-seed",
        type=int,
        default=None,
        help="PYTHONHASHSEED of rank 0; rank r gets this plus r (default 6).",
    ),
    CASE_TIMEOUT,
    SELECT,
    IGNORE,
    FAIL_AT,
    OUTPUT,
    click.option(
        "--shard",
        metavar="I/N",
        help="Run part I of N, all of about equal expected time; `attncheck merge` joins their reports.",
    ),
    click.option(
        "--resume",
        is_flag=True,
        help="Go on with the last interrupted scan (or that of --run-dir).",
    ),
    click.option("--run-dir", type=click.Path(path_type=Path), help="Folder for journal and logs."),
    QUIET,
    click.option(
        "-v", "--verbose", is_flag=True, help="List every case; tracebacks for internal errors."
    ),
)


def scan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a scan, as a decorator."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


@click.command()
@scan_options
@click.pass_context
def scan(ctx: click.Context, /, **given: Any) -> None:
    """Run attention operators on DTensors and report what works, what is missing, wrong or costly.

    With no GPU at hand: attncheck scan --with flash-attn
    """
    scan_and_report(ctx, given, run_scan)


def scan_and_report(
    ctx: click.Context, given: dict[str, Any], run: Callable[[dict[str, Any]], Report]
) -> None:
    """The way of a command that makes one report: its options, waivers, formats and exit code."""
    from attncheck import config, waivers

    configured = config.load(Path.cwd())
    options = merged(configured, given)
    outputs = parse_outputs(options["output"] or ("table",))
    fail_on = options["fail-on"] or "error"
    if fail_on not in FAIL_ON:
        raise unknown("severity", fail_on, FAIL_ON)
    report = guarded(lambda: run(options), options["verbose"], ctx)
    report = waivers.apply(report, configured.get("waivers", ()), datetime.date.today())
    write(report, outputs, options["verbose"])
    ctx.exit(exit_code(report, fail_on))


def run_scan(options: dict[str, Any]) -> Report:
    """A scan with the options of the command line over those of pyproject.toml. Raises UserError."""
    from attncheck import sharding
    from attncheck.plan import Selection, parse_mesh
    from attncheck.runner import scan as runner

    with progress(options["quiet"]) as show:
        if options["resume"]:
            return runner.resume(options["run-dir"], log, show)
        fixes = fix_files(options["fixes"])
        for code in (*options["probes"], *options["imports"], *fixes):
            log(f"running the code of {code}")
        request = runner.ScanRequest(
            selection=Selection(
                operators=options["operator"],
                settings=options["setting"],
                placements=options["placement"],
                directions=options["direction"],
                routes=options["route"],
                level=options["level"] or "default",
            ),
            meshes=meshes(options["mesh"], options["ranks"], parse_mesh),
            repeats=repeats(options["repeats"]),
            engine=options["engine"] or "processes",
            device=device(options["device"] or "cpu"),
            seed=options["seed"],
            hash_seed=options["hash-seed"]
            if options["hash-seed"] is not None
            else runner.FIRST_HASH_SEED,
            case_timeout=positive("--case-timeout", options["case-timeout"]),
            with_packages=options["with"],
            probe_files=options["probes"],
            imports=options["imports"],
            select_rules=options["select"],
            ignore_rules=options["ignore"],
            run_dir=options["run-dir"],
            command="attncheck " + " ".join(sys.argv[1:]),
            fixes=fixes,
            shard=sharding.parse(options["shard"]) if options["shard"] else None,
        )
        return runner.scan(request, log, show)


def fix_files(names: Sequence[str]) -> tuple[str, ...]:
    """Paths of fix files; `known` is written to the cache, as what attncheck knows today."""
    from attncheck.provision import cache_root

    def path(name: str) -> str:
        if name != "known":
            return name
        from attncheck.fixes import emit

        return str(emit.write_known(cache_root()))

    return tuple(path(name) for name in names)
