"""The rule catalogue: made of the rule files, complete, and where the rules' addresses point to."""

from __future__ import annotations

import re
from pathlib import Path

from attncheck import rules
from attncheck.rules import page

PUBLISHED = Path(__file__).parents[3] / "reports" / "published" / "rules.md"


def test_the_published_page_is_that_of_the_rule_files() -> None:
    """After a change: attncheck explain --all > reports/published/rules.md"""
    assert PUBLISHED.read_text(encoding="utf-8") == page.catalogue(rules.RULES)


def test_every_rule_is_in_a_family_under_its_anchor() -> None:
    text = page.catalogue(rules.RULES)
    headings = re.findall(r"^## (.+)$", text, re.M)
    assert headings == [f"{rule.id} {rule.name}" for rule in rules.RULES]
    slugs = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}  # as GitHub's
    assert {rule.docs_url.rpartition("#")[2] for rule in rules.RULES} == slugs
    assert set(re.findall(r"\]\(#(.+?)\)", text)) == slugs


def test_a_comment_in_code_is_no_heading() -> None:
    text = page.catalogue(rules.RULES)
    assert "\n# NotImplementedError: Operator" in text
    assert "\n### What to do" in text
    assert "\n## What" not in text
