"""Commands that run nothing: saved reports and what can be said of them."""

from __future__ import annotations

from pathlib import Path

import click

from attncheck.commands.common import write


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--format", "format_", default="table", metavar="NAME", help="table, markdown or json."
)
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write to this file.")
@click.option("-v", "--verbose", is_flag=True, help="List every case.")
def report(file: Path, format_: str, output: Path | None, verbose: bool) -> None:
    """Render a saved JSON report again, in another format. Runs nothing, needs no torch."""
    from attncheck import plugins
    from attncheck.saved import read_report

    form = plugins.load_format(format_)
    write(read_report(file), [(form, output)], verbose)
