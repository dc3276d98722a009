"""The page of an audit in a real Chromium: its tables, and the cases that no matrix shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sample_audit
from chromium import chromium
from playwright.sync_api import Browser, Page, expect

from attncheck import plugins
from attncheck.view import RenderOptions


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Iterator[Page]:
    """The page as a file. It may ask for nothing else, nor fail."""
    faults: list[str] = []
    file = tmp_path / "report.html"
    text = plugins.load_format("html").render(sample_audit.sample(), options=RenderOptions())
    file.write_text(text, encoding="utf-8")
    # axe is a script of its own, which the page's policy forbids.
    context = browser.new_context(bypass_csp=True)
    shown = context.new_page()
    shown.set_default_timeout(5000)
    shown.on("request", lambda r: r.url == file.as_uri() or faults.append(f"asked for {r.url}"))
    shown.on("pageerror", lambda error: faults.append(f"failed: {error}"))
    shown.on("console", lambda message: faults.append(f"console: {message.text}"))
    shown.goto(file.as_uri())
    yield shown
    context.close()
    assert faults == []


def test_each_table_is_reached_from_the_top(page: Page) -> None:
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#audit-1")).to_be_focused()
    for link in page.locator("nav a").all():
        link.click()
        target = page.locator(str(link.get_attribute("href")))
        expect(target).to_be_in_viewport()


def test_what_is_a_detail_is_unfolded(page: Page) -> None:
    section = page.locator("section", has=page.get_by_role("heading", name="Kernel ops"))
    expect(section.locator("table")).to_be_hidden()
    section.locator("summary").click()
    expect(section.locator("table")).to_be_visible()


def test_the_cases_of_attention_calls_are_listed(page: Page) -> None:
    page.get_by_role("button", name="List 6 cases").click()
    expect(page.locator("#panel")).to_be_visible()
    expect(page.locator(".case")).to_have_count(6)
    page.locator(".case").first.click()
    expect(page.locator(".detail")).to_have_count(1)


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_page(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_axe_finds_nothing_grave(page: Page) -> None:
    from axe_playwright_python.sync_playwright import Axe

    assert grave(Axe().run(page)) == []
    page.locator("#audit-1").evaluate("() => document.querySelector('details').open = true")
    assert grave(Axe().run(page)) == []


def grave(results: Any) -> list[str]:
    found = results.response["violations"]
    return [v["id"] for v in found if v["impact"] in ("serious", "critical")]
