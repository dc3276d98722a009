"""`attncheck new probe`: what it writes loads as it is, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from attncheck import scaffold
from attncheck.errors import UserError
from attncheck.plan import Selection, plan
from attncheck.plugins import load_probe_file


def test_the_template_is_a_probe_under_the_new_name(tmp_path: Path) -> None:
    path = scaffold.new_probe("my_kernel", tmp_path)
    assert path == tmp_path / "my_kernel.py"
    probe = load_probe_file(path)
    assert (probe.name, [o.name for o in probe.operators]) == ("my_kernel", ["my_kernel"])
    cases = plan([probe], {"tp": 2}, Selection())
    assert {c.setting_name for c in cases} == {"causal", "gqa", "bfloat16"}
    text = path.read_text()
    assert "--probe my_kernel.py" in text
    assert scaffold.TEMPLATE_NAME not in text


def test_it_loads_without_torch(tmp_path: Path) -> None:
    path = scaffold.new_probe("mine", tmp_path)
    code = (
        "import sys; from pathlib import Path; from attncheck.plugins import load_probe_file; "
        f"load_probe_file(Path({str(path)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["my-kernel", "a/b", "", "1st", "class", "../x", "k\u00e9rnel"])
def test_names_that_are_none_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="expected letters, digits and underscores"):
        scaffold.new_probe(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("precious")
    with pytest.raises(UserError, match=r"mine\.py exists already"):
        scaffold.new_probe("mine", tmp_path)
    assert (tmp_path / "mine.py").read_text() == "precious"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot write .*nowhere"):
        scaffold.new_probe("mine", tmp_path / "nowhere")
