"""Watching one call from inside: every kernel op that meets a DTensor, every refusal, every collective.

Two dispatch modes, one above DTensor and one below it. The upper one sees each kernel op with its
DTensor arguments, and when DTensor refuses the op it replicates the arguments, runs the op on them and
goes on, so that one run names all that is missing and not only the first. The lower one sees what
DTensor really does with the local tensors, and counts collectives there; `CommDebugMode` sits above
modules and has been seen to miscount.

Bytes are what one rank sends under a ring algorithm (see attncheck.rings). That is what the collective that
was asked for costs where it is real. Held against the kernel's count of bytes that gloo sent
(tests/functional/test_collectives.py): all_gather and all_reduce agree to 2 %; gloo emulates reduce_scatter
by all_reduce and all_to_all by all_gather, and so sends 2 and n times as much.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate

from attncheck.model import Collective, KernelOp, MissingOp
from attncheck.rings import ring_bytes
from attncheck.runner import blame, collectives, compat
from attncheck.runner.compat import TorchDispatchMode, tree_flatten, tree_map

STATE_BYTES = 256

# Ops without a kernel, which autograd adds behind the one that a user calls: no rank waits or dies in them.
ALIASES = ("aten.detach.default", "aten.alias.default")


@dataclass
class Trace:
    """What one rank saw while it ran one call. Plain values only: it travels between ranks."""

    ops: dict[tuple[Any, ...], int] = field(default_factory=dict)
    missing: dict[tuple[str, str, str], str] = field(default_factory=dict)
    collectives: dict[tuple[str, str, str], tuple[int, int]] = field(default_factory=dict)
    sequence: list[str] = field(default_factory=list)
    # (op, phase): why the shape of an output of it is not what its placements say.
    illegal: dict[tuple[str, str], str] = field(default_factory=dict)
    last_op: str = ""
    raised_in: str = (
        ""  # the op that let an exception through; '' where Python above the ops raised
    )

    def kernel_ops(self) -> tuple[KernelOp, ...]:
        return tuple(
            KernelOp(op, phase, inputs, outputs, calls)
            for (op, phase, inputs, outputs), calls in self.ops.items()
        )

    def missing_ops(self) -> tuple[MissingOp, ...]:
        return tuple(
            MissingOp(op, phase, kind, message)
            for (op, phase, kind), message in self.missing.items()
        )

    def communication(self) -> tuple[Collective, ...]:
        return tuple(
            Collective(name, op, phase, count, size)
            for (name, op, phase), (count, size) in self.collectives.items()
        )


class StateFile:
    """One line per rank that survives the process: which case, doing what. Peers and restarts read it.

    A fixed-size `pwrite` costs microseconds and, unlike memory, outlives a segfault.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        # Held as long as the process lives: how a peer can tell that it is gone, whatever it died of.
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.case = -1
        self.doing = "idle"
        self.op = ""
        self.collectives = 0

    def write(self) -> None:
        line = f"{self.case}\t{self.doing}\t{self.collectives}\t{self.op}"
        os.pwrite(self._fd, line.encode()[:STATE_BYTES].ljust(STATE_BYTES), 0)

    def set(self, doing: str, op: str | None = None) -> None:
        self.doing = doing
        if op is not None:
            self.op = op
        self.write()


@dataclass(frozen=True)
class RankDoing:
    """A state file, read."""

    case: int
    doing: str
    collectives: int
    op: str


def is_gone(path: Path) -> bool:
    """Whether the process that wrote this state file has ended. False where nobody can tell."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # it is held, or this file system has no locks
        return False
    return True


def read_state(path: Path) -> RankDoing:
    """What a rank last wrote; `idle` with case -1 where it wrote nothing (yet)."""
    try:
        parts = path.read_bytes()[:STATE_BYTES].decode(errors="replace").rstrip("\0 ").split("\t")
        return RankDoing(int(parts[0]), parts[1], int(parts[2]), parts[3])
    except (OSError, ValueError, IndexError):
        return RankDoing(-1, "idle", 0, "")


class Observer:
    """Runs calls under both modes and fills a `Trace`. The caller sets `phase`: `setup`, where ops are
    not recorded, then `forward` and `backward`.

    Where one process simulates many `ranks`, `trace` is the first one's. The others took part in the same
    calls; what of theirs may differ is the communication, in `peers`.
    """

    def __init__(self, state: StateFile, ranks: int = 1) -> None:
        self.ranks = ranks
        self.trace = Trace()
        self.peers: list[Trace] = []
        self.calls = blame.Record()
        self.phase = "setup"
        self.state = state
        self.current_op = ""
        self.last_collective = ""
        self.counting = True

    @contextlib.contextmanager
    def watch(self) -> Iterator[Trace]:
        self.trace = Trace()
        self.peers = [Trace() for _ in range(1, self.ranks)]
        self.calls = blame.Record()
        self.phase = "setup"
        compat.route_higher_order_ops(_Above, _Below)
        with (
            compat.watch_alltoall(self._alltoall),
            compat.unwatched_propagation(),
            _Below(self),
            _Above(self),
        ):
            yield self.trace

    def enter(self, op: str) -> None:
        self.current_op = op
        self.trace.last_op = op
        self.trace.raised_in = ""
        self.state.set("op", op)

    def refused(self, error: BaseException) -> bool:
        """Whether what the call raised is DTensor refusing an op where no mode is: inside torch.compile,
        which traces with all modes off."""
        kind, op = compat.refusal(error) or ("", None)
        # Once an op was replicated, what comes after may be of attncheck's own making.
        if not op or self.trace.missing:
            return False
        self.enter(op)
        self.trace.missing[op, self.phase, kind] = compat.refusal_sentence(error)
        return True

    def begin(self, func: Any, op: str, args: Any, kwargs: Any) -> blame.OpCall | None:
        """Keeps what the op takes; of simulated ranks nothing is kept."""
        if self.phase == "setup" or self.ranks > 1:
            return None
        return self.calls.begin(func, op, self.phase, args, kwargs)

    def record_op(self, op: str, inputs: Any, outputs: Any) -> None:
        if self.phase == "setup":
            return  # attncheck's own making of the arguments
        key = (op, self.phase, _placements(inputs), _placements(outputs))
        self.trace.ops[key] = self.trace.ops.get(key, 0) + 1
        if why := blame.illegal_shape(outputs):
            self.trace.illegal.setdefault((op, self.phase), why)

    def record_collective(
        self, name: str, operands: Sequence[torch.Tensor], group_ranks: int
    ) -> None:
        self.state.collectives += 1
        self.last_collective = name
        for rank, trace in enumerate((self.trace, *self.peers)):
            local = [compat.on_rank(t, rank) for t in operands]
            local_bytes = sum(t.numel() * t.element_size() for t in local)
            trace.sequence.append(f"{name}:{local_bytes}")
            if not self.counting:
                continue
            key = (name, self.current_op, self.phase)
            count, size = trace.collectives.get(key, (0, 0))
            sent = ring_bytes(name, local_bytes, group_ranks)
            trace.collectives[key] = (count + 1, size + sent)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Communication in here is attncheck's own: it stays in the sequence, but costs nobody."""
        before, self.counting = self.counting, False
        try:
            yield
        finally:
            self.counting = before

    @contextlib.contextmanager
    def _alltoall(self, local: torch.Tensor, ranks: int) -> Iterator[None]:
        self.record_collective("all_to_all", (local,), ranks)
        with self.suspended():
            yield


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, observer: Observer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.observer = observer

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        # Under such a mode torch.compile compiles, under others it silently runs eagerly, and the case
        # would be judged by what users never run. (Asked for from 2.9 on; up to 2.8 it runs eagerly in here.)
        return True


class _Below(_Mode):  # type: ignore[no-untyped-call]
    """Under DTensor: sees the collectives on local tensors, and steps aside for DTensors."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(issubclass(t, (DTensor, compat.AsyncCollectiveTensor)) for t in types):
            return NotImplemented
        return _call_local(self.observer, func, args, kwargs or {})


class _Above(_Mode):  # type: ignore[no-untyped-call]
    """Over DTensor: records each kernel op, and carries on past the ones that DTensor refuses."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        observer = self.observer
        if not any(issubclass(t, DTensor) for t in types):
            if any(issubclass(t, compat.AsyncCollectiveTensor) for t in types):
                return NotImplemented  # its own handler waits for it, under both modes
            return func(*args, **kwargs)  # plain tensors are the lower mode's business
        name = compat.op_name(func)
        if name not in ALIASES:
            observer.enter(name)
        call = observer.begin(func, name, args, kwargs)
        try:
            # This mode is off inside its own handler; the lower one stays on and sees what follows.
            out = func(*args, **kwargs)
        except Exception as error:
            refused = compat.refusal(error)
            if refused is None:
                observer.trace.raised_in = name
                raise
            kind, named = refused
            # The text may name an op that a composite one decomposed into; that is the missing one.
            op = named if named and named != name and "." in named else name
            observer.trace.missing.setdefault(
                (op, observer.phase, kind), compat.refusal_sentence(error)
            )
            with observer.suspended():
                out = run_replicated(func, args, kwargs)
        observer.record_op(name, (args, kwargs), out)
        if call is not None:
            observer.calls.end(call, args, kwargs, out)
        return out


def _call_local(observer: Observer, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    called = collectives.called(func, args, kwargs)
    if called is None:
        return func(*args, **kwargs)
    name = called.name
    if name:
        observer.record_collective(name, called.operands, compat.group_size(called.group))
    # Collectives are asynchronous: ranks block where they wait, for what was issued last.
    observer.state.set("collective", f"{name or observer.last_collective} in {observer.current_op}")
    try:
        return func(*args, **kwargs)
    finally:
        observer.state.set("op", observer.current_op)


def run_replicated(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run a refused op anyway: gather its DTensors, run it whole on every rank, wrap what it returns.

    Arguments that the op mutates are written back into the caller's own local memory under their own
    placement: a result left in a temporary would be lost (that is how naive fixes of in-place backwards
    go wrong).
    """
    mesh = next(a.device_mesh for a in tree_flatten((args, kwargs))[0] if isinstance(a, DTensor))
    everywhere = [Replicate()] * mesh.ndim
    wholes: dict[int, torch.Tensor] = {}

    def whole(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        if id(value) not in wholes:
            with torch.no_grad():
                gathered = cast("DTensor", value.detach()).redistribute(placements=everywhere)
                wholes[id(value)] = compat.local_tensor(gathered).clone()
        return wholes[id(value)]

    out = compat.call_on_ranks(func, tree_map(whole, args), tree_map(whole, dict(kwargs)))
    schema = compat.schema_of(func)
    arguments = schema.arguments if schema is not None else ()  # a higher-order op mutates nothing
    named = dict(zip((a.name for a in arguments), args, strict=False)) | dict(kwargs)
    mutated = {
        id(wholes[id(named[a.name])]): named[a.name]
        for a in arguments
        if a.alias_info is not None
        and a.alias_info.is_write
        and isinstance(named.get(a.name), DTensor)
    }
    for result_id, original in mutated.items():
        result = next(w for w in wholes.values() if id(w) == result_id)
        with torch.no_grad():
            compat.local_tensor(original).copy_(_share(result, original))

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in mutated:
            return mutated[id(value)]
        return DTensor.from_local(value, mesh, everywhere, run_check=False)

    return tree_map(wrap, out)


def _share(whole: torch.Tensor, like: DTensor) -> torch.Tensor:
    """This rank's part of `whole`, as the placements of `like` have it; no communication.

    Of a `P(sum)` every rank holds an equal share, which DTensor's own redistribute does not offer.
    """
    mesh = like.device_mesh
    partial = [isinstance(p, Partial) for p in like.placements]
    wanted = [
        Replicate() if is_partial else p
        for is_partial, p in zip(partial, like.placements, strict=True)
    ]
    placed = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    ranks = math.prod(mesh.size(axis) for axis, is_partial in enumerate(partial) if is_partial)
    return compat.local_tensor(placed.redistribute(placements=wanted)) / ranks


def _placements(value: Any) -> tuple[tuple[str, ...], ...]:
    return tuple(
        tuple(compat.placement_text(p) for p in leaf.placements)
        if isinstance(leaf, DTensor)
        else ("plain",)
        for leaf in tree_flatten(value)[0]
        if isinstance(leaf, torch.Tensor)
    )
