"""How far a result is from its reference: the tolerance, the statistics, and what they say of the cause.

Where each boundary comes from. None is tuned; what healthy operators measure against them is published in
reports/published/trust/false-alarms.md, and made anew by `python tests/oracle/false_alarms.py`.

`supported | drift`: a largest error above

    bound = 2 * err_unsharded + atol,   atol = 2 * sqrt(2 * ranks) * eps(dtype) * max|reference|

- `2 * err_unsharded` is the convention of the flash-attention test suites. The error of the operator on
  whole tensors and its error on shards are two maxima of as many draws from one distribution of rounding
  errors; for N errors with Gaussian tails the one is above twice the other with a probability of about N^-3
  (1e-6 for 100 elements).
- `atol` is for the roundings that only the sharded run has. A reduction over n ranks rounds n parts,
  n - 1 sums and the stored result: 2n roundings, of numbers that can be twice as large as their sum
  (parts cancel). Each is off by at most eps/2, independently, so together they grow like the square root of
  their number (Higham's probabilistic bound); twice that is 3.5 standard deviations of such a sum. On
  2 ranks this is 4 eps.
- A gradient that vanishes (with one key dq and dk are 0) is a difference of equal numbers, and all that an
  operator gives is what their roundings leave. Where the reference is below one rounding (eps) of the largest
  gradient of the case, that one takes the place of max|reference|.

`drift | wrong`: an error that no rounding explains. Either

- the largest error is above `WRONG_FACTOR` = 16 bounds. Rounding that grew is a sum carried out in the
  working precision: L additions make it sqrt(L) times larger, and no reduction in a probe is longer than
  256 = 16^2; or
- a row (the last dim) is wrong: its RMS error is above 16 times what the operator shows there unsharded, and
  above 16 unit roundoffs of bfloat16, the coarsest dtype there is (6.25 %), of the values in that row and of
  those in the whole tensor. In bfloat16 a head or a row of wrong values stays below 16 bounds; or
- a value is not finite where the reference is.

Replicas must agree in every bit: they are said to be the same tensor, and code branches on them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attncheck.model import ErrorStat, Fact, Place
from attncheck.runner.placements import border_distance, owners

WRONG_FACTOR = 16.0
# 16 unit roundoffs of bfloat16 (eps / 2 = 2^-8).
WRONG_ROW_SHARE = WRONG_FACTOR * 2.0**-8


@dataclass(frozen=True)
class Expected:
    """The reference of one tensor (float64, whole) and the unsharded operator's own result."""

    reference: torch.Tensor
    unsharded: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """How a result lies on the mesh: for saying where an error is."""

    placements: tuple[str, ...] = ()
    mesh: tuple[int, ...] = ()

    @property
    def ranks(self) -> int:
        return math.prod(self.mesh)


WHOLE = Layout()


def atol(dtype: torch.dtype, scale: float, ranks: int = 1) -> float:
    """Absolute error that reducing and storing values up to `scale` over `ranks` ranks explains."""
    return 2 * math.sqrt(2 * ranks) * torch.finfo(dtype).eps * scale


def error_stat(
    value: torch.Tensor,
    expected: Expected,
    dtype: torch.dtype,
    layout: Layout = WHOLE,
    among: float = 0.0,
) -> ErrorStat:
    """Errors of `value` (float64, whole) against the reference. `among`: the largest value among the tensors
    from whose size this one can come by cancellation.

    Where both are the same infinity (the log-sum-exp of a row that sees no key) there is no error.
    """
    reference = expected.reference
    unsharded = expected.unsharded.to(torch.float64)
    difference = _difference(value, reference)
    own = _difference(unsharded, reference)
    own_max = float(own.max()) if own.numel() else 0.0
    scale = largest_value(reference)
    rounded = among if scale < torch.finfo(dtype).eps * among else scale
    bound = 2 * own_max + atol(dtype, max(rounded, torch.finfo(dtype).tiny), layout.ranks)
    if not bool(torch.isfinite(difference).all()):
        inf = math.inf
        return ErrorStat(inf, inf, inf, own_max, bound, inf, scale)
    if not difference.numel():
        return ErrorStat(0.0, 0.0, 0.0, own_max, bound, 0.0, scale)
    largest = float(difference.max())
    # What sharding changed: without a bug the sign of it is a coin toss, whatever bias the kernel has.
    change = torch.where(value == unsharded, 0.0, value - unsharded)
    total = float(change.abs().sum())
    ulps = difference / _ulp(reference, dtype)
    worst = int(difference.argmax())
    place = _place(difference, worst, bound, layout)
    return ErrorStat(
        max=largest,
        mean=float(difference.mean()),
        rms=float(difference.square().mean().sqrt()),
        unsharded_max=own_max,
        bound=bound,
        ratio=largest / bound if bound else (0.0 if largest == 0 else math.inf),
        scale=scale,
        note=_note(place) if largest > bound else "",
        unsharded_rms=float(own.square().mean().sqrt()),
        unsharded_ratio=largest / own_max if own_max else (0.0 if largest == 0 else math.inf),
        ulps=float(ulps.flatten()[worst]),
        ulps_median=float(ulps.median()),
        row=_worst_row(difference, own, reference, bound),
        sign_bias=float(change.sum()) / total if total else 0.0,
        size_bias=float((change * reference.sign()).sum()) / total if total else 0.0,
        worst=place,
    )


def classify(stat: ErrorStat) -> str:
    """`ok`, `drift` or `wrong`: see the head of this file."""
    if stat.max <= stat.bound:
        return "ok"
    if not math.isfinite(stat.max) or stat.ratio > WRONG_FACTOR:
        return "wrong"
    return "wrong" if stat.row > 1 else "drift"


def disagreement(name: str, expected: Expected) -> str:
    """Why the operator and its reference are not about the same thing on whole tensors, or ''.

    Everything is judged against what the operator shows unsharded: were that no rounding, nothing that
    shards do could be told from it any more.
    """
    dtype = expected.unsharded.dtype
    stat = error_stat(expected.unsharded.to(torch.float64), expected, dtype)
    rounding = WRONG_ROW_SHARE * _rms(expected.reference) + atol(dtype, 1.0)
    if math.isfinite(stat.max) and stat.rms <= rounding:
        return ""
    where = f" at global index {stat.worst.index}" if stat.worst else ""
    return f"{name} differs from its reference by up to {stat.max:.3g}, on whole tensors{where}"


def diagnose(name: str, stat: ErrorStat) -> list[Fact]:
    """What the places of the errors say of their cause, beside how large they are."""
    place = stat.worst
    if place is None or place.beyond < 2:
        return []
    facts = []
    # By chance alone every one of them would lie there with this probability.
    if place.beyond_at_border == place.beyond and place.at_border**place.beyond < 1e-3:
        share = f"{place.at_border:.0%} of the tensor"
        detail = f"all {place.beyond} elements beyond the bound lie next to a border between shards ({share})"
        facts.append(Fact("at_border", name, detail))
    if place.beyond_on is not None:
        detail = f"all {place.beyond} elements beyond the bound are those of rank {place.beyond_on}"
        facts.append(Fact("on_one_rank", name, detail))
    return facts


def _difference(value: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return torch.where(value == reference, 0.0, (value - reference).abs())


def largest_value(reference: torch.Tensor) -> float:
    """The largest finite magnitude; 0 where there is none."""
    if not reference.numel():
        return 0.0
    return float(torch.nan_to_num(reference, nan=0.0, posinf=0.0, neginf=0.0).abs().max())


def _rms(values: torch.Tensor) -> float:
    finite = values[torch.isfinite(values)]
    return float(finite.square().mean().sqrt()) if finite.numel() else 0.0


def _ulp(reference: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance between neighbouring numbers of `dtype` at each value (that of tiny at smaller ones)."""
    info = torch.finfo(dtype)
    size = torch.nan_to_num(reference.abs(), posinf=0.0).clamp_min(info.tiny)
    return torch.exp2(torch.floor(torch.log2(size))) * info.eps


def _worst_row(
    difference: torch.Tensor, own: torch.Tensor, reference: torch.Tensor, bound: float
) -> float:
    """Over rows with an element beyond `bound`: how far their RMS error is above what rounding explains.

    1 is the boundary; 0 where no element is beyond the bound.
    """
    rows, own, values = (
        t.reshape(-1, t.shape[-1]) if t.ndim else t.reshape(1, 1)
        for t in (difference, own, torch.nan_to_num(reference, posinf=0.0, neginf=0.0))
    )
    beyond = rows.amax(-1) > bound
    if not bool(beyond.any()):
        return 0.0
    error, own, size = (t[beyond].square().mean(-1).sqrt() for t in (rows, own, values))
    size = size.clamp_min(_rms(reference))
    explained = torch.maximum(WRONG_ROW_SHARE * size, WRONG_FACTOR * own)
    return float((error / explained.clamp_min(torch.finfo(torch.float64).tiny)).max())


def _place(difference: torch.Tensor, worst: int, bound: float, layout: Layout) -> Place:
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), difference.shape))
    if not layout.mesh:
        return Place(index)
    where = (tuple(difference.shape), layout.placements, layout.mesh)
    distance = border_distance(*where)
    beyond = difference > bound
    count = int(beyond.sum())
    held = owners(index, *where)
    if distance is None or not count:
        return Place(index, held, None if distance is None else int(distance[index]), count)
    near = distance == 0
    return Place(
        index,
        held,
        int(distance[index]),
        beyond=count,
        beyond_at_border=int((beyond & near).sum()),
        at_border=float(near.double().mean()),
        beyond_on=_only_owner(beyond, held, where),
    )


def _only_owner(beyond: torch.Tensor, held: Sequence[int], where: tuple[Any, ...]) -> int | None:
    """The one rank that holds every element beyond the bound, if other ranks hold other elements."""
    if len(held) != 1:
        return None
    for index in beyond.nonzero().tolist():
        if owners(index, *where) != tuple(held):
            return None
    return held[0]


def _note(place: Place) -> str:
    """Where the worst element is, in words that go on a sentence."""
    text = f" at global index {place.index}"
    if not place.owners or place.border is None:
        return text
    text += " on rank " + ", ".join(map(str, place.owners))
    # Where most elements are next to a border, being there says nothing.
    return text + (", next to a border between shards" if _tells(place) else "")


def _tells(place: Place) -> bool:
    return place.border == 0 and place.at_border <= 0.25
