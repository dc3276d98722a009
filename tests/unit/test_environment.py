"""`attncheck env`: versions read, never imported."""

from __future__ import annotations

from pathlib import Path

from attncheck import environment


def test_describes_what_is_here() -> None:
    found = environment.describe()
    assert "torch" in found["packages"]
    text = environment.render(found)
    assert f"- torch {found['packages']['torch']}" in text


def test_says_that_torch_is_not_installed() -> None:
    found = {**environment.describe(), "packages": {}}
    assert "torch is not installed" in environment.render(found)


def test_packages_of_an_extra_folder_are_seen(tmp_path: Path) -> None:
    info = tmp_path / "flash_attn-2.8.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    assert environment.packages([str(tmp_path)])["flash-attn"] == "2.8.3"


def test_gpus_are_read_from_the_drivers_files(tmp_path: Path) -> None:
    assert environment.gpu(tmp_path) == "none"
    card = tmp_path / "gpus" / "0000:01:00.0"
    card.mkdir(parents=True)
    (card / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n")
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64  580.65.06  Release\n")
    assert environment.gpu(tmp_path) == "NVIDIA H100 80GB HBM3 (driver 580.65.06)"
