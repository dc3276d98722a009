"""[tool.attncheck]: what is taken, and the sentence for what is not."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from attncheck import config
from attncheck.errors import UserError
from attncheck.waivers import Waiver


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


def test_a_baseline_is_meant_from_the_file_that_names_it(tmp_path: Path) -> None:
    table = '[tool.attncheck]\nbaseline = "ci/baseline.json"\nallow = ["costlier"]\nstrict = true\n'
    assert config.parse(write(tmp_path, table)) == {
        "baseline": str(tmp_path / "ci" / "baseline.json"),
        "allow": ("costlier",),
        "strict": True,
    }


def test_rules_and_tables_to_ignore_are_told_apart(tmp_path: Path) -> None:
    table = """
[tool.attncheck]
ignore = [
    "ATN301",
    {rule = "ATN101", operator = "flash*", kernel-op = "flash_attn.*", reason = "t 1", until = 2027-01-31},
    "slow-*",
    {rule = "ATN2", reason = "no end"},
    {rule = "ATN5", reason = "as a text", until = "2027-02-01"},
]
"""
    globs = (("operator", "flash*"), ("kernel-op", "flash_attn.*"))
    assert config.parse(write(tmp_path, table)) == {
        "ignore": ("ATN301", "slow-*"),
        "waivers": (
            Waiver("ATN101", "t 1", globs, datetime.date(2027, 1, 31)),
            Waiver("ATN2", "no end"),
            Waiver("ATN5", "as a text", until=datetime.date(2027, 2, 1)),
        ),
    }


def test_without_tables_there_are_no_waivers(tmp_path: Path) -> None:
    assert config.parse(write(tmp_path, "[tool.attncheck]\nignore = []\n")) == {"ignore": ()}


def test_no_table_is_no_configuration(tmp_path: Path) -> None:
    assert config.parse(write(tmp_path, "[project]\nname = 'x'\n")) == {}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ('[tool.attncheck]\nlevels = "quick"\n', ["levels", "level"]),
        ('[tool.attncheck]\nranks = "two"\n', ["ranks must be int", "'two'"]),
        ("[tool.attncheck]\nranks = true\n", ["ranks must be int"]),
        ('[tool.attncheck]\nselect = "ATN1"\n', ["select must be a list of strings"]),
        ('[tool.attncheck]\nstrict = "yes"\n', ["strict must be bool", "'yes'"]),
        ("[tool.attncheck]\nstrict = 1\n", ["strict must be bool", "1"]),
        ('[tool.attncheck]\nwaivers = ["ATN1"]\n', ["'waivers'"]),
        ('[tool.attncheck]\nignore = "ATN1"\n', ["ignore must be a list"]),
        ('[tool.attncheck]\nignore = ["ATN1", 3]\n', ["ignore must be a list", "3"]),
        ('[tool.attncheck]\nignore = [{rule = "ATN1"}]\n', ["entry 1 of ignore", "reason"]),
        (
            '[tool.attncheck]\nignore = ["ATN1", {rule = "ATN1", why = "x"}]\n',
            ["entry 2 of ignore", "'why'", "reason"],
        ),
        (
            '[tool.attncheck]\nignore = [{rule = "ATN110", reason = "x"}]\n',
            ["entry 1 of ignore", "'ATN110'", "ATN104"],
        ),
        (
            '[tool.attncheck]\nignore = [{rule = "ATN1", reason = "x", until = "soon"}]\n',
            ["entry 1 of ignore", "until must be a date", "'soon'"],
        ),
        ("[tool]\nattncheck = 3\n", ["must be a table"]),
        ("[tool.attncheck\n", ["not valid TOML"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, table: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        config.parse(write(tmp_path, table))
    assert all(word in str(error.value) for word in [*words, "pyproject.toml"])
