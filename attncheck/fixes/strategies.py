"""Giving DTensor the strategies that follow from signatures, taking them back, and proving both.

PyTorch's `register_sharding` is not enough here. It derives a cache key that ignores floats and booleans
before the first integer (a strategy that looks at `causal` is served stale); it is ignored where torch has
a single-dim strategy for the op (2.13 on); it expands rows over a mesh without asking whether two axes
together tear a group of heads; and it lets DTensor redistribute what an op writes in place, which loses
what was written. So this goes one step below it, to the tables that it writes into. They are private:
`op_strategy_funcs` and `op_to_schema_info` (2.5 to 2.15), the two of single-dim strategies (2.11 on),
`op_to_rules` (to 2.12), and the caches (in Python; in C++ from 2.10 on).

This file is part of every module that `attncheck fix` writes: it needs torch alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor import _op_schema as schemas
from torch.distributed.tensor._collective_utils import redistribute_cost
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from attncheck.fixes.notation import (
    NO_STRATEGY_HAS,
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
    results_shapes,
)

REGISTERED, KEPT, LEFT, ABSENT = "registered", "registered before", "left alone", "absent"
OTHER = "another version"
MADE_BY = "attncheck"

_TABLES = (
    "op_strategy_funcs",
    "op_to_schema_info",
    "op_single_dim_strategy_funcs",
    "op_to_schema_info_for_single_dim_strategy",
    "op_to_rules",
)
# Those of them that hold strategies: propagation notes an op it decomposes in `op_to_schema_info` too.
_STRATEGIES = ("op_strategy_funcs", "op_single_dim_strategy_funcs", "op_to_rules")
# `PlacementStrategy` up to 2.7.
_OpSpec = getattr(schemas, "OpSpec", None) or schemas.PlacementStrategy  # type: ignore[attr-defined]


class NotRegistered(RuntimeError):
    """Something of the registration is not as it must be. The text is one sentence."""


class Strategy:
    """What DTensor asks for the sharding of one op; its forms are told apart by their arguments."""

    made_by = MADE_BY

    def __init__(self, op: Any, forms: Sequence[Signature]) -> None:
        self.op = op
        self.forms = tuple(forms)
        self.roll_call = False

    def __call__(self, *asked: Any) -> Any:
        if self.roll_call:
            raise _Present
        schema = asked[-1]  # up to 2.6 the mesh comes first
        values = arguments(self.op, schema.args_schema, schema.kwargs_schema)
        specs = {name: spec for name, value in values.items() if (spec := _spec(value)) is not None}
        signature = form_of(self.forms, values)
        mesh = next(iter(specs.values())).mesh
        shapes = {name: tuple(spec.shape) for name, spec in specs.items()}
        fixed = _unmovable(signature, specs, schema.kwargs_schema)
        every = layouts(signature, values, shapes, tuple(mesh.shape))
        possible = leaving(every, fixed)
        if not possible:
            raise Refused(
                f"{signature.op} cannot move what it writes into or gets by keyword{NO_STRATEGY_HAS}"
                f"{listed(fixed)}: bring its arguments to one of these placements before the call: "
                f"{alternatives(every, fixed)}"
            )
        if "query" in specs and _in_context_parallel():
            lies = tuple(specs["query"].placements)
            possible = [layout for layout in possible if layout.takes["query"] == lies]
            if not possible:
                raise Refused(
                    f"{signature.op} within context_parallel, which takes what comes out for shards of the "
                    "sequence: no strategy leaves the queries where they lie"
                )
        return self._spec_of(cheapest(possible, specs, mesh), specs, mesh)

    def _spec_of(self, layout: Layout, specs: Mapping[str, Any], mesh: Any) -> Any:
        outputs = [None if p is None else DTensorSpec(mesh, p) for p in layout.gives]
        inputs = [
            DTensorSpec(mesh, layout.takes[name], tensor_meta=spec.tensor_meta)
            for name, spec in specs.items()
        ]
        costs = [[redistribute_cost(specs[n], s)] for n, s in zip(specs, inputs, strict=True)]
        made = outputs[0] if len(self.op._schema.returns) == 1 else tuple(outputs)
        return schemas.OpStrategy(
            [_OpSpec(output_specs=made, input_specs=inputs, redistribute_cost=costs)]
        )


class _Present(Exception):
    """Raised by a strategy that is asked whether it is the one that answers."""


def arguments(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name. PyTorch's dispatcher leaves out those that equal their defaults."""
    declared = op._schema.arguments
    given = dict(zip((a.name for a in declared), args, strict=False))
    given.update(kwargs)
    for argument in declared:
        if argument.name not in given:
            given[argument.name] = argument.default_value if argument.has_default_value() else None
    return given


def _spec(value: Any) -> Any:
    """The DTensorSpec of an argument, None where it is no tensor."""
    if isinstance(value, schemas.OpStrategy):
        return value.strategies[0].output_spec
    return value if isinstance(value, DTensorSpec) else None


def _unmovable(
    signature: Signature, specs: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> dict[str, Sequence[Placement]]:
    """Tensors that must stay as they lie: what the op writes into, and what is passed by keyword, which
    DTensor never redistributes, whatever a strategy says."""
    written = {name for name, text in signature.takes.items() if read(text).in_place}
    return {n: spec.placements for n, spec in specs.items() if n in written or n in kwargs}


def _in_context_parallel() -> bool:
    """It hands its shards of the sequence to SDPA, and takes what comes out for such, wherever it lies."""
    handled = getattr(DTensor._op_dispatcher, "_custom_op_handlers", {})
    return torch.ops.aten._scaled_dot_product_flash_attention.default in handled


def cheapest(possible: Sequence[Layout], specs: Mapping[str, Any], mesh: Any) -> Layout:
    """The least communication, then the fewest tensors moved: the same choice on every rank."""

    def price(layout: Layout) -> tuple[float, int]:
        moved = [name for name in specs if layout.takes[name] != tuple(specs[name].placements)]
        costs = (redistribute_cost(specs[n], DTensorSpec(mesh, layout.takes[n])) for n in moved)
        return sum(costs), len(moved)

    return min(possible, key=price)


# --- registering ---------------------------------------------------------------------------------

# What the tables held for an op before it was registered here.
_saved: dict[Any, list[dict[Any, Any]]] = {}
_libraries: dict[Any, Any] = {}


def install(signatures: Iterable[Signature], required: bool = True) -> dict[str, str]:
    """Give DTensor a strategy for each op, before or after its first use; twice is harmless.

    Returns what became of each op: `registered`, `registered before`, `left alone` (torch has a strategy
    of its own), `another version` (it returns more or less than described) or `absent`. Raises
    NotRegistered where a required op is absent, or a strategy does not answer once it is registered.
    """
    became: dict[str, str] = {}
    new: list[Strategy] = []
    for name, described in by_op(signatures).items():
        op = find_op(name, described[0].imports if required else "")
        if op is None:
            if required:
                raise NotRegistered(
                    f"The op {name} is not registered in this process: import what registers it first"
                )
            became[name] = ABSENT
        elif op in _saved or _is_ours(op):
            became[name] = KEPT
        elif _is_known(op) and not _is_overridden(described):
            became[name] = LEFT
        elif any(len(form.gives) != len(op._schema.returns) for form in described):
            became[name] = OTHER
        else:
            new.append(_put(op, described))
            became[name] = REGISTERED
    if new:
        forget_propagated()
    for strategy in new:
        if not answers(strategy):
            _take_back([each.op for each in new])
            raise NotRegistered(
                f"The strategy registered for {strategy.op} is not the one that answers: this torch "
                f"({torch.__version__}) looks for strategies somewhere else"
            )
    return became


def remove() -> None:
    """Put back what DTensor had before `install`."""
    _take_back([*_saved])


def _take_back(ops: Iterable[Any]) -> None:
    for op in ops:
        for table, saved in zip(_tables(), _saved.pop(op), strict=True):
            table.pop(op, None)
            table.update(saved)
        if library := _libraries.pop(op, None):
            library._destroy()
    forget_propagated()


def find_op(name: str, imports: str = "") -> Any:
    """The overload of `flash_attn._flash_attn_forward.default`, or None. May import the module that
    registers it, and raises what that raises."""
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.rpartition(".")
    found = getattr(getattr(torch.ops, namespace), packet, None)
    if found is None and imports:
        importlib.import_module(imports)
        found = getattr(getattr(torch.ops, namespace), packet, None)
    return getattr(found, overload, None)


def _propagator() -> Any:
    return DTensor._op_dispatcher.sharding_propagator


def _tables() -> list[dict[Any, Any]]:
    propagator = _propagator()
    return [getattr(propagator, name) for name in _TABLES if hasattr(propagator, name)]


def _is_known(op: Any) -> bool:
    """Whether a strategy is registered for an op, by torch or by another such module."""
    return any(op in getattr(_propagator(), name, {}) for name in _STRATEGIES)


def _is_ours(op: Any) -> bool:
    """Whether another module that attncheck wrote has registered a strategy for it."""
    return getattr(_propagator().op_strategy_funcs.get(op), "made_by", "") == MADE_BY


def _is_overridden(forms: Sequence[Signature]) -> bool:
    """Whether this torch is one of those whose own strategy is wrong."""
    bounds = forms[0].overrides
    return bounds is not None and bounds[0] <= torch.__version__ < bounds[1]


def _put(op: Any, forms: Sequence[Signature]) -> Strategy:
    strategy = Strategy(op, forms)
    _saved[op] = [{op: table.pop(op)} if op in table else {} for table in _tables()]
    declared = op._schema.arguments
    # Everything from the first argument on that is no tensor is in the cache key, flags included.
    first = next(
        (at for at, a in enumerate(declared) if str(a.type) not in ("Tensor", "Optional[Tensor]")),
        len(declared),
    )
    keywords = [a.name for a in declared if a.kwarg_only]
    # Looking into lists makes every dispatch half as dear again, so only where they can hold tensors.
    lists = any("List[" in str(a.type) and "Tensor" in str(a.type) for a in declared)
    info = schemas.RuntimeSchemaInfo(first, keywords or None, needs_pytree=lists)
    _propagator().register_op_strategy(op, strategy, info)
    if forms[0].fake and not op.has_kernel_for_dispatch_key("Meta"):
        _give_fake(op, forms)
    return strategy


def _give_fake(op: Any, forms: Sequence[Signature]) -> None:
    """A Meta kernel made of what the signatures say of the results."""

    def fake(*args: Any, **kwargs: Any) -> Any:
        values = arguments(op, args, kwargs)
        tensors = {n: v for n, v in values.items() if isinstance(v, torch.Tensor)}
        like = next(iter(tensors.values()))
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        form = form_of(forms, values)
        made = [
            values.get(name)  # what is no tensor: None, or a number that was an argument
            if result is None
            else like.new_empty(result[0], dtype=getattr(torch, result[1]) if result[1] else None)
            for name, result in zip(form.gives, results_shapes(form, values, shapes), strict=True)
        ]
        return made[0] if len(op._schema.returns) == 1 else tuple(made)

    namespace, name = op._schema.name.split("::")
    library: Any = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
    library.impl(name, fake, "Meta")
    _libraries[op] = library


def answers(strategy: Strategy) -> bool:
    """Whether DTensor, asked for the sharding of the op, asks this strategy: by asking it.

    What runs the op on meta tensors first is left out, so that no arguments need to be made up.
    """
    propagator, op = _propagator(), strategy.op
    if op in getattr(DTensor._op_dispatcher, "_custom_op_handlers", {}):
        return False
    name = next(
        n
        for n in ("_propagate_tensor_meta_non_cached", "_propagate_tensor_meta")  # 2.7 on; before
        if hasattr(propagator, n)
    )
    strategy.roll_call = True
    setattr(propagator, name, lambda schema: None)
    try:
        # Up to 2.8 a tensor is looked for, to tell the mesh.
        return _asks(propagator, op, ()) or _asks(
            propagator,
            op,
            (DTensorSpec(None, (Replicate(),)),),  # type: ignore[arg-type]
        )
    finally:
        delattr(propagator, name)
        strategy.roll_call = False


def _asks(propagator: Any, op: Any, args: tuple[Any, ...]) -> bool:
    try:
        propagator.propagate_op_sharding_non_cached(schemas.OpSchema(op, args, {}))
    except _Present:
        return True
    except Exception:
        return False
    return False


def forget_propagated() -> None:
    """Clear what was propagated before in this thread: in Python and, from 2.10 on, in C++."""
    cached = _propagator().propagate_op_sharding
    (cached if hasattr(cached, "cache_clear") else cached.cache).cache_clear()
    clear = getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", None)
    if clear is not None:
        clear()
