"""Dispatch modes and the trees of arguments they see; where they must see more, or less, than they would."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from attncheck.runner.compat.ops import higher_order_ops

__all__ = [
    "TorchDispatchMode",
    "convertible_modules",
    "fake_mode",
    "is_fake",
    "is_innermost",
    "route_higher_order_ops",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "unwatched_propagation",
]


def fake_mode(take_real: bool = False) -> Any:
    """A mode in which ops only tell the shapes of their results. A real tensor among them is an error, unless
    `take_real` lets it be taken for its shape."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=take_real)


@contextlib.contextmanager
def convertible_modules() -> Iterator[None]:
    """Lets `Module.to` and its like convert fake parameters: each becomes a new one.

    torch swaps a fake parameter with its converted self, and refuses where it has weak references; that of
    the fake mode's own is enough (seen in 2.6 to 2.15).
    """
    original = torch.nn.Module._apply
    made: dict[int, tuple[torch.Tensor, torch.nn.Parameter]] = {}  # tied ones stay tied

    def convert(parameter: torch.Tensor, fn: Any) -> torch.nn.Parameter:
        if id(parameter) not in made:
            with torch.no_grad():
                new = torch.nn.Parameter(fn(parameter), parameter.requires_grad)
            made[id(parameter)] = parameter, new
        return made[id(parameter)][1]

    def apply(self: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
        if recurse:
            for child in self.children():
                child._apply(fn)  # type: ignore[no-untyped-call]
        for name, parameter in self._parameters.items():
            if parameter is not None:
                self._parameters[name] = convert(parameter, fn)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = fn(buffer)
        return self

    torch.nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module._apply = original  # type: ignore[method-assign]


def is_innermost(modes: Sequence[Any]) -> bool:
    """Whether these are the last dispatch modes that were entered, so that they can be left."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    stack = _get_current_dispatch_mode_stack()
    return bool(modes) and [*stack[-len(modes) :]] == [*modes]


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor, or the local one of a DTensor, holds no numbers."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(getattr(tensor, "_local_tensor", tensor), FakeTensor)


@contextlib.contextmanager
def unwatched_propagation() -> Iterator[None]:
    """Keeps dispatch modes off while DTensor searches decompositions for a strategy.

    The search (2.11 on) runs tens of thousands of ops on meta tensors: nothing there is communication or
    a kernel, and passing each through a mode of ours made it a quarter slower than it is for users.

    Its arguments are passed on as they come: (schema, propagator) in 2.11, (search, schema) from 2.12 on, and
    a third from 2.14 on. An exception in here would be taken for an op without a strategy.
    """
    try:
        from torch.distributed.tensor._decompositions import DecompShardingStrategy
        from torch.utils._python_dispatch import _disable_current_modes
    except ImportError:
        yield
        return
    search: Any = DecompShardingStrategy
    original = search.propagate_strategy

    def unwatched(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return original(*args, **kwargs)

    before = vars(search)["propagate_strategy"]  # a staticmethod in 2.11
    search.propagate_strategy = unwatched
    try:
        yield
    finally:
        search.propagate_strategy = before


def route_higher_order_ops(*modes: type) -> None:
    """Lets dispatch modes see the higher-order ops there are; each op raises under a mode without a rule.

    A mode gets the types of the tensors, as for any other op, and what returns NotImplemented goes on to
    DTensor's own rule with the mode still there. (`supports_higher_order_operators`, from 2.9 on, takes the
    mode away before DTensor's rule runs.)
    """
    for op in higher_order_ops().values():
        for mode in modes:
            if mode not in op.python_key_table:
                op.py_impl(mode)(functools.partial(_through_mode, op))


def _through_mode(op: Any, mode: Any, *args: Any, **kwargs: Any) -> Any:
    leaves, _ = tree_flatten((args, kwargs))
    types = {type(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)}
    # torch.compile traces what a compiled function calls, this included, where it gave up on its own graph
    # (seen in 2.9).
    untraced = torch.compiler.disable(mode.__torch_dispatch__)  # type: ignore[no-untyped-call]
    return untraced(op, types, args, kwargs)
