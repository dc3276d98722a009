"""Run by test_xformers.py where the real xformers is: what settings give on whole tensors, as JSON.

{operator/setting: {tensor: [error, bound]}} against the float64 reference, or {operator/setting: text} where
xformers refuses the setting.
"""

from __future__ import annotations

import json
from pathlib import Path

from flash_attn_errors import measured

from attncheck import standins
from attncheck.plugins import load_probe_file

PROBE_FILE = Path(__file__).parents[3] / "probes" / "xformers.py"

if __name__ == "__main__":
    standins.provide("xformers")
    report = {
        f"{operator.name}/{setting.name}": measured(operator, setting)
        for operator in load_probe_file(PROBE_FILE).operators
        for setting in operator.settings
    }
    print(json.dumps(report))
