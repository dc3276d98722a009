"""Keeping DTensors away from functions that are no dispatcher ops: pybind, Triton, CuTe.

DTensor cannot intercept such a function, and the local data does not go along: `DTensor.data_ptr()` is 0,
so the kernel behind it reads from address 0 and takes the process with it. The guard stands in front of
the function, on CPU stand-ins and real extensions alike, and raises instead.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

_GUARDED = "__attncheck_guarded__"


class BypassesDispatcher(RuntimeError):
    """A DTensor was about to reach a function that is no dispatcher op. `function` names it."""

    def __init__(self, function: str) -> None:
        self.function = function
        super().__init__(
            f"{function} is no dispatcher op: DTensor cannot intercept it, and the data pointer it "
            "would read is 0"
        )


def protect(target: str) -> None:
    """Guard `module:function`, or every function of `module`; twice is harmless.

    Raises ImportError where the module does not import, AttributeError where it lacks the function.
    """
    module_name, _, name = target.partition(":")
    module = importlib.import_module(module_name)
    if name and not hasattr(module, name):
        raise AttributeError(f"{module_name} has no function {name}")
    names = [name] if name else [n for n in dir(module) if not n.startswith("_")]
    for each in names:
        function = getattr(module, each)
        if callable(function) and not isinstance(function, type):
            setattr(module, each, _guarded(function, f"{module_name}.{each}"))


def _guarded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    if getattr(function, _GUARDED, False):
        return function

    @functools.wraps(function, updated=())
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(t, DTensor) for t in _tensors((args, kwargs))):
            raise BypassesDispatcher(name)
        return function(*args, **kwargs)

    setattr(guarded, _GUARDED, True)
    return guarded


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            yield from _tensors(item)
