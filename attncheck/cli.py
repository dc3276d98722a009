"""The commands: parse, call, render. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from attncheck import __version__
from attncheck.errors import UserError, unknown

if TYPE_CHECKING:
    from attncheck.fixes.fixing import Fixed, FixRequest
    from attncheck.fixes.output import Target
    from attncheck.model import Case, Report

EXIT_CLEAN, EXIT_FINDINGS, EXIT_ERROR, EXIT_INCONCLUSIVE = 0, 1, 2, 3
EXIT_INTERRUPTED = 130
T = TypeVar("T")
FAIL_ON = ("error", "warning", "info", "never")


class Commands(click.Group):
    """Turns our errors into one sentence and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"attncheck: {error}", err=True)
            ctx.exit(EXIT_ERROR)
        except BrokenPipeError:
            # The reader of a pipe left (`| head`); that is no error of ours.
            sys.stderr.close()
            ctx.exit(EXIT_CLEAN)


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="attncheck")
def main() -> None:
    """Find out which attention operators really work on DTensors, before you deploy.

    Exit codes: 0 clean, 1 findings, 2 usage or internal error, 3 inconclusive.
    """


def _many(*names: str, **kwargs: Any) -> Callable[[Any], Any]:
    return click.option(*names, multiple=True, **kwargs)


@main.command()
@_many("--operator", "-k", metavar="GLOB", help="Operators to run, e.g. 'sdpa*' (repeatable).")
@_many("--setting", metavar="GLOB", help="Settings to run, e.g. causal, '*mask*'.")
@_many(
    "--placement",
    metavar="GLOB",
    help="Placements: replicate, batch, heads, sequence, query, head_dim, partial.",
)
@_many("--direction", metavar="NAME", help="forward or backward.")
@_many("--route", metavar="NAME", help="How the operator is distributed: dtensor.")
@click.option("--level", metavar="NAME", help="quick, default or full.")
@click.option("--ranks", type=int, help="Processes to run (default 2).")
@_many("--mesh", metavar="SHAPE", help="Device mesh, e.g. 2x2 or dp=2,tp=2 (repeatable).")
@click.option(
    "--repeats",
    type=int,
    metavar="N",
    help="Run each case with N sets of values: tells rounding from a bug (default 1).",
)
@click.option(
    "--engine",
    metavar="NAME",
    help="processes (default): a real process for each rank; simulated: all ranks in one process, for "
    "worlds that do not fit this machine, blind to ranks that diverge or hang and to code that asks for "
    "its rank; both: one held against the other.",
)
@click.option("--device", metavar="NAME", help="cpu (default) or cuda.")
@_many(
    "--with",
    "with_",
    metavar="PACKAGE",
    help="Provision a package's Python part and run it on CPU stand-ins: flash-attn or xformers, "
    "each with [==VERSION].",
)
@_many("--probe", "probes", metavar="FILE", help="A probe file of your own. Its code is run.")
@_many(
    "--import",
    "imports",
    metavar="MODULE",
    help="Import it, and scan the attention ops that it registers. Its code is run.",
)
@_many(
    "--fix",
    "fixes",
    metavar="FILE",
    help="Register the strategies of this file, written by attncheck fix, before the first case; `known` "
    "stands for all that attncheck knows. Its code is run.",
)
@click.option(
    "--seed", type=int, help="Seed of all values (default: fresh; the report records it)."
)
@click.option(
    "--hash-seed",
    type=int,
    default=None,
    help="PYTHONHASHSEED of rank 0; rank r gets this plus r (default 6).",
)
@click.option("--case-timeout", type=float, metavar="SECONDS", help="Deadline of a single case.")
@_many("--select", metavar="RULE", help="Only these rules (ATN101, ATN1, missing-*).")
@_many("--ignore", metavar="RULE", help="All but these rules.")
@click.option(
    "--fail-on",
    metavar="SEVERITY",
    help="Lowest severity that exits 1: error (default), warning, info, never.",
)
@_many(
    "--output",
    "-o",
    metavar="FORMAT[:PATH]",
    help="Write a report: table, markdown, json (repeatable; no PATH is stdout).",
)
@click.option(
    "--resume", is_flag=True, help="Go on with the last interrupted scan (or that of --run-dir)."
)
@click.option("--run-dir", type=click.Path(path_type=Path), help="Folder for journal and logs.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option(
    "-v", "--verbose", is_flag=True, help="List every case; tracebacks for internal errors."
)
@click.pass_context
def scan(ctx: click.Context, /, **given: Any) -> None:
    """Run attention operators on DTensors and report what works, what is missing, wrong or costly.

    With no GPU at hand: attncheck scan --with flash-attn
    """
    from attncheck import config

    options = _merge(config.load(Path.cwd()), given)
    outputs = _parse_outputs(options["output"] or ("table",))
    fail_on = options["fail-on"] or "error"
    if fail_on not in FAIL_ON:
        raise unknown("severity", fail_on, FAIL_ON)
    report = _guarded(lambda: _scan(options), options["verbose"], ctx)
    _write(report, outputs, options["verbose"])
    ctx.exit(exit_code(report, fail_on))


def _merge(configured: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Options of the command line over those of pyproject.toml; names as in the configuration."""
    named = {k.rstrip("_").replace("_", "-"): v for k, v in given.items()}
    return {k: (v if v not in (None, ()) else configured.get(k, v)) for k, v in named.items()}


def _scan(options: dict[str, Any]) -> Report:
    from attncheck.plan import Selection, parse_mesh
    from attncheck.runner import scan as runner

    with _progress(options["quiet"]) as show:
        if options["resume"]:
            return runner.resume(options["run-dir"], _log, show)
        fixes = _fix_files(options["fixes"])
        for code in (*options["probes"], *options["imports"], *fixes):
            _log(f"running the code of {code}")
        request = runner.ScanRequest(
            selection=Selection(
                operators=options["operator"],
                settings=options["setting"],
                placements=options["placement"],
                directions=options["direction"],
                routes=options["route"],
                level=options["level"] or "default",
            ),
            meshes=_meshes(options["mesh"], options["ranks"], parse_mesh),
            repeats=_repeats(options["repeats"]),
            engine=options["engine"] or "processes",
            device=_device(options["device"] or "cpu"),
            seed=options["seed"],
            hash_seed=options["hash-seed"]
            if options["hash-seed"] is not None
            else runner.FIRST_HASH_SEED,
            case_timeout=_positive("--case-timeout", options["case-timeout"]),
            with_packages=options["with"],
            probe_files=options["probes"],
            imports=options["imports"],
            select_rules=options["select"],
            ignore_rules=options["ignore"],
            run_dir=options["run-dir"],
            command="attncheck " + " ".join(sys.argv[1:]),
            fixes=fixes,
        )
        return runner.scan(request, _log, show)


def _fix_files(names: Sequence[str]) -> tuple[str, ...]:
    """Paths of fix files; `known` is written to the cache, as what attncheck knows today."""
    from attncheck.provision import cache_root

    def path(name: str) -> str:
        if name != "known":
            return name
        from attncheck.fixes import emit

        return str(emit.write_known(cache_root()))

    return tuple(path(name) for name in names)


def _meshes(
    texts: Sequence[str], ranks: int | None, parse: Callable[[str], dict[str, int]]
) -> tuple[dict[str, int], ...]:
    if ranks is not None and ranks < 1:
        raise UserError(
            f"--ranks is {ranks}: at least 1 rank is needed (2 or more to shard anything)."
        )
    if not texts:
        return ({"tp": ranks or 2},)
    meshes = {tuple(mesh.items()): mesh for mesh in map(parse, texts)}  # one named twice is one
    for text, mesh in zip(texts, map(parse, texts), strict=True):
        size = math.prod(mesh.values())
        if ranks is not None and ranks != size:
            raise UserError(
                f"Mesh {text!r} has {size} ranks, but --ranks is {ranks}: give one or make them equal."
            )
    return tuple(meshes.values())


def _repeats(count: int | None) -> int:
    if count is not None and count < 1:
        raise UserError(f"--repeats is {count}: expected at least 1 set of values.")
    return count or 1


def _device(name: str) -> str:
    if name not in ("cpu", "cuda"):
        raise unknown("device", name, ("cpu", "cuda"))
    return name


def _positive(option: str, value: float | None) -> float | None:
    if value is not None and value <= 0:
        raise UserError(f"{option} is {value:g}: expected a number of seconds above 0.")
    return value


def _guarded(run: Callable[[], T], verbose: bool, ctx: click.Context) -> T:
    """Internal errors are never findings: exit 2, one sentence, the traceback with -v."""
    from attncheck.runner.launch import Interrupted

    try:
        return run()
    except (KeyboardInterrupt, Interrupted):
        click.echo("attncheck: interrupted; all workers have ended.", err=True)
        ctx.exit(EXIT_INTERRUPTED)
    except (UserError, click.ClickException, click.exceptions.Exit):
        raise
    except Exception as error:
        if verbose:
            raise
        click.echo(
            f"attncheck: internal error, {type(error).__name__}: {error} (-v shows the traceback)",
            err=True,
        )
        ctx.exit(EXIT_ERROR)


def _log(message: str) -> None:
    click.echo(f"attncheck: {message}", err=True)


@contextlib.contextmanager
def _progress(quiet: bool) -> Any:
    """A counter on the terminal; silent in files and pipes."""
    with _progress_line(quiet) as told:

        def show(done: int, total: int, case: Case | None) -> None:
            what = (
                f"{case.operator} {case.setting_name} {case.placement} {case.direction}"
                if case
                else ""
            )
            told(what, f"[{done}/{total}] ")

        yield show


@contextlib.contextmanager
def _progress_line(quiet: bool) -> Any:
    """One line on the terminal, rewritten, with the seconds so far; silent in files and pipes."""
    shown = sys.stderr.isatty() and not quiet
    began = time.time()

    def put(line: str, after: str = "") -> None:
        width = shutil.get_terminal_size().columns - 1
        click.echo(f"\r{line[:width]:<{width}}{after}", nl=False, err=True)

    def told(text: str, before: str = "") -> None:
        if shown:
            put(f"{before}{time.time() - began:.0f} s  {text}")

    try:
        yield told
    finally:
        if shown:
            put("", after="\r")


def exit_code(report: Report, fail_on: str) -> int:
    """0 clean, 1 findings at or above `fail_on`, 3 when too little ran to say either."""
    from attncheck.model import UNJUDGED, Severity, Status

    if fail_on != "never":
        limit = Severity(fail_on).rank
        if any(f.severity.rank <= limit for f in report.findings if f.rule not in UNJUDGED):
            return EXIT_FINDINGS
    ran = sum(1 for r in report.cases if r.outcome.status.ran)
    if any(r.outcome.status is Status.UNKNOWN for r in report.cases) or 2 * ran < len(report.cases):
        return EXIT_INCONCLUSIVE
    return EXIT_CLEAN


@main.command()
@_many("--operator", "-k", metavar="GLOB", help="Operators to hunt in, e.g. 'sdpa*' (repeatable).")
@click.option("--minutes", type=float, default=5.0, metavar="N", help="How long (default 5).")
@click.option(
    "--examples",
    type=int,
    metavar="N",
    help="End after so many examples (default: run the time out).",
)
@_many("--with", "with_", metavar="PACKAGE", help="Provision it first, as scan does (repeatable).")
@_many("--probe", "probes", metavar="FILE", help="A probe file of your own. Its code is run.")
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
@_many(
    "--known",
    type=click.Path(path_type=Path),
    metavar="REPORT",
    help="A JSON report (of a scan, or a hunt): the ops that it says DTensor refuses are no finds.",
)
@click.option("--fail-on", default="error", metavar="SEVERITY", help="As for scan.")
@_many("--output", "-o", metavar="FORMAT[:PATH]", help="Write a report of the finds, as scan does.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("-v", "--verbose", is_flag=True, help="Tracebacks for internal errors.")
@click.pass_context
def hunt(ctx: click.Context, /, **given: Any) -> None:
    """Search for cases that fail, shrink each to its smallest, and save it as a probe file.

    Draws operators, sizes, dtypes, meshes, placements and memory layouts at random, those of real models
    first.
    """
    outputs = _parse_outputs(given["output"])
    if given["fail_on"] not in FAIL_ON:
        raise unknown("severity", given["fail_on"], FAIL_ON)
    if not given["minutes"] > 0:
        raise UserError(f"--minutes is {given['minutes']:g}: expected a number above 0.")

    def run() -> Report:
        from attncheck.hunt import hunting

        for code in given["probes"]:
            _log(f"running the code of {code}")
        with _progress_line(given["quiet"]) as told:
            request = hunting.HuntRequest(
                operators=given["operator"],
                minutes=given["minutes"],
                with_packages=given["with_"],
                probe_files=given["probes"],
                engine=given["engine"] or hunting.default_engine(),
                seed=given["seed"],
                case_timeout=_positive("--case-timeout", given["case_timeout"])
                or hunting.CASE_SECONDS,
                save=given["save"],
                examples=given["examples"],
                known=given["known"],
                command="attncheck " + " ".join(sys.argv[1:]),
            )
            hunted = hunting.hunt(request, _log, told)
        summary = hunting.render(hunted)
        click.echo(summary, nl=False, err=any(path is None for _, path in outputs))
        _write(hunted.report, outputs, given["verbose"])
        if hunted.stopped:
            ctx.exit(EXIT_INTERRUPTED)
        if not hunted.tally.run or hunted.tally.unknown:
            ctx.exit(EXIT_INCONCLUSIVE if not hunted.finds else EXIT_FINDINGS)
        return hunted.report

    ctx.exit(exit_code(_guarded(run, given["verbose"], ctx), given["fail_on"]))


@main.command()
@click.option(
    "--from",
    "from_",
    type=click.Path(path_type=Path),
    metavar="REPORT",
    help="A JSON report of a scan (default: scan first).",
)
@_many("--kernel-op", metavar="GLOB", help="Kernel ops to mend, e.g. 'flash_attn.*' (repeatable).")
@_many("--operator", "-k", metavar="GLOB", help="Operators to scan, where no report is given.")
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
@_many("--mesh", metavar="SHAPE", help="Device mesh to scan first (repeatable).")
@click.option("--device", metavar="NAME", help="cpu (default) or cuda.")
@_many("--with", "with_", metavar="PACKAGE", help="Provision it first, as scan does (repeatable).")
@_many("--probe", "probes", metavar="FILE", help="A probe file of your own. Its code is run.")
@_many("--import", "imports", metavar="MODULE", help="Import it, as scan does. Its code is run.")
@click.option("--seed", type=int, help="Seed of all values (default: fresh, or the report's).")
@_many(
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
    options = _merge(
        {k: configured[k] for k in ("with", "probes", "imports") if k in configured}, given
    )
    target = output.target(options["write"], options["diff"], options["force"])
    outputs = _parse_outputs(options["output"])

    def run() -> Fixed:
        for code in (*options["probes"], *options["imports"]):
            _log(f"running the code of {code}")
        with _progress(options["quiet"]) as show:
            return fixing.fix(_fix_request(options, target), _log, show)

    fixed = _guarded(run, options["verbose"], ctx)
    for line in telling.summary(fixed):
        click.echo(line, err=True)
    click.echo(target.put(fixed.text), nl=False)
    if target.write and fixed.text:
        _log(f"wrote {target.file}")
    _write(fixed.report, outputs, options["verbose"])
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
            meshes=_meshes(options["mesh"], None, parse_mesh),
            device=_device(options["device"] or "cpu"),
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


def _parse_outputs(texts: Sequence[str]) -> list[tuple[Any, Path | None]]:
    """Loads every format before anything is run: a typo must not cost a scan."""
    from attncheck import plugins

    out = []
    for text in texts:
        name, _, path = text.partition(":")
        target = Path(path) if path else None
        if target is not None and not target.parent.is_dir():
            raise UserError(f"Cannot write {path}: the folder {target.parent} does not exist.")
        out.append((plugins.load_format(name), target))
    return out


def _write(report: Report, outputs: Sequence[tuple[Any, Path | None]], verbose: bool) -> None:
    from attncheck.view import RenderOptions

    for form, path in outputs:
        to_terminal = path is None and sys.stdout.isatty()
        encoding = (sys.stdout.encoding or "ascii").lower()
        options = RenderOptions(
            color=to_terminal and not os.environ.get("NO_COLOR"),
            width=shutil.get_terminal_size((100, 24)).columns if path is None else 120,
            unicode=path is not None or "utf" in encoding,
            verbose=verbose,
        )
        text = form.render(report, options=options)
        if path is None:
            click.echo(text, nl=not text.endswith("\n"), color=options.color)
            continue
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"Cannot write {path}: {error.strerror}.") from None
        _log(f"wrote {path}")


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--format", "format_", default="table", metavar="NAME", help="table, markdown or json."
)
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write to this file.")
@click.option("-v", "--verbose", is_flag=True, help="List every case.")
def report(file: Path, format_: str, output: Path | None, verbose: bool) -> None:
    """Render a saved JSON report again, in another format. Runs nothing, needs no torch."""
    from attncheck import plugins
    from attncheck.model import read_report

    form = plugins.load_format(format_)
    _write(read_report(file), [(form, output)], verbose)


# --- explaining ----------------------------------------------------------------------------------


@main.command("list")
@click.option("--cases", is_flag=True, help="List the cases that a scan at --level would run.")
@click.option(
    "--kernel-ops",
    is_flag=True,
    help="List every attention-like op registered in the process, and what DTensor has for it.",
)
@click.option("--level", default="default", metavar="NAME", help="quick, default or full.")
@_many("--probe", "probes", metavar="FILE", help="A probe file of your own. Its code is run.")
@_many("--import", "imports", metavar="MODULE", help="Import it first (with --kernel-ops).")
@_many(
    "--with",
    "with_",
    metavar="PACKAGE",
    help="Provision it first, as scan does (with --kernel-ops).",
)
def list_(cases: bool, kernel_ops: bool, level: str, **given: tuple[str, ...]) -> None:
    """List probes, operators, settings, placements, rules and formats."""
    from attncheck import config, listing

    options = _merge(config.load(Path.cwd()), given)
    if kernel_ops:
        text = listing.kernel_ops(options["probes"], options["imports"], options["with"], _log)
    elif cases:
        text = listing.cases(level, options["probes"])
    else:
        text = listing.everything(options["probes"])
    click.echo(text, nl=False)


@main.group()
def new() -> None:
    """Write a file to start from."""


@new.command("probe")
@click.argument("name")
@click.option(
    "--folder", type=click.Path(path_type=Path), default=Path(), help="Where (default: here)."
)
def new_probe(name: str, folder: Path) -> None:
    """Write NAME.py, a documented probe that runs as it is, to be changed into your own."""
    from attncheck import scaffold

    path = scaffold.new_probe(name, folder)
    click.echo(f"Wrote {path}. It runs as it is:\n\n  attncheck scan --probe {path} -k '{name}*'\n")


@main.command()
def env() -> None:
    """Show the versions that matter, for pasting into an issue. Works without torch."""
    from attncheck import environment

    click.echo(environment.render(environment.describe()), nl=False)


@main.command()
@click.argument("rule")
def explain(rule: str) -> None:
    """Explain a rule: what it does, why it matters, an example, what to do."""
    from attncheck import rules

    found = rules.find(rule)
    click.echo(
        f"# {found.id} {found.name}\n\nSeverity: {found.severity.value}. Since {found.since}.\n"
    )
    click.echo(found.docs.strip())
