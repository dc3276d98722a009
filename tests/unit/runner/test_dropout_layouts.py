"""Dropout judged in another layout: identity values and mask lie where the dims' roles say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attncheck import plugins
from attncheck.model import Status
from attncheck.plan import Selection, plan
from attncheck.runner import judge
from attncheck.runner.case import Local, Prepared, RankRecord
from attncheck.runner.inputs import cotangent, whole_tensors

PROBE = plugins.load_probe_file(Path(__file__).resolve().parents[3] / "probes" / "flash_attn.py")
OPERATOR = next(o for o in PROBE.operators if o.name == "flash_attn_func")
SETTING = next(s for s in OPERATOR.settings if s.name == "dropout")
SPECS = OPERATOR.tensors(SETTING)
WHOLES = whole_tensors(OPERATOR.name, SETTING, SPECS, seed=1)
KEYS = SETTING["kv_sequence"]


def test_values_are_the_identity_for_every_head() -> None:
    v = WHOLES["v"]  # (batch, kv_sequence, kv_heads, head_dim)
    assert v.shape == (6, KEYS, 4, KEYS)
    for head in range(4):
        assert torch.equal(v[2, :, head], torch.eye(KEYS))


@pytest.mark.parametrize("other_mask", [False, True])
def test_the_gradient_of_v_must_have_the_mask_of_the_forward(other_mask: bool) -> None:
    random = torch.Generator().manual_seed(3)
    shape = (6, SETTING["sequence"], 4, KEYS)
    masks = [torch.rand(shape, generator=random) >= SETTING.dropout for _ in range(2)]
    out, other = (mask / (KEYS * (1 - SETTING.dropout)) for mask in masks)
    dout = cotangent(OPERATOR.name, SETTING, torch.Size(shape), torch.float32, 1)
    dv = torch.einsum("bihj,bihd->bjhd", other if other_mask else out, dout)
    results = {"out": Local(out, shape, ("R",)), "grad.v": Local(dv, tuple(dv.shape), ("R",))}
    selection = Selection(
        operators=(OPERATOR.name,), settings=("dropout",), placements=("replicate",)
    )
    case = next(c for c in plan((PROBE,), {"tp": 2}, selection) if c.direction == "backward")
    prepared = Prepared(OPERATOR, SETTING, SPECS, WHOLES, {"out": out, "grad.v": dv})
    records = [RankRecord(rank, results=results, warm=results) for rank in range(2)]
    values = [judge.Values(1, prepared, {})]
    found = judge.judge(case, values, records, (6, 7), ())
    if other_mask:
        assert found.status is Status.WRONG
        assert [(f.code, f.subject) for f in found.facts] == [("wrong_gradient", "grad.v")]
    else:
        assert (found.status, found.facts) == (Status.SUPPORTED, ())
