"""What is said of rules, made of the rule files alone: of one (`attncheck explain`), or of all on a page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from attncheck.rules.base import Rule

FAMILIES = {
    "ATN1": "Missing strategies",
    "ATN2": "Numbers",
    "ATN3": "Cost",
    "ATN4": "Environment",
    "ATN5": "Stability",
}


def explained(rule: Rule) -> str:
    """One rule, as Markdown."""
    return f"# {rule.id} {rule.name}\n\n{_facts(rule)}\n\n{rule.docs.strip()}\n"


def catalogue(rules: Iterable[Rule]) -> str:
    """All rules on one page, as Markdown: an index, and each rule under a heading with its id and name."""
    return "\n".join(_catalogue(tuple(rules)))


def _catalogue(rules: tuple[Rule, ...]) -> Iterator[str]:
    yield "# Rules"
    yield "\nWritten by `attncheck explain --all` from the rule files in `attncheck/rules/`; do not edit.\n"
    for family, title in FAMILIES.items():
        yield f"**{title}** ({family}xx)\n"
        for rule in rules:
            if rule.id.startswith(family):
                fragment = rule.docs_url.rpartition("#")[2]
                yield f"- [{rule.id} {rule.name}](#{fragment}), {rule.severity.value}"
        yield ""
    for rule in rules:
        yield f"## {rule.id} {rule.name}\n\n{_facts(rule)}\n"
        yield _deeper(rule.docs.strip()) + "\n"


def _facts(rule: Rule) -> str:
    return f"Severity: {rule.severity.value}. Since {rule.since}."


def _deeper(docs: str) -> str:
    """The same with each heading one level down; a comment in a block of code is none."""
    parts = re.split(r"(^```.*?^```)", docs, flags=re.M | re.S)
    return "".join(
        part if i % 2 else re.sub(r"^(#+ )", r"#\1", part, flags=re.M)
        for i, part in enumerate(parts)
    )
