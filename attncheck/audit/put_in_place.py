"""What must be there before the user's modules are imported: packages, stand-ins and fixes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from attncheck import plugins
from attncheck.audit.lines import add_installed
from attncheck.runner.available import Availability


def put_in_place(
    path: Sequence[str], probe_files: Sequence[str], fixes: Sequence[str], device: str = "cpu"
) -> None:
    """`path`: folders of provisioned packages; `probe_files`: whose operators get stand-ins for what is
    compiled, where their packages are there (none: those of the built-in probes)."""
    sys.path[:0] = path
    for folder in path:
        add_installed(folder)
    files = [Path(file) for file in probe_files] or list(plugins.load_probes([]).files)
    availability = Availability(device)
    for file in files:
        for operator in plugins.load_probe_file(file).operators:
            if operator.packages:
                availability.refusal(operator)
    # Before the user's modules take functions that a fix stands in front of.
    for fix in fixes:
        plugins.register_fix(Path(fix))
