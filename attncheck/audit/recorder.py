"""What happens in a model, op by op: which kernel op meets DTensors in which module, and what communicates.

Two dispatch modes, as in `runner.observe`: one above DTensor, which sees each op with its DTensor arguments,
and one below, which sees the collectives on local tensors. What is written down here is counts by what is
different, so that a thousand equal calls are one entry; the first of them is looked at closely.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from attncheck.audit.lines import line_here
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


@dataclass
class _Known:
    """What a call does that was looked at before: DTensor answers equal calls alike."""

    ops: dict[str, int]
    traffic: list[tuple[Traffic, int, int]]
    attention: Attention | None


class Recorder:
    """Records while `recording()`. With `carry`, what an op that fails may have returned is asked of it, and
    the model goes on; without, what the op raised goes on, as in any run.

    The first of equal calls (the same op and flags, placements and shapes) is looked at from both sides, the
    others are counted: forty layers cost as much to watch as one, but for the counting.
    """

    def __init__(self, carry: Callable[..., Any] | None = None) -> None:
        self.facts = Facts()
        self.where = Where()
        self.carry = carry
        self.on = True
        self.modes: tuple[TorchDispatchMode, ...] = ()
        self._below = _Below(self)
        self._op = ""
        self._counting = True
        self._own: list[tuple[Traffic, int, int]] = []  # of the call that is looked at
        self._known: dict[Any, _Known] = {}
        self._texts: dict[Any, Texts] = {}
        self._quiet: set[Any] = set()
        self._dull: set[Any] = set()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """The modules of this process are followed, and the ops in here are recorded."""
        compat.route_higher_order_ops(_Above, _Below)
        self.modes = (_Above(self),)
        with (
            self.where.watching(),
            compat.watch_alltoall(self._alltoall),
            compat.unwatched_propagation(),
            self.modes[0],
        ):
            yield

    # --- ops -------------------------------------------------------------------------------------

    def call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """An op that takes a DTensor."""
        backward = compat.in_backward()
        if func in self._quiet:
            try:
                return func(*args, **kwargs)
            except Exception as error:  # up to 2.9 `aten.alias` has no strategy
                path, name = self.where.path(backward), compat.op_name(func)
                return self._failed(func, name, path, backward, args, kwargs, error)
        key = _key(func, backward, args, kwargs)
        known = self._known.get(key) if key is not None else None
        path = self.where.path(backward)
        if known is None:
            return self._look(key, func, path, backward, args, kwargs)
        counting, self._counting = self._counting, False
        try:
            out = func(*args, **kwargs)
        except Exception as error:
            name = compat.op_name(func)
            return self._failed(func, name, path, backward, args, kwargs, error)
        finally:
            self._counting = counting
        known.ops[path] = known.ops.get(path, 0) + 1
        for kind, count, size in known.traffic:
            self._add_traffic(kind, path, count, size)
        if known.attention is not None:
            self._attended(known.attention, path)
        return out

    def _look(self, key: Any, func: Any, path: str, backward: bool, args: Any, kwargs: Any) -> Any:
        name = compat.op_name(func)
        if name in ALIASES:
            self._quiet.add(func)
            return self.call(func, args, kwargs)
        above, self._op = self._op, name
        before, self._own = self._own, []
        try:
            with self._below:
                out = func(*args, **kwargs)
        except Exception as error:
            return self._failed(func, name, path, backward, args, kwargs, error)
        else:
            phase = BACKWARD if backward else FORWARD
            kind = Op(name, phase, self._placements((args, kwargs)), self._placements(out))
            ops = self.facts.ops.setdefault(kind, {})
            ops[path] = ops.get(path, 0) + 1
            attention = None
            if not backward:
                self._note_line(kind, path)
                if attention_ops.looks_like(name, compat.schema_of(func)):
                    attention = Attention(name, *_arguments(func, args, kwargs, self._text))
                    self._attended(attention, path)
            self._look_for_uneven(name, path, args, kwargs)
            if key is not None:
                self._known[key] = _Known(ops, self._own, attention)
            return out
        finally:
            self._op, self._own = above, before

    def plain(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """An op on ordinary tensors: a collective that the model or its plan asks for, or attention in a
        `local_map`."""
        if func in self._dull:
            return
        called = collectives.called(func, args, kwargs)
        if called is not None and called.name:
            self.collective(called)
        elif attention_ops.looks_like(name := compat.op_name(func), compat.schema_of(func)):
            if not compat.in_backward():
                self.attended(name, args, kwargs)
        else:
            self._dull.add(func)

    def attended(self, op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """An attention call, on ordinary tensors or no op of its own by the time that this mode sees it."""
        func = compat.find_overload(op)
        call = Attention(op, *_arguments(func, args, kwargs, self._text))
        self._attended(call, self.where.path(False))

    def _attended(self, call: Attention, path: str) -> None:
        by_path = self.facts.attention.setdefault(call, {})
        by_path[path] = by_path.get(path, 0) + 1

    def _failed(
        self,
        func: Any,
        name: str,
        path: str,
        backward: bool,
        args: Any,
        kwargs: Any,
        error: Exception,
    ) -> Any:
        """Writes down what was refused; what the op may have returned, or raises what it raised."""
        problem, named = compat.refusal(error) or ("error", None)
        op = named if named and named != name and "." in named else name
        message = (
            compat.refusal_sentence(error)
            if problem != "error"
            else f"{type(error).__name__}: {compat.error_text(error)}"[:500]
        )
        phase = BACKWARD if backward else FORWARD
        kind = Op(op, phase, self._placements((args, kwargs)), (), problem, message)
        by_path = self.facts.ops.setdefault(kind, {})
        by_path[path] = by_path.get(path, 0) + 1
        if not backward:
            self._note_line(kind, path)
            if attention_ops.looks_like(name, compat.schema_of(func)):
                self._attended(Attention(name, *_arguments(func, args, kwargs, self._text)), path)
        if self.carry is None:
            raise error
        with self._suspended():
            try:
                return self.carry(func, args, kwargs)
            except Exception:
                raise error from None  # what it raised at first is what users will see

    def _note_line(self, kind: Op | Traffic, path: str) -> None:
        if (kind, path) not in self.facts.lines:  # looking for it walks the stack
            self.facts.lines[kind, path] = line_here()

    # --- placements ------------------------------------------------------------------------------

    def _placements(self, tree: Any) -> Placed:
        """Of each tensor in it: its placements, or `plain`."""
        return tuple(
            self._text(leaf.placements) if isinstance(leaf, DTensor) else ("plain",)
            for leaf in tree_leaves(tree)
            if isinstance(leaf, torch.Tensor)
        )

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

    def weigh(self, named: Iterable[tuple[str, torch.Tensor]]) -> tuple[int, int]:
        """(numbers that the parameters hold, bytes of them that this rank has); uneven ones are noted."""
        count, size = 0, 0
        for name, parameter in named:
            local = parameter
            if isinstance(parameter, DTensor):
                local = compat.local_tensor(parameter)
                for found in uneven(name, "", parameter):
                    self.facts.uneven.setdefault(found)
            count += math.prod(parameter.shape)
            size += local.numel() * local.element_size()
        return count, size

    # --- communication ---------------------------------------------------------------------------

    def collective(self, called: collectives.Called) -> None:
        self.communicated(called.name, called.operands, compat.group_size(called.group))

    def communicated(self, name: str, operands: Sequence[torch.Tensor], ranks: int) -> None:
        if not self._counting or not self.where.outermost:
            return  # attncheck's own, or what places the weights before the first step
        backward = compat.in_backward()
        path = self.where.path(backward)
        kind = Traffic(name, BACKWARD if backward else FORWARD, self._op)
        sent = ring_bytes(name, sum(t.numel() * t.element_size() for t in operands), ranks)
        self._own.append((kind, 1, sent))
        if not backward:
            self._note_line(kind, path)
        self._add_traffic(kind, path, 1, sent)

    def _add_traffic(self, kind: Traffic, path: str, count: int, size: int) -> None:
        totals = self.facts.traffic.setdefault(kind, {}).setdefault(path, [0, 0])
        totals[0] += count
        totals[1] += size

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


def _key(func: Any, backward: bool, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What equal calls have in common; None where an argument cannot be compared."""
    parts: list[Any] = [func, backward]
    _add_parts(args, parts)
    for name, value in kwargs.items():
        parts.append(name)
        _add_parts((value,), parts)
    key = tuple(parts)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _add_parts(values: Sequence[Any], parts: list[Any]) -> None:
    for value in values:
        if isinstance(value, DTensor):
            # Its placements, mesh, shape, stride and dtype; the hash is kept by the spec, equality is not.
            parts.append(hash(compat.spec_of(value)))
        elif isinstance(value, torch.Tensor):
            parts.append((value.shape, value.dtype))
        elif isinstance(value, (list, tuple)):
            parts.append(len(value))
            _add_parts(value, parts)
        else:
            parts.append(value)


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
            placements: Texts = ()
            axes: Texts = ()
            if isinstance(value, DTensor):
                placements = text(value.placements)
                axes = tuple(value.device_mesh.mesh_dim_names or ())
            shape = tuple(int(size) for size in value.shape)
            dtype = str(value.dtype).rpartition(".")[2]
            tensors.append(Argument(name, shape, dtype, placements, axes))
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
