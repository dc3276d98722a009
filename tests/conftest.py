"""Settings that hold for every test."""

import sys
from pathlib import Path

import hypothesis

# The helpers in tests/unit (`real_scan`, `sample_report`, `strategies`) are importable by every test.
sys.path.insert(0, str(Path(__file__).parent / "unit"))

# Machines are shared and noisy: a slow example is no failure.
hypothesis.settings.register_profile("attncheck", deadline=None)
hypothesis.settings.load_profile("attncheck")
