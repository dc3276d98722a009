"""What commands share: option helpers, outputs, progress, exit codes."""

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

from attncheck.errors import UserError, unknown

if TYPE_CHECKING:
    from attncheck.cells import Matrix
    from attncheck.model import Case, Report


EXIT_CLEAN, EXIT_FINDINGS, EXIT_ERROR, EXIT_INCONCLUSIVE = 0, 1, 2, 3
EXIT_INTERRUPTED = 130
T = TypeVar("T")
FAIL_ON = ("error", "warning", "info", "never")


def many(*names: str, **kwargs: Any) -> Callable[[Any], Any]:
    return click.option(*names, multiple=True, **kwargs)


def merged(configured: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Options of the command line over those of pyproject.toml; names as in the configuration."""
    named = {k.rstrip("_").replace("_", "-"): v for k, v in given.items()}
    return {k: (v if v not in (None, ()) else configured.get(k, v)) for k, v in named.items()}


def meshes(
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


def repeats(count: int | None) -> int:
    if count is not None and count < 1:
        raise UserError(f"--repeats is {count}: expected at least 1 set of values.")
    return count or 1


def device(name: str) -> str:
    if name not in ("cpu", "cuda"):
        raise unknown("device", name, ("cpu", "cuda"))
    return name


def positive(option: str, value: float | None) -> float | None:
    if value is not None and value <= 0:
        raise UserError(f"{option} is {value:g}: expected a number of seconds above 0.")
    return value


def guarded(run: Callable[[], T], verbose: bool, ctx: click.Context) -> T:
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


def log(message: str) -> None:
    click.echo(f"attncheck: {message}", err=True)


@contextlib.contextmanager
def progress(quiet: bool) -> Any:
    """A counter on the terminal; silent in files and pipes."""
    with progress_line(quiet) as told:

        def show(done: int, total: int, case: Case | None) -> None:
            what = (
                f"{case.operator} {case.setting_name} {case.placement} {case.direction}"
                if case
                else ""
            )
            told(what, f"[{done}/{total}] ")

        yield show


@contextlib.contextmanager
def progress_line(quiet: bool) -> Any:
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
    from attncheck.model import UNJUDGED, Severity

    if fail_on != "never":
        limit = Severity(fail_on).rank
        if any(f.severity.rank <= limit for f in report.findings if f.rule not in UNJUDGED):
            return EXIT_FINDINGS
    return EXIT_INCONCLUSIVE if report.inconclusive else EXIT_CLEAN


def parse_outputs(texts: Sequence[str], *, matrix: bool = False) -> list[tuple[Any, Path | None]]:
    """Loads every format before anything is run: a typo must not cost a scan, nor a format that cannot show
    a `matrix` one of these."""
    from attncheck import plugins

    out = []
    for text in texts:
        name, _, path = text.partition(":")
        target = Path(path) if path else None
        if target is not None and not target.parent.is_dir():
            raise UserError(f"Cannot write {path}: the folder {target.parent} does not exist.")
        form = plugins.load_format(name)
        if matrix:
            form.check_matrices()
        out.append((form, target))
    return out


def write(
    report: Report | Matrix, outputs: Sequence[tuple[Any, Path | None]], verbose: bool
) -> None:
    """A report or a matrix in each of these formats, to its file or to stdout."""
    from attncheck.files import write_text
    from attncheck.model import Report
    from attncheck.view import RenderOptions

    for form, path in outputs:
        to_terminal = path is None and sys.stdout.isatty()
        encoding = (sys.stdout.encoding or "ascii").lower()
        options = RenderOptions(
            color=to_terminal and not os.environ.get("NO_COLOR"),
            width=shutil.get_terminal_size((100, 24)).columns if path is None else 120,
            unicode=path is not None or "utf" in encoding,
            verbose=verbose,
            folder=Path.cwd(),
        )
        render = form.render if isinstance(report, Report) else form.render_matrix
        text = render(report, options=options)
        if path is None:
            click.echo(text, nl=not text.endswith("\n"), color=options.color)
            continue
        write_text(path, text)
        log(f"wrote {path}")
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary and isinstance(report, Report):
        options = RenderOptions(folder=Path.cwd())
        for form in dict.fromkeys(form for form, _ in outputs):
            if (text := form.step_summary(report, options=options)) is not None:
                _append(Path(summary), text)


def _append(file: Path, text: str) -> None:
    """To the summary of a CI step, which others may write to as well. Without it the verdict still counts."""
    try:
        with file.open("a", encoding="utf-8") as summary:
            summary.write(text)
    except OSError as error:
        log(f"cannot write the step summary {file}: {error.strerror}")
