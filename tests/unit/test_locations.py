"""The line that pins a distribution, in every kind of file that can, and in none that cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attncheck import locations
from attncheck.locations import BASELINE, NOWHERE, Location, distribution_of, find, locator

PYPROJECT = """\
[build-system]
requires = ["torch==2.1.0"]

[project]
name = "wan"
# torch==2.9.0 did not work
dependencies = [
    "numpy",
    'torch==2.11.0; python_version < "3.14"',
    "flash_attn>=2.7",
]

[project.optional-dependencies]
xformers = ["xformers==0.0.35; sys_platform == \\"linux\\""]

[tool.uv]
constraint-dependencies = ["triton==3.5"]

[tool.attncheck]
level = "quick"
"""

POETRY = """\
[tool.poetry.dependencies]
python = "^3.10"
torch = { version = "2.11.0", source = "cpu" }
"flash-attn" = "^2.7"

[tool.poetry.group.dev.dependencies]
xformers = "0.0.35"

[tool.other]
triton = "3.5"
"""

LOCK = """\
version = 1

[[package]]
name = "flash-attn"
version = "2.7.4.post1"
source = { registry = "https://example.org/simple" }
dependencies = [
    { name = "torch" },
]

[[package]]
name = "torch"
version = "2.11.0"

[[package]]
name = "wan"
source = { editable = "." }
"""

REQUIREMENTS = """\
# torch==1.0
-r other.txt
--index-url https://example.org/torch
torch == 2.11.0 \\
    --hash=sha256:00
flash-attn @ https://example.org/flash_attn-2.7.4-py3-none-any.whl
https://example.org/xformers-0.0.35-py3-none-any.whl#sha256=00
triton  # any
"""

BASELINE_TEXT = """\
{
 "schema_version": 1,
 "environment": {
  "torch": "2.11.0"
 },
 "entries": [
{"operator": "triton", "status": "wrong"}
]
}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return tmp_path


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / NAMES.get(name, name)).write_text(text)


NAMES = {
    "pyproject": "pyproject.toml",
    "uv": "uv.lock",
    "poetry": "poetry.lock",
    "requirements": "requirements.txt",
    "constraints": "constraints-cuda.txt",
    "baseline": BASELINE,
}


@pytest.mark.parametrize(
    ("name", "text", "distribution", "line"),
    [
        ("pyproject", PYPROJECT, "torch", 9),
        ("pyproject", PYPROJECT, "flash-attn", 10),
        ("pyproject", PYPROJECT, "xformers", 14),
        ("pyproject", PYPROJECT, "triton", 17),
        ("pyproject", PYPROJECT, "wan", None),
        ("pyproject", POETRY, "torch", 3),
        ("pyproject", POETRY, "flash-attn", 4),
        ("pyproject", POETRY, "xformers", 7),
        ("pyproject", POETRY, "triton", None),
        ("uv", LOCK, "torch", 13),
        ("uv", LOCK, "Flash_Attn", 5),
        ("poetry", LOCK, "torch", 13),
        ("uv", LOCK, "wan", 16),
        ("requirements", REQUIREMENTS, "torch", 4),
        ("requirements", REQUIREMENTS, "flash-attn", 6),
        ("requirements", REQUIREMENTS, "xformers", 7),
        ("constraints", REQUIREMENTS, "triton", 8),
        ("requirements", REQUIREMENTS, "other", None),
        ("baseline", BASELINE_TEXT, "torch", 4),
        ("baseline", BASELINE_TEXT, "triton", None),
    ],
)
def test_each_kind_of_file(
    project: Path, name: str, text: str, distribution: str, line: int | None
) -> None:
    write(project, **{name: text})
    found = find(distribution, project)
    assert found == (None if line is None else Location(NAMES[name], line))


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_lines_are_counted_as_editors_do(project: Path, ending: str) -> None:
    text = "# a form feed \x0c and \u2028 end no line\nnumpy\ntorch==2.11.0\n"
    (project / "requirements.txt").write_bytes(text.replace("\n", ending).encode())
    assert find("torch", project) == Location("requirements.txt", 3)


def test_what_decides_the_version_wins(project: Path) -> None:
    """A range in pyproject.toml and the exact version in the lock file: a bump changes the lock file."""
    write(project, pyproject='[project]\ndependencies = ["torch>=2.6"]\n')
    assert find("torch", project) == Location("pyproject.toml", 2)
    write(project, uv=LOCK)
    assert find("torch", project) == Location("uv.lock", 13)
    write(project, pyproject='[project]\ndependencies = ["torch==2.11.0"]\n')
    assert find("torch", project) == Location("pyproject.toml", 2)


def test_a_folder_of_requirements(project: Path) -> None:
    (project / "requirements").mkdir()
    (project / "requirements" / "gpu.txt").write_text("flash-attn==2.7.4\n")
    assert find("flash-attn", project) == Location("requirements/gpu.txt", 1)


def test_paths_are_those_of_the_repository(project: Path) -> None:
    """A package of a workspace: its own pin first, then the lock file at the root."""
    package = project / "packages" / "wan"
    package.mkdir(parents=True)
    write(package, pyproject='[project]\ndependencies = ["torch==2.11.0", "flash-attn"]\n')
    write(project, uv=LOCK)
    assert find("torch", package) == Location(
        "pyproject.toml", 2
    )  # no repository: the folder itself
    (project / ".git").mkdir()
    assert find("torch", package) == Location("packages/wan/pyproject.toml", 2)
    assert find("flash-attn", package) == Location("uv.lock", 5)


def test_where_nothing_pins_it(project: Path) -> None:
    """The pin of torch; then the attncheck table or dependency; then the baseline; then pyproject.toml."""
    write(project, baseline='{\n "entries": []\n}\n')
    assert locator(project)("xformers") == Location(BASELINE, 1)
    write(project, pyproject='[project]\nname = "wan"\n')
    assert locator(project)("xformers") == Location(BASELINE, 1)
    write(project, pyproject='[project]\nname = "wan"\n\n[tool.attncheck]\n')
    assert locator(project)("xformers") == Location("pyproject.toml", 4)
    write(project, requirements="torch==2.11.0\n")
    assert locator(project)("xformers") == Location("requirements.txt", 1)
    write(project, requirements="torch==2.11.0\nxformers\n")
    assert locator(project)("xformers") == Location("requirements.txt", 2)


def test_no_project(project: Path) -> None:
    assert locator(None)("torch") == NOWHERE
    assert locator(project)("torch") == NOWHERE
    assert locator(project / "gone")("torch") == NOWHERE


@pytest.mark.parametrize(
    ("subject", "distribution"),
    [
        ("flash_attn._flash_attn_forward.default", "flash-attn"),
        ("flash_attn_3.fwd.default", "flash-attn-3"),
        ("aten.bmm.default", "torch"),
        ("higher_order.flex_attention", "torch"),
        ("xformers_flash.flash_fwd.default", "xformers"),
        ("flash_attn_kvcache", "flash-attn"),
        ("my_kernels.attention.default", "my-kernels"),
        ("", ""),
    ],
)
def test_whose_an_op_is(subject: str, distribution: str) -> None:
    assert distribution_of(subject) == distribution


# --- files that say nothing ----------------------------------------------------------------------


def test_files_that_are_no_regular_files(project: Path) -> None:
    """Reading a pipe would never end, and code scanning shows nothing at a link."""
    os.mkfifo(project / "requirements.txt")
    (project / "uv.lock").mkdir()
    elsewhere = project / "elsewhere"
    elsewhere.write_text("torch==2.11.0\n")
    (project / "constraints.txt").symlink_to(elsewhere)
    assert find("torch", project) is None


def test_a_huge_file_is_left_alone(project: Path) -> None:
    (project / "requirements.txt").write_text("torch==2.11.0\n" + "#" * locations.MAX_BYTES)
    assert find("torch", project) is None


def test_an_unreadable_file(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(project, requirements="torch==2.11.0\n")

    def refused(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refused)
    assert find("torch", project) is None


@pytest.mark.parametrize("name", ["pyproject.toml", "uv.lock", "requirements.txt", BASELINE])
@given(data=st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
def test_broken_files_never_raise(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"broken-{name}"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    found = locator(folder)("torch")
    assert found.line >= 1
    assert found.path in (name, "pyproject.toml")


@pytest.mark.parametrize(
    "text",
    [
        "[project]\ndependencies = 7\n",
        "project = 1\ntool = []\n",
        "[project]\ndependencies = [[1], {a = 1}]\n[project.optional-dependencies]\na = 2\n",
        "[tool.poetry.dependencies]\ntorch = 3\n[tool.poetry.group]\ndev = 1\n",
        "[project]\ndependencies = ['torch ==== nonsense']\n",
        "x = " + "[" * 5000,
    ],
)
def test_a_pyproject_of_another_shape(project: Path, text: str) -> None:
    write(project, pyproject=text)
    assert find("torch", project) is None
    assert locator(project)("torch") == Location("pyproject.toml", 1)
