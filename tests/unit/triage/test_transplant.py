"""A probe's call as code that stands alone."""

from __future__ import annotations

import functools
import importlib.util
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attncheck import plugins
from attncheck.probing import Setting
from attncheck.triage.transplant import NotTransplantable, Transplant, transplant

SETTING = Setting("plain", {"batch": 2}, options={"factor": 3, "name": 'a"b'})

Load = Callable[[str], Any]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def run(text: str) -> Any:
        file = tmp_path / "probe_of_a_test.py"
        file.write_text("from __future__ import annotations\n" + textwrap.dedent(text))
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module
        spec.loader.exec_module(module)
        return module

    return run


def run(code: Transplant, t: Any) -> Any:
    lines = [*code.imports, *code.definitions, f"result = {code.expression}"]
    names: dict[str, Any] = {"t": t}
    exec("\n".join(lines), names)
    return names["result"]


def test_it_takes_along_what_it_uses_and_nothing_else(load: Load) -> None:
    module = load(
        """
        import math
        from attncheck.probing import BATCH, Setting, Tensors
        FACTOR: int = 2
        OTHER = 5
        UNUSED = open
        def helper(x: int, *rest: float, by: "int" = FACTOR, **more: Any) -> int:
            y: int = x * by  # type: ignore[assignment]
            return y
        def unused(): return UNUSED
        def call(kind: str | None, setting: Setting, t: Tensors) -> "int":
            assert kind == "a"
            return helper(math.floor(t["q"]), by=FACTOR) * setting["batch"] * setting.get("factor")
        """
    )
    code = transplant(functools.partial(module.call, "a"), SETTING)
    assert run(code, {"q": 5.5}) == 5 * 2 * 2 * 3
    text = "\n".join([*code.imports, *code.definitions, code.expression])
    assert code.expression == 'call("a", setting, t)'
    for absent in ("attncheck", "UNUSED", "OTHER", "Tensors", "str |", "-> ", "type: ignore"):
        assert absent not in text


def test_helpers_of_ours_come_along_as_source(load: Load) -> None:
    module = load(
        """
        from attncheck.probing import BATCH, refuse_unknown
        def call(setting, t):
            refuse_unknown(call, [])
            return setting[BATCH]
        """
    )
    code = transplant(module.call, SETTING)
    assert run(code, {}) == 2
    assert "attncheck" not in "\n".join([*code.imports, *code.definitions])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("from attncheck.runner import compat\ndef call(s, t): return compat", "attncheck.runner"),
        ("def call(s, t):\n    from attncheck.runner import compat", "attncheck.runner"),
        ("import attncheck.runner\ndef call(s, t): return attncheck", "attncheck.runner"),
        ("call = lambda s, t: t", "inside of another"),
        (
            "def make(x):\n    def call(s, t): return x\n    return call\ncall = make(1)",
            "inside of",
        ),
    ],
)
def test_what_cannot_stand_alone_says_why(load: Load, text: str, why: str) -> None:
    with pytest.raises(NotTransplantable, match=why):
        transplant(load(text).call, SETTING)


def test_only_literals_are_bound(load: Load) -> None:
    module = load("def call(thing, setting, t): return thing")
    assert run(transplant(functools.partial(module.call, (1, "a")), SETTING), {}) == (1, "a")
    with pytest.raises(NotTransplantable, match="takes a object"):
        transplant(functools.partial(module.call, object()), SETTING)
    with pytest.raises(NotTransplantable, match="keywords"):
        transplant(functools.partial(module.call, thing=1), SETTING)


def test_nearly_every_built_in_probe_stands_alone() -> None:
    alone = 0
    for probe in plugins.load_probes().probes:
        for operator in probe.operators:
            try:
                code = transplant(operator.call, operator.settings[0])
            except NotTransplantable:
                continue
            alone += 1
            text = "\n".join([*code.imports, *code.definitions, code.expression])
            compile(text, operator.name, "exec")
            assert "import attncheck" not in text
            assert "from attncheck" not in text
    assert alone > 30
