"""Rules about what is installed: each catches a planted environment and is silent on its healthy twin."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from planted_environment import (
    NEW_ERROR,
    SET_DEVICE_OLD,
    compile_library,
    install,
    needs_compiler,
    torch,
)

from attncheck import envcheck, ownership, rules
from attncheck.model import Severity
from attncheck.rules import installs
from attncheck.static import installed

Fill = Callable[[Path], None]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    ownership.foreign.cache_clear()
    yield
    ownership.foreign.cache_clear()


@dataclasses.dataclass(frozen=True)
class Planted:
    """`says`: in the title or the message; `does`: in the code of a remedy."""

    rule: str
    sick: Fill
    says: str
    does: str
    healthy: Fill
    severity: Severity = Severity.ERROR


def xformers(torch_version: str) -> Fill:
    def fill(site: Path) -> None:
        install(site, "torch", torch_version, "torch/__init__.py")
        requires = ["torch==2.6.0", "numpy; extra == 'bench'", "flash-attn; python_version < '3.0'"]
        install(site, "xformers", "0.0.29.post3", "xformers/__init__.py", requires=requires)

    return fill


def hollow_diffusers(flash_attn: str) -> Fill:
    def fill(site: Path) -> None:
        install(site, "flash-attn", flash_attn, "flash_attn/__init__.py", "flash_attn_2_cuda.so")
        install(site, "diffusers", "0.36.0", "diffusers/__init__.py")

    return fill


def engine(flash_attn: str) -> Fill:
    def fill(site: Path) -> None:
        install(site, "flash-attn", flash_attn, "flash_attn/__init__.py", "flash_attn_2_cuda.so")
        install(site, "transformer-engine", "2.15.0", "transformer_engine/__init__.py")

    return fill


def wheel(tag: str) -> Fill:
    """flash-attn from a wheel whose name says what it is for, but for what it installed."""

    def fill(site: Path) -> None:
        install(site, "torch", "2.6.0+cu124", "torch/__init__.py")
        (site / "torch" / "version.py").write_text("cuda = '12.4'\n")
        url = f"https://x.org/flash_attn-2.8.3%2B{tag}-cp311-cp311-linux_x86_64.whl"
        files = ("flash_attn/__init__.py", "flash_attn_2_cuda.abi3.so")
        install(site, "flash-attn", "2.8.3", *files, url=url)

    return fill


def clash(other_module: str) -> Fill:
    def fill(site: Path) -> None:
        files = ("flash_attn/__init__.py", "flash_attn_2_cuda.so")
        install(site, "flash-attn", "2.8.3", *files)
        install(site, "flash-attn-triton", "0.1.1", f"{other_module}/__init__.py")

    return fill


def namespace(version: str) -> Fill:
    def fill(site: Path) -> None:
        install(site, "xformers", version, "xformers/__init__.py")
        files = ("flash_attn_interface.py", "flash_attn_3/_C.abi3.so")
        install(site, "flash-attn-3", "3.0.0b1", *files)

    return fill


def unbuilt(torch_version: str) -> Fill:
    def fill(site: Path) -> None:
        install(site, "torch", torch_version, "torch/__init__.py")
        (site / "torch" / "version.py").write_text("cuda = '12.8'\n")
        install(site, "flash-attn", "2.8.3", "flash_attn/__init__.py")

    return fill


PLANTED = [
    Planted(
        "ATN405",
        xformers("2.9.1"),
        "xformers 0.0.29.post3 needs torch==2.6.0, and torch 2.9.1 is installed",
        "pip install xformers==0.0.33.post2",
        xformers("2.6.0+cu124"),
    ),
    Planted(
        "ATN406",
        hollow_diffusers("2.6.3"),
        "diffusers 0.36.0 does not go with flash-attn 2.6.3: it takes flash-attn>=2.7.0",
        "pip install --no-build-isolation 'flash-attn>=2.7.0'",
        hollow_diffusers("2.7.0.post2"),
    ),
    Planted(
        "ATN406",
        engine("2.8.3.post2"),
        "transformer-engine 2.15.0 does not go with flash-attn 2.8.3.post2",
        "pip install transformer-engine==2.20.2",
        engine("2.8.3"),
        Severity.WARNING,
    ),
    Planted(
        "ATN407",
        wheel("cu12torch2.8cxx11abiTRUE"),
        "torch 2.8, and torch 2.6.0+cu124 is here",
        "flash-attn==2.8.3",
        wheel("cu12torch2.6cxx11abiTRUE"),
    ),
    Planted(
        "ATN408",
        clash("flash_attn"),
        "both install flash_attn, one over the other",
        "--force-reinstall --no-deps flash-attn==2.8.3",
        clash("flash_attn_triton"),
    ),
    Planted(
        "ATN408",
        namespace("0.0.34"),
        "flash-attn-3 3.0.0b1 and xformers 0.0.34 both register the ops of flash_attn_3",
        "pip uninstall",
        namespace("0.0.30"),
    ),
    Planted(
        "ATN409",
        unbuilt("2.9.1"),
        "flash-attn 2.8.3 has no prebuilt wheel for torch 2.9 (they are for 2.4 to 2.8)",
        "--no-build-isolation",
        unbuilt("2.8.0"),
        Severity.INFO,
    ),
]  # fmt: skip


@pytest.mark.parametrize("plant", PLANTED, ids=lambda p: f"{p.rule}-{p.does.split()[-1]}")
def test_rule_fires_on_its_fault_and_not_on_the_twin(plant: Planted, tmp_path: Path) -> None:
    plant.sick(tmp_path / "sick")
    plant.healthy(tmp_path / "healthy")
    (finding,) = examine(tmp_path / "sick", plant.rule)
    assert plant.says in f"{finding.title}\n{finding.message}"
    assert any(plant.does in remedy.code for remedy in finding.remedies)
    assert (finding.severity, finding.cases, finding.kernel_op) == (plant.severity, (), "")
    assert examine(tmp_path / "healthy", plant.rule) == ()


def examine(site: Path, rule: str) -> tuple[rules.base.Finding, ...]:
    read = installed.read(envcheck.environment.RELEVANT, [site], "3.11")
    return rules.examine(read, select=[rule])


def test_every_static_rule_is_planted() -> None:
    assert {plant.rule for plant in PLANTED} == {rule.id for rule in rules.RULES if rule.static}


@needs_compiler
def test_an_extension_for_another_torch(tmp_path: Path) -> None:
    torch(tmp_path, "2.8.0+cu128", cuda="12.8", defines=[NEW_ERROR])
    module = "flash_attn_2_cuda.cpython-311-x86_64-linux-gnu.so"
    compile_library(tmp_path / module, needs=[SET_DEVICE_OLD])
    url = "https://x.org/flash_attn-2.8.3%2Bcu12torch2.7cxx11abiTRUE-cp311-cp311-linux_x86_64.whl"
    install(tmp_path, "flash-attn", "2.8.3", "flash_attn/__init__.py", module, url=url)
    (finding,) = examine(tmp_path, "ATN402")
    assert "built for torch 2.7 or older" in finding.message
    assert "The wheel's name says cu12torch2.7cxx11abiTRUE." in finding.message
    # The wheel for just this environment, by its address: torch, CUDA, Python and C++ ABI.
    wanted = "flash_attn-2.8.3+cu12torch2.8cxx11abiTRUE-cp311-cp311-linux_x86_64.whl"
    assert wanted in finding.remedies[0].code
    # What ATN402 says of it, no other rule says again.
    assert examine(tmp_path, "ATN407") == ()


@needs_compiler
def test_a_wheel_for_another_torch_whose_symbols_are_all_there_is_a_warning(tmp_path: Path) -> None:
    torch(tmp_path, "2.8.0+cu128", cuda="12.8", defines=[NEW_ERROR])
    module = "flash_attn_2_cuda.cpython-311-x86_64-linux-gnu.so"
    compile_library(tmp_path / module, needs=[NEW_ERROR])
    url = "https://x.org/flash_attn-2.8.3%2Bcu12torch2.7cxx11abiTRUE-cp311-cp311-linux_x86_64.whl"
    install(tmp_path, "flash-attn", "2.8.3", "flash_attn/__init__.py", module, url=url)
    assert examine(tmp_path, "ATN402") == ()
    (finding,) = examine(tmp_path, "ATN407")
    assert finding.severity is Severity.WARNING
    assert "Every symbol that it needs of PyTorch is there all the same." in finding.message


def test_a_planned_environment_needs_no_files() -> None:
    cell = {"torch": "2.9.1", "xformers": "0.0.29.post3"}
    (finding,) = envcheck.check_planned(cell, "3.11").findings
    assert finding.rule == "ATN406"
    assert finding.title.endswith("does not go with torch 2.9.1: it takes torch==2.6.0")
    assert "https://pypi.org/project/xformers/0.0.29.post3/" in finding.message
    for healthy in ({"torch": "2.6.0", "xformers": "0.0.29.post3"}, {"torch": "2.9.1"}, {}):
        assert envcheck.check_planned(healthy, "3.11").findings == ()


def test_a_planned_wheel_is_held_against_the_planned_torch() -> None:
    tag = "2.8.3+cu12torch2.6cxx11abiTRUE"
    (finding,) = envcheck.check_planned({"torch": "2.6.0", "flash-attn": tag}, "3.11").findings
    assert (finding.rule, finding.severity) == ("ATN407", Severity.ERROR)
    assert (
        "the C++11 ABI (cxx11abiTRUE), and torch has the C++ ABI of before C++11" in finding.title
    )
    tag = tag.replace("TRUE", "FALSE")
    assert envcheck.check_planned({"torch": "2.6.0", "flash-attn": tag}, "3.11").findings == ()


@pytest.mark.parametrize(
    ("torch_version", "python", "says"),
    [
        ("2.9.1", "3.11", "for torch 2.9 (they are for 2.4 to 2.8)"),
        ("2.8.0", "3.14", "for Python 3.14 (they are for 3.9 to 3.13)"),
        ("2.4.1+cu121", "3.13", "for torch 2.4 with Python 3.13"),
        ("2.8.0+cu130", "3.11", "for CUDA 13.0 (cu12)"),
        ("2.8.0+cpu", "3.11", "for a PyTorch without CUDA"),
    ],
)
def test_what_there_is_no_wheel_for(torch_version: str, python: str, says: str) -> None:
    planned = installed.planned({"torch": torch_version, "flash-attn": "2.8.3"}, python)
    (finding,) = rules.examine(planned, select=["ATN409"])
    assert says in finding.title


def test_a_missing_requirement_is_a_warning_and_nvidias_are_left_to_the_files(
    tmp_path: Path,
) -> None:
    requires = ["triton==3.5.1", "nvidia-cudnn-cu12==9.10.2.21", "sympy"]
    install(tmp_path, "torch", "2.9.1", "torch/__init__.py", requires=requires)
    (finding,) = examine(tmp_path, "ATN405")
    assert finding.severity is Severity.WARNING
    assert "needs triton==3.5.1, and triton is not installed" in finding.title


def test_an_advice_goes_with_all_else_that_is_installed() -> None:
    """The newest xformers takes this flash-attn, and not this torch."""
    cell = {"torch": "2.8.0", "flash-attn": "2.8.3", "xformers": "0.0.32.post2"}
    planned = installed.planned(cell, "3.11")
    assert installs.fitting(planned, "xformers") == ""
    (finding,) = rules.examine(planned, select=["ATN406"])
    assert [remedy.code.split()[1] for remedy in finding.remedies] == ["install"]
    assert "xformers==" not in finding.remedies[0].code


def test_what_is_newer_than_the_knowledge_is_said_to_be_unknown() -> None:
    result = envcheck.check_planned({"torch": "2.6.0", "xformers": "0.0.99"}, "3.11")
    assert result.findings == ()
    (note,) = result.notes
    assert note.startswith("xformers 0.0.99 is newer than all that is known of xformers")
    assert note in envcheck.render(result)


def test_old_knowledge_says_so() -> None:
    planned = installed.planned({"xformers": "0.0.34"}, "3.11")
    assert envcheck.notes(planned, datetime.date(2026, 12, 1)) == ()
    (note,) = envcheck.notes(planned, datetime.date(2028, 1, 1))
    assert note.startswith("What is known of xformers is of 2026-")


def test_what_is_said_when_nothing_is_wrong_or_nothing_is_there() -> None:
    clean = envcheck.check_planned({"torch": "2.6.0"}, "3.11")
    assert not clean.failed
    assert envcheck.render(clean).startswith(
        "Nothing wrong was found (1 package looked at: torch 2.6.0)"
    )
    assert "Nothing to check" in envcheck.render(envcheck.check_planned({}, "3.11"))


def test_files_linked_to_an_installers_cache_are_the_packages_own(tmp_path: Path) -> None:
    """`uv --link-mode symlink`."""
    install(tmp_path / "site", "flash-attn", "2.8.3", "flash_attn/__init__.py")
    file = tmp_path / "site" / "flash_attn" / "__init__.py"
    cached = file.rename(tmp_path / "cached.py")
    file.symlink_to(cached)
    assert examine(tmp_path / "site", "ATN408") == ()
