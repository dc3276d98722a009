"""`attncheck gate` and `attncheck baseline`: what is new since a baseline, and the baseline itself."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attncheck.commands.common import (
    FAIL_ON,
    guarded,
    log,
    many,
    merged,
    parse_outputs,
    write,
)
from attncheck.commands.scan import run_scan, scan_options
from attncheck.errors import UserError, unknown

if TYPE_CHECKING:
    from attncheck.baseline import Baseline, Rewritten
    from attncheck.compare import Policy
    from attncheck.model import Report

# Options of a scan that say what becomes of its report, and mean the same for a saved one.
_ABOUT_THE_REPORT = ("fail_on", "output", "quiet", "verbose")

_from_option = click.option(
    "--from",
    "from_",
    type=click.Path(path_type=Path),
    metavar="REPORT",
    help="A JSON report (of scan or merge); runs nothing, and needs no torch. Default: scan now.",
)
_baseline_option = click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The baseline (default attncheck-baseline.json).",
)


@click.command()
@_baseline_option
@_from_option
@many(
    "--allow",
    metavar="KIND",
    help="Let this kind of change pass: new, worse, drifted or costlier (repeatable).",
)
@click.option(
    "--strict",
    is_flag=True,
    default=None,
    help="Fail also for entries of the baseline that were fixed, or are no longer run.",
)
@scan_options
@click.pass_context
def gate(ctx: click.Context, /, **given: Any) -> None:
    """Scan, hold the result against the baseline, and fail for what is new: for CI, on version bumps.

    Takes the options of scan, and fails for new findings (at or above --fail-on), for cases that are worse,
    have drifted, or send more bytes. What the baseline knows passes.

    Exit codes: 0 nothing is worse, 1 something is, 2 usage or internal error, 3 known cases could not be run.
    """
    from attncheck import baseline as baselines

    options, policy = _options(given)
    outputs = parse_outputs(options["output"] or ("table",))
    file = _file(options)
    known = _selected(baselines.read(file), given)
    report = _report(options, given, known, ctx)
    comparison = baselines.gate(
        known, report, policy, datetime.date.today(), str(file), _incomplete(report)
    )
    write(dataclasses.replace(report, comparison=comparison), outputs, options["verbose"])
    ctx.exit(comparison.exit_code)


def _options(given: dict[str, Any]) -> tuple[dict[str, Any], Policy]:
    """Everything that can be wrong without a scan is said before it."""
    from attncheck import compare, config
    from attncheck.model import Severity

    if given["shard"]:
        raise UserError(
            "--shard is for scan: join the reports with `attncheck merge`, and give the result to --from."
        )
    configured = config.load(Path.cwd())
    options = merged(configured, given)
    options["waivers"] = configured.get("waivers", ())
    fail_on = options["fail-on"] or "error"
    if fail_on not in FAIL_ON:
        raise unknown("severity", fail_on, FAIL_ON)
    policy = compare.Policy(
        allow=compare.kinds(options.get("allow") or ()),
        fail_on=None if fail_on == "never" else Severity(fail_on),
        strict=bool(options.get("strict")),
    )
    return options, policy


def _file(options: dict[str, Any]) -> Path:
    from attncheck.baseline import DEFAULT_FILE

    return Path(options["baseline"] or DEFAULT_FILE)


def _report(
    options: dict[str, Any], given: dict[str, Any], known: Baseline, ctx: click.Context
) -> Report:
    """A saved report, or that of a scan, less what is ignored by configuration.

    The scan takes the values of the baseline, so that numbers differ by what was changed alone.
    """
    from attncheck import merging, saved, waivers

    if options["from"] is not None:
        beside = ("from_", "baseline", "allow", "strict", *_ABOUT_THE_REPORT)
        for name, value in given.items():
            if name not in beside and value not in (None, (), False):
                option = f"--{name.rstrip('_').replace('_', '-')}"
                raise UserError(
                    f"{option} is an option of a scan, and --from takes a report of one: expected one of the "
                    "two."
                )
        report = saved.read_report(options["from"])
        if "ignored" in report.environment:
            # What its scan ignored is ignored here by today's date, and by configuration where there is one.
            where = str(options["from"])
            recorded = waivers.recorded(report.environment, where)
            report = merging.judged_again(report, where)
            return waivers.apply(report, options["waivers"] or recorded, datetime.date.today())
    else:
        seed = options["seed"] if options["seed"] is not None else known.seed
        report = guarded(lambda: run_scan({**options, "seed": seed}), options["verbose"], ctx)
    return waivers.apply(report, options["waivers"], datetime.date.today())


def _incomplete(report: Report) -> str:
    """What of its scan a report lacks, in words."""
    from attncheck import merging

    if missing := merging.missing_shards(report.environment):
        return f"shard {', '.join(missing)} is missing"
    return "it is one shard of a scan" if "shard" in report.environment else ""


# The fields of a baseline's entry that an option of the command line selects by.
_SELECTING = ("operator", "setting", "route", "placement", "direction")


def _selected(known: Baseline, given: dict[str, Any]) -> Baseline:
    """What of a baseline a scan of these operators, settings ... could meet: the rest was not asked for."""
    from attncheck.plan import matches

    chosen = {name: given[name] for name in _SELECTING if given.get(name)}
    kept = {
        key: one
        for key, one in known.known.items()
        if all(matches(getattr(key, name), globs) for name, globs in chosen.items())
    }
    return dataclasses.replace(known, known=kept)


# --- the baseline --------------------------------------------------------------------------------


@click.group()
def baseline() -> None:
    """The file of what is known, and which findings you live with: write, prune, show."""


def _rewriting(command: Callable[..., Any]) -> Callable[..., Any]:
    return _baseline_option(_from_option(scan_options(command)))


@baseline.command("write")
@_rewriting
@click.pass_context
def write_baseline(ctx: click.Context, /, **given: Any) -> None:
    """Write down what a scan finds, so that a gate fails only for what comes after.

    An existing file is brought up to date: every `reason` and `until` stays with its entry, numbers that
    differ by no more than noise stay as they are, and so do cases that this scan did not run.
    """
    from attncheck import baseline as baselines

    options, _ = _options(given)
    file = _file(options)
    old = baselines.read(file) if file.exists() else baselines.Baseline({})
    _check_writable(file)
    report = _report(options, given, old, ctx)
    rewritten = baselines.updated(old, report)
    _put(file, rewritten)
    log(
        f"wrote {file}: {rewritten.baseline.entries} entries; {rewritten.added} cases added, "
        f"{rewritten.changed} changed"
    )
    if rewritten.kept:
        log(
            f"{rewritten.kept} cases that this scan does not have are kept: `attncheck baseline prune` "
            "removes them"
        )
    if rewritten.left_out:
        log(f"{rewritten.left_out} cases have no verdict (their check failed), and are left out")


@baseline.command()
@_rewriting
@click.pass_context
def prune(ctx: click.Context, /, **given: Any) -> None:
    """Remove the entries that are stale: findings that are gone, and cases that are no longer run."""
    from attncheck import baseline as baselines

    options, _ = _options(given)
    file = _file(options)
    old = baselines.read(file)
    _check_writable(file)
    chosen = _selected(old, given)
    beside = {key: one for key, one in old.known.items() if key not in chosen.known}
    report = _report(options, given, old, ctx)
    if lacking := _incomplete(report):
        raise UserError(
            f"The report is not whole ({lacking}): expected one of all cases, for what it lacks would be "
            "pruned."
        )
    rewritten = baselines.pruned(chosen, report)
    pruned = rewritten.baseline
    rewritten = dataclasses.replace(
        rewritten, baseline=dataclasses.replace(pruned, known={**beside, **pruned.known})
    )
    if not rewritten.removed:
        log(f"{file} has no stale entry, and stays as it is")
        return
    _put(file, rewritten)
    log(f"wrote {file}: {rewritten.removed} stale entries removed")


@baseline.command()
@_baseline_option
def show(**given: Any) -> None:
    """Show what a baseline holds: entries by rule and status, and what is accepted until when."""
    from attncheck import baseline as baselines
    from attncheck import config

    file = _file(merged(config.load(Path.cwd()), given))
    click.echo(baselines.summary(baselines.read(file), datetime.date.today()), nl=False)


def _check_writable(file: Path) -> None:
    """Before a scan is run for it."""
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"Cannot write {file}: expected a file in a folder that exists.")


def _put(file: Path, rewritten: Rewritten) -> None:
    from attncheck import baseline as baselines
    from attncheck.files import write_text

    write_text(file, baselines.dump(rewritten.baseline))
