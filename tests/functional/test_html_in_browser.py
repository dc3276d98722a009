"""The HTML report in a real Chromium: by keyboard, by mouse, without a script, in print, under attack."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sample_report
from chromium import chromium
from playwright.sync_api import Browser, BrowserContext, Page, expect

from attncheck import casesview, plugins, view
from attncheck.casesview import CasesView
from attncheck.model import CaseChange, ChangeKind, Comparison, Difference, Report, Status
from attncheck.view import RenderOptions

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def contexts(browser: Browser) -> Iterator[list[BrowserContext]]:
    opened: list[BrowserContext] = []
    yield opened
    for context in opened:
        context.close()


@pytest.fixture
def open_page(browser: Browser, contexts: list[BrowserContext], tmp_path: Path) -> Iterator[Open]:
    """Opens a page as a file. Whatever it does, it may ask for nothing else, nor fail, nor open a dialog."""
    faults: list[str] = []

    def show(text: str, **options: Any) -> Page:
        file = tmp_path / "report.html"
        file.write_text(text, encoding="utf-8")
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("request", lambda r: r.url == file.as_uri() or faults.append(f"asked for {r.url}"))
        page.on("pageerror", lambda error: faults.append(f"failed: {error}"))
        page.on("console", lambda message: faults.append(f"console: {message.text}"))
        page.on("dialog", lambda dialog: (faults.append("opened a dialog"), dialog.dismiss()))
        page.goto(file.as_uri())
        return page

    yield show
    assert faults == []


def render(report: Report) -> str:
    return plugins.load_format("html").render(report, options=RenderOptions())


SAMPLE = sample_report.sample()


@functools.cache
def sample_page() -> str:
    return render(SAMPLE)


def cells(page: Page) -> dict[tuple[str, str, str], str]:
    """What the matrix shows: (operator, direction, placement) -> text."""
    rows = page.evaluate(
        """() => [...document.querySelectorAll("#grid tr")].map(
            (row) => [...row.cells].map((cell) => cell.textContent.trim()))"""
    )
    return {
        (row[0], row[1], placement): text
        for row in rows[1:]
        for placement, text in zip(rows[0][2:], row[2:], strict=True)
        if text
    }


def test_the_script_shows_the_matrix_that_the_page_has_without_it(open_page: Open) -> None:
    """One rule makes both: `view.Cell` in Python, `summarise` in the script."""
    with_script = cells(open_page(sample_page()))
    without = cells(open_page(sample_page(), java_script_enabled=False))
    assert with_script == without
    assert len(with_script) > 40


def test_search_and_open_by_keyboard(open_page: Open) -> None:
    page = open_page(sample_page())
    page.keyboard.press("/")
    expect(page.locator("#search")).to_be_focused()
    page.keyboard.type("flash_attn_func heads")
    wanted = [
        r
        for r in SAMPLE.cases
        if (r.case.operator, r.case.placement) == ("flash_attn_func", "heads")
    ]
    expect(page.locator("#matched")).to_have_text(
        f"{len(wanted)} of {len(SAMPLE.cases)} cases match."
    )
    assert set(cells(page)) == {("flash_attn_func", "both", "heads")}
    page.keyboard.press("ArrowDown")
    expect(page.locator("#grid button")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#panel")).to_be_visible()
    expect(page.locator(".case")).to_have_count(len(wanted))
    expect(page.locator(".case").first).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator(".detail")).to_have_count(1)
    page.keyboard.press("Escape")  # folds the case
    expect(page.locator(".detail")).to_have_count(0)
    expect(page.locator(".case").nth(1)).to_be_focused()
    page.keyboard.press("Escape")  # closes
    expect(page.locator("#panel")).to_be_hidden()
    expect(page.locator("#grid button")).to_be_focused()


def test_enter_in_the_search_lists_the_cases(open_page: Open) -> None:
    page = open_page(sample_page())
    page.keyboard.press("/")
    page.keyboard.type("no answer within")
    page.keyboard.press("Enter")
    expect(page.locator("#panel-title")).to_have_text("Matching cases 1 case")
    expect(page.locator(".detail .message")).to_have_text("no answer within 20 s")
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    expect(page.locator("#search")).to_be_focused()


def test_nothing_matches(open_page: Open) -> None:
    page = open_page(sample_page())
    page.locator("#search").fill("no such case")
    expect(page.locator("#matched")).to_have_text(f"0 of {len(SAMPLE.cases)} cases match.")
    expect(page.locator("#list")).to_be_disabled()
    page.locator("#reset").click()
    expect(page.locator("#matched")).to_have_text("")
    expect(page.locator("#grid button").first).to_be_visible()


def test_arrows_move_over_empty_cells_and_tab_reaches_one(open_page: Open) -> None:
    page = open_page(sample_page())
    assert page.locator('#grid button[tabindex="0"]').count() == 1
    page.locator('#grid button[tabindex="0"]').focus()

    def place() -> list[str]:
        return page.evaluate("JSON.parse(document.activeElement.dataset.place)")

    assert place() == ["sdpa", "forward", "replicate"]
    page.keyboard.press("End")
    assert place() == ["sdpa", "forward", "partial"]
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert place() == ["sdpa", "backward", "batch"]
    # flash_attn_varlen_func and flash_attn_with_kvcache have no cell below batch
    page.locator("[data-place*=flash_attn_qkvpacked_func][data-place*=batch]").focus()
    page.keyboard.press("ArrowDown")
    assert place() == ["fallback.matmul", "forward", "batch"]
    assert page.locator('#grid button[tabindex="0"]').count() == 1


def test_facets_and_statuses(open_page: Open) -> None:
    page = open_page(sample_page())
    page.get_by_role("combobox", name="direction").select_option("backward")
    assert {direction for _, direction, _ in cells(page)} == {"backward"}
    page.get_by_role("combobox", name="dtype").select_option("bfloat16")
    wanted = [
        r
        for r in SAMPLE.cases
        if r.case.direction == "backward" and r.case.setting["dtype"] == "bfloat16"
    ]
    expect(page.locator("#matched")).to_have_text(
        f"{len(wanted)} of {len(SAMPLE.cases)} cases match."
    )
    page.locator("#reset").click()
    wrong = page.get_by_role("button", name="wrong").first
    wrong.click()
    expect(wrong).to_have_attribute("aria-pressed", "true")
    assert all("wrong" in text for text in cells(page).values())
    assert page.get_by_role("combobox", name="mesh").count() == 0  # there is one
    assert page.get_by_role("combobox", name="version").count() == 0


def test_operators_of_which_nothing_ran_appear_when_asked_for(open_page: Open) -> None:
    result = SAMPLE.cases[-1]
    idle = dataclasses.replace(
        result,
        case=dataclasses.replace(result.case, operator="idle_attention"),
        outcome=dataclasses.replace(result.outcome, status=Status.UNAVAILABLE),
    )
    page = open_page(render(dataclasses.replace(SAMPLE, cases=(*SAMPLE.cases, idle))))
    assert not any(operator == "idle_attention" for operator, _, _ in cells(page))
    expect(page.locator("#left-out")).to_contain_text("1 case of operators of which nothing ran")
    page.locator("#search").fill("idle_attention")
    assert {operator for operator, _, _ in cells(page)} == {"idle_attention"}


def test_a_version_facet_appears_with_a_second_version(open_page: Open) -> None:
    page_of = sys.modules["attncheck._shelf.reports.html"].page
    shown = view.build(SAMPLE)
    cases = casesview.build(SAMPLE, shown)
    later = [dataclasses.replace(case, version="torch 2.14.0") for case in cases.cases[:9]]
    both = (*cases.cases, *later)
    facets = casesview.facets(both)
    page = open_page(page_of(shown, CasesView(both, cases.drawings, cases.kernel_ops, facets)))
    page.get_by_role("combobox", name="version").select_option("torch 2.14.0")
    expect(page.locator("#matched")).to_have_text(f"9 of {len(both)} cases match.")


def test_a_case_in_full(open_page: Open) -> None:
    first = next(
        r
        for r in SAMPLE.cases
        if r.outcome.status is Status.WRONG and r.case.operator == "sdpa[FLASH_ATTENTION]"
    )
    sizes = {"q": (6, 3, 18, 16), "k": (6, 4, 18, 16), "v": (6, 4, 18, 16)}
    dims = dict.fromkeys(sizes, ("batch", "heads", "sequence", "head_dim"))
    case = dataclasses.replace(
        first.case,
        tensor_sizes=sizes,
        tensor_dims=dims,
        placements={"q": ("S(1)",), "k": ("R",), "v": ("P(sum)",), "mask": ("plain",)},
    )
    page = open_page(
        render(dataclasses.replace(SAMPLE, cases=(dataclasses.replace(first, case=case),)))
    )
    page.locator("#grid button").click()
    drawings = page.get_by_role("img")
    expect(drawings).to_have_count(4)
    expect(drawings.first).to_have_attribute(
        "aria-label",
        "q (batch=6, heads=3, sequence=18, head_dim=16), tp=2: S(1): rank 0 holds heads 0 to 1, "
        "rank 1 holds heads 2.",
    )
    wide, narrow = (
        float(rect.get_attribute("width") or 0) for rect in drawings.first.locator("rect").all()
    )
    assert wide == pytest.approx(2 * narrow)  # to scale
    expect(page.locator(".detail")).to_contain_text("heads (dim 1): 2 + 1")
    assert drawings.nth(1).locator("rect").count() == 2  # copies
    assert drawings.nth(1).locator(".addend").count() == 0
    assert drawings.nth(2).locator(".addend").count() == 2  # hatched, with what the page defines
    assert 'url("#hatch")' in drawings.nth(2).locator(".addend").first.evaluate(
        "(rect) => getComputedStyle(rect).fill"
    )
    assert page.locator("pattern#hatch line").count() == 1
    assert drawings.nth(3).locator(".edge").count() == 1
    detail = page.locator(".detail")
    expect(detail).to_contain_text("2.6 (beyond the bound)")
    expect(detail.locator("table").first).to_contain_text("2e-07")  # unsharded
    expect(detail).to_contain_text("wrong_result")
    expect(detail.locator(".finding")).to_contain_text("ATN201")
    expect(detail.locator(".finding")).to_contain_text("Replicate q, k and v before the call.")


def test_collectives_and_missing_ops(open_page: Open) -> None:
    page = open_page(sample_page())
    page.locator('[data-place=\'["sdpa[FLASH_ATTENTION]","forward","query"]\']').click()
    page.locator(".case").first.click()
    expect(page.locator(".detail")).to_contain_text("1 all_gather, 27 KiB a rank")
    page.get_by_role("button", name="Close").click()
    page.locator('[data-place=\'["flash_attn_func","both","heads"]\']').click()
    page.locator(".case").first.click()
    table = page.locator(".detail table", has_text="what was said")
    expect(table).to_contain_text(sample_report.FLASH_FORWARD)


def test_copying_code(open_page: Open) -> None:
    page = open_page(sample_page(), permissions=["clipboard-read", "clipboard-write"])
    button = page.locator(".copyable", has_text="local_map(").get_by_role("button").first
    button.click()
    expect(button).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == sample_report.LOCAL_MAP


def test_copying_without_a_clipboard(open_page: Open) -> None:
    page = open_page(sample_page(), permissions=["clipboard-read", "clipboard-write"])
    page.evaluate("""() => {
        window.read = () => original.readText();
        const original = navigator.clipboard;
        Object.defineProperty(navigator, "clipboard", { value: undefined, configurable: true });
    }""")
    page.locator('[data-place=\'["flash_attn_func","both","heads"]\']').click()
    page.locator(".case").first.click()  # within a dialog, beside which nothing can be selected
    button = page.locator("dialog .copyable", has_text="local_map(").get_by_role("button").first
    button.click()
    expect(button).to_have_text("Copied")
    assert page.evaluate("window.read()") == sample_report.LOCAL_MAP


def test_a_finding_shows_its_cases(open_page: Open) -> None:
    page = open_page(sample_page())
    shown = view.build(SAMPLE).findings
    page.locator("#finding-0").get_by_role("button", name="Show").click()
    expect(page.locator("#panel-title")).to_have_text(
        f"{shown[0].rule} {shown[0].name} {len(shown[0].cases)} cases"
    )


def test_without_javascript(open_page: Open) -> None:
    page = open_page(sample_page(), java_script_enabled=False)
    expect(page.locator("#grid")).to_be_visible()
    for control in ("#filters", "#theme", "dialog"):
        expect(page.locator(control)).to_be_hidden()
    page.locator("#cases summary").nth(6).click()  # Playwright finds no text in noscript
    assert page.locator("#cases summary").all_inner_texts()[6] == "flash_attn_with_kvcache: 4 cases"
    expect(page.get_by_role("cell", name="no answer within 20 s")).to_be_visible()
    expect(page.locator("#findings").get_by_text("Call it on local tensors")).to_be_visible()


def test_light_and_dark(open_page: Open) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = open_page(sample_page(), color_scheme="light")
    dark = open_page(sample_page(), color_scheme="dark")
    assert light.evaluate(ground) == "rgb(255, 255, 255)"
    assert dark.evaluate(ground) == "rgb(20, 23, 26)"
    light.get_by_role("button", name="Dark colours").click()
    assert light.evaluate(ground) == "rgb(20, 23, 26)"
    light.get_by_role("button", name="Light colours").click()
    assert light.evaluate(ground) == "rgb(255, 255, 255)"


def test_in_print(open_page: Open) -> None:
    page = open_page(sample_page(), color_scheme="dark")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")  # which emulation does not send
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    for control in ("#filters", "#theme", "nav", ".copyable button"):
        expect(page.locator(control).first).to_be_hidden()
    for remedy in page.locator(".remedies ol").all():
        expect(remedy).to_be_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("#findings details:not([open])").count() > 0
    assert page.pdf().startswith(b"%PDF")


def test_of_an_open_panel_its_cases_are_printed(open_page: Open) -> None:
    page = open_page(sample_page())
    page.locator("#grid button").first.click()
    page.emulate_media(media="print")
    expect(page.locator("dialog")).to_be_visible()
    expect(page.locator("main")).to_be_hidden()


@pytest.mark.parametrize("width", [320, 400])
def test_a_narrow_window_scrolls_its_tables_only(open_page: Open, width: int) -> None:
    page = open_page(sample_page(), viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#grid button").first.click()
    page.locator(".case").first.click()
    assert page.evaluate("document.querySelector('dialog').scrollWidth") <= width


HOSTILE = (
    sample_report.HOSTILE,
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)><svg onload=alert(1)>",
    "\"'><script>alert(1)</script><a href='javascript:alert(1)'>x</a>",
    "<!--<script>",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_report_runs_nothing(open_page: Open, text: str) -> None:
    """`open_page` sees to it that there was no dialog, no failure and no request."""
    report = sample_report.hostile(text)
    page = open_page(render(report))
    assert page.locator("html[data-ready]").count() == 1
    assert page.locator("script").count() == 2
    assert (
        page.locator("img, iframe, object, embed, a[href^=javascript], main svg, [onerror]").count()
        == 0
    )
    page.locator("#list").click()
    expect(page.locator(".case")).to_have_count(3)
    for case in page.locator(".case").all():
        case.click()
    expect(page.locator(".detail")).to_have_count(3)
    assert page.locator("script").count() == 2
    assert (
        page.locator("img:not(svg), iframe, a[href^=javascript], [onerror], [onload]").count() == 0
    )
    expect(page.locator(".detail .message").first).to_have_text(view.clean(text).strip())


def test_the_policy_holds(browser: Browser, contexts: list[BrowserContext], tmp_path: Path) -> None:
    """Were something to slip through, the browser refuses it: here it is put in by hand."""
    attack = "<main><script>window.ran = 1</script><img src='data:,' onerror='window.ran = 1'>"
    file = tmp_path / "attacked.html"
    file.write_text(sample_page().replace("<main>", attack), encoding="utf-8")
    ran = []
    for bypass in (False, True):
        context = browser.new_context(bypass_csp=bypass)
        contexts.append(context)
        page = context.new_page()
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]")
        ran.append(page.evaluate("window.ran"))
    assert ran == [None, 1]


def test_a_comparison(open_page: Open) -> None:
    first, second = SAMPLE.cases[0].case.id, SAMPLE.cases[1].case.id
    changes = (
        CaseChange(first, ChangeKind.NEW, Status.MISSING_STRATEGY, Status.SUPPORTED, gates=True),
        CaseChange(second, ChangeKind.FIXED, Status.WRONG, Status.MISSING_STRATEGY, ("ATN201",)),
    )
    environment = (Difference("torch", "2.11.0", "2.13.0"),)
    comparison = Comparison("the baseline", environment, changes, len(SAMPLE.cases) - 2)
    page = open_page(render(dataclasses.replace(SAMPLE, comparison=comparison)))
    expect(page.locator(".lead p").first).to_contain_text("Against the baseline")
    expect(page.locator("#compared")).to_contain_text("2.11.0")
    page.get_by_role("button", name="1 fixed").click()
    expect(page.locator("#matched")).to_have_text(f"1 of {len(SAMPLE.cases)} cases match.")
    page.locator("#grid button").click()
    expect(page.locator(".detail")).to_contain_text(
        "Compared: fixed. wrong -> missing strategy (ATN201)."
    )


def test_an_empty_report(open_page: Open) -> None:
    page = open_page(render(Report({}, (), ())))
    expect(page.locator(".lead")).to_contain_text("No case was planned")


# --- for whoever does not see it -----------------------------------------------------------------


def test_the_accessible_tree(open_page: Open) -> None:
    page = open_page(sample_page())
    tree = page.locator("body").aria_snapshot()
    for role in ("banner", "main", "contentinfo", 'navigation "Sections"', 'search "Cases"'):
        assert f"- {role}" in tree
    assert '- heading "attncheck report" [level=1]' in tree
    grid = page.locator("#grid").aria_snapshot()
    assert grid.startswith('- grid "Worst status, and how many cases are right":')
    assert '- columnheader "heads"' in grid
    assert '- rowheader "sdpa[FLASH_ATTENTION]"' in grid
    assert '- button "wrong, 4 of 5 right"' in grid


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_grave(
    browser: Browser, contexts: list[BrowserContext], tmp_path: Path, scheme: Any
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    file = tmp_path / "report.html"
    file.write_text(sample_page(), encoding="utf-8")
    context = browser.new_context(
        color_scheme=scheme, bypass_csp=True
    )  # axe is a script of its own
    contexts.append(context)
    page = context.new_page()
    page.goto(file.as_uri())
    assert violations(Axe().run(page)) == []
    page.locator('[data-place=\'["flash_attn_func","both","heads"]\']').click()
    page.locator(".case").first.click()
    assert violations(Axe().run(page)) == []


def test_axe_would_find_it(browser: Browser, contexts: list[BrowserContext]) -> None:
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context()
    contexts.append(context)
    page = context.new_page()
    page.set_content("<html lang=en><title>x</title><main><h1>x</h1><button></button></main>")
    assert violations(Axe().run(page)) == ["button-name"]


def violations(results: Any) -> list[str]:
    return [
        v["id"] for v in results.response["violations"] if v["impact"] in ("serious", "critical")
    ]


# --- as it is used -------------------------------------------------------------------------------


def test_by_the_command(open_page: Open, tmp_path: Path) -> None:
    saved, page_file = tmp_path / "report.json", tmp_path / "page.html"
    text = plugins.load_format("json").render(SAMPLE, options=RenderOptions())
    saved.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "attncheck", "report", str(saved)]
    subprocess.run([*command, "--format", "html", "-o", str(page_file)], check=True)
    page = open_page(page_file.read_text(encoding="utf-8"))
    assert cells(page) == cells(open_page(sample_page()))
