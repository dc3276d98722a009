"""The command line: every command in its place. What they do stands in `attncheck.commands`."""

from __future__ import annotations

import sys
from typing import Any

import click

from attncheck import __version__
from attncheck.commands import audit, catalogue, common, fix, gate, hunt, matrix, reports, scan
from attncheck.errors import UserError


class Commands(click.Group):
    """Turns our errors into one sentence and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"attncheck: {error}", err=True)
            ctx.exit(common.EXIT_ERROR)
        except BrokenPipeError:
            # The reader of a pipe left (`| head`); that is no error of ours.
            sys.stderr.close()
            ctx.exit(common.EXIT_CLEAN)


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="attncheck")
def main() -> None:
    """Find out which attention operators really work on DTensors, before you deploy.

    Exit codes: 0 clean, 1 findings, 2 usage or internal error, 3 inconclusive.
    """


for command in (
    scan.scan,
    gate.gate,
    gate.baseline,
    hunt.hunt,
    fix.fix,
    audit.audit,
    matrix.matrix,
    matrix.cache_,
    reports.report,
    reports.diff,
    reports.merge,
    catalogue.list_,
    catalogue.new,
    catalogue.env,
    catalogue.explain,
):
    main.add_command(command)
