"""Which module an op belongs to, in forward and in backward.

In forward hooks of modules know. In backward there is no module: each node of the graph has the number that
it got when it was made, so it is enough to remember which module was running from which number on.
"""

from __future__ import annotations

import bisect
import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from attncheck.runner import compat

# What wrappers put into a path, and no user wrote.
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.|$)")

_RAISED_IN = "_attncheck_raised_in"


def unwrapped(path: str) -> str:
    """A path as the user has it.

    >>> unwrapped("_orig_mod.blocks.0._checkpoint_wrapped_module.norm")
    'blocks.0.norm'
    """
    return _WRAPPERS.sub("", path).strip(".")


def raised_in(error: BaseException) -> str:
    """The innermost module that an exception, or what it was raised from, came out of while it was watched;
    '' where none is known."""
    cause: BaseException | None = error
    while cause is not None:
        if path := getattr(cause, _RAISED_IN, ""):
            return str(path)
        cause = cause.__cause__ or cause.__context__
    return ""


class Where:
    """Follows the modules of a process while `watching`. `paths` are those that were seen, by module."""

    def __init__(self) -> None:
        self.paths: dict[int, str] = {}
        self.models: list[torch.nn.Module] = []
        self.outside = ""  # what runs where no module does
        self.outermost = 0  # calls of a module that no other called
        self.on_return: Callable[[], None] | None = None  # at the end of each of them
        self._modules: list[torch.nn.Module] = []  # an id means something only as long as it lives
        self._hooks: list[Any] = []
        self._watching = False
        self._stack: list[str] = []
        self._starts: list[int] = [0]
        self._owners: list[str] = [""]

    def name(self, model: torch.nn.Module, prefix: str = "") -> None:
        """Takes the paths of a model's modules from it."""
        self.models.append(model)
        for path, module in model.named_modules():
            self._take(module, unwrapped(f"{prefix}{path}"))

    def _take(self, module: torch.nn.Module, path: str) -> None:
        if id(module) not in self.paths:
            self.paths[id(module)] = path
            self._modules.append(module)
            if self._watching:
                self._hook(module)

    def _hook(self, module: torch.nn.Module) -> None:
        """What its own hooks do (a plan redistributes in them) is its doing, so ours comes after them."""
        self._hooks.append(module.register_forward_hook(self._leave, always_call=True))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self._hooks.append(register_module_forward_pre_hook(self._enter))
        self._watching = True
        for module in self._modules:
            self._hook(module)
        try:
            yield
        finally:
            self._watching = False
            self._stack.clear()
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()

    def path(self, backward: bool) -> str:
        """The innermost module that is running, or whose backward is. One that is run again in backward
        (a checkpoint) is running."""
        if self._stack:
            return self._stack[-1]
        if not backward:
            return self.outside
        number = compat.node_number()
        if number is None:
            return ""
        return self._owners[bisect.bisect_right(self._starts, number) - 1]

    def forget(self) -> None:
        """A step has ended: what was numbered in it is gone."""
        self._starts, self._owners = [0], [""]

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        if id(module) not in self.paths:
            if self._stack:
                self._take(module, f"{self._stack[-1]}.{type(module).__name__}".strip("."))
            else:
                self.name(module)
        self.outermost += not self._stack and not compat.in_backward()
        self._stack.append(self.paths[id(module)])
        self._mark()

    def _leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if self._watching and self._stack:
            path = self._stack.pop()
            error = sys.exc_info()[1]  # this hook runs where the module raises, too
            if error is not None and not hasattr(error, _RAISED_IN):
                setattr(error, _RAISED_IN, path)  # keeping the error would keep its tensors
            self._mark()
            if not self._stack and self.on_return is not None and not compat.in_backward():
                self.on_return()

    def _mark(self) -> None:
        number = compat.next_number()
        owner = self._stack[-1] if self._stack else ""
        if number == self._starts[-1]:
            self._owners[-1] = owner
        else:
            self._starts.append(number)
            self._owners.append(owner)
