"""Which distribution a module belongs to, on folders made up as installers leave them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from attncheck import environment, ownership

TWO = (
    "flash-attn 2.8.3 and flash-attn-triton 0.1.1 both install flash_attn, one over the other: whose "
    "functions `import flash_attn` gives is chance; uninstall one, then reinstall the other"
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    ownership.foreign.cache_clear()
    yield
    ownership.foreign.cache_clear()


def install(folder: Path, name: str, version: str, *files: str) -> None:
    """As pip does: the files, and a dist-info that lists them."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("raise AssertionError('imported')\n")
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (info / "METADATA").write_text(metadata)
    listed = [*files, f"{info.name}/METADATA", f"{info.name}/RECORD"]
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in listed))


def test_a_module_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "flash_attn", "2.8.3", "flash_attn/__init__.py", "hopper/__init__.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert ownership.foreign("flash-attn") == ""
    assert ownership.owner_of_module("flash_attn") == "flash-attn 2.8.3"
    assert environment.clashes() == []


def test_two_in_one_folder_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "flash-attn", "2.8.3", "flash_attn/__init__.py")
    install(tmp_path, "flash-attn-triton", "0.1.1", "flash_attn/__init__.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert ownership.foreign("flash-attn") == TWO
    assert environment.clashes() == [TWO]


def test_two_in_one_folder_with_the_same_content_are_no_clash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVIDIA's wheels for CUDA 12 each bring an empty `nvidia/__init__.py`."""
    for name in ("nvidia-cudnn-cu12", "nvidia-nccl-cu12"):
        install(tmp_path, name, "9.1.0", "nvidia/__init__.py")
        record = tmp_path / f"{name.replace('-', '_')}-9.1.0.dist-info" / "RECORD"
        record.write_text(record.read_text().replace("__init__.py,,", "__init__.py,sha256=47DE,0"))
    monkeypatch.syspath_prepend(tmp_path)
    assert ownership.foreign("nvidia-cudnn-cu12") == ""


def test_one_in_front_of_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "behind", "flash-attn", "2.8.3", "flash_attn/__init__.py")
    install(tmp_path / "front", "flash-attn-triton", "0.1.1", "flash_attn/__init__.py")
    monkeypatch.syspath_prepend(tmp_path / "behind")
    monkeypatch.syspath_prepend(tmp_path / "front")
    assert ownership.foreign("flash-attn") == (
        f"`import flash_attn` takes {tmp_path / 'front' / 'flash_attn' / '__init__.py'}, which belongs "
        "to flash-attn-triton 0.1.1, not to flash-attn 2.8.3"
    )
    assert ownership.foreign("flash-attn-triton") == ""


def test_files_of_nobody_in_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "behind", "flash-attn", "2.8.3", "flash_attn/__init__.py")
    checkout = tmp_path / "front" / "flash_attn" / "__init__.py"
    checkout.parent.mkdir(parents=True)
    checkout.write_text("")
    monkeypatch.syspath_prepend(tmp_path / "behind")
    monkeypatch.syspath_prepend(tmp_path / "front")
    assert "which belongs to no installed distribution" in ownership.foreign("flash-attn")


def test_parts_of_one_package_are_no_clash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn-4 puts its files inside flash-attn's package."""
    install(tmp_path, "flash-attn", "2.8.3", "flash_attn/__init__.py")
    install(tmp_path, "flash-attn-4", "4.0.0", "flash_attn/cute/__init__.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert ownership.foreign("flash-attn") == ""
    assert ownership.foreign("flash-attn-4") == ""


def test_without_a_list_of_files_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "flash-attn", "2.8.3", "flash_attn/__init__.py")
    (tmp_path / "flash_attn-2.8.3.dist-info" / "RECORD").unlink()
    monkeypatch.syspath_prepend(tmp_path)
    assert ownership.foreign("flash-attn") == ""
    assert ownership.owner_of_module("flash_attn") == ""


def test_what_is_not_there_and_what_is_only_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import ModuleType

    assert ownership.owner_of_module("surely_not_installed") == ""
    monkeypatch.setitem(sys.modules, "made_in_memory", ModuleType("made_in_memory"))
    assert ownership.owner_of_module("made_in_memory") == ""
