"""Settings that hold for every test."""

import sys
from pathlib import Path

import hypothesis
import pytest

# The helpers in tests/unit (`real_scan`, `sample_report`, `strategies`) are importable by every test.
sys.path.insert(0, str(Path(__file__).parent / "unit"))

# Machines are shared and noisy: a slow example is no failure.
hypothesis.settings.register_profile("attncheck", deadline=None)
hypothesis.settings.load_profile("attncheck")


# Real ranks share the machine with nothing else of ours: deadlines and benchmarks are of an idle one.
ALONE = ("functional", "benchmarks")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n 2 --dist loadgroup` one process runs what needs ranks, and the other the rest."""
    tests = Path(__file__).parent
    for item in items:
        folder, *_ = item.path.relative_to(tests).parts
        group = "ranks" if folder in ALONE else str(item.path.relative_to(tests))
        item.add_marker(pytest.mark.xdist_group(group))
