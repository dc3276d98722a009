"""Kernel ops: their names and schemas, and what is registered for them with the dispatcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch


def op_name(func: Any) -> str:
    """A kernel op as PyTorch writes it: its path under `torch.ops`."""
    return str(func) if hasattr(func, "_schema") else f"higher_order.{func}"


def schema_of(op: Any) -> Any:
    """The FunctionSchema of an op (an overload); None of a higher-order op, which has none."""
    return getattr(op, "_schema", None)


def schema_op_name(schema: Any) -> str:
    """`op_name`, of a FunctionSchema: `flash_attn._flash_attn_forward.default`."""
    return f"{schema.name.replace('::', '.')}.{schema.overload_name or 'default'}"


def is_packet(function: Any) -> TypeGuard[Any]:
    """Whether it is an op with all its overloads, as `torch.ops.aten.add` is."""
    return isinstance(function, torch._ops.OpOverloadPacket)


def registered_schemas() -> list[Any]:
    """The FunctionSchema of every dispatcher op in this process."""
    return list(torch._C._jit_get_all_schemas())


def higher_order_ops() -> dict[str, Any]:
    """Higher-order ops by name: no dispatcher table has them. {} where torch keeps no list of them."""
    try:
        from torch._ops import _higher_order_ops
    except ImportError:
        return {}
    return dict(_higher_order_ops)


def find_overload(name: str) -> Any:
    """The callable op of `flash_attn._flash_attn_forward.default`, or None."""
    namespace, _, rest = name.partition(".")
    packet_name, _, overload = rest.rpartition(".")
    packet = getattr(getattr(torch.ops, namespace), packet_name, None)
    return getattr(packet, overload, None)


def kernel_keys(schema: Any, keys: Sequence[str]) -> tuple[str, ...]:
    """On which of the dispatch `keys` the op can be called, through a kernel of its own or a default."""
    has = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    return tuple(key for key in keys if has(_dispatch_name(schema), key))


def has_own_kernel(schema: Any, key: str) -> bool:
    """Whether the op has a kernel for this dispatch `key` and no other."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(_dispatch_name(schema), key))


def is_composite(schema: Any) -> bool:
    """Whether the op is made of others before any tensor subclass sees it."""
    return has_own_kernel(schema, "CompositeImplicitAutograd")


def has_autograd(schema: Any) -> bool:
    """Whether the op has an autograd formula. Without one PyTorch warns, and goes on with what comes."""
    keys = ("CompositeImplicitAutograd", "Autograd", "AutogradCPU", "AutogradCUDA")
    return any(has_own_kernel(schema, key) for key in keys)


def _dispatch_name(schema: Any) -> str:
    return str(schema.name) + (f".{schema.overload_name}" if schema.overload_name else "")
