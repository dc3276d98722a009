"""[tool.attncheck]: what is taken, and the sentence for what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from attncheck import config
from attncheck.errors import UserError


def write(folder: Path, table: str) -> Path:
    file = folder / "pyproject.toml"
    file.write_text(table)
    return file


def test_values_keep_their_kind(tmp_path: Path) -> None:
    table = '[tool.attncheck]\nlevel = "quick"\nranks = 4\ncase-timeout = 9\nselect = ["ATN1"]\n'
    assert config.parse(write(tmp_path, table)) == {
        "level": "quick",
        "ranks": 4,
        "case-timeout": 9.0,
        "select": ("ATN1",),
    }


def test_found_from_a_folder_below(tmp_path: Path) -> None:
    write(tmp_path, '[tool.attncheck]\nlevel = "full"\n')
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    assert config.load(below) == {"level": "full"}


def test_probes_are_meant_from_the_file_that_names_them(tmp_path: Path) -> None:
    write(
        tmp_path,
        '[tool.attncheck]\nprobes = ["mine.py", "/abs/x.py"]\nimports = ["kernels_of_ours"]\n',
    )
    (tmp_path / "below").mkdir()
    assert config.load(tmp_path / "below") == {
        "probes": (str(tmp_path / "mine.py"), "/abs/x.py"),
        "imports": ("kernels_of_ours",),
    }


def test_no_table_is_no_configuration(tmp_path: Path) -> None:
    assert config.parse(write(tmp_path, "[project]\nname = 'x'\n")) == {}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ('[tool.attncheck]\nlevels = "quick"\n', ["levels", "level"]),
        ('[tool.attncheck]\nranks = "two"\n', ["ranks must be int", "'two'"]),
        ("[tool.attncheck]\nranks = true\n", ["ranks must be int"]),
        ('[tool.attncheck]\nselect = "ATN1"\n', ["select must be a list of strings"]),
        ("[tool]\nattncheck = 3\n", ["must be a table"]),
        ("[tool.attncheck\n", ["not valid TOML"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, table: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        config.parse(write(tmp_path, table))
    assert all(word in str(error.value) for word in [*words, "pyproject.toml"])
