"""The report as one web page: the matrix as a heat map, with every case behind its cells.

The page is a file of its own: style and script stand in it (reports/_html/), and its policy forbids it
every request and every other script. Without JavaScript it is plain tables. What comes of a report is
data: the template escapes all text, and the script makes text nodes of it, never markup.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from markupsafe import Markup, escape

from attncheck import cellsview
from attncheck.casesview import CasesView, CaseView, Facet
from attncheck.casesview import build as build_cases
from attncheck.cells import Matrix, uncollected
from attncheck.cellsview import MatrixView
from attncheck.changes import word
from attncheck.model import UNPLANNED, Report, Status
from attncheck.text import count, listing
from attncheck.view import (
    EXIT_CODES,
    STYLES,
    Cell,
    FindingView,
    RemedyView,
    RenderOptions,
    View,
    build,
)

NAME = "html"
SUMMARY = "one page for a browser: heat map, search, every case; no network"

FOLDER = Path(__file__).parent / "_html"
# One after the other, in one scope.
SCRIPTS = ("dom.js", "data.js", "matrix.js", "drawing.js", "detail.js", "panel.js", "page.js")

_NAME = re.compile(r"(?<!`)`([^`\n]{1,120})`(?!`)")
# What a text of JSON must not hold within a <script> element: the end of it, or the start of another.
_IN_SCRIPT = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}

_ALWAYS = {f.name for f in dataclasses.fields(CaseView) if f.default is dataclasses.MISSING}


def render(report: Report, *, options: RenderOptions) -> str:
    """HTML. `options.width`, `options.color` and `options.verbose` mean nothing to it."""
    view = build(report)
    text = page(view, build_cases(report, view))
    return text if options.unicode else text.encode("ascii", "xmlcharrefreplace").decode("ascii")


def render_matrix(matrix: Matrix, *, options: RenderOptions) -> str:
    """The same of a matrix: versions across, and every case of every version."""
    view = cellsview.build(matrix)
    with uncollected():
        text = matrix_page(view, cellsview.cases(matrix, view))
    return text if options.unicode else text.encode("ascii", "xmlcharrefreplace").decode("ascii")


def page(view: View, cases: CasesView) -> str:
    """The page that shows a view and its cases."""
    rules = [f"{finding.rule} {finding.name}" for finding in view.findings]
    document = {"placements": view.placements, "rules": rules}
    return _rendered(
        "page.html",
        _data(cases, document),
        view=view,
        cases=cases,
        by_operator=_by_operator(cases),
        change_word=word,
        exit_codes=EXIT_CODES,
    )


def matrix_page(view: MatrixView, cases: CasesView) -> str:
    """The page that shows a matrix and its cases."""
    placements = placements_of_cases(cases)
    versions = tuple(dict.fromkeys(case.version for case in cases.cases))
    preset = {"placement": view.placement} if len(placements) > 1 else {}
    document = {
        "placements": placements,
        "rules": [f"{spread.finding.rule} {spread.finding.name}" for spread in view.findings],
        "pivots": [
            {"name": "version", "values": versions},
            {"name": "placement", "values": placements},
        ],
        "preset": preset,
    }
    if len(placements) > 1:
        cases = dataclasses.replace(cases, facets=(Facet("placement", placements), *cases.facets))
    return _rendered("matrix.html", _data(cases, document, share=True), view=view, cases=cases)


def placements_of_cases(cases: CasesView) -> tuple[str, ...]:
    """In the order in which they come."""
    return tuple(dict.fromkeys(c.placement for c in cases.cases if c.placement != UNPLANNED))


def _rendered(template: str, data: str, **values: Any) -> str:
    style, script = _style(), _script()
    return _template(template).render(
        styles={status: STYLES[status] for status in Status},
        policy=_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        data=Markup(data),
        words=cell_words,
        in_order=remedies_in_order,
        count=count,
        listing=listing,
        **values,
    )


def cell_words(cell: Cell) -> str:
    """What a cell says to whoever does not see it."""
    status = STYLES[cell.status].word
    return f"{status}, {cell.ok} of {cell.total} right" if cell.total else status


def remedies_in_order(finding: FindingView) -> list[RemedyView]:
    """The one to try first, then the others."""
    first = finding.first_remedy
    return [r for _, r in sorted(enumerate(finding.remedies), key=lambda r: r[0] != first)]


def prose(text: str) -> Markup:
    """Text in which names between backticks, as rules write them, stand in code font."""
    parts = (
        Markup("<code>{}</code>").format(part) if i % 2 else escape(part)
        for i, part in enumerate(_NAME.split(text))
    )
    return Markup("").join(parts)


def _by_operator(cases: CasesView) -> dict[str, list[CaseView]]:
    out: dict[str, list[CaseView]] = {}
    for case in cases.cases:
        out.setdefault(case.operator, []).append(case)
    return out


# What of a case is the same in every version that it is run with.
_SAME = (
    "id", "operator", "setting", "placement", "direction", "mesh", "dtype", "function", "sizes", "placements",
    "drawings",
)  # fmt: skip


def _data(cases: CasesView, document: Mapping[str, Any], *, share: bool = False) -> str:
    """What the script shows, as JSON that can stand in a <script> element. `share`: many cases are the same
    but for the version."""
    shown = msgspec.to_builtins(cases)
    # Most of what could be said of a case is empty.
    told = [
        {name: value for name, value in case.items() if value or name in _ALWAYS}
        for case in shown["cases"]
    ]
    whole = {
        **shown,
        "cases": told,
        **document,
        "statuses": [
            {
                "status": status.value,
                "symbol": STYLES[status].symbol,
                "word": STYLES[status].word,
                "meaning": STYLES[status].meaning,
                "ran": status.ran,
                "usable": status.usable,
            }
            for status in Status
        ],
    }
    if share:
        whole |= _shared(told)
    text = json.dumps(whole, separators=(",", ":"), allow_nan=False)
    for character, escaped in _IN_SCRIPT.items():
        text = text.replace(character, escaped)
    return text


def _shared(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Cases without what others have as well, and a list of that."""
    places: dict[str, int] = {}
    shared: list[Mapping[str, Any]] = []
    own: list[Mapping[str, Any]] = []
    for case in cases:
        same = {name: case[name] for name in _SAME if name in case}
        key = json.dumps(same)
        if key not in places:
            places[key] = len(shared)
            shared.append(same)
        rest = {name: value for name, value in case.items() if name not in _SAME}
        own.append({"at": places[key], **rest})
    return {"shared": shared, "cases": own}


# --- what the page is made of --------------------------------------------------------------------


@functools.cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FileSystemLoader(FOLDER),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = prose
    return environment.get_template(name)


def _style() -> str:
    return (FOLDER / "page.css").read_text(encoding="utf-8")


def _script() -> str:
    parts = ((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return '(() => {\n"use strict";\n' + "\n".join(parts) + "})();\n"


def _policy(style: str, script: str) -> str:
    """Nothing from anywhere, and of styles and scripts none but these two."""
    return (
        f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
