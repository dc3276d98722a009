"""What users name: a function of a module or of a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attncheck.audit import target
from attncheck.errors import UserError


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder of its own; what is imported from there is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {*sys.modules}
    yield
    for name in {*sys.modules} - before:
        del sys.modules[name]


def wrote(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("package.module:build", ("package.module", "build")),
        ("module:build", ("module", "build")),
        ("here.py:build", ("here.py", "build")),
        ("sub/my-model.py:build", ("sub/my-model.py", "build")),
    ],
)
def test_parse(text: str, parsed: tuple[str, str]) -> None:
    wrote("here.py", "")
    wrote("sub/my-model.py", "")
    assert target.parse(text, "--inputs") == parsed


@pytest.mark.parametrize(
    "text",
    ["", ":", "module", "module:", ":build", "here.py", "a b:build", "a..b:build", "m:Class.build"],
)
def test_what_names_no_function(text: str) -> None:
    with pytest.raises(
        UserError, match=r"^--inputs .* names no function: expected package\.module:f"
    ):
        target.parse(text, "--inputs")


def test_a_file_that_does_not_exist() -> None:
    with pytest.raises(UserError, match=r"'gone\.py:build': the file gone\.py does not exist\.$"):
        target.parse("gone.py:build", "audit")


def test_a_function_of_a_file_beside_its_own_modules() -> None:
    wrote("sub/wan.py", "import layers\n\ndef build():\n    return layers.DEPTH\n")
    wrote("sub/layers.py", "DEPTH = 40\n")
    assert target.load("sub/wan.py:build", "audit")() == 40


def test_a_file_is_run_once() -> None:
    """`build` and `inputs` share what they say between them."""
    wrote("wan.py", "made = []\ndef build(): made.append(1)\ndef inputs(): return made\n")
    target.load("wan.py:build", "audit")()
    assert target.load("wan.py:inputs", "--inputs")() == [1]
    assert sys.modules["wan"].__dict__["made"] == [1]


def test_a_file_that_is_called_like_a_module_of_python() -> None:
    import json

    wrote("json.py", "def build(): return 'mine'\ndef inputs(): return build()\n")
    assert target.load("json.py:build", "audit")() == "mine"
    assert target.load("json.py:inputs", "--inputs")() == "mine"
    assert sys.modules["json"] is json


def test_a_file_that_raises_is_no_module() -> None:
    wrote("broken.py", "def build(): ...\nraise RuntimeError('at import')\n")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="at import"):
            target.load("broken.py:build", "audit")
    assert "broken" not in sys.modules


def test_a_function_of_a_package() -> None:
    wrote("package/__init__.py", "")
    wrote("package/module.py", "def build(): return 1\n")
    assert target.load("package.module:build", "audit")() == 1


@pytest.mark.parametrize(
    ("text", "missing"), [("gone.module:build", "gone"), ("package.gone:build", "package.gone")]
)
def test_a_module_that_does_not_exist(text: str, missing: str) -> None:
    wrote("package/__init__.py", "")
    with pytest.raises(UserError, match=f"there is no module '{missing}' here or among"):
        target.load(text, "audit")


def test_a_module_that_a_users_module_does_not_find_is_its_own_error() -> None:
    wrote("module.py", "import gone_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="gone_dependency"):
        target.load("module:build", "audit")


def test_a_function_that_does_not_exist() -> None:
    wrote("wan.py", "SIZE = 5\ndef build_small(): ...\ndef build_large(): ...\n")
    with pytest.raises(
        UserError, match=r"Unknown function in wan\.py 'build'\. .* build_large, build_small\.$"
    ):
        target.load("wan.py:build", "audit")


def test_a_name_that_is_no_function() -> None:
    wrote("wan.py", "build = 5\n")
    with pytest.raises(UserError, match=r"'wan\.py:build' is a int, expected a function"):
        target.load("wan.py:build", "audit")
