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


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n 2 --dist loadgroup`: what starts processes of its own runs one after the other, as it expects,
    and the unit tests beside it."""
    for item in items:
        if "unit" not in item.path.parts:
            item.add_marker(pytest.mark.xdist_group("processes"))
