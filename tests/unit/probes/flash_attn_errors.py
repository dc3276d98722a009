"""Run by test_flash_attn*.py where the real flash_attn is: what settings give on whole tensors, as JSON.

`python flash_attn_errors.py LEVEL PROBE_FILE ...`: {operator/setting: {tensor: [error, bound]}} against the
float64 reference, or {operator/setting: text} where the setting is refused.

Bound: 16 roundings of the largest value of a result: about one for each of the products,
exponentials and sums that a gradient goes through (5.4 is the worst that was measured, in float32).
With dropout, values mean nothing: the facts that the oracle finds take their place.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from attncheck import standins
from attncheck.plugins import load_probe_file
from attncheck.probing import LEVELS, Operator, Setting
from attncheck.runner import case
from attncheck.runner.oracle import judge_dropout

ROUNDINGS = 16


def measured(operator: Operator, setting: Setting) -> Any:
    prepared = case.prepare(operator, setting, 0, "cpu")
    if prepared.refused is not None:
        reason, text = prepared.refused
        return f"{reason.value}: {text}"
    if setting.dropout:
        out = prepared.unsharded["out"].double()
        facts = judge_dropout(out, [out], sharded=False, rate=setting.dropout)
        return {"out": [float(len(facts)), 0.0], "grad.v": [0.0, 0.0]}
    reference = case.run_reference(prepared, 0)
    results = set(prepared.unsharded)
    written = {
        spec.name for spec in prepared.specs if spec.mutable
    }  # a reference may leave them alone
    assert results - written <= set(reference) <= results
    errors = {}
    for name, exact in reference.items():
        got = prepared.unsharded[name]
        assert got.shape == exact.shape, name
        assert bool((exact.isinf() == got.isinf()).all()), name
        finite = exact.isfinite()
        error = (got.double() - exact)[finite].abs().max()
        bound = ROUNDINGS * torch.finfo(got.dtype).eps * exact[finite].abs().max()
        errors[name] = [float(error), float(bound)]
        assert all(math.isfinite(number) for number in errors[name]), name
    return errors


def main(level: str, *probe_files: str) -> None:
    standins.provide("flash_attn_2_cuda")
    report = {
        f"{operator.name}/{setting.name}": measured(operator, setting)
        for probe_file in probe_files
        for operator in load_probe_file(Path(probe_file)).operators
        for setting in operator.settings
        if LEVELS.index(setting.level) <= LEVELS.index(level)
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
