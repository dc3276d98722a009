"""`attncheck matrix` and `attncheck cache`."""

from __future__ import annotations

import datetime
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attncheck.commands.common import (
    EXIT_CLEAN,
    EXIT_INCONCLUSIVE,
    FAIL_ON,
    device,
    exit_code,
    guarded,
    log,
    many,
    meshes,
    parse_outputs,
    positive,
    progress,
    repeats,
    write,
)
from attncheck.errors import UserError, unknown

if TYPE_CHECKING:
    from attncheck.cells import Matrix
    from attncheck.matrix.running import MatrixRequest

# Options that pip and uv take under the same names, as they are.
_INSTALLER_OPTIONS = ("index-url", "extra-index-url", "find-links", "constraint")


def _versions(package: str) -> Callable[[Any], Any]:
    return many(f"--{package}", metavar="VERSIONS", help=f"Versions of {package}, the same way.")


@click.command()
@many("--torch", metavar="VERSIONS", help="Versions of torch, e.g. 2.9.1,2.13.0 (repeatable).")
@_versions("flash-attn")
@_versions("xformers")
@click.option(
    "--bisect",
    metavar="SELECTION",
    help="Find the release in which a status changes, e.g. 'operator=sdpa, placement=heads': walks all "
    "releases between the two versions given, or those given, in about log2 runs.",
)
@many("--operator", "-k", metavar="GLOB", help="Operators to run, as for scan.")
@many("--setting", metavar="GLOB", help="Settings to run.")
@many("--placement", metavar="GLOB", help="Placements to run.")
@many("--direction", metavar="NAME", help="forward or backward.")
@many("--route", metavar="NAME", help="How the operator is distributed: dtensor.")
@click.option("--level", default="default", metavar="NAME", help="quick, default or full.")
@click.option("--ranks", type=int, help="Processes to run (default 2).")
@many("--mesh", metavar="SHAPE", help="Device mesh, e.g. 2x2 or dp=2,tp=2 (repeatable).")
@click.option("--repeats", type=int, metavar="N", help="Run each case with N sets of values.")
@click.option("--device", "device_", default="cpu", metavar="NAME", help="cpu (default) or cuda.")
# The same in every matrix, or no outcome could be used again.
@click.option("--seed", type=int, default=0, help="Seed of the values (default 0).")
@click.option("--case-timeout", type=float, metavar="SECONDS", help="Deadline of a case.")
@many("--probe", "probes", metavar="FILE", help="A probe file of your own. Its code is run.")
@many("--fix", "fixes", metavar="FILE", help="Register the strategies of a fix first, or `known`.")
@click.option(
    "--python",
    default="",
    metavar="PYTHON",
    help="The interpreter of all cells: a version (3.12) or a path (default: this one).",
)
@click.option("--index-url", metavar="URL", help="Index to install from; as for pip.")
@many("--extra-index-url", metavar="URL", help="As for pip (repeatable).")
@many("--find-links", metavar="FOLDER", help="Wheels that lie on disk; as for pip (repeatable).")
@many("--constraint", metavar="FILE", help="A constraints file; as for pip (repeatable).")
@click.option("--no-index", is_flag=True, help="Install from --find-links alone; as for pip.")
@click.option(
    "--max-disk",
    metavar="SIZE",
    help="What the cache may take, e.g. 20GB: environments not used for longest are removed.",
)
@many("--select", metavar="RULES", help="Rules to apply, as for scan.")
@many("--ignore", metavar="RULES", help="Rules to leave out.")
@click.option("--fail-on", default="error", metavar="SEVERITY", help="As for scan.")
@many("--output", "-o", metavar="FORMAT[:PATH]", help="table, markdown, html, json or junit.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("-v", "--verbose", is_flag=True, help="Everything; tracebacks for internal errors.")
@click.pass_context
def matrix(ctx: click.Context, /, **given: Any) -> None:
    """Run the same cases with several versions of torch and of attention packages, each combination in an
    environment of its own.

    Environments are made once, in the user's cache (5 to 7 GB for each CUDA build of torch; no GPU is
    needed). What was measured before, and cannot have changed, is not run again.

    attncheck matrix --torch 2.9.1,2.13.0 --flash-attn 2.7.4.post1,2.8.3.post2
    """
    outputs = parse_outputs(given["output"] or ("table",), matrix=True)
    if given["fail_on"] not in FAIL_ON:
        raise unknown("severity", given["fail_on"], FAIL_ON)
    made = guarded(lambda: _run(_request(given), given), given["verbose"], ctx)
    write(made, outputs, given["verbose"])
    ctx.exit(_exit_code(made, given["fail_on"]))


def _run(request: MatrixRequest, given: dict[str, Any]) -> Matrix:
    from attncheck.matrix import bisecting, running
    from attncheck.runner.launch import Interrupted, terminable

    for code in (*request.scan.probe_files, *request.scan.fixes):
        log(f"running the code of {code}")
    try:
        with progress(given["quiet"]) as show, terminable():
            if given["bisect"] is not None:
                return bisecting.bisect(request, given["bisect"], log, show)
            return running.run(request, log, show)
    except (KeyboardInterrupt, Interrupted):
        log("what was measured is kept: the same command goes on from here")
        raise


def _request(given: dict[str, Any]) -> MatrixRequest:
    from attncheck.commands.scan import fix_files
    from attncheck.installer import redacted
    from attncheck.matrix.environments import Source
    from attncheck.matrix.running import MatrixRequest
    from attncheck.plan import Selection, parse_mesh
    from attncheck.runner.scan import ScanRequest

    torch = _listed(given["torch"])
    if not torch:
        raise UserError("--torch is missing: expected versions of it, e.g. --torch 2.9.1,2.13.0.")
    scan = ScanRequest(
        selection=Selection(
            operators=given["operator"],
            settings=given["setting"],
            placements=given["placement"],
            directions=given["direction"],
            routes=given["route"],
            level=given["level"],
        ),
        meshes=meshes(given["mesh"], given["ranks"], parse_mesh),
        repeats=repeats(given["repeats"]),
        device=device(given["device_"]),
        seed=given["seed"],
        case_timeout=positive("--case-timeout", given["case_timeout"]),
        probe_files=given["probes"],
        select_rules=given["select"],
        ignore_rules=given["ignore"],
        # It stands in every cell's report, and an index URL may hold a password.
        command=redacted("attncheck " + " ".join(sys.argv[1:])),
        fixes=fix_files(given["fixes"]),
    )
    packages = {"flash-attn": _listed(given["flash_attn"]), "xformers": _listed(given["xformers"])}
    return MatrixRequest(
        scan,
        torch,
        {package: versions for package, versions in packages.items() if versions},
        Source(given["python"], _installer_options(given)),
        parse_size(given["max_disk"]) if given["max_disk"] else None,
    )


def _listed(texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part.strip() for text in texts for part in text.split(",") if part.strip())


def _installer_options(given: dict[str, Any]) -> tuple[str, ...]:
    options = ["--no-index"] if given["no_index"] else []
    for name in _INSTALLER_OPTIONS:
        value = given[name.replace("-", "_")]
        for text in (value,) if isinstance(value, str) else value or ():
            # Installers are started elsewhere.
            if name in ("find-links", "constraint") and "://" not in text:
                if not Path(text).exists():
                    raise UserError(f"--{name} {text} does not exist.")
                text = str(Path(text).resolve())
            options += [f"--{name}", text]
    return tuple(options)


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str) -> int:
    """Bytes.

    >>> parse_size("20GB"), parse_size("1.5 GiB")
    (20000000000, 1610612736)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.I)
    if match is None or float(match[1]) <= 0:
        raise UserError(f"--max-disk {text!r} is no size: expected one like 20GB.")
    power = "KMGT".find(match[2].upper()) + 1 if match[2] else 0
    return int(float(match[1]) * (1024**power if match[3] else _UNITS[match[2].upper()]))


def _exit_code(made: Matrix, fail_on: str) -> int:
    """The worst of the cells': findings, then inconclusive. No cell at all is inconclusive."""
    codes = [exit_code(cell.report, fail_on) for cell in made.cells if cell.report is not None]
    lacking = len(codes) < len(made.cells)
    inconclusive = EXIT_INCONCLUSIVE if lacking or EXIT_INCONCLUSIVE in codes else EXIT_CLEAN
    return 1 if 1 in codes else inconclusive


@click.group("cache")
def cache_() -> None:
    """What attncheck keeps: environments of a matrix, provisioned packages, runs, outcomes."""


@cache_.command("list")
def cache_list() -> None:
    """List what there is, largest first: name, kind, size, last use."""
    from tabulate import tabulate

    from attncheck import cache, provision
    from attncheck.text import size

    entries = cache.entries()
    rows = [(e.name, e.kind, size(e.bytes), _day(e.used)) for e in entries]
    if rows:
        click.echo(tabulate(rows, headers=("name", "kind", "size", "last used"), tablefmt="plain"))
    total = size(sum(entry.bytes for entry in entries))
    click.echo(f"{total} in {provision.cache_root()}")


@cache_.command("clear")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--older-than", type=float, metavar="DAYS", help="Only what was not used for that long."
)
def cache_clear(names: tuple[str, ...], older_than: float | None) -> None:
    """Remove entries by name or glob, as `cache list` shows them, or all of them. What is in use stays."""
    import fnmatch

    from attncheck import cache
    from attncheck.text import size

    entries = cache.entries()
    for name in names:
        if not any(fnmatch.fnmatchcase(entry.name, name) for entry in entries):
            raise unknown("entry of the cache", name, [entry.name for entry in entries])
    chosen = [e for e in entries if not names or any(fnmatch.fnmatchcase(e.name, n) for n in names)]
    if older_than is not None:
        chosen = [e for e in chosen if time.time() - e.used > older_than * 86400]
    freed = 0
    for entry in chosen:
        if cache.remove(entry):
            freed += entry.bytes
        else:
            log(f"{entry.name} is in use, and stays")
    click.echo(f"Freed {size(freed)}.")


def _day(used: float) -> str:
    return datetime.datetime.fromtimestamp(used).strftime("%Y-%m-%d %H:%M")
