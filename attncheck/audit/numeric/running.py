"""One call of a model, recorded: the same on a rank and in the process of the unsharded model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from attncheck.audit.numeric.building import Given
from attncheck.audit.numeric.calls import Call, keywords
from attncheck.audit.numeric.captured import Captured, capture
from attncheck.audit.numeric.recording import Event, Recorder
from attncheck.audit.numeric.watching import Sighting, Watch
from attncheck.audit.numeric.weights import parameters, share
from attncheck.runner import compat
from attncheck.runner.compat import tree_leaves
from attncheck.runner.placements import chunk_bounds

# A cotangent by the number of the output and the output; None where none can be made for it.
Cotangent = Callable[[int, torch.Tensor], torch.Tensor | None]


@dataclass
class Record:
    """What one call showed, of a rank or of the unsharded model.

    `given`: the tensors it is called with; `gradients`: by parameter, None where none came; `others`: how
    many outputs are no real floating tensors; `no_backward`: why there was none; `dropout`: some was turned
    off; `full`: not all modules were recorded; `functions`: see `Recorder`; `refused`: {weight: why it could
    not be given the unsharded model's}; `parts`: what a rank holds of these.
    """

    outputs: list[Captured] = field(default_factory=list)
    gradients: dict[str, Captured | None] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    sightings: list[Sighting] = field(default_factory=list)
    others: int = 0
    no_backward: str = ""
    dropout: bool = False
    full: bool = False
    functions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    given: list[Captured] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    parts: dict[str, Captured] = field(default_factory=dict)


def run(
    model: nn.Module,
    given: Given,
    call: Call,
    cotangent: Cotangent,
    recorder: Recorder,
    watch: Watch | None = None,
    dtype: torch.dtype | None = None,
) -> Record:
    """Raises what the model raises."""
    watch = Watch(recorder) if watch is None else watch
    given = Given(given.args, keywords(given.kwargs, call)).afresh(dtype)
    record = Record(given=[capture(tensor) for tensor in given.tensors()])
    model.train(call.training)
    model.zero_grad(set_to_none=True)
    with (
        torch.compiler.set_stance("force_eager"),
        torch.set_grad_enabled(call.backward),
        recorder.recording(model),
        watch.watching(),
    ):
        returned = model(*given.args, **given.kwargs)
    leaves = [leaf for leaf in tree_leaves(returned) if isinstance(leaf, torch.Tensor)]
    outputs = [leaf for leaf in leaves if leaf.is_floating_point()]
    record.others = len(leaves) - len(outputs)
    record.outputs = [capture(out) for out in outputs]
    if call.backward:
        record.no_backward = _backward(outputs, cotangent)
        if not record.no_backward:
            record.gradients = {
                name: None if parameter.grad is None else capture(parameter.grad)
                for name, parameter in parameters(model)
            }
    record.events = recorder.told()
    record.sightings = watch.sightings
    record.dropout, record.full = watch.dropout, recorder.full
    record.functions = recorder.functions
    return record


def _backward(outputs: Sequence[torch.Tensor], cotangent: Cotangent) -> str:
    """Why there was no backward, or ''."""
    asked = [(number, out) for number, out in enumerate(outputs) if out.requires_grad]
    if not asked:
        return "no output requires a gradient"
    cotangents = [cotangent(number, out) for number, out in asked]
    if any(each is None for each in cotangents):
        return "an output has another shape than the unsharded model's"
    torch.autograd.backward([out for _, out in asked], cotangents)
    return ""


def whole_cotangent(number: int, like: torch.Tensor, seed: int) -> torch.Tensor:
    """Fixed random numbers, in the dtype of an output of the unsharded model."""
    generator = torch.Generator().manual_seed(seed + number)
    return torch.randn(tuple(like.shape), generator=generator).to(like.dtype)


def placed_cotangent(
    out: torch.Tensor, whole: torch.Tensor, like: torch.Tensor
) -> torch.Tensor | None:
    """This rank's part of a cotangent, for an output of the parallel model. `like`: the unsharded output, by
    whose values a plain part finds its place. None where the shape fits nothing."""
    whole = whole.to(out.dtype)
    if isinstance(out, DTensor):
        if tuple(out.shape) != tuple(whole.shape):
            return None
        placements = [Replicate() if p.is_partial() else p for p in out.placements]
        frame = DTensor.from_local(
            torch.empty_like(compat.local_tensor(out)),
            out.device_mesh,
            placements,
            run_check=False,
            shape=out.shape,
            stride=out.stride(),
        )
        local = share(whole, frame).to(out.device)
        return DTensor.from_local(
            local,
            out.device_mesh,
            placements,
            run_check=False,
            shape=out.shape,
            stride=out.stride(),
        )
    if out.shape == whole.shape:
        return whole.to(out.device)
    at = _place_of(out, like)
    return None if at is None else whole[at].to(out.device).contiguous()


def _place_of(part: torch.Tensor, whole: torch.Tensor) -> tuple[slice, ...] | None:
    """Where in the whole tensor a part of it lies: of the chunks of its shape, the one with the nearest
    values."""
    if part.ndim != whole.ndim:
        return None
    choices: list[list[slice]] = []
    for own, size in zip(part.shape, whole.shape, strict=True):
        parts = range(1, size // max(1, own) + 2)
        starts = {
            low
            for count in parts
            for low, high in (chunk_bounds(size, count, at) for at in range(count))
            if high - low == own
        }
        choices.append([slice(start, start + own) for start in sorted(starts)])
    places = list(itertools.product(*choices))
    values = part.detach().cpu().to(whole.dtype)
    return min(
        places, key=lambda at: float((values - whole[at]).abs().double().sum()), default=None
    )
