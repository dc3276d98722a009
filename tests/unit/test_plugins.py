"""The shelves: what is found, what is loaded, and what is said of a file that does not load."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import attncheck
from attncheck import plugins
from attncheck.errors import UserError
from attncheck.model import Report
from attncheck.view import RenderOptions

PROBE = """\
from __future__ import annotations
from dataclasses import dataclass
from attncheck.probing import Operator, Probe, Setting, Tensor

@dataclass(frozen=True)
class Shape:
    name: str = "x"

def never(setting, tensors):
    raise AssertionError

OPERATOR = Operator({operator!r}, never, never, never, (Setting("plain", {{}}),))
PROBE = Probe({probe!r}, "mine", (OPERATOR,))
"""
FORMAT = """\
NAME = "mine"
SUMMARY = "my own"
def render(report, *, options):
    return f"{len(report.cases)} cases at {options.width}"
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def mine(probe: str = "mine", operator: str = "my_attention") -> str:
    return PROBE.format(probe=probe, operator=operator)


# --- where the shelves are -----------------------------------------------------------------------


@pytest.mark.parametrize("shelf", ["probes", "reports"])
def test_checkout_has_the_shelves_beside_the_package(shelf) -> None:
    folder = plugins.builtin_dir(shelf)
    assert folder.name == shelf
    assert list(folder.glob("*.py"))


def test_wheel_has_the_shelves_inside_the_package(tmp_path, monkeypatch) -> None:
    package = tmp_path / "site-packages" / "attncheck"
    (package / "probes").mkdir(parents=True)
    (package.parent / "probes").mkdir()  # somebody else's
    monkeypatch.setattr(plugins, "__file__", str(package / "plugins.py"))
    assert plugins.builtin_dir("probes") == package / "probes"
    (package.parent / "reports").mkdir()
    with pytest.raises(UserError, match="lacks its built-in reports"):
        plugins.builtin_dir("reports")


# --- probes --------------------------------------------------------------------------------------


def test_built_in_probes_load_without_torch() -> None:
    code = (
        "import sys; from attncheck import plugins; shelf = plugins.load_probes()\n"
        "assert shelf.probes and not shelf.errors, shelf.errors\n"
        "assert len(shelf.probes) == len(shelf.files)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_probe_of_ones_own(write) -> None:
    path = write("my kernel-2.py", mine())
    shelf = plugins.load_probes([path])
    assert shelf.probes[-1].name == "mine"
    assert shelf.files[-1] == path
    assert plugins.load_probe_file(path) is shelf.probes[-1]


def test_a_folder_of_probes(write, tmp_path) -> None:
    write("one.py", mine("one", "a"))
    write("two.py", mine("two", "b"))
    write("_helper.py", "raise SystemExit")
    names = [probe.name for probe in plugins.load_probes([tmp_path]).probes]
    assert names[-2:] == ["one", "two"]


def test_the_same_file_twice_is_one(write) -> None:
    path = write("my_kernel.py", mine())
    shelf = plugins.load_probes([path, path.parent / "." / path.name])
    assert [probe.name for probe in shelf.probes].count("mine") == 1
    assert shelf.errors == ()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("import no_such_module", "does not load: ModuleNotFoundError: No module named"),
        ("x = 1\n\ny = 1 / 0", "does not load: ZeroDivisionError: division by zero (line 3)."),
        ("def (", "does not load: SyntaxError"),
        ("raise SystemExit(3)", "does not load: SystemExit: 3 (line 1)."),
        ("x = 1", "defines no PROBE; expected `PROBE = Probe(...)`."),
        ("PROBE = 3", "PROBE is of type int; expected an attncheck.probing.Probe."),
        (
            "from attncheck.probing import Probe\nPROBE = Probe('p', '', ('x',))",
            "holds an object of type str",
        ),
        ("from attncheck.probing import Probe\nPROBE = Probe('p', '', ())", "is empty"),
    ],
)
def test_a_broken_probe_is_one_sentence_and_the_others_load(write, text, sentence) -> None:
    broken, good = write("broken.py", text), write("good.py", mine())
    shelf = plugins.load_probes([broken, good])
    ((path, said),) = shelf.errors
    assert path == broken
    assert sentence in said
    assert str(broken) in said
    assert "\n" not in said
    assert shelf.probes[-1].name == "mine"
    with pytest.raises(UserError) as error:
        plugins.load_probe_file(broken)
    assert str(error.value) == said


def test_a_file_that_failed_leaves_no_module(write) -> None:
    before = set(sys.modules)
    plugins.load_probes([write("broken.py", "1 / 0")])
    assert not [name for name in set(sys.modules) - before if "broken" in name]


def test_interrupting_a_probe_interrupts(write) -> None:
    with pytest.raises(KeyboardInterrupt):
        plugins.load_probes([write("slow.py", "raise KeyboardInterrupt")])


def test_missing_and_other_files(write, tmp_path) -> None:
    shelf = plugins.load_probes([tmp_path / "none.py", write("notes.txt", "x")])
    assert "does not exist" in shelf.errors[0][1]
    assert "is no Python file" in shelf.errors[1][1]


@pytest.mark.parametrize(
    ("probe", "operator", "sentence"),
    [
        ("sdpa", "mine", "the probe name 'sdpa' is taken"),
        ("mine", "sdpa", "the operator name 'sdpa' is taken"),
    ],
)
def test_names_are_unique(write, probe, operator, sentence) -> None:
    shelf = plugins.load_probes([write("again.py", mine(probe, operator))])
    ((_, said),) = shelf.errors
    assert sentence in said
    assert [p.name for p in shelf.probes].count("sdpa") == 1


# --- probes that packages ship -------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An installed package `shipped` whose entry point names `module`."""

    def install(module: str) -> Path:
        folder = tmp_path / "site"
        (folder / "shipped").mkdir(parents=True)
        (folder / "shipped" / "__init__.py").write_text("raise ImportError('must not be imported')")
        (folder / "shipped" / "probes.py").write_text(mine("shipped", "shipped_attention"))
        info = folder / "shipped-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shipped\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[attncheck.probes]\nours = {module}\n")
        monkeypatch.syspath_prepend(folder)
        return folder

    return install


def test_an_entry_point_names_a_probe_file_of_a_package(package) -> None:
    folder = package("shipped.probes")
    announced: list[Path] = []
    shelf = plugins.load_probes(announce=announced.append)
    assert shelf.errors == ()
    assert "shipped" in {p.name for p in shelf.probes}
    assert announced == [folder / "shipped" / "probes.py"]
    assert set(announced) < set(shelf.files)


@pytest.mark.parametrize("module", ["shipped.nothing", "nowhere.probes"])
def test_an_entry_point_that_leads_nowhere_costs_nobody_else(package, module) -> None:
    package(module)
    shelf = plugins.load_probes()
    ((_, sentence),) = shelf.errors
    assert sentence.startswith("Probe file ours of shipped is not there")
    assert module in sentence
    assert len(shelf.probes) > 2


# --- formats -------------------------------------------------------------------------------------


def test_format_names_are_file_stems() -> None:
    assert {"json", "markdown", "table"} <= set(plugins.formats())


def test_listing_formats_runs_none_of_them() -> None:
    code = (
        "import sys; from attncheck import plugins; plugins.formats()\n"
        "assert not [m for m in sys.modules if m.startswith('attncheck._shelf')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_built_in_formats_are_complete() -> None:
    for name, form in plugins.formats().items():
        assert plugins.load_format(name).name == name
        assert form.summary
        assert isinstance(form.render(Report({}, (), ()), options=RenderOptions()), str)


def test_a_format_shadows_no_module() -> None:
    plugins.load_format("json")
    assert sys.modules["json"] is json
    assert "attncheck._shelf.reports.json" in sys.modules
    assert hasattr(json, "loads")


def test_unknown_format() -> None:
    with pytest.raises(UserError, match=r"Unknown format 'markdwn'\. .*markdown"):
        plugins.load_format("markdwn")


def test_a_format_of_ones_own(write) -> None:
    form = plugins.load_format("mine", [write("mine.py", FORMAT)])
    assert form.summary == "my own"
    assert form.render(Report({}, (), ()), options=RenderOptions(width=90)) == "0 cases at 90"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1 / 0", "Format file .* does not load: ZeroDivisionError"),
        ("NAME = 'x'", "defines no SUMMARY"),
        ("NAME = SUMMARY = 'x'\nrender = 3", "defines no render; expected a function"),
    ],
)
def test_a_broken_format(write, text, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        plugins.load_format("bad", [write("bad.py", text)])


def test_namespace_belongs_to_no_module() -> None:
    assert not (Path(attncheck.__file__).parent / "_shelf").exists()
