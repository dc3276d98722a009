"""Does a result come out of dispatcher ops? Recognises functions that DTensor could never intercept.

A pybind, Triton or CuTe kernel allocates its output through the dispatcher (`empty_like`) and fills it behind
the dispatcher's back. So the call is followed once on ordinary tensors: what an op makes of an argument, or
of what came from one, comes from the arguments, too. If the output does not, something else filled it, and
the same function would read a DTensor through a null pointer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from attncheck.runner import compat
from attncheck.runner.compat import TorchDispatchMode, tree_leaves

# They take a tensor for its shape and dtype alone.
_ALLOCATE = frozenset(
    [
        *("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty"),
        *("new_empty_strided", "full_like", "new_full", "new_ones", "new_zeros"),
        *("ones_like", "zeros_like"),
    ]
)


def bypasses_dispatcher(
    call: Callable[[], Mapping[str, torch.Tensor]], arguments: Sequence[torch.Tensor]
) -> bool:
    """Whether `call`, which reads `arguments` (ordinary tensors), fills `out` by other means than ops.

    A call that cannot be followed (it raises under a dispatch mode) is given the benefit of the doubt.
    """
    follow = _Follow(arguments)
    try:
        with _eagerly(), torch.no_grad(), follow:
            out = call()["out"]
    except Exception:
        return False
    return not follow.comes_from_arguments(out)


class _Follow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Marks the memory that holds something computed from the arguments."""

    def __init__(self, arguments: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._marked = {_memory(t) for t in arguments}
        self._alive: list[torch.Tensor] = []  # freed memory would be given to somebody else

    def comes_from_arguments(self, tensor: torch.Tensor) -> bool:
        return _memory(tensor) in self._marked

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        if name in _ALLOCATE:
            return out
        if any(self.comes_from_arguments(t) for t in _tensors((args, kwargs))):
            filled = [*_tensors(out), *_written(func, args, kwargs)]
            self._marked |= {_memory(t) for t in filled}
            self._alive += filled
        return out


def _memory(tensor: torch.Tensor) -> int:
    return compat.storage_id(tensor)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The arguments that an op writes into."""
    schema = compat.schema_of(func)
    if schema is None:
        return
    arguments = schema.arguments
    named = dict(zip((a.name for a in arguments), args, strict=False)) | dict(kwargs)
    for argument in arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(named.get(argument.name))


def _eagerly() -> contextlib.AbstractContextManager[Any]:
    """Compiled code runs behind the dispatcher, too, but DTensor is traced into it: run it uncompiled.

    `set_stance` came with 2.6.
    """
    stance = getattr(torch.compiler, "set_stance", None)
    return stance("force_eager") if stance is not None else contextlib.nullcontext()
