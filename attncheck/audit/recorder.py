"""What happens in a model, op by op: which kernel op meets DTensors in which module, and what communicates.

Two dispatch modes, as in `runner.observe`: one above DTensor, which sees each op with its DTensor arguments,
and one below, which sees the collectives on local tensors. What is written down here is counts by what is
different, so that a thousand equal calls are one entry; the first of them is looked at closely.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from attncheck.audit.lines import user_line
from attncheck.audit.seen import (
    BACKWARD,
    FORWARD,
    Argument,
    Attention,
    Facts,
    Op,
    Placed,
    Texts,
    Traffic,
    Uneven,
)
from attncheck.audit.where import Where
from attncheck.rings import ring_bytes
from attncheck.runner import attention_ops, collectives, compat
from attncheck.runner.compat import AsyncCollectiveTensor, TorchDispatchMode, tree_leaves
from attncheck.runner.observe import ALIASES


class Recorder:
    """Records while `recording()`. With `carry`, what an op that fails may have returned is asked of it, and
    the model goes on; without, what the op raised goes on, as in any run."""

    def __init__(self, carry: Callable[..., Any] | None = None) -> None:
        self.facts = Facts()
        self.where = Where()
        self.carry = carry
        self.on = True
        self.modes: tuple[TorchDispatchMode, ...] = ()
        self._op = ""
        self._counting = True
        self._calls: dict[Any, Op] = {}
        self._texts: dict[Any, Texts] = {}
        self._names: dict[Any, str] = {}
        self._attention: dict[Any, bool] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """The modules of this process are followed, and the ops in here are recorded."""
        compat.route_higher_order_ops(_Above, _Below)
        below, above = self.modes = _Below(self), _Above(self)
        with (
            self.where.watching(),
            compat.watch_alltoall(self._alltoall),
            compat.unwatched_propagation(),
            below,
            above,
        ):
            yield

    # --- ops -------------------------------------------------------------------------------------

    def call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """An op that takes a DTensor."""
        name = self._name(func)
        if name in ALIASES:
            return func(*args, **kwargs)
        backward = compat.in_backward()
        path = self.where.path(backward)
        inputs = self._placements(args, kwargs)
        above, self._op = self._op, name
        try:
            out = func(*args, **kwargs)
        except Exception as error:
            self._failed(name, path, backward, inputs, error)
            if self.carry is None:
                raise
            with self._suspended():
                out = self._carried(func, args, kwargs, error)
        else:
            key = (func, backward, inputs, self._outputs(out))
            kind = self._calls.get(key)
            if kind is None:
                kind = self._calls[key] = self._new(key, name, path, args, kwargs)
            by_path = self.facts.ops[kind]
            by_path[path] = by_path.get(path, 0) + 1
        finally:
            self._op = above
        if not backward and self._is_attention(func, name):
            self.attend(func, name, path, args, kwargs)
        return out

    def attend(
        self, func: Any, name: str, path: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        call = Attention(name, *_arguments(func, args, kwargs, self._text))
        by_path = self.facts.attention.setdefault(call, {})
        by_path[path] = by_path.get(path, 0) + 1

    def plain(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """An op on ordinary tensors: attention in a `local_map` is attention."""
        name = self._name(func)
        if self._is_attention(func, name) and not compat.in_backward():
            self.attend(func, name, self.where.path(False), args, kwargs)

    def _new(self, key: Any, name: str, path: str, args: Any, kwargs: Any) -> Op:
        _, backward, inputs, outputs = key
        kind = Op(
            name, BACKWARD if backward else FORWARD, self._shown(inputs), self._shown(outputs)
        )
        self.facts.ops.setdefault(kind, {})
        if not backward:
            self.facts.lines.setdefault(((name, FORWARD), path), user_line())
        self._look_for_uneven(name, path, args, kwargs)
        return kind

    def _failed(self, name: str, path: str, backward: bool, inputs: Any, error: Exception) -> None:
        problem, named = compat.refusal(error) or ("error", None)
        op = named if named and named != name and "." in named else name
        message = (
            compat.refusal_sentence(error)
            if problem != "error"
            else f"{type(error).__name__}: {compat.error_text(error)}"[:500]
        )
        phase = BACKWARD if backward else FORWARD
        kind = Op(op, phase, self._shown(inputs), (), problem, message)
        by_path = self.facts.ops.setdefault(kind, {})
        by_path[path] = by_path.get(path, 0) + 1
        if not backward:
            self.facts.lines.setdefault(((op, FORWARD), path), user_line())

    def _carried(self, func: Any, args: Any, kwargs: Any, error: Exception) -> Any:
        assert self.carry is not None
        try:
            return self.carry(func, args, kwargs)
        except Exception:
            raise error from None  # what it raised at first is what users will see

    def _is_attention(self, func: Any, name: str) -> bool:
        known = self._attention.get(func)
        if known is None:
            known = attention_ops.looks_like(name, compat.schema_of(func))
            self._attention[func] = known
        return known

    def _name(self, func: Any) -> str:
        name = self._names.get(func)
        if name is None:
            name = self._names[func] = compat.op_name(func)
        return name

    # --- placements ------------------------------------------------------------------------------

    def _placements(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Of each tensor among the arguments: the placements of a DTensor, None of an ordinary one."""
        found: list[Any] = []
        for value in args:
            _add(value, found)
        for value in kwargs.values():
            _add(value, found)
        return tuple(found)

    def _outputs(self, out: Any) -> tuple[Any, ...]:
        found: list[Any] = []
        _add(out, found)
        return tuple(found)

    def _shown(self, placements: tuple[Any, ...]) -> Placed:
        return tuple(("plain",) if each is None else self._text(each) for each in placements)

    def _text(self, placements: Any) -> Texts:
        texts = self._texts.get(placements)
        if texts is None:
            texts = tuple(compat.placement_text(p) for p in placements)
            self._texts[placements] = texts
        return texts

    def _look_for_uneven(self, name: str, path: str, args: Any, kwargs: Any) -> None:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, DTensor):
                for found in uneven(path, name, leaf):
                    self.facts.uneven.setdefault(found)

    # --- communication ---------------------------------------------------------------------------

    def collective(self, called: collectives.Called) -> None:
        self.communicated(called.name, called.operands, compat.group_size(called.group))

    def communicated(self, name: str, operands: Sequence[torch.Tensor], ranks: int) -> None:
        if not self._counting or not self.where.outermost:
            return  # attncheck's own, or what places the weights before the first step
        backward = compat.in_backward()
        path = self.where.path(backward)
        kind = Traffic(name, BACKWARD if backward else FORWARD, self._op)
        by_path = self.facts.traffic.setdefault(kind, {})
        if path not in by_path:
            by_path[path] = [0, 0]
            if not backward:
                self.facts.lines.setdefault((kind, path), user_line())
        size = sum(t.numel() * t.element_size() for t in operands)
        by_path[path][0] += 1
        by_path[path][1] += ring_bytes(name, size, ranks)

    @contextlib.contextmanager
    def _suspended(self) -> Iterator[None]:
        """Communication in here is attncheck's own."""
        before, self._counting = self._counting, False
        try:
            yield
        finally:
            self._counting = before

    @contextlib.contextmanager
    def _alltoall(self, local: torch.Tensor, ranks: int) -> Iterator[None]:
        self.communicated("all_to_all", (local,), ranks)
        with self._suspended():
            yield


def _add(value: Any, found: list[Any]) -> None:
    if isinstance(value, DTensor):
        found.append(value.placements)
    elif isinstance(value, torch.Tensor):
        found.append(None)
    elif isinstance(value, (list, tuple)):
        for each in value:
            _add(each, found)


def uneven(path: str, op: str, tensor: DTensor) -> Iterator[Uneven]:
    """The dims of a tensor that some mesh axis does not divide."""
    mesh = tensor.device_mesh
    names = mesh.mesh_dim_names or [str(axis) for axis in range(mesh.ndim)]
    sizes = list(tensor.shape)
    for axis, placement in enumerate(tensor.placements):
        if not placement.is_shard():
            continue
        dim, ranks = placement.dim, mesh.size(axis)  # type: ignore[attr-defined]
        if sizes[dim] % ranks:
            yield Uneven(path, op, dim, int(sizes[dim]), names[axis], ranks)
        sizes[dim] = -(-sizes[dim] // ranks)


def _arguments(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], text: Callable[[Any], Texts]
) -> tuple[tuple[Argument, ...], str]:
    """The tensors and the flags of a call, by the names in its schema."""
    schema = compat.schema_of(func)
    names = [a.name for a in schema.arguments] if schema is not None else []
    names += [f"argument {at}" for at in range(len(names), len(args))]
    tensors, flags = [], {}
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        if isinstance(value, torch.Tensor):
            placements = text(value.placements) if isinstance(value, DTensor) else ()
            shape = tuple(int(size) for size in value.shape)
            tensors.append(Argument(name, shape, str(value.dtype).rpartition(".")[2], placements))
        elif value is None or isinstance(value, (bool, int, float, str)):
            flags[name] = value if value == value else "nan"
    return tuple(tensors), json.dumps(flags)


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # under such a mode torch.compile compiles, as it does for users (see runner.observe)


class _Below(_Mode):  # type: ignore[no-untyped-call]
    """Under DTensor: sees the collectives on local tensors, and steps aside for DTensors."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(issubclass(t, (DTensor, AsyncCollectiveTensor)) for t in types):
            return NotImplemented
        kwargs = kwargs or {}
        if self.recorder.on:
            called = collectives.called(func, args, kwargs)
            if called is not None and called.name:
                self.recorder.collective(called)
        return func(*args, **kwargs)


class _Above(_Mode):  # type: ignore[no-untyped-call]
    """Over DTensor: each op that meets one."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(issubclass(t, DTensor) for t in types):
            if any(issubclass(t, AsyncCollectiveTensor) for t in types):
                return NotImplemented
            if self.recorder.on:
                self.recorder.plain(func, args, kwargs)
            return func(*args, **kwargs)
        if not self.recorder.on:
            return func(*args, **kwargs)
        return self.recorder.call(func, args, kwargs)
