"""Settings that hold for every test."""

import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# The helpers in tests/unit (`real_scan`, `sample_report`, `strategies`) are importable by every test.
sys.path.insert(0, str(Path(__file__).parent / "unit"))

# Machines are shared and noisy: a slow example is no failure.
hypothesis.settings.register_profile("attncheck", deadline=None)
hypothesis.settings.load_profile("attncheck")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2`: what starts processes of its own runs on one worker, one after the other as it expects,
    and the unit tests on the other beside it."""
    from xdist.scheduler import LoadScopeScheduling

    class BesideProcesses(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file.startswith("tests/unit/") else "processes"

    return BesideProcesses(config, log)
