"""Which modules did the same: forty layers are told once. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

_NUMBER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]*)(?![^.])")

# A path in parts; where it has a number, the numbers of all the paths that are told with it.
Part = str | frozenset[int]
Parts = tuple[Part, ...]


def starred(path: str) -> str:
    """The path with each number as `*`.

    >>> starred("blocks.3.experts.11.w2"), starred("norm1")
    ('blocks.*.experts.*.w2', 'norm1')
    """
    return _NUMBER.sub("*", path)


class Folder:
    """Names groups of the modules of one model, whose paths it is given."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = tuple(dict.fromkeys(paths))
        self._alike: dict[tuple[str, ...], list[Parts]] = {}  # that differ in numbers alone
        for parts in map(_parts, self._paths):
            self._alike.setdefault(_kind(parts), []).append(parts)
        self._names: dict[Parts, str] = {}

    def layers(self) -> dict[str, int]:
        """How many modules there are of each path, whatever the first number in it that is not the same in
        all of them.

        >>> Folder(["stages.0.blocks.0", "stages.0.blocks.1", "stages.0.blocks.1.mlp.2"]).layers()
        {'stages.0.blocks.*': 2}
        """
        alike: dict[Parts, int] = {}
        for parts in map(_parts, self._paths):
            for name in _starred_once(parts):
                alike[name] = alike.get(name, 0) + 1
        found = {}
        for parts in map(_parts, self._paths):
            for name in _starred_once(parts):
                if alike[name] > 1:
                    found[".".join(map(_text, name))] = alike[name]
                    break
        return found

    def fold(self, counts: Mapping[str, int]) -> list[tuple[str, int]]:
        """(name, sum of counts) for each group of paths that one name can stand for: `*` where it is all the
        numbers that there are, else these numbers. Each path is told by one name, which tells no other.

        >>> folder = Folder(f"b.{at}" for at in range(4))
        >>> folder.fold({"b.0": 1, "b.1": 1, "b.2": 1, "b.3": 1, "head": 2})
        [('b.*', 4), ('head', 2)]
        >>> folder.fold({"b.0": 1, "b.1": 1, "b.3": 1}), folder.fold({"b.2": 5})
        ([('b.[0-1,3]', 3)], [('b.2', 5)])
        """
        groups = {_parts(path): count for path, count in counts.items()}
        for at in range(max(map(len, groups), default=0)):
            groups = _merged(groups, at)
        return [(self._name(parts), count) for parts, count in groups.items()]

    def _name(self, parts: Parts) -> str:
        name = self._names.get(parts)
        if name is None:
            name = self._names[parts] = ".".join(self._shown(parts))
        return name

    def _shown(self, parts: Parts) -> Iterable[str]:
        alike = self._alike.get(_kind(parts), [])
        for at, part in enumerate(parts):
            if isinstance(part, str):
                yield part
                continue
            there = {path[at] for path in alike if _fits(path, parts, but=at)}
            if len(part) > 1 and {frozenset([number]) for number in part} == there:
                # From here on it is all modules that are told, whatever their number here.
                parts = (*parts[:at], "*", *parts[at + 1 :])
                yield "*"
            elif len(part) > 1:
                yield f"[{_ranges(sorted(part))}]"
            else:
                yield _text(part)


def _parts(path: str) -> Parts:
    return tuple(
        frozenset([int(part)]) if _NUMBER.fullmatch(part) else part for part in path.split(".")
    )


def _text(part: Part) -> str:
    """Of a part with one number at most."""
    return part if isinstance(part, str) else "".join(map(str, part))


def _starred_once(parts: Parts) -> Iterable[Parts]:
    """The parts with one of their numbers as `*`, the first number first."""
    for at, part in enumerate(parts):
        if isinstance(part, frozenset):
            yield (*parts[:at], "*", *parts[at + 1 :])


def _kind(parts: Parts) -> tuple[str, ...]:
    return tuple(part if isinstance(part, str) else "*" for part in parts)


def _merged(groups: Mapping[Parts, int], at: int) -> dict[Parts, int]:
    """Groups that differ in their numbers at one place alone become one."""
    found: dict[Parts, list[frozenset[int]]] = {}
    counts: dict[Parts, int] = {}
    for parts, count in groups.items():
        numbers = parts[at] if at < len(parts) else ""
        rest = parts
        if isinstance(numbers, frozenset):
            rest = (*parts[:at], frozenset(), *parts[at + 1 :])
            found.setdefault(rest, []).append(numbers)
        counts[rest] = counts.get(rest, 0) + count
    return {
        (*rest[:at], frozenset().union(*found[rest]), *rest[at + 1 :])
        if rest in found
        else rest: count
        for rest, count in counts.items()
    }


def _fits(path: Parts, parts: Parts, but: int) -> bool:
    """Whether `parts`, some of them `*` by now, tell this path of the same kind, but for one place."""
    return all(
        at == but or isinstance(own, str) or isinstance(numbers, str) or own <= numbers
        for at, (own, numbers) in enumerate(zip(path, parts, strict=True))
    )


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}-{b}" if a != b else f"{a}" for a, b in runs)
