"""Which modules did the same: forty layers are told once. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


def starred(path: str, numbers: int) -> str:
    """The path with its first so many numbers as `*`.

    >>> starred("blocks.3.experts.11", 1), starred("blocks.3.experts.11", 2), starred("norm1", 1)
    ('blocks.*.experts.11', 'blocks.*.experts.*', 'norm1')
    """
    return _NUMBER.sub("*", path, count=numbers) if numbers else path


class Folder:
    """Names groups of the modules of one model, whose paths it is given."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = tuple(dict.fromkeys(paths))
        self._depth = max((len(_NUMBER.findall(path)) for path in self._paths), default=0)
        # How the names with one star less share those with so many stars.
        self._members: list[dict[str, set[str]]] = []
        for stars in range(1, self._depth + 1):
            members: dict[str, set[str]] = {}
            for path in self._paths:
                members.setdefault(starred(path, stars), set()).add(starred(path, stars - 1))
            self._members.append(members)

    def layers(self) -> dict[str, int]:
        """How many modules each name stands for that has one number for all of several modules."""
        counts: dict[str, int] = {}
        for path in self._paths:
            name = starred(path, 1)
            counts[name] = counts.get(name, 0) + 1
        return {name: count for name, count in counts.items() if "*" in name and count > 1}

    def fold(self, counts: Mapping[str, int]) -> list[tuple[str, int]]:
        """(name, sum of counts) for each group of paths that one name can stand for: all modules that differ
        in a number are told by `*`, some of the layers by their numbers, one by itself.

        >>> folder = Folder(f"b.{at}" for at in range(4))
        >>> folder.fold({"b.0": 1, "b.1": 1, "b.2": 1, "b.3": 1, "head": 2})
        [('b.*', 4), ('head', 2)]
        >>> folder.fold({"b.0": 1, "b.1": 1, "b.3": 1}), folder.fold({"b.2": 5})
        ([('b.[0-1,3]', 3)], [('b.2', 5)])
        """
        named = dict(counts)
        for stars, members in enumerate(self._members, 1):
            groups: dict[str, list[str]] = {}
            for name in named:
                groups.setdefault(_star_next(name), []).append(name)
            merged: dict[str, int] = {}
            for name, own in groups.items():
                total = sum(named[each] for each in own)
                everyone = members.get(name, set())
                if len(own) > 1 and set(own) == everyone:
                    merged[name] = total
                elif len(own) > 1 and stars == 1:
                    merged[_some(own)] = total
                else:
                    merged |= {each: named[each] for each in own}
            named = merged
        return list(named.items())


def _star_next(name: str) -> str:
    return _NUMBER.sub("*", name, count=1)


def _some(paths: Sequence[str]) -> str:
    """Several layers of one name, by their numbers."""
    numbers = sorted(int(_NUMBER.search(path)[0]) for path in paths)  # type: ignore[index]
    return _NUMBER.sub(f"[{_ranges(numbers)}]", paths[0], count=1)


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}-{b}" if a != b else f"{a}" for a, b in runs)
