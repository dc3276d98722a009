"""Foreign text in GitHub's Markdown: what is shown of it is the text, and nothing of it is markup.

Everything that comes from outside goes through `prose`, `code`, `block` or `details`, so that a case id or a
message can neither break a table nor notify somebody.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

# GitHub refuses an issue of more than 65,536 characters.
ISSUE_LENGTH = 65_000

# What means something to Markdown anywhere in a line; an underscore does not inside of a word.
_SPECIAL = re.compile(r"[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_PLAIN_CODE = re.compile(r"[\w .,:;=+()\[\]/'@*#?!&^%~-]+", re.ASCII)
_SPAN = re.compile(r"(?<!`)`([\w.:()\[\]=,-]+)`(?!`)", re.ASCII)
_ZERO_WIDTH_SPACE = "&#8203;"


def prose(text: str) -> str:
    """Foreign text on one line that Markdown shows as it is, in a paragraph or in a table.

    Single words in backticks, as our own rules write names, stay in code font.
    """
    parts = _SPAN.split(" ".join(text.split()))
    # The odd parts are what stood between two lone backticks.
    out = "".join(_escape(p) if i % 2 == 0 else f"`{p}`" for i, p in enumerate(parts))
    # What begins a list, a heading or a rule at the start of a line.
    return re.sub(r"^([#+=-]|\d+(?=[.)]\s))", _escape_start, out)


def _escape(text: str) -> str:
    return _mute(_SPECIAL.sub(r"\\\g<0>", html.escape(text, quote=False)))


def _escape_start(match: re.Match[str]) -> str:
    # Only punctuation can be escaped: a number makes no list where something precedes it.
    return f"&#8203;{match[0]}" if match[0][0].isdigit() else f"\\{match[0]}"


def _mute(escaped: str) -> str:
    # GitHub looks for @name and #123 after resolving entities: only a character between helps.
    escaped = re.sub(r"@(?=\w)", f"@{_ZERO_WIDTH_SPACE}", escaped)
    return re.sub(r"(?<!&)#(?=\d)", f"#{_ZERO_WIDTH_SPACE}", escaped)


def code(text: str) -> str:
    """A name in code font: a code span where that is safe, else escaped HTML."""
    text = " ".join(text.split())
    if not text:
        return ""
    return f"`{text}`" if _PLAIN_CODE.fullmatch(text) else f"<code>{_escape(text)}</code>"


def block(text: str, language: str = "") -> str:
    """A fenced block, behind a fence longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def details(summary: str, body: str) -> str:
    """A fold. Its first line is HTML, not Markdown; the blank lines let Markdown read the body."""
    text = _mute(html.escape(" ".join(summary.split()), quote=False))
    return f"<details><summary>{text}</summary>\n\n{body}\n\n</details>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    from tabulate import tabulate

    return tabulate(list(rows), header, tablefmt="github", disable_numparse=True)
