"""What is published of matrices is what the renderer makes of them now, and what the README shows of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from attncheck import cells, plugins, saved
from attncheck.view import RenderOptions

ROOT = Path(__file__).resolve().parents[3]
PUBLISHED = ROOT / "reports" / "published" / "matrix"
FILES = sorted(PUBLISHED.glob("*.json"))


def markdown(file: Path) -> str:
    matrix = saved.read(file)
    assert isinstance(matrix, cells.Matrix)
    return plugins.load_format("markdown").render_matrix(
        matrix, options=RenderOptions(folder=Path.cwd(), width=120)
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_page_is_what_the_report_says(file: Path) -> None:
    """If not: attncheck report FILE.json --format markdown --output FILE.md, in the folder."""
    assert file.with_suffix(".md").read_text(encoding="utf-8") == markdown(file)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_command_that_made_it_is_told(file: Path) -> None:
    matrix = saved.read(file)
    told = (PUBLISHED / "README.md").read_text(encoding="utf-8")
    options = re.findall(r"--torch \S+|--bisect|--level \S+", matrix.environment["command"])
    commands = [line for line in told.splitlines() if line.startswith("attncheck ")]
    assert any(all(o in line for o in options) and file.name in line for line in commands)


def test_the_readme_shows_its_summary() -> None:
    page = (PUBLISHED / "torch-flash-attn.md").read_text(encoding="utf-8")
    section = page.partition("## Operators with heads sharded")[2].partition("\n## ")[0]
    (table,) = re.findall(r"^\| operator .*?\n\n", section.partition("<details>")[0], re.M | re.S)
    assert len(table.splitlines()) > 5
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")
