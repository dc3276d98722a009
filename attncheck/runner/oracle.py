"""The oracle: results on all ranks against a float64 reference. It judges values, nothing else.

Tolerance and statistics are in `drift`. Here: placements, replicas, and dropout masks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from attncheck.model import ErrorStat, Fact
from attncheck.runner.drift import (
    Expected,
    Layout,
    classify,
    diagnose,
    error_stat,
    largest_value,
)
from attncheck.runner.placements import assemble


@dataclass(frozen=True)
class RankResult:
    """One result on all ranks: each rank's local tensor, and the placements rank 0 saw.

    `placements` is None for an ordinary tensor (each rank then holds, or should hold, the whole).
    """

    locals: Sequence[torch.Tensor]
    shape: tuple[int, ...]
    placements: tuple[str, ...] | None


@dataclass
class Verdict:
    """What the oracle says of one case: errors by tensor, and facts beyond numbers."""

    errors: dict[str, ErrorStat] = field(default_factory=dict)
    facts: list[Fact] = field(default_factory=list)
    wholes: dict[str, torch.Tensor] = field(default_factory=dict)


def judge_values(
    results: Mapping[str, RankResult],
    expected: Mapping[str, Expected],
    mesh: Sequence[int],
    summed: torch.dtype | None = None,
) -> Verdict:
    """Compare every result (`out`, `lse`, `grad.q` ...) with its reference. All tensors on the CPU.

    A result is judged in the dtype in which the unsharded operator returns it, or in `summed`, where that is
    coarser: the dtype of an argument that comes as a partial sum, which is carried out in it.
    """
    verdict = Verdict()
    gradients = [want for name, want in expected.items() if name.startswith("grad.")]
    among = max((largest_value(want.reference) for want in gradients), default=0.0)
    for name, want in expected.items():
        kind = "gradient" if name.startswith("grad.") else "result"
        result = results.get(name)
        if result is None:
            if kind == "gradient":
                verdict.facts.append(
                    Fact("gradient_missing", name, "no gradient reached this input")
                )
            else:
                verdict.facts.append(Fact("wrong_result", name, "this output did not come back"))
            continue
        placements = result.placements
        if placements is None:
            verdict.facts.append(Fact("plain_result", name, "an ordinary tensor came back"))
            placements = ("R",) * len(mesh)
        shape = tuple(want.reference.shape)
        if result.shape != shape:
            detail = f"global shape {result.shape}, expected {shape}"
            verdict.facts.append(Fact("local_shape", name, detail))
            continue
        assembly = assemble(result.locals, shape, placements, mesh)
        if assembly.whole is None:
            verdict.facts.append(Fact("local_shape", name, "; ".join(assembly.shape_faults)))
            continue
        verdict.wholes[name] = assembly.whole
        layout = Layout(tuple(placements), tuple(mesh))
        of = among if kind == "gradient" else 0.0
        dtype = _coarser(want.unsharded.dtype, summed)
        stat = error_stat(assembly.whole, want, dtype, layout, of)
        verdict.errors[name] = stat
        if assembly.replica_gap > 0:
            detail = (
                f"ranks that should hold the same values differ by up to {assembly.replica_gap:.3g}"
            )
            verdict.facts.append(Fact("replicas_differ", name, detail))
            if assembly.replica_gap > stat.bound:  # the first replica of each part is judged below
                verdict.facts.append(
                    Fact("replica_wrong", name, f"beyond the bound {stat.bound:.3g}")
                )
        state = classify(stat)
        if not math.isfinite(stat.max):
            verdict.facts.append(Fact("nonfinite", name, "not finite where the reference is"))
        if state != "ok":
            detail = f"max error {stat.max:.3g}, bound {stat.bound:.3g}, ratio {stat.ratio:.3g}"
            verdict.facts.append(Fact(f"{state}_{kind}", name, f"{detail}{stat.note}"))
            verdict.facts += diagnose(name, stat)
    return verdict


def _coarser(dtype: torch.dtype, other: torch.dtype | None) -> torch.dtype:
    return max(dtype, other or dtype, key=lambda one: torch.finfo(one).eps)


def judge_dropout(
    whole: torch.Tensor, locals_by_rank: Sequence[torch.Tensor], sharded: bool, rate: float
) -> list[Fact]:
    """Judge a dropout mask that can be read off the output.

    The probe calls attention with q = 0 (uniform probabilities 1/n) and v = identity, so that
    out[..., i, j] is `keep[i, j] / (n * (1 - rate))`: values, rate and independence of the shards are all
    visible, whatever random numbers were drawn.
    """
    facts = []
    columns = whole.shape[-1]
    kept_value = 1.0 / (columns * (1.0 - rate))
    kept = whole > kept_value / 2
    expected = torch.where(kept, kept_value, 0.0)
    if float((whole - expected).abs().max()) > 0.02 * kept_value:
        detail = f"values other than 0 and {kept_value:.4g} in the output"
        facts.append(Fact("dropout_values", "out", detail))
    shared = _alike(locals_by_rank, kept_value) if sharded else None
    # What shards share is drawn once.
    draws = whole.numel() / (len(locals_by_rank) if shared else 1)
    measured = 1.0 - float(kept.double().mean())
    # 5 standard deviations of a binomial: one false alarm in 1.7 million.
    if abs(measured - rate) > 5 * math.sqrt(rate * (1 - rate) / draws):
        facts.append(Fact("dropout_rate", "out", f"rate {measured:.4f} instead of {rate}"))
    if shared:
        a, b = shared
        detail = f"ranks {a} and {b} dropped exactly the same elements of different shards"
        facts.append(Fact("dropout_shared", "out", detail))
    return facts


def _alike(locals_by_rank: Sequence[torch.Tensor], kept_value: float) -> tuple[int, int] | None:
    """Two shards with the same mask, by their ranks; shards without elements have none."""
    patterns = {
        rank: local > kept_value / 2 for rank, local in enumerate(locals_by_rank) if local.numel()
    }
    for (a, one), (b, other) in itertools.combinations(patterns.items(), 2):
        if one.shape == other.shape and torch.equal(one, other):
            return a, b
    return None
