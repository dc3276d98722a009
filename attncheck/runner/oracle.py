"""The oracle: float64 reference, tolerance, replicas, placements. It judges values, nothing else.

Tolerance (the convention of the flash-attention test suites): the error that the same operator shows on
whole tensors in the same dtype is what the kernel costs; sharding may double it (another order of
summation), plus a few roundings of the result:

    bound = 2 * err_unsharded + atol(dtype),   atol = 4 * eps(dtype) * max|reference|

4 roundings: one per partial result of a reduction over the ranks and one to store it, on 2 ranks in
forward and backward. Beyond `bound` it is drift. It is `wrong` when no rounding explains it: the error
is above `WRONG_FACTOR` bounds, or the RMS error is a visible share of the reference's RMS where the
unsharded operator's is not, or values are not finite where the reference is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from attncheck.model import ErrorStat, Fact
from attncheck.runner.placements import assemble

ATOL_EPS = 4.0
WRONG_FACTOR = 16.0
# Share of the reference's RMS that an error must reach to be a wrong region rather than rounding.
WRONG_RMS_SHARE = 0.05


@dataclass(frozen=True)
class Expected:
    """The reference of one tensor (float64, whole) and the unsharded operator's own result."""

    reference: torch.Tensor
    unsharded: torch.Tensor


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


def atol(dtype: torch.dtype, scale: float) -> float:
    return ATOL_EPS * torch.finfo(dtype).eps * scale


def error_stat(value: torch.Tensor, expected: Expected, dtype: torch.dtype) -> ErrorStat:
    """Errors of `value` (float64, whole) against the reference.

    Where both are the same infinity (the log-sum-exp of a row that sees no key) there is no error.
    """
    reference = expected.reference
    difference = _difference(value, reference)
    finite = bool(torch.isfinite(difference).all())
    own = (
        float(_difference(expected.unsharded.to(torch.float64), reference).max())
        if reference.numel()
        else 0.0
    )
    scale = _scale(reference)
    bound = 2 * own + atol(dtype, max(scale, torch.finfo(dtype).tiny))
    largest = (
        float(difference.max()) if finite and difference.numel() else (0.0 if finite else math.inf)
    )
    return ErrorStat(
        max=largest,
        mean=float(difference.mean()) if finite and difference.numel() else largest,
        rms=float(difference.square().mean().sqrt()) if finite and difference.numel() else largest,
        unsharded_max=own,
        bound=bound,
        ratio=largest / bound if bound else (0.0 if largest == 0 else math.inf),
        scale=scale,
        note=_worst_place(difference) if finite and largest > bound else "",
    )


def _difference(value: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return torch.where(value == reference, 0.0, (value - reference).abs())


def _scale(reference: torch.Tensor) -> float:
    finite = reference[torch.isfinite(reference)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _rms(reference: torch.Tensor) -> float:
    finite = reference[torch.isfinite(reference)]
    return float(finite.square().mean().sqrt()) if finite.numel() else 0.0


def classify(stat: ErrorStat, reference_rms: float) -> str:
    """`ok`, `drift` or `wrong`."""
    if stat.max <= stat.bound:
        return "ok"
    if not math.isfinite(stat.max) or stat.ratio > WRONG_FACTOR:
        return "wrong"
    return "wrong" if stat.rms > WRONG_RMS_SHARE * reference_rms else "drift"


def disagreement(name: str, expected: Expected) -> str:
    """Why the operator and its reference are not about the same thing on whole tensors, or ''.

    Everything is judged against what the operator shows unsharded: were that no rounding, nothing that
    shards do could be told from it any more.
    """
    dtype = expected.unsharded.dtype
    stat = error_stat(expected.unsharded.to(torch.float64), expected, dtype)
    rounding = WRONG_RMS_SHARE * _rms(expected.reference) + atol(dtype, 1.0)
    if math.isfinite(stat.max) and stat.rms <= rounding:
        return ""
    place = _worst_place(_difference(expected.unsharded.to(torch.float64), expected.reference))
    where = place if math.isfinite(stat.max) else ""
    return f"{name} differs from its reference by up to {stat.max:.3g}, on whole tensors{where}"


def judge_values(
    results: Mapping[str, RankResult],
    expected: Mapping[str, Expected],
    mesh: Sequence[int],
) -> Verdict:
    """Compare every result (`out`, `lse`, `grad.q` ...) with its reference. All tensors on the CPU.

    A result is judged in the dtype in which the unsharded operator returns it.
    """
    verdict = Verdict()
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
        stat = error_stat(assembly.whole, want, want.unsharded.dtype)
        verdict.errors[name] = stat
        if assembly.replica_gap > 0:
            detail = (
                f"ranks that should hold the same values differ by up to {assembly.replica_gap:.3g}"
            )
            verdict.facts.append(Fact("replicas_differ", name, detail))
        state = classify(stat, _rms(want.reference))
        if not math.isfinite(stat.max):
            verdict.facts.append(Fact("nonfinite", name, "not finite where the reference is"))
        if state != "ok":
            detail = f"max error {stat.max:.3g}, bound {stat.bound:.3g}, ratio {stat.ratio:.3g}"
            verdict.facts.append(Fact(f"{state}_{kind}", name, f"{detail}{stat.note}"))
    return verdict


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
    draws = whole.numel()
    measured = 1.0 - float(kept.double().mean())
    # 5 standard deviations of a binomial: one false alarm in 1.7 million.
    if abs(measured - rate) > 5 * math.sqrt(rate * (1 - rate) / draws):
        facts.append(Fact("dropout_rate", "out", f"rate {measured:.4f} instead of {rate}"))
    if sharded:
        patterns = [(local > kept_value / 2) for local in locals_by_rank if local.numel()]
        for a in range(len(patterns)):
            for b in range(a + 1, len(patterns)):
                if patterns[a].shape == patterns[b].shape and torch.equal(patterns[a], patterns[b]):
                    detail = (
                        f"ranks {a} and {b} dropped exactly the same elements of different shards"
                    )
                    return [*facts, Fact("dropout_shared", "out", detail)]
    return facts


def _worst_place(difference: torch.Tensor) -> str:
    index = torch.unravel_index(difference.argmax(), difference.shape)
    return f" at global index {tuple(int(i) for i in index)}"
