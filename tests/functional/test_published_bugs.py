"""The bug reports in reports/published/bugs: each one's script runs without attncheck, and shows the bug.

A report holds its script verbatim and what it printed; a script that says something else, under the torch
of these tests, is a report that has gone stale.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch_here

from attncheck import plugins

ROOT = Path(__file__).resolve().parents[2]
BUGS = ROOT / "reports" / "published" / "bugs"
TORCH = str(torch_here.TORCH)
# One process each, some 3 s: what the default run affords.
QUICK = ("cudnn-any-bias-fails", "register-sharding-ignored")


def load_render() -> ModuleType:
    spec = importlib.util.spec_from_file_location("published_bugs_render", BUGS / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


render = load_render()
SLUGS = render.slugs()


def needed(slug: str) -> None:
    """Skip where a package is missing that the script is about."""
    for name in render.needs(slug):
        if importlib.util.find_spec(render.PACKAGES[name]) is None:
            pytest.skip(f"{slug} is about {name}, which is not installed")


def runs_as_reported(slug: str) -> None:
    if TORCH not in render.recorded()[slug]:
        pytest.skip(f"no outcome of {slug} is recorded under torch {TORCH}")
    code, output = render.run(slug)
    assert code == render.recorded()[slug][TORCH], output
    if render.base(slug) == TORCH:
        assert code == 1, output
        assert render.masked(output) == render.masked(render.content(slug, "output"))


def test_every_script_has_a_report_and_every_report_a_script():
    scripts = {path.stem for path in BUGS.glob("*.py")} - {"render"}
    reports = {path.stem for path in BUGS.glob("*.md")} - {"README"}
    assert scripts == reports == set(SLUGS)
    assert len(SLUGS) >= 14


@pytest.mark.parametrize("slug", SLUGS)
def test_a_report_holds_its_script_and_its_command(slug):
    assert render.content(slug, "script") == render.script(slug).rstrip()
    assert render.content(slug, "command") == " ".join(render.command(slug))


@pytest.mark.parametrize("slug", SLUGS)
def test_a_report_is_filled(slug):
    assert render.facts(slug)["severity"] in render.SEVERITIES
    assert f"torch   {render.base(slug)}" in render.content(slug, "environment")
    assert render.content(slug, "output").splitlines()[-1] == "BUG"
    # 1 means that the bug shows, 0 that it does not: anything else is a script that broke.
    assert set(render.recorded()[slug].values()) <= {0, 1}
    assert render.recorded()[slug][render.base(slug)] == 1


@pytest.mark.parametrize("slug", SLUGS)
def test_a_script_depends_on_torch_and_the_package_it_is_about(slug):
    imported = set()
    for node in ast.walk(ast.parse(render.script(slug))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
    foreign = imported - {"torch"} - set(sys.stdlib_module_names)
    assert foreign <= {render.PACKAGES[name] for name in render.needs(slug)}


def test_the_index_is_what_the_reports_and_the_records_say():
    text = (BUGS / "README.md").read_text(encoding="utf-8")
    assert f"<!-- index -->\n{render.index(render.recorded())}\n<!-- end of index -->" in text


def test_numbers_are_masked_and_words_are_not():
    assert render.masked("max error 1.2e-07, heads [3, 6]\n") == "max error N, heads [N, N]"
    assert render.masked("wrong 2.4e+00") != render.masked("right 2.4e+00")


def test_the_published_scripts_are_no_report_formats():
    """reports/ is a shelf of formats; what is published lies below it."""
    assert not set(SLUGS) & set(plugins.formats())
    assert not any("published" in format_.path.parts for format_ in plugins.formats().values())


def test_the_quick_ones_were_asked_under_every_torch():
    without = {slug: set(torch_here.RUN_WITH) - set(render.recorded()[slug]) for slug in QUICK}
    # 2.6 has no strategy for the cuDNN op at all, which its script would take for its bug.
    assert without == {"cudnn-any-bias-fails": {"2.6.0"}, "register-sharding-ignored": set()}


@pytest.mark.parametrize("slug", QUICK)
def test_quick_scripts_run_as_reported(slug):
    runs_as_reported(slug)


@pytest.mark.slow
@pytest.mark.parametrize("slug", [slug for slug in SLUGS if slug not in QUICK])
def test_scripts_run_as_reported(slug):
    needed(slug)
    runs_as_reported(slug)
