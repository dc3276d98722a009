"""The reader of shared libraries, against what a compiler wrote, and against files that are none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from planted_environment import NEW_ERROR, compile_library, needs_compiler

from attncheck.static import elf

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ELF")


@needs_compiler
def test_what_a_library_asks_for_and_offers(tmp_path: Path) -> None:
    offers = compile_library(
        tmp_path / "libnew.so", ["shiny"], soname="libnew.so.1", version="NEW_2.99"
    )
    asks = compile_library(tmp_path / "asks.so", [NEW_ERROR], ["shiny", "nowhere"], [offers])
    library = elf.read(asks)
    assert library is not None
    assert "libnew.so.1" in library.needed
    assert ("libnew.so.1", "NEW_2.99") in library.versions
    assert {"shiny", "nowhere"} <= elf.undefined(asks)
    assert NEW_ERROR not in elf.undefined(asks)
    assert "__cxa_finalize" not in elf.undefined(asks)  # weak: may be left undefined
    assert elf.defined(asks, [NEW_ERROR, "shiny", "nowhere"]) == {NEW_ERROR}
    assert elf.defined(offers, ["shiny"]) == {"shiny"}
    assert "NEW_2.99" in elf.version_names(offers)


@needs_compiler
def test_every_name_of_a_large_table_is_found_and_no_other(tmp_path: Path) -> None:
    names = [f"function_{i}" for i in range(500)]
    library = compile_library(tmp_path / "large.so", names)
    assert elf.defined(library, [*names, "function_500", "function_"]) == set(names)


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"\x7fELF\x02\x01" + b"\0" * 20, b"text\n" * 40])
def test_what_is_no_library_is_none(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "broken.so"
    file.write_bytes(data)
    assert elf.read(file) is None
    assert elf.undefined(file) == elf.defined(file, ["f"]) == elf.version_names(file) == frozenset()


@needs_compiler
def test_a_library_that_was_cut_off_is_none(tmp_path: Path) -> None:
    whole = compile_library(tmp_path / "whole.so", ["f"])
    cut = tmp_path / "cut.so"
    cut.write_bytes(whole.read_bytes()[:3000])
    assert elf.read(cut) is None
    assert elf.read(tmp_path / "not_there.so") is None
