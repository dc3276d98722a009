"""What several sets of values say together: rounding, the order of a reduction, a bug."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from attncheck.model import ErrorStat
from attncheck.runner.drift import Expected, Layout, error_stat
from attncheck.runner.repeats import spread

Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LAYOUT = Layout(("S(1)",), (2,))


def stats(change: Change, repeats: int = 8) -> list[tuple[int, ErrorStat]]:
    """Errors of float32 results that `change(values, noise)` made of the right ones."""
    out = []
    for seed in range(repeats):
        random = torch.Generator().manual_seed(seed)
        want = torch.randn(4, 12, 6, generator=random, dtype=torch.float64)
        noise = torch.randn(4, 12, 6, generator=random, dtype=torch.float64)
        value = change(want.clone(), noise)
        out.append((seed, error_stat(value, Expected(want, want.float()), torch.float32, LAYOUT)))
    return out


def border(want: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    want[:, 5:7] += 3e-6 * noise[:, 5:7]
    return want


def corner(want: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    want[3, 11, 5] += 4e-6 * noise[3, 11, 5].sign()
    return want


@pytest.mark.parametrize(
    ("change", "nature"),
    [
        (lambda want, noise: want + 1e-6 * noise, "rounding"),
        (lambda want, noise: want * (1 + 2e-6), "systematic"),  # grows: one way for all values
        (lambda want, noise: want + 4e-6, "systematic"),
        (border, "systematic"),
        (corner, "systematic"),
        (lambda want, noise: want + 0.1 * noise, "systematic"),  # too large for any rounding
        (lambda want, noise: want.float().double(), ""),
    ],
)
def test_nature(change: Change, nature: str) -> None:
    assert spread(stats(change), repeatable=True).nature == nature


def test_bits_that_change_from_call_to_call_are_the_order_of_a_reduction() -> None:
    noisy = stats(lambda want, noise: want + 1e-6 * noise)
    assert spread(noisy, repeatable=False).nature == "order"
    wrong = stats(lambda want, noise: want + 0.1 * noise)
    assert spread(wrong, repeatable=False).nature == "systematic"  # no order explains that


def test_too_few_say_nothing() -> None:
    assert spread(stats(lambda want, noise: want + 1e-6 * noise, 3), True).nature == ""


def test_the_spread_names_the_worst_seed() -> None:
    made = stats(lambda want, noise: want + 1e-6 * noise)
    found = spread(made, repeatable=True)
    assert found.repeats == 8
    assert found.ratio_min <= found.ratio_median <= found.ratio_max
    assert dict(made)[found.worst_seed].ratio == found.ratio_max
    assert found.beyond == sum(s.max > s.bound for _, s in made) > 3
