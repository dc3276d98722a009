"""How much the error of a healthy case varies with its values: what `attncheck.compare` takes for noise.

    attncheck scan -k 'fallback.*' -k 'sdpa[MATH]' --repeats 30 --seed 7 --output json:a.json
    attncheck scan -k 'fallback.*' -k 'sdpa[MATH]' --repeats 20 --seed 99 --output json:b.json
    python tests/oracle/gate_noise.py a.json b.json

Errors are parts of their bound. Prints how far the largest of single runs comes, and how far the medians of
two reports lie apart; exits 1 where a gate would call one of them drifted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from attncheck.compare import FLOOR, MANY, NOISE, NOISE_OF_MEDIANS
from attncheck.model import Report, Spread
from attncheck.saved import read_report


def spreads(report: Report) -> Iterator[tuple[str, Spread]]:
    """Of each tensor of each case that is right."""
    for result in report.cases:
        if result.outcome.status.usable:
            for tensor, spread in result.outcome.spread.items():
                yield f"{result.case.id} {tensor}", spread


def percentiles(numbers: list[float]) -> str:
    ordered = sorted(numbers)
    at = (0.5, 0.99, 0.999, 1.0)
    return ", ".join(f"{100 * p:g} %: {ordered[round(p * (len(ordered) - 1))]:.2f}" for p in at)


def main(first: str, second: str) -> int:
    a, b = (dict(spreads(read_report(Path(file)))) for file in (first, second))
    singles = [s.ratio_max / max(s.ratio_min, FLOOR) for report in (a, b) for s in report.values()]
    runs = sum(s.repeats for report in (a, b) for s in report.values())
    both = [(a[name].ratio_median, b[name].ratio_median) for name in a if name in b]
    medians = [max(pair) / max(min(pair), FLOOR) for pair in both]
    assert min(s.repeats for report in (a, b) for s in report.values()) >= MANY
    print(
        f"{len(singles)} tensors, {runs} sets of values; growth counted from {FLOOR} of the bound"
    )
    print(f"largest over smallest of single runs: {percentiles(singles)}; limit {NOISE}")
    print(
        f"medians of {len(medians)} tensors in two runs: {percentiles(medians)}; limit {NOISE_OF_MEDIANS}"
    )
    return int(max(singles) > NOISE or max(medians) > NOISE_OF_MEDIANS)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
