"""Known models on 2 ranks: their attention calls, reduced and placed as planned, run with real numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch_here import before

from attncheck import models
from attncheck.model import Outcome, Status
from attncheck.plan import Selection
from attncheck.probing import Setting
from attncheck.runner.scan import ScanRequest, scan

# A video model, a language model with grouped queries, one with a window and a softcap, and two degrees of
# tensor parallelism that do not divide the heads of keys: 16 for 8 of them, 4 for 10.
DEPLOYED = (
    ("wan2.1-t2v-14b", 8),
    ("llama3-8b", 8),
    ("gemma2-9b", 8),
    ("llama3-8b", 16),
    ("phi-4", 4),
)
OPERATORS = ("flash_attn_func", "sdpa_cuda.flash", "fallback.matmul")

# By model, degree, call, operator and direction.
Outcomes = dict[tuple[str, int, str, str, str], Outcome]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    settings: dict[str, list[Setting]] = {}
    named = {}
    for name, tp in DEPLOYED:
        for one in models.settings(models.find(name), {"tp": tp}, operators=OPERATORS):
            if one.setting is None:
                continue
            assert one.mesh == {"tp": 2}
            # Two deployments of one model: each gets names of its own.
            setting = replace(one.setting, name=f"{one.setting.name}.{tp}")
            settings.setdefault(one.operator, []).append(setting)
            named[setting.name] = (name, tp, one.call)
    report = scan(
        ScanRequest(
            selection=Selection(operators=tuple(settings), level="full"),
            meshes=({"tp": 2},),
            seed=4,
            with_packages=("flash-attn",),
            run_dir=Path(tmp_path_factory.mktemp("presets")) / "run",
            settings={operator: tuple(some) for operator, some in settings.items()},
            only={operator: tuple(s.name for s in some) for operator, some in settings.items()},
        ),
        lambda message: None,
        lambda done, planned, case: None,
    )
    return {
        (*named[r.case.setting_name], r.case.operator, r.case.direction): r.outcome
        for r in report.cases
    }


def test_every_case_ran(outcomes: Outcomes) -> None:
    # flash-attn: 2 + 1 + 2 + 1 + 1 calls, SDPA's flash op 2 + 1 + 0 + 1 + 1, matmul those of Wan; both ways.
    assert len(outcomes) == 2 * (7 + 5 + 2)
    assert {key for key, outcome in outcomes.items() if not outcome.status.ran} == set()


def test_flash_attn_is_refused_for_every_model(outcomes: Outcomes) -> None:
    """The report that attncheck began with."""
    found = {key: o for key, o in outcomes.items() if key[3] == "flash_attn_func"}
    assert len(found) == 14
    for key, outcome in found.items():
        assert outcome.status is Status.MISSING_STRATEGY, key
        assert "flash_attn._flash_attn_forward.default" in {op.op for op in outcome.missing_ops}


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_heads_that_the_ranks_divide_work(outcomes: Outcomes, direction: str) -> None:
    for model, call in (
        ("wan2.1-t2v-14b", "self"),
        ("wan2.1-t2v-14b", "text"),
        ("llama3-8b", "self"),
    ):
        outcome = outcomes[model, 8, call, "sdpa_cuda.flash", direction]
        assert outcome.status.usable, (model, call, outcome.message)
        if not before("2.13.0"):
            assert outcome.status is Status.SUPPORTED
            assert outcome.collectives == ()


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_heads_of_keys_that_must_be_copied_work(outcomes: Outcomes, direction: str) -> None:
    """One head of keys on both ranks, as each has after it was copied; moving q is PyTorch's own idea."""
    outcome = outcomes["llama3-8b", 16, "self", "sdpa_cuda.flash", direction]
    if before("2.9.1"):  # PyTorch's own strategy for it indexes beyond its placements
        assert outcome.message == "list index out of range"
    else:
        assert outcome.status.usable


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_groups_that_ranks_cut_through_do_not_work(outcomes: Outcomes, direction: str) -> None:
    """What `degrees` says of phi-4 on 4 ranks: some raise, and the others go on."""
    (division,) = models.degrees(models.find("phi-4"), tp=4, cp=1)
    assert "raise while the others go on" in division.why
    outcome = outcomes["phi-4", 4, "self", "sdpa_cuda.flash", direction]
    assert not outcome.status.usable
    if not before("2.13.0"):
        assert outcome.status is Status.DIVERGED, outcome.message
