"""Which lines are the user's: neither torch's, nor a package's, nor attncheck's own."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import pytest

import attncheck
from attncheck.audit import lines

PACKAGE = Path(attncheck.__file__).parent


@pytest.mark.parametrize(
    ("file", "is_users"),
    [
        ("/home/me/wan/model.py", True),
        (str(PACKAGE / "runner" / "worker.py"), False),
        # Beside the package, not in it.
        (str(PACKAGE.with_name("attncheck_fixes.py")), True),
        (f"{PACKAGE}-models/model.py", True),
        (str(Path(sysconfig.get_path("purelib"), "torch", "nn", "functional.py")), False),
        (str(Path(sysconfig.get_path("stdlib"), "contextlib.py")), False),
        ("<string>", False),
        ("<frozen importlib._bootstrap>", False),
    ],
)
def test_is_users(file: str, is_users: bool) -> None:
    assert lines.is_users(file) is is_users


def test_a_package_that_was_provisioned_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_INSTALLED", [*lines._INSTALLED])
    lines.add_installed("/cache/flash-attn-2.8.3")
    assert not lines.is_users("/cache/flash-attn-2.8.3/flash_attn/interface.py")
    assert lines.is_users("/cache/flash-attn-2.8.30/mine.py")


def user_code(source: str, **names: Any) -> dict[str, Any]:
    exec(compile(source, "/home/me/model.py", "exec"), names)
    return names


def test_the_innermost_line_that_runs() -> None:
    """Python's own code runs below it."""
    source = "import weakref\n\ndef build(model):\n    return weakref.finalize(model, line)()\n"
    names = user_code(source, line=lines.user_line)
    assert names["build"](names["build"]) == "model.py:4"


def test_no_line_where_no_code_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_INSTALLED", [*lines._INSTALLED, "/"])
    assert lines.user_line() == ""


def test_the_line_of_an_error_is_where_users_code_called() -> None:
    source = "import json\n\ndef build():\n    return json.loads('{')\n"
    with pytest.raises(ValueError, match="property name") as raised:
        user_code(source)["build"]()
    assert lines.line_of(raised.value) == "model.py:4"


def test_an_error_that_came_through_no_users_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    monkeypatch.setattr(lines, "_INSTALLED", [*lines._INSTALLED, str(Path(__file__).parent)])
    with pytest.raises(ValueError, match="property name") as raised:
        json.loads("{")
    assert lines.line_of(raised.value) == ""
    assert lines.line_of(ValueError("never raised")) == ""
