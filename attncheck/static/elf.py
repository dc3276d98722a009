"""What a shared library asks for and offers, read from its file: nothing is loaded.

ELF, 64 bit, little endian: what Linux has on x86-64 and aarch64. Of a symbol table that is searched for
a few names only the hash buckets are touched (libtorch_cpu.so exports 100,000 names and has 500 MB).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_DYNAMIC, _DYNSYM, _GNU_HASH, _VERDEF, _VERNEED = 6, 11, 0x6FFFFFF6, 0x6FFFFFFD, 0x6FFFFFFE
_NEEDED, _RPATH, _RUNPATH = 1, 15, 29
_WEAK = 2
_SYMBOL = struct.Struct("<IBBHQQ")  # name, info, other, section, value, size
MACHINES = {0x3E: "x86_64", 0xB7: "aarch64"}


@dataclass(frozen=True)
class Library:
    """`needed`: names of libraries (DT_NEEDED); `paths`: where it looks for them first, `$ORIGIN` as it is
    written; `versions`: of which library it needs which symbol versions (`libc.so.6`: `GLIBC_2.34`)."""

    file: Path
    machine: str
    needed: tuple[str, ...]
    paths: tuple[str, ...]
    versions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Section:
    kind: int
    offset: int
    size: int
    link: int


def read(file: Path) -> Library | None:
    """None where it is not an ELF file of the kind described above."""
    try:
        with _Reader(file) as reader:
            return reader.library(file)
    except (OSError, ValueError, struct.error):
        return None


def undefined(file: Path) -> frozenset[str]:
    """The names that another library must define, weak ones left out; none where it cannot be read."""
    try:
        with _Reader(file) as reader:
            return frozenset(reader.undefined())
    except (OSError, ValueError, struct.error):
        return frozenset()


def defined(file: Path, names: Iterable[str]) -> frozenset[str]:
    """Those of `names` that a library exports; none where it cannot be read."""
    try:
        with _Reader(file) as reader:
            return frozenset(name for name in names if reader.exports(name.encode()))
    except (OSError, ValueError, struct.error):
        return frozenset()


def version_names(file: Path) -> frozenset[str]:
    """The symbol versions that a library has (`GLIBC_2.34`); none where it cannot be read."""
    try:
        with _Reader(file) as reader:
            return frozenset(reader.version_names())
    except (OSError, ValueError, struct.error):
        return frozenset()


class _Reader:
    """An ELF file mapped into memory. Raises ValueError or struct.error where it is none, or is cut off."""

    def __init__(self, file: Path) -> None:
        with file.open("rb") as opened:
            self._data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        if self._data[:6] != b"\x7fELF\x02\x01":
            self._data.close()
            raise ValueError(f"{file} is no 64-bit little-endian ELF file")
        (self._machine,) = struct.unpack_from("<H", self._data, 18)
        self._sections = list(self._read_sections())

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._data.close()

    def _read_sections(self) -> Iterator[_Section]:
        (start,) = struct.unpack_from("<Q", self._data, 40)
        size, count = struct.unpack_from("<HH", self._data, 58)
        for i in range(count):
            _, kind, _, _, offset, length, link = struct.unpack_from(
                "<IIQQQQI", self._data, start + i * size
            )
            yield _Section(kind, offset, length, link)

    def _section(self, kind: int) -> _Section | None:
        return next((s for s in self._sections if s.kind == kind), None)

    def _text(self, strings: _Section, at: int) -> str:
        start = strings.offset + at
        return self._data[start : self._data.find(b"\0", start)].decode("latin-1")

    def library(self, file: Path) -> Library:
        needed, paths = self._dynamic()
        return Library(
            file=file,
            machine=MACHINES.get(self._machine, str(self._machine)),
            needed=needed,
            paths=paths,
            versions=tuple(self._needed_versions()),
        )

    def _dynamic(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        section = self._section(_DYNAMIC)
        if section is None:
            raise ValueError("not a shared library")
        strings = self._sections[section.link]
        needed, paths = [], []
        for offset in range(section.offset, section.offset + section.size, 16):
            tag, value = struct.unpack_from("<QQ", self._data, offset)
            if tag == _NEEDED:
                needed.append(self._text(strings, value))
            elif tag in (_RPATH, _RUNPATH):
                paths += self._text(strings, value).split(":")
        return tuple(needed), tuple(paths)

    def undefined(self) -> Iterator[str]:
        section = self._section(_DYNSYM)
        if section is None:
            return
        strings = self._sections[section.link]
        table = self._data[section.offset : section.offset + section.size]
        for name, info, _, where, _, _ in _SYMBOL.iter_unpack(table):
            if where == 0 and name and info >> 4 != _WEAK:
                yield self._text(strings, name)

    def exports(self, name: bytes) -> bool:
        """As the loader looks: the GNU hash of the name, its bucket, the names in it."""
        hashes, symbols = self._section(_GNU_HASH), self._section(_DYNSYM)
        if hashes is None or symbols is None:
            return False
        buckets, first, bloom, _ = struct.unpack_from("<IIII", self._data, hashes.offset)
        if not buckets:
            return False
        wanted = _gnu_hash(name)
        start = hashes.offset + 16 + 8 * bloom
        (index,) = struct.unpack_from("<I", self._data, start + 4 * (wanted % buckets))
        chain = start + 4 * buckets
        strings = self._sections[symbols.link].offset
        while index >= first and index:
            (found,) = struct.unpack_from("<I", self._data, chain + 4 * (index - first))
            if found | 1 == wanted | 1:
                at, _, _, where, _, _ = _SYMBOL.unpack_from(
                    self._data, symbols.offset + _SYMBOL.size * index
                )
                begin = strings + at
                if where and self._data[begin : begin + len(name) + 1] == name + b"\0":
                    return True
            if found & 1:
                break
            index += 1
        return False

    def _needed_versions(self) -> Iterator[tuple[str, str]]:
        section = self._section(_VERNEED)
        if section is None:
            return
        strings, offset = self._sections[section.link], section.offset
        while True:
            _, count, file, first, following = struct.unpack_from("<HHIII", self._data, offset)
            at = offset + first
            for _ in range(count):
                _, flags, _, name, step = struct.unpack_from("<IHHII", self._data, at)
                if not flags & _WEAK:
                    yield self._text(strings, file), self._text(strings, name)
                at += step
            if not following:
                return
            offset += following

    def version_names(self) -> Iterator[str]:
        section = self._section(_VERDEF)
        if section is None:
            return
        strings, offset = self._sections[section.link], section.offset
        while True:
            first, following = struct.unpack_from("<II", self._data, offset + 12)
            (name,) = struct.unpack_from("<I", self._data, offset + first)
            yield self._text(strings, name)
            if not following:
                return
            offset += following


def _gnu_hash(name: bytes) -> int:
    value = 5381
    for byte in name:
        value = (value * 33 + byte) & 0xFFFFFFFF
    return value
