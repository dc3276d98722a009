"""`attncheck audit`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attncheck.commands.common import (
    device,
    log,
    many,
    parse_outputs,
    positive,
    progress,
    write,
)
from attncheck.commands.scan import (
    CASE_TIMEOUT,
    FAIL_AT,
    FIX,
    IGNORE,
    OUTPUT,
    PROBE,
    QUIET,
    SEED,
    SELECT,
    WITH,
    fix_files,
    scan_and_report,
)
from attncheck.errors import UserError

if TYPE_CHECKING:
    from attncheck.model import Report
    from attncheck.runner.scan import ScanRequest


@click.command()
@click.argument("build", metavar="BUILD", nargs=-1, type=click.UNPROCESSED)
@click.option("--mesh", metavar="SHAPE", help="The model's device mesh, e.g. tp=8 or dp=2,tp=4.")
@click.option(
    "--inputs",
    metavar="MODULE:FUNCTION",
    help="inputs(mesh) -> a tuple or dict of tensors (default: `inputs` beside BUILD).",
)
@click.option(
    "--numeric",
    is_flag=True,
    help="Also: is the parallel model equal to build(None), with real numbers on real ranks, forward and "
    "backward? Give it a build of reduced size.",
)
@click.option(
    "--model",
    metavar="NAME",
    help="Instead of a build function, a model that attncheck knows, e.g. wan2.1-t2v-14b (`attncheck list "
    "--models`), split by --tp, --cp and --dp.",
)
@click.option("--tp", type=int, metavar="N", help="With --model: ranks of tensor parallelism.")
@click.option("--cp", type=int, metavar="N", help="With --model: ranks that split the sequence.")
@click.option("--dp", type=int, metavar="N", help="With --model: ranks that split the batch.")
@many("--operator", "-k", metavar="GLOB", help="With --model: operators to run (repeatable).")
@click.option(
    "--script",
    metavar="FILE",
    help="Watch a real run instead: run this script, its arguments after `--`, and report its first steps.",
)
@click.option(
    "--steps",
    type=int,
    metavar="N",
    help="With --script: of the first N steps the first and the last are recorded (default 10).",
)
@click.option("--device", metavar="NAME", help="Where the calls are run: cpu (default) or cuda.")
@WITH
@FIX
@PROBE
@SEED
@click.option(
    "--timeout", type=float, metavar="SECONDS", help="Deadline of the pass, and of --numeric (900)."
)
@CASE_TIMEOUT
@SELECT
@IGNORE
@FAIL_AT
@OUTPUT
@QUIET
@click.option(
    "-v", "--verbose", is_flag=True, help="List every op; tracebacks for internal errors."
)
@click.pass_context
def audit(ctx: click.Context, /, **given: Any) -> None:
    """Look at a whole model and its parallel plan before it is deployed: no GPU, no weights.

    BUILD names a function of yours, package.module:function or file.py:function; build(mesh) returns the
    model, already parallelised. It is RUN, on fake tensors and a process group that connects nobody; then
    each distinct attention call is run with real numbers at a reduced size.

    A real run: torchrun --nproc-per-node 2 -m attncheck audit --script train.py -- --its --arguments
    """
    _refuse_idle(given)
    if given["script"]:
        run_script(ctx, given)
    else:
        scan_and_report(ctx, given, run_audit)


# Options that mean something with another one alone, by that one ('' for a build function).
_BELONG = {
    "model": ("tp", "cp", "dp", "operator"),
    "script": ("steps",),
    "": ("mesh", "inputs", "numeric", "timeout"),
}


def _refuse_idle(given: dict[str, Any]) -> None:
    """Raises UserError for an option that would be ignored."""
    kind = next((name for name in ("script", "model") if given[name]), "")
    for owner, names in _BELONG.items():
        for name in names:
            if owner != kind and given[name]:
                with_ = f"--{owner}" if owner else "a build function"
                raise UserError(f"--{name} goes with {with_}, which this command does not have.")


def run_audit(options: dict[str, Any]) -> Report:
    """An audit with the options of the command line over those of pyproject.toml. Raises UserError."""
    from attncheck.audit.auditing import TIMEOUT_SECONDS, AuditRequest
    from attncheck.audit.auditing import audit as run
    from attncheck.plan import parse_mesh

    if options["model"]:
        return run_preset(options)
    if len(options["build"]) != 1:
        given = f"found {len(options['build'])}" if options["build"] else "found none"
        raise UserError(f"An audit takes one build function, package.module:function; {given}.")
    mesh = options["mesh"]
    if isinstance(mesh, (list, tuple)):  # pyproject.toml's, of scans
        mesh = mesh[0] if mesh else None
    if not mesh:
        raise UserError("An audit needs the model's mesh, e.g. --mesh tp=8.")
    with progress(options["quiet"]) as show:
        request = AuditRequest(
            target=options["build"][0],
            mesh=parse_mesh(mesh),
            inputs=options["inputs"] or "",
            numeric=options["numeric"],
            timeout=positive("--timeout", options["timeout"]) or TIMEOUT_SECONDS,
            scan=scan_request(options),
        )
        return run(request, log, show)


def scan_request(options: dict[str, Any]) -> ScanRequest:
    """How attention calls are run."""
    from attncheck.runner.scan import ScanRequest

    fixes = fix_files(options["fixes"])
    for code in (*options["probes"], *fixes):
        log(f"running the code of {code}")
    return ScanRequest(
        device=device(options["device"] or "cpu"),
        seed=options["seed"],
        case_timeout=positive("--case-timeout", options["case-timeout"]),
        with_packages=options["with"],
        probe_files=options["probes"],
        select_rules=options["select"],
        ignore_rules=options["ignore"],
        command="attncheck " + " ".join(sys.argv[1:]),
        fixes=fixes,
    )


def run_preset(options: dict[str, Any]) -> Report:
    """An audit of a known model."""
    from attncheck.audit.presets import PresetRequest, audit_preset

    if options["build"]:
        raise UserError(
            f"--model {options['model']} takes no build function; choose one of the two."
        )
    mesh = {}
    for axis in ("dp", "tp", "cp"):
        ranks = options[axis]
        if ranks is not None and ranks < 1:
            raise UserError(f"--{axis} is {ranks}: expected at least 1 rank.")
        if ranks is not None:
            mesh[axis] = ranks
    if not any(ranks > 1 for ranks in mesh.values()):
        raise UserError("--model needs a degree of more than 1 rank, e.g. --tp 8.")
    with progress(options["quiet"]) as show:
        request = PresetRequest(options["model"], mesh, options["operator"], scan_request(options))
        return audit_preset(request, log, show)


# --- a real run ----------------------------------------------------------------------------------


def writer(outputs: Sequence[str], verbose: bool = False) -> Callable[[Report], None]:
    """Writes a report in each of these formats; that of another rank than 0 to a file of its own. Raises
    UserError for a format that there is not."""
    parsed = parse_outputs(outputs)

    def put(report: Report) -> None:
        rank = int(report.environment.get("rank", 0))
        own = [
            (form, path.with_name(f"{path.name}.rank{rank}") if rank and path else path)
            for form, path in parsed
        ]
        write(report, own, verbose)

    return put


def run_script(ctx: click.Context, given: dict[str, Any]) -> None:
    """Runs the script as `python FILE ARGUMENTS` would, in this process, watched. What it raises goes on."""
    import runpy

    from attncheck import environment
    from attncheck.audit import observing, put_in_place
    from attncheck.runner.scan import ScanRequest, provisioned

    script = Path(given["script"])
    if not script.is_file():
        raise UserError(f"--script {script} does not exist; expected a Python file.")
    steps = given["steps"] if given["steps"] is not None else observing.STEPS
    if steps < 1:
        raise UserError(f"--steps is {steps}: expected at least 1.")
    fixes = fix_files(given["fixes"])
    write = writer(given["output"] or ("table",), given["verbose"])
    kind = given["device"] or ("cpu" if environment.gpu() == "none" else "cuda")
    path = provisioned(ScanRequest(with_packages=given["with_"]), log)
    put_in_place.put_in_place(path, (), fixes, device(kind))
    command = "attncheck " + " ".join(sys.argv[1:])
    sys.argv = [str(script), *given["build"]]
    sys.path.insert(0, str(script.resolve().parent))
    with observing.Observation(steps, write, script.name, command):
        runpy.run_path(str(script), run_name="__main__")
