"""What the errors of several sets of values say together: rounding, the order of a reduction, or a bug."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from attncheck.model import ErrorStat, Spread
from attncheck.runner.drift import classify

# Fewer sets of values beyond the bound than this say nothing of what they have in common.
ENOUGH = 4
# Chance at which coincidences are taken for a pattern.
CHANCE = 1e-3


def spread(stats: Sequence[tuple[int, ErrorStat]], repeatable: bool) -> Spread:
    """The spread of one tensor's errors; `stats` are (seed, errors), one per set of values (at least 1)."""
    ratios = [stat.ratio for _, stat in stats]
    beyond = [stat for _, stat in stats if stat.max > stat.bound]
    places = Counter(stat.worst.index for stat in beyond if stat.worst)
    return Spread(
        repeats=len(stats),
        ratio_min=min(ratios),
        ratio_median=statistics.median(ratios),
        ratio_max=max(ratios),
        worst_seed=max(stats, key=lambda pair: pair[1].ratio)[0],
        beyond=len(beyond),
        repeatable=repeatable,
        same_place=max(places.values(), default=0),
        at_border=sum(1 for stat in beyond if stat.worst and stat.worst.border == 0),
        sign_bias=statistics.fmean(stat.sign_bias for _, stat in stats),
        size_bias=statistics.fmean(stat.size_bias for _, stat in stats),
        nature=nature(beyond, repeatable),
    )


def nature(beyond: Sequence[ErrorStat], repeatable: bool) -> str:
    """`order`, `systematic`, `rounding`, or '' where there are too few to say.

    Rounding errors go up and down, and are largest now here and now there. Those of a bug have something
    in common over all values: their direction, their place, or a size that no rounding has.
    """
    if not beyond:
        return ""
    if any(classify(stat) == "wrong" for stat in beyond):
        return "systematic"
    if not repeatable:
        return "order"
    if len(beyond) < ENOUGH:
        return ""
    common = _one_way(beyond) or _one_place(beyond) or _at_borders(beyond)
    return "systematic" if common else "rounding"


def _one_way(beyond: Sequence[ErrorStat]) -> bool:
    """Whether what sharding changed goes one way for all values: rounding tosses a coin per element."""
    for biases in ([s.size_bias for s in beyond], [s.sign_bias for s in beyond]):
        if min(map(abs, biases)) > 0.5 and len({bias > 0 for bias in biases}) == 1:
            return True
    return False


def _one_place(beyond: Sequence[ErrorStat]) -> bool:
    """Whether the largest error is at the same element for nearly all values."""
    places = Counter(stat.worst.index for stat in beyond if stat.worst)
    count = max(places.values(), default=0)
    return count >= ENOUGH and 4 * count >= 3 * len(beyond)


def _at_borders(beyond: Sequence[ErrorStat]) -> bool:
    """Whether every largest error is next to a border between shards, more often than chance has it."""
    chance = 1.0
    for stat in beyond:
        if stat.worst is None or stat.worst.border != 0:
            return False
        chance *= stat.worst.at_border
    return chance < CHANCE
