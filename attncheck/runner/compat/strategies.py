"""Where DTensor looks for an op's sharding strategy: its tables, and from 2.11 on the op's decomposition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate

# Tables come and go: `op_single_dim_strategy_funcs` came with 2.11, and nearly all strategies live there from
# 2.14 on (1222 against 18 in 2.15).
_TABLES = ("op_strategy_funcs", "op_single_dim_strategy_funcs", "op_to_rules")


def has_strategy(op: Any) -> bool:
    """Whether DTensor has a strategy registered for an op; a higher-order op takes a `py_impl` instead."""
    if not hasattr(op, "_schema"):
        return DTensor in op.python_key_table
    propagator = _propagator()
    return any(op in getattr(propagator, table, {}) for table in _TABLES)


def has_decomposition(op: Any) -> bool:
    """Whether DTensor would try the op's decomposition for want of a strategy (2.11 on; else False)."""
    search = _search()
    return search is not None and bool(search.has_decomp(op))


def refuses_decomposition(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Why DTensor finds no strategy in the op's decomposition for this call, or ''. Tensors are replicated.

    Traces the decomposition once, on meta tensors, for the placement that always works if any does.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
    from torch.distributed.tensor._op_schema import OpSchema

    # Of one rank that is rank 0 everywhere, as the search makes it (2.11 to 2.15).
    mesh = DeviceMesh("cpu", [0], _init_backend=False, _rank=0)

    def spec(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        meta = TensorMeta(value.shape, value.stride(), value.dtype)
        return DTensorSpec(mesh, (Replicate(),), tensor_meta=meta)

    specs = tuple(spec(a) for a in args)
    schema = OpSchema(op, specs, {key: spec(value) for key, value in kwargs.items()})
    replicated = (Replicate(),) * len(specs)
    propagator, search = _propagator(), _search()
    # An object of the propagator's own from 2.12 on; functions that are handed the propagator in 2.11.
    owner = () if hasattr(propagator, "decomp_strategy") else (propagator,)
    try:
        search._propagate_through_decomp(schema, replicated, mesh, *owner)
    except Exception as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ""


def _propagator() -> Any:
    return DTensor._op_dispatcher.sharding_propagator


def _search() -> Any:
    """What looks for strategies in decompositions, or None (to 2.10)."""
    if hasattr(_propagator(), "decomp_strategy"):
        return _propagator().decomp_strategy
    try:
        from torch.distributed.tensor._decompositions import DecompShardingStrategy
    except ImportError:
        return None
    return DecompShardingStrategy
