"""Commands that tell what there is: probes, rules, versions; and the scaffold of a probe."""

from __future__ import annotations

from pathlib import Path

import click

from attncheck.commands.common import EXIT_FINDINGS, log, many, merged
from attncheck.errors import UserError


@click.command("list")
@click.option("--cases", is_flag=True, help="List the cases that a scan at --level would run.")
@click.option(
    "--kernel-ops",
    is_flag=True,
    help="List every attention-like op registered in the process, and what DTensor has for it.",
)
@click.option(
    "--models",
    is_flag=True,
    help="List the models that `attncheck audit --model` knows, by figures.",
)
@click.option("--level", default="default", metavar="NAME", help="quick, default or full.")
@many("--probe", "probes", metavar="FILE", help="A probe file of your own. Its code is run.")
@many("--import", "imports", metavar="MODULE", help="Import it first (with --kernel-ops).")
@many(
    "--with",
    "with_",
    metavar="PACKAGE",
    help="Provision it first, as scan does (with --kernel-ops).",
)
def list_(
    cases: bool, kernel_ops: bool, models: bool, level: str, **given: tuple[str, ...]
) -> None:
    """List probes, operators, settings, placements, rules and formats."""
    from attncheck import config, listing

    options = merged(config.load(Path.cwd()), given)
    if kernel_ops:
        text = listing.kernel_ops(options["probes"], options["imports"], options["with"], log)
    elif models:
        text = listing.models()
    elif cases:
        text = listing.cases(level, options["probes"])
    else:
        text = listing.everything(options["probes"])
    click.echo(text, nl=False)


@click.group()
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


@click.command()
@click.option("--check", is_flag=True, help="Say what does not go together, why, and what to do.")
@click.option("--json", "json_", is_flag=True, help="One JSON document, for issue templates.")
@click.pass_context
def env(ctx: click.Context, check: bool, json_: bool) -> None:
    """Show the versions that matter, for pasting into an issue. Works without torch.

    With --check, installed versions are held against what packages declare and what is known of them, and
    compiled extensions against the PyTorch that is here. Nothing is imported or loaded. Exit code 1 where
    something is wrong.
    """
    from attncheck import environment

    described = environment.describe()
    if not check and not json_:
        click.echo(environment.render(described), nl=False)
        return
    from attncheck import envcheck

    result = envcheck.check() if check else None
    if json_:
        click.echo(envcheck.as_json(described, result), nl=False)
    elif result is not None:
        click.echo(environment.render(described), nl=False)
        click.echo("\n" + envcheck.render(result), nl=False)
    if result is not None and result.failed:
        ctx.exit(EXIT_FINDINGS)


@click.command()
@click.argument("rule", required=False)
@click.option("--all", "all_", is_flag=True, help="Every rule, as one Markdown page.")
def explain(rule: str | None, all_: bool) -> None:
    """Explain a rule: what it does, why it matters, an example, what to do."""
    from attncheck import rules
    from attncheck.rules import page

    if all_ == (rule is not None):
        raise UserError("Expected the id or the name of one rule (ATN101), or --all.")
    text = page.catalogue(rules.RULES) if rule is None else page.explained(rules.find(rule))
    click.echo(text, nl=False)
