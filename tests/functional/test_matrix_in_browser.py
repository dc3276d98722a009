"""The page of a matrix in a real Chromium: versions across, or placements; what is behind a cell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sample_matrix
from chromium import chromium
from playwright.sync_api import Browser, Page, expect

from attncheck import plugins
from attncheck.cells import Matrix
from attncheck.view import RenderOptions


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


def opened(browser: Browser, matrix: Matrix, folder: Path) -> tuple[Page, list[str]]:
    """The page, and what it did that it may not: ask for anything, or fail."""
    file = folder / "matrix.html"
    html = plugins.load_format("html")
    file.write_text(html.render_matrix(matrix, options=RenderOptions()), encoding="utf-8")
    page, faults = browser.new_page(), []
    page.set_default_timeout(5000)
    page.on("request", lambda r: r.url == file.as_uri() or faults.append(f"asked for {r.url}"))
    page.on("pageerror", lambda error: faults.append(f"failed: {error}"))
    page.on("console", lambda message: faults.append(f"console: {message.text}"))
    page.on("dialog", lambda dialog: (faults.append("opened a dialog"), dialog.dismiss()))
    page.goto(file.as_uri())
    return page, faults


def test_versions_stand_across_and_placements_on_demand(browser: Browser, tmp_path: Path) -> None:
    page, faults = opened(browser, sample_matrix.sample(), tmp_path)
    columns = page.locator("#grid thead th")
    built = [cell.name for cell in sample_matrix.sample().cells if cell.report is not None]
    expect(columns).to_have_text(["operator", "direction", *built])
    # With heads, as at the beginning: one case of the hang, and none where flash-attn is too old.
    row = page.locator("#grid tbody tr", has_text="flash_attn_with_kvcache")
    expect(row.locator("button > span:first-child")).to_have_text(
        ["H 0/1", "\u00b7", "H 0/1", "\u00b7", "H 0/1"]
    )
    page.locator('[data-facet="placement"]').select_option(label="all")
    page.locator("#across").select_option(label="placement")
    expect(columns.nth(2)).to_have_text("replicate")
    page.get_by_role("button", name="Clear filters").wait_for(state="hidden")
    assert faults == []


def test_a_cell_shows_the_cases_of_its_version(browser: Browser, tmp_path: Path) -> None:
    page, faults = opened(browser, sample_matrix.sample(), tmp_path)
    row = page.locator("#grid tbody tr", has_text="fallback.einsum").first
    row.locator("button").last.click()
    panel = page.locator("#panel")
    expect(panel).to_contain_text("fallback.einsum, torch 2.15.0 + flash-attn 2.8.3.post2")
    expect(panel).to_contain_text("view size is not compatible")
    assert faults == []


def test_a_hostile_matrix_does_nothing(browser: Browser, tmp_path: Path) -> None:
    page, faults = opened(browser, sample_matrix.hostile(), tmp_path)
    page.wait_for_selector("html[data-ready]")
    assert faults == []
