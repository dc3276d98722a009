"""Why an operator cannot be called: packages that are broken, or not what their name says."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from attncheck import ownership
from attncheck.model import Reason
from attncheck.probing import Operator
from attncheck.runner.available import Availability

UNDEFINED = "/lib/kernels_cuda.so: undefined symbol: _ZN3c105ErrorC2ENS_14SourceLocationE"

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """`install(name, module, code, version)`: a distribution with one module, on the path."""
    before = set(sys.modules)
    ownership.foreign.cache_clear()
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, module: str, code: str = "", version: str = "2.8.3") -> None:
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata)
        (info / "RECORD").write_text(f"{module}.py,,\n")

    yield make
    ownership.foreign.cache_clear()
    for name in set(sys.modules) - before:
        del sys.modules[name]


def needing(package: str, bypass: str = "") -> Operator:
    return Operator(
        name="kernels",
        tensors=lambda _: (),
        call=lambda _, t: t["out"],
        reference=lambda _, t: t["out"],
        settings=(),
        packages=(package,),
        bypasses=(bypass,) if bypass else (),
    )


def refusal(operator: Operator, device: str = "cuda") -> tuple[Reason, str] | None:
    """As on a GPU, where no stand-in hides what is broken."""
    return Availability(device).refusal(operator)


def test_an_extension_that_does_not_load_is_told_with_the_loaders_words(install: Install) -> None:
    install("made-kernels", "made_kernels_cuda", f"raise ImportError({UNDEFINED!r})")
    found = refusal(needing("made-kernels>=2", "made_kernels_cuda"))
    assert found == (Reason.EXTENSION_NOT_LOADABLE, f"ImportError: {UNDEFINED}")


def test_a_package_without_its_compiled_module(install: Install) -> None:
    install("made-kernels", "made_kernels")
    found = refusal(needing("made-kernels>=2", "made_kernels_cuda"))
    text = "made-kernels>=2: No module named 'made_kernels_cuda'"
    assert found == (Reason.EXTENSION_NOT_LOADABLE, text)


def test_a_module_that_the_package_needs_is_a_missing_package(install: Install) -> None:
    install("made-kernels", "made_kernels_cuda", "import surely_not_installed")
    found = refusal(needing("made-kernels>=2", "made_kernels_cuda"))
    assert found == (Reason.PACKAGE_MISSING, "No module named 'surely_not_installed'")


def test_another_package_under_the_same_name(install: Install) -> None:
    install("made-kernels", "made_kernels")
    install("made-kernels-triton", "made_kernels", version="0.1")
    found = refusal(needing("made-kernels>=2"))
    assert found is not None
    assert found[0] is Reason.PACKAGE_CLASH
    assert found[1].startswith("made-kernels 2.8.3 and made-kernels-triton 0.1 both install made_")


def test_a_missing_package_says_who_has_its_module(install: Install) -> None:
    install("made-kernels-triton", "made_kernels", version="0.1")
    assert refusal(needing("made-kernels>=2")) == (
        Reason.PACKAGE_MISSING,
        "made-kernels is not installed; the `made_kernels` that is here belongs to "
        "made-kernels-triton 0.1",
    )


def test_a_package_as_it_should_be(install: Install) -> None:
    install("made-kernels", "made_kernels_cuda", "def forward(q): return q")
    assert refusal(needing("made-kernels>=2", "made_kernels_cuda")) is None
    old = refusal(needing("made-kernels>=3", "made_kernels_cuda"))
    text = "made-kernels 2.8.3 does not satisfy made-kernels>=3"
    assert old == (Reason.VERSION_UNSUPPORTED, text)
