"""Which kernel op is at fault where a case is wrong: each op that it reached, once more on whole tensors.

A case is judged by what comes out at its end. Between, every kernel op took DTensors and gave DTensors, and
each can be asked by itself: put its inputs together as their placements say, call it on the whole tensors,
and compare with its outputs put together. The first op that fails this is the one to mend. Where all pass,
none of them is to blame, but what stands around them (a wrapper with the wrong placements).

Each rank keeps what its ops took and gave; rank 0 asks for it only where a case is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from attncheck.runner import compat
from attncheck.runner.compat import tree_flatten, tree_unflatten
from attncheck.runner.placements import assemble, local_shape, shard_dim

# Of one case: attncheck's own settings stay far below; a user's own probe may not.
MAX_OPS = 400
MAX_BYTES = 256 * 2**20
# An op is at fault by an error that no order of summation makes: so many roundings of the largest value, or
# this share of the RMS (in half precision so many roundings are no bound).
RMS_SHARE = 0.02
ROUNDINGS = 256
# What they return is another thing in each call.
_UNREPEATABLE = ("empty", "rand", "dropout", "bernoulli", "multinomial", "normal")


@dataclass(frozen=True)
class Held:
    """A tensor that an op took or gave on this rank; `placements` is None for an ordinary tensor."""

    local: torch.Tensor
    shape: tuple[int, ...]
    placements: tuple[str, ...] | None


@dataclass
class OpCall:
    """One call of a kernel op on this rank. `arguments` is the tree of its (args, kwargs), with the tensors
    in `inputs` taken out; `outputs` are the tensors that it returned, and then those that it wrote into."""

    op: str
    phase: str
    func: Any = None
    arguments: Any = None
    inputs: list[Held] = field(default_factory=list)
    outputs: list[Held] = field(default_factory=list)


@dataclass
class Record:
    """The calls of a case in their order; not `complete` where there were too many to keep."""

    calls: list[OpCall] = field(default_factory=list)
    complete: bool = True
    size: int = 0

    def begin(self, func: Any, op: str, phase: str, args: Any, kwargs: Any) -> OpCall | None:
        """To be called before the op is: it may write into what it takes."""
        if not self.complete:
            return None
        leaves, arguments = tree_flatten((args, dict(kwargs)))
        call = OpCall(op, phase, func)
        kept = [_keep(call.inputs, leaf) for leaf in leaves]
        call.arguments = (kept, arguments)
        return call

    def end(self, call: OpCall, args: Any, kwargs: Any, out: Any) -> None:
        for leaf in (*tree_flatten(out)[0], *written(call.func, args, kwargs)):
            _keep(call.outputs, leaf)
        held = (*call.inputs, *call.outputs)
        self.size += sum(t.local.numel() * t.local.element_size() for t in held)
        self.calls.append(call)
        if len(self.calls) > MAX_OPS or self.size > MAX_BYTES:
            self.calls, self.complete = [], False

    def to_send(self) -> list[OpCall]:
        """For another rank, which has the arguments that are no tensors itself."""
        return [
            OpCall(
                call.op,
                call.phase,
                inputs=[_on_cpu(held) for held in call.inputs],
                outputs=[_on_cpu(held) for held in call.outputs],
            )
            for call in self.calls
        ]


def _on_cpu(held: Held) -> Held:
    return replace(held, local=held.local.cpu())


class _Tensor:
    """Stands for the next tensor in a tree of arguments."""


def _keep(held: list[Held], leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    local, placements = leaf, None
    if isinstance(leaf, DTensor):
        local = compat.local_tensor(leaf)
        placements = tuple(compat.placement_text(p) for p in leaf.placements)
    held.append(Held(local.detach().clone(), tuple(leaf.shape), placements))
    return _Tensor


def written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that the op writes into, by its schema."""
    schema = compat.schema_of(func)
    if schema is None:
        return []
    named = dict(zip((a.name for a in schema.arguments), args, strict=False)) | dict(kwargs)
    return [
        named[a.name]
        for a in schema.arguments
        if a.alias_info is not None and a.alias_info.is_write and a.name in named
    ]


def illegal_shape(out: Any) -> str:
    """Why the local tensor of one of the DTensors in `out` is not what its placements say, or ''."""
    for leaf in tree_flatten(out)[0]:
        if not isinstance(leaf, DTensor):
            continue
        mesh = leaf.device_mesh
        coordinate = mesh.get_coordinate()
        texts = [compat.placement_text(p) for p in leaf.placements]
        known = all(t == "R" or t.startswith("P(") or shard_dim(t) is not None for t in texts)
        if coordinate is None or not known:
            continue
        for rank, local in enumerate(compat.each_rank(compat.local_tensor(leaf))):
            at = [compat.on_rank(index, rank) for index in coordinate]
            shape = tuple(compat.on_rank(size, rank) for size in leaf.shape)
            found = tuple(local.shape)
            expected = local_shape(shape, texts, tuple(mesh.shape), at)
            if found != expected and all(type(size) is int for size in found):
                whole = f"[{', '.join(texts)}] of {shape}"
                return f"a rank holds {found}, but {whole} is {expected}"
    return ""


def first_at_fault(records: Sequence[Sequence[OpCall]], mesh: Sequence[int]) -> tuple[str, bool]:
    """(the first op whose outputs are not what it gives on whole tensors, or ''; whether all were asked).

    `records`: the calls of every rank in rank order; the first has the arguments that are no tensors.
    """
    all_asked = bool(records[0])
    for together in _in_step(records):
        verdict = None if together is None else _is_at_fault(together, mesh)
        if verdict:
            assert together is not None
            return together[0].op, True
        all_asked = all_asked and verdict is False
    return "", all_asked


def _in_step(records: Sequence[Sequence[OpCall]]) -> list[tuple[OpCall, ...] | None]:
    if len({tuple(call.op for call in calls) for calls in records}) > 1:
        return [None]
    return list(zip(*records, strict=True))


def _is_at_fault(together: Sequence[OpCall], mesh: Sequence[int]) -> bool | None:
    """None where it cannot be told."""
    first = together[0]
    if any(word in first.op for word in _UNREPEATABLE):
        return None
    try:
        inputs = [_whole(held, mesh) for held in zip(*(c.inputs for c in together), strict=True)]
        outputs = [_whole(held, mesh) for held in zip(*(c.outputs for c in together), strict=True)]
    except ValueError:  # a placement that nobody can put together, or ranks that hold other things
        return None
    if any(
        whole is None or whole.gap > _noise(whole.value, held.local.dtype)
        for whole, held in zip(inputs, first.inputs, strict=True)
    ):
        return None  # there is no whole tensor to ask about: an op before this one made it so
    try:
        with compat.no_communication():
            expected = _call_whole(first, [whole.value for whole in inputs if whole is not None])
    except Exception:  # whatever an op makes of what a wrong op before it gave
        return None
    if len(expected) != len(outputs):
        return None
    return any(
        held.placements is not None and (whole is None or _differs(whole, want))
        for held, whole, want in zip(first.outputs, outputs, expected, strict=True)
    )


@dataclass(frozen=True)
class _Whole:
    """A tensor put together, in the dtype of its shards. `gap`: by how much replicas of it differ."""

    value: torch.Tensor
    gap: float


def _whole(held: Sequence[Held], mesh: Sequence[int]) -> _Whole | None:
    """None where the shards do not fit. Raises ValueError for a placement that it does not know."""
    first = held[0]
    if first.placements is None:
        return _Whole(first.local.cpu(), 0.0)
    made = assemble([h.local.cpu() for h in held], first.shape, first.placements, mesh)
    if made.whole is None:
        return None
    return _Whole(made.whole.to(first.local.dtype), made.replica_gap)


def _call_whole(call: OpCall, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    devices = [held.local.device for held in call.inputs]
    wholes = iter([t.clone().to(d) for t, d in zip(inputs, devices, strict=True)])
    kept, tree = call.arguments
    args, kwargs = tree_unflatten([next(wholes) if x is _Tensor else x for x in kept], tree)
    with torch.no_grad():
        out = call.func(*args, **kwargs)
    returned = [*tree_flatten(out)[0], *written(call.func, args, kwargs)]
    return [t.cpu() for t in returned if isinstance(t, torch.Tensor)]


def _noise(value: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest difference that summing in another order explains."""
    if not dtype.is_floating_point:
        return 0.0
    finite = value[torch.isfinite(value)]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return ROUNDINGS * torch.finfo(dtype).eps * largest


def _differs(whole: _Whole, want: torch.Tensor) -> bool:
    if tuple(whole.value.shape) != tuple(want.shape):
        return True
    got, wanted = whole.value.to(torch.float64), want.to(torch.float64)
    same = (got == wanted) | (torch.isnan(got) & torch.isnan(wanted))
    difference = torch.where(same, 0.0, (got - wanted).abs())
    if not difference.numel():
        return False
    noise = _noise(wanted, want.dtype)
    largest = max(float(difference.max()), whole.gap)
    if not math.isfinite(largest) or largest > noise:
        return True
    rms = wanted[torch.isfinite(wanted)].square().mean().sqrt()
    return bool(difference.square().mean().sqrt() > RMS_SHARE * rms)
