"""What each module of a model takes and gives in one call, and the gradients of that, in order of execution.

A module has two hooks before it: one in front of all others, which sees what the caller gave, and one behind
them, which sees what a plan's own hooks made of it. What is run again in backward (a checkpoint) is not
recorded twice.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from attncheck.audit.numeric.captured import (
    GIVEN,
    OUTPUT,
    TAKEN,
    Captured,
    Key,
    capture,
    is_floating,
)
from attncheck.runner import compat
from attncheck.runner.compat import tree_flatten, tree_leaves, tree_unflatten

# What wrappers put into a path, and no user wrote (as in audit.where).
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.|$)")
# What the tensors of one call may take, in bytes; from there on modules are followed, but not recorded.
ROOM_BYTES = 2**31
# How far behind a module's output its autograd functions are looked for.
_NODES = 12

Override = Callable[[torch.Tensor], torch.Tensor]


def clean(path: str) -> str:
    """A path or a parameter's name without what wrappers put into it."""
    return _WRAPPERS.sub("", path).strip(".")


@dataclass
class Held:
    """A tensor that was met, and its gradient once backward came by."""

    tensor: torch.Tensor
    captured: Captured
    gradient: Captured | None = None


@dataclass(frozen=True)
class Event:
    key: Key
    captured: Captured
    gradient: Captured | None


@dataclass
class Recorder:
    """Records one call at a time: `with recorder.recording(model): ...`, then `told()`.

    `overrides`: what to put in the place of a tensor. `on_enter` is told the path of each module that
    starts, forward, and of each whose gradient came by, backward. `functions`: autograd functions that are no
    torch's own, by the module that gave what they made.
    """

    overrides: Mapping[Key, Override] = field(default_factory=dict)
    on_enter: Callable[[str, str], None] = lambda doing, path: None
    keys: list[Key] = field(default_factory=list)
    stack: list[str] = field(default_factory=list)
    full: bool = False
    functions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    busy: bool = False  # at noting: what runs meanwhile is no call of the model's
    _held: list[Held] = field(default_factory=list)
    _by_tensor: dict[int, Held] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)
    _running: list[int] = field(default_factory=list)
    _room: int = ROOM_BYTES

    @property
    def path(self) -> str:
        """The innermost module that is running; what it was, after one raised."""
        return self.stack[-1] if self.stack else ""

    def tensor(self, key: Key) -> torch.Tensor:
        """The tensor itself, with its graph."""
        return self._held[self.keys.index(key)].tensor

    @contextlib.contextmanager
    def recording(self, model: torch.nn.Module) -> Iterator[None]:
        hooks = []
        # A wrapper and what it wraps have one path: the wrapper stands for both.
        modules: dict[str, torch.nn.Module] = {}
        for name, module in model.named_modules():
            modules.setdefault(clean(name), module)
        for path, module in modules.items():
            hooks += [
                module.register_forward_pre_hook(self._given(path), prepend=True, with_kwargs=True),
                module.register_forward_pre_hook(self._taken(path), with_kwargs=True),
                module.register_forward_hook(self._gave(path), with_kwargs=True),
            ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def told(self) -> list[Event]:
        return [
            Event(key, held.captured, held.gradient)
            for key, held in zip(self.keys, self._held, strict=True)
        ]

    def _given(self, path: str) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
            if compat.in_backward():
                return None
            nth = self._counts[path] = self._counts.get(path, -1) + 1
            self.stack.append(path)
            self._running.append(nth)
            self.on_enter("forward of", path)
            return self._note(path, nth, GIVEN, (args, kwargs))

        return hook

    def _taken(self, path: str) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
            if compat.in_backward() or not self._running:
                return None
            return self._note(path, self._running[-1], TAKEN, (args, kwargs))

        return hook

    def _gave(self, path: str) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if compat.in_backward() or not self._running:
                return None
            self.stack.pop()
            if names := _functions(output):
                self.functions[path] = names
            return self._note(path, self._running.pop(), OUTPUT, output)

        return hook

    def _note(self, path: str, nth: int, kind: str, tree: Any) -> Any:
        """Notes the floating tensors of a tree; the tree with overrides in place, None where it has none."""
        leaves, spec = tree_flatten(tree)
        changed = False
        floating = [at for at, leaf in enumerate(leaves) if is_floating(leaf)]
        self.busy = True
        for number, at in enumerate(floating):
            key = Key(path, nth, kind, number)
            if key in self.overrides:
                leaves[at] = self.overrides[key](leaves[at])
                changed = True
            held = self._hold(leaves[at], path)
            if held is not None:
                self.keys.append(key)
                self._held.append(held)
        self.busy = False
        return tree_unflatten(leaves, spec) if changed else None

    def _hold(self, tensor: torch.Tensor, path: str) -> Held | None:
        captured = capture(tensor)
        known = self._by_tensor.get(id(tensor))
        if known is not None and torch.equal(known.captured.local, captured.local):
            return known  # else something was written into it since
        self._room -= captured.local.numel() * captured.local.element_size()
        self.full = self.full or self._room < 0
        if self.full:
            return None
        held = Held(tensor, captured)
        if tensor.requires_grad and torch.is_grad_enabled():
            tensor.register_hook(self._gradient(held, path))  # type: ignore[no-untyped-call]
        self._by_tensor[id(tensor)] = held
        return held

    def _gradient(self, held: Held, path: str) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            self.on_enter("backward of", path)
            held.gradient = capture(gradient)

        return hook


def _functions(output: Any) -> tuple[str, ...]:
    """Names of autograd functions written in Python shortly behind an output (torch's own begin with `_`)."""
    ahead = [leaf.grad_fn for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    names: list[str] = []
    for node in itertools.islice(_behind(ahead), _NODES):
        name = node.name()
        if isinstance(node, torch.autograd.function.BackwardCFunction) and name[0] != "_":
            names.append(name.removesuffix("Backward"))
    return tuple(dict.fromkeys(names))


def _behind(ahead: list[Any]) -> Iterator[Any]:
    """The nodes of a graph, those of the last functions first."""
    seen = set()
    while ahead:
        node = ahead.pop(0)
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            ahead += [next_node for next_node, _ in node.next_functions]
