"""The report itself, or the matrix, as JSON: what `attncheck report` reads back and every other tool can.

Their schemas ship with the package: attncheck/schema/report.schema.json and matrix.schema.json.
"""

from __future__ import annotations

import json
import re

from attncheck.cells import Matrix, dump_matrix
from attncheck.model import Report, dump_report
from attncheck.view import RenderOptions

NAME = "json"
SUMMARY = "everything, for other tools and for rendering again later"

# Half a surrogate pair (some kernel printed broken UTF-8) is a legal string but no legal UTF-8.
_UNPRINTABLE = re.compile("[\ud800-\udfff]")
_NOT_ASCII = re.compile("[^\x00-\x7f]")


def render(report: Report, *, options: RenderOptions) -> str:
    """JSON text that the output's encoding can carry; nothing of the report is changed or cut."""
    return _printable(dump_report(report), options)


def render_matrix(matrix: Matrix, *, options: RenderOptions) -> str:
    """Likewise of a matrix."""
    return _printable(dump_matrix(matrix), options)


def _printable(text: str, options: RenderOptions) -> str:
    unprintable = _UNPRINTABLE if options.unicode else _NOT_ASCII
    # Outside of strings JSON is ASCII, so an escape always stands inside one.
    return unprintable.sub(lambda match: json.dumps(match[0])[1:-1], text)
