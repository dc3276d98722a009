"""How long Chromium takes to open the HTML report of 5,000 cases, beside as many bytes in a plain table."""

from __future__ import annotations

import dataclasses
import html
import json
from pathlib import Path

import pytest
import sample_report
from chromium import chromium
from playwright.sync_api import Browser

from attncheck import plugins
from attncheck.model import Report, to_json
from attncheck.view import RenderOptions

CASES = 5000


def many_cases() -> Report:
    """The sample again and again, on other meshes, as one with every placement of many meshes has."""
    sample = sample_report.sample()
    cases = []
    while len(cases) < CASES:
        mesh = {"tp": 2 + len(cases) // len(sample.cases)}
        for result in sample.cases:
            name = result.case.id.replace("tp=2", f"tp={mesh['tp']}")
            cases.append(
                dataclasses.replace(
                    result, case=dataclasses.replace(result.case, id=name, mesh=mesh)
                )
            )
    return dataclasses.replace(sample, cases=tuple(cases[:CASES]))


def plain_page(report: Report, size: int) -> str:
    """A row with the JSON of each case, cut so that the page has `size` characters."""
    room = size // len(report.cases) - len("<tr><td></td></tr>")
    rows = (html.escape(json.dumps(to_json(result)), quote=False)[:room] for result in report.cases)
    table = "".join(f"<tr><td>{row:.<{room}}</td></tr>" for row in rows)
    return f"<!doctype html><meta charset=utf-8><title>x</title><table id=grid>{table}</table>"


def seconds_to_matrix(browser: Browser, file: Path, runs: int = 3) -> float:
    """From navigation until the document is loaded and its table is laid out; the fastest run."""
    times = []
    for _ in range(runs):
        page = browser.new_page()
        page.goto(file.as_uri(), wait_until="domcontentloaded")
        times.append(
            page.evaluate(
                """() => {
                    document.getElementById("grid").getBoundingClientRect();
                    return performance.now() / 1000;
                }"""
            )
        )
        page.close()
    return min(times)


@pytest.mark.slow
def test_five_thousand_cases_beside_a_plain_table(tmp_path: Path) -> None:
    report = many_cases()
    text = plugins.load_format("html").render(report, options=RenderOptions())
    ours, plain = tmp_path / "ours.html", tmp_path / "plain.html"
    ours.write_text(text, encoding="utf-8")
    plain.write_text(plain_page(report, len(text)), encoding="utf-8")
    with chromium() as browser:
        ours_takes = seconds_to_matrix(browser, ours)
        plain_takes = seconds_to_matrix(browser, plain)
    print(
        f"{CASES} cases, {len(text.encode()) / 1e6:.1f} MB: {ours_takes:.2f} s, "
        f"{ours_takes / plain_takes:.2f} times a plain table of as many bytes"
    )
    assert ours_takes < plain_takes
