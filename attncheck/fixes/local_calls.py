"""Functions that are no dispatcher ops, called on each rank's own shards.

DTensor never gets to see such a function (pybind, Triton, CuTe behind Python), so no strategy can be
registered for it; it would read a DTensor through a null pointer. Its wrapper here does what DTensor does
for an op: choose the cheapest layout that the signature allows, bring the arguments to it, call the
function on the local tensors, and make DTensors of the results.

That is `torch.distributed.tensor.experimental.local_map`, and three things that it leaves to its caller: the
placements follow from the call instead of being fixed; an argument that is whole where others are sharded
gets a gradient that is a sum over the ranks (`in_grad_placements`, silently one rank's share without it);
and results have their global shape, where `local_map` multiplies the local one by the ranks, which is wrong
for shards of different sizes.

This file is part of modules that `attncheck fix` writes: it needs torch alone.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from attncheck.fixes.notation import (
    WAYS,
    Layout,
    Refused,
    Signature,
    alternatives,
    by_op,
    form_of,
    layouts,
    leaving,
    listed,
    read,
)
from attncheck.fixes.strategies import (
    ABSENT,
    KEPT,
    LEFT,
    MADE_BY,
    REGISTERED,
    NotRegistered,
    cheapest,
    find_op,
)

_Choice = tuple[Signature, Layout]
_KEPT_CHOICES = 1024  # calls that differ in shapes, placements or flags


def local_call(forms: Sequence[Signature], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which on DTensors is called on their local shards; its forms are told apart by their
    arguments. On ordinary tensors it is called as it is.

    In the conditions of a signature the items of a tuple are called `window_size[0]`, and the class of an
    argument `type(attn_bias)`. Ordinary tensors beside DTensors are the same on every rank, and are
    taken as they are. The wrapper raises Refused where no layout is right.
    """
    declared = inspect.signature(function)
    chosen: dict[Any, _Choice] = {}  # as DTensor keeps what it propagated

    @functools.wraps(function)
    def on_shards(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(value, DTensor) for value in (*args, *kwargs.values())):
            return function(*args, **kwargs)
        bound = declared.bind(*args, **kwargs)
        bound.apply_defaults()
        values = _by_name(bound)
        key = _key(values)
        choice = chosen.get(key)
        if choice is None:
            choice = _choose(forms, values)
            if key is not None and len(chosen) < _KEPT_CHOICES:
                chosen[key] = choice
        call = _lay_out(*choice, values)
        _localize(bound, call)
        return _assemble(function(*bound.args, **bound.kwargs), call)

    on_shards.made_by = MADE_BY  # type: ignore[attr-defined]
    return on_shards


@dataclass(frozen=True)
class _Call:
    """A call laid out: its arguments by name, and the local tensor for each DTensor among them."""

    signature: Signature
    layout: Layout
    mesh: Any
    values: Mapping[str, Any]
    locals: Mapping[str, torch.Tensor]

    def size(self, letter: str, local: bool = False) -> int | None:
        """The size of a named dim, of all of it or of this rank's part."""
        sizes = []
        for name, text in self.signature.takes.items():
            tensor = self.values.get(name)
            if isinstance(tensor, torch.Tensor):
                part = self.locals.get(name, tensor)
                form = read(text).of(tensor.ndim) or ()
                if letter in form:
                    sizes.append((tensor, part)[local].shape[form.index(letter)])
        return max(sizes) if sizes else None


def _by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """All arguments by name, and what `local_call` says of them; what is in `**kwargs` by its own names."""
    values: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            values.update(value)
        else:
            values[name] = value
    for name, value in [*values.items()]:
        values[f"type({name})"] = type(value).__name__
        if isinstance(value, (tuple, list)):
            values.update({f"{name}[{at}]": item for at, item in enumerate(value)})
    return values


def _key(values: Mapping[str, Any]) -> Any:
    """All that a choice depends on, and nothing that holds tensors. None where that cannot be a key."""
    key: list[Any] = []
    for name, value in values.items():
        if isinstance(value, DTensor):
            key.append((name, value.shape, value.placements, value.device_mesh))
        elif isinstance(value, torch.Tensor):
            key.append((name, value.shape))
        else:
            plain = value is None or isinstance(value, (bool, int, float, str))
            key.append((name, value if plain else type(value)))
    try:
        hash(tuple(key))
    except TypeError:  # sizes that are no numbers
        return None
    return tuple(key)


def _choose(forms: Sequence[Signature], values: Mapping[str, Any]) -> _Choice:
    signature = form_of(forms, values)
    tensors = {n: value for n, value in values.items() if isinstance(value, torch.Tensor)}
    placed = {n: tensor for n, tensor in tensors.items() if isinstance(tensor, DTensor)}
    mesh = next(iter(placed.values())).device_mesh
    for name, tensor in placed.items():
        if tensor.device_mesh != mesh:
            raise Refused(f"{signature.op}: {name} lies on another mesh than {next(iter(placed))}")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    every = layouts(signature, values, shapes, tuple(mesh.shape))
    # What the function writes into stays where it is: what is written into a copy is lost.
    fixed = {n: t.placements for n, t in placed.items() if read(signature.takes[n]).in_place}
    possible = leaving(every, fixed)
    if not possible:
        raise Refused(
            f"{signature.op} writes into its arguments, and none of its layouts has {listed(fixed)}: bring "
            f"them to one of these placements before the call: {alternatives(every, fixed)}"
        )
    return signature, cheapest(possible, {n: t._spec for n, t in placed.items()}, mesh)


def _lay_out(signature: Signature, layout: Layout, values: Mapping[str, Any]) -> _Call:
    placed = {n: value for n, value in values.items() if isinstance(value, DTensor)}
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and name not in placed:
            _accept_plain(signature, layout, name, value)
    local = {n: _local(t, layout.takes[n], layout.ways) for n, t in placed.items()}
    mesh = next(iter(placed.values())).device_mesh
    return _Call(signature, layout, mesh, values, local)


def _accept_plain(signature: Signature, layout: Layout, name: str, tensor: torch.Tensor) -> None:
    """Raises Refused where an ordinary tensor, the same on every rank, cannot be used as it is."""
    how = f"{signature.op}: {name} is an ordinary tensor beside DTensors, and would have to be"
    wanted = layout.takes[name]
    if any(not placement.is_replicate() for placement in wanted):
        raise Refused(
            f"{how} {''.join(map(str, wanted))}: pass it as a DTensor, "
            f"DTensor.from_local({name}, mesh, [Replicate()] * mesh.ndim)"
        )
    if tensor.requires_grad and torch.is_grad_enabled() and set(layout.ways) != {"replicate"}:
        raise Refused(
            f"{how} given a gradient, which would be that of one rank's shard: pass it as a DTensor"
        )


def _local(tensor: DTensor, wanted: Sequence[Placement], ways: Sequence[str]) -> torch.Tensor:
    """This rank's part under the wanted placements. Its gradient finds the way back."""
    if tuple(tensor.placements) != tuple(wanted):
        tensor = tensor.redistribute(placements=list(wanted))
    # Of what is whole while the call is not, every rank makes only its shard's part of the gradient.
    grads = [
        Partial("sum") if way != "replicate" and placement.is_replicate() else placement
        for way, placement in zip(ways, wanted, strict=True)
    ]
    part: torch.Tensor = _Part.apply(tensor, grads)  # type: ignore[no-untyped-call]
    return part


class _Part(torch.autograd.Function):
    """`to_local(grad_placements=...)`, which gives the gradient a stride that differs from rank to rank where
    the shards differ, and leaves a collective that is under way (`async_op=True`) to be waited for."""

    @staticmethod
    def forward(ctx: Any, tensor: DTensor, grads: Sequence[Placement]) -> torch.Tensor:
        ctx.mesh, ctx.shape, ctx.grads = tensor.device_mesh, tensor.shape, grads
        part = tensor._local_tensor
        if isinstance(part, AsyncCollectiveTensor):
            part = part.wait()
        return part.view_as(part)  # the same memory: the function may write into it

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _of_parts(grad, ctx.mesh, ctx.grads, ctx.shape), None


def _of_parts(
    local: torch.Tensor, mesh: Any, placements: Sequence[Placement], shape: Sequence[int]
) -> DTensor:
    """The DTensor of this global shape. Contiguous: what the strides of a rank's part would be for the whole,
    nobody can tell where a part has one head."""
    stride = [math.prod(shape[at + 1 :]) for at in range(len(shape))]
    return DTensor.from_local(
        local.contiguous(),
        mesh,
        placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(stride),
    )


def _localize(bound: inspect.BoundArguments, call: _Call) -> None:
    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            bound.arguments[name] = {n: call.locals.get(n, v) for n, v in value.items()}
        else:
            bound.arguments[name] = call.locals.get(name, value)


def _assemble(returned: Any, call: _Call) -> Any:
    """DTensors of what the function returned: a tensor, or several of which some may be None."""
    described = {name: read(text) for name, text in call.signature.gives.items()}
    if not isinstance(returned, (tuple, list)):
        return _assembled(returned, next(iter(described)), call)
    if len(returned) > len(described):
        raise Refused(
            f"{call.signature.op} returned {len(returned)} results; {len(described)} are described"
        )
    pairs = zip(returned, described, strict=False)
    return type(returned)([_assembled(one, name, call) for one, name in pairs])


def _assembled(local: Any, name: str, call: _Call) -> Any:
    text = call.signature.gives[name]
    dims = read(text)
    if dims.none or not isinstance(local, torch.Tensor):
        return local
    form = () if dims.replicated else dims.of(local.ndim)
    if form is None:
        raise Refused(
            f"{call.signature.op}: {name} is described as {text!r}, and has {local.ndim} dims"
        )
    shape = [*local.shape]
    placements: list[Placement] = []
    for way in call.layout.ways:
        at = next((form.index(letter) for letter in WAYS[way] if letter in form), None)
        if at is None:
            added = any(letter in dims.summed for letter in WAYS[way])
            placements.append(Partial("sum") if added else Replicate())
            continue
        mine = call.size(form[at], local=True)
        if local.shape[at] != mine:
            raise Refused(
                f"{call.signature.op}: {name} is described as {text!r}, and has {local.shape[at]} of "
                f"{form[at]!r} where the arguments have {mine}"
            )
        shape[at] = call.size(form[at])
        placements.append(Shard(at))
    return _of_parts(local, call.mesh, placements, shape)


# --- in place of the functions -------------------------------------------------------------------

# Where a wrapper was put: the module, the name, and what was there.
_replaced: list[tuple[Any, str, Any]] = []


def patch(functions: Iterable[Signature], required: bool = True) -> dict[str, str]:
    """Put wrappers in the place of functions, in the modules of their package that have them; twice is
    harmless. Who imported a function by name before has to do so again.

    Returns what became of each: `registered`, `registered before`, `left alone` (the op of `unless` is
    registered) or `absent`. Raises NotRegistered where a required function is absent.
    """
    became = {}
    for path, described in by_op(functions).items():
        module, _, name = path.rpartition(".")
        function = _find(module, name)
        if function is None:
            if required:
                raise NotRegistered(f"There is no function {path} in this environment")
            became[path] = ABSENT
        elif getattr(function, "made_by", "") == MADE_BY:
            became[path] = KEPT
        elif described[0].unless and _calls(function, described[0].unless):
            became[path] = LEFT
        else:
            wrapper = local_call(described, function)
            for holder in _holders(module, name, function):
                _replaced.append((holder, name, function))
                setattr(holder, name, wrapper)
            became[path] = REGISTERED
    return became


def unpatch() -> None:
    """Put the functions back."""
    for holder, name, function in _replaced:
        setattr(holder, name, function)
    _replaced.clear()


def _find(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _calls(function: Any, op: str) -> bool:
    """Whether this version of a function calls the op: it is registered, and what the function's module has
    under its name is no ordinary function, as in versions from before it was an op."""
    own = getattr(function, "__globals__", {}).get(op.split(".")[1])
    return find_op(op) is not None and not inspect.isfunction(own)


def _holders(module: str, name: str, function: Any) -> list[Any]:
    """The loaded modules of the same package that have this function under its name."""
    package = module.partition(".")[0]
    return [
        loaded
        for path, loaded in [*sys.modules.items()]
        if path.partition(".")[0] == package
        and getattr(loaded, "__dict__", {}).get(name) is function
    ]
