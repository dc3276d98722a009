"""What the recorder writes down, and what of it an audit tells. Torch-free.

Kinds of calls, each with how often it came in which module; `told` folds the modules that did the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from attncheck.audit.folding import Folder, starred
from attncheck.audited import ModuleCommunication, ModuleOp, UnevenShard

FORWARD, BACKWARD = "forward", "backward"

Texts = tuple[str, ...]
Placed = tuple[Texts, ...]


@dataclass(frozen=True)
class Op:
    """One kind of call of a kernel op: whatever is in here, calls may differ in."""

    op: str
    phase: str
    inputs: Placed
    outputs: Placed
    problem: str = ""
    message: str = ""


@dataclass(frozen=True)
class Traffic:
    """One kind of collective. `kernel_op` is empty where the model or its plan asked for it."""

    name: str
    phase: str
    kernel_op: str


@dataclass(frozen=True)
class Uneven:
    """A dim that `axis` does not divide: of a parameter at `path`, or of what `op` took in the module
    there."""

    path: str
    op: str
    dim: int
    size: int
    axis: str
    ranks: int


@dataclass(frozen=True)
class Argument:
    """A tensor that an attention op took; `placements` is empty for an ordinary one, and `axes` are those of
    its mesh, empty where they have no names."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    placements: Texts = ()
    axes: Texts = ()


@dataclass(frozen=True)
class Attention:
    """One kind of attention call: its tensors, and its other arguments by name, as JSON text."""

    op: str
    tensors: tuple[Argument, ...]
    flags: str


@dataclass
class Facts:
    """Counts by module path: of ops; of collectives, with bytes; of attention calls. `lines`: where a kind of
    call was first met in a module."""

    ops: dict[Op, dict[str, int]] = field(default_factory=dict)
    traffic: dict[Traffic, dict[str, list[int]]] = field(default_factory=dict)
    attention: dict[Attention, dict[str, int]] = field(default_factory=dict)
    uneven: dict[Uneven, None] = field(default_factory=dict)
    lines: dict[tuple[Op | Traffic, str], str] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """An attention call and the modules that it came from, folded."""

    call: Attention
    modules: tuple[str, ...]
    calls: int


@dataclass(frozen=True)
class Told:
    """Facts, folded."""

    layers: Mapping[str, int]
    ops: tuple[ModuleOp, ...]
    communication: tuple[ModuleCommunication, ...]
    uneven: tuple[UnevenShard, ...]
    attention: tuple[Seen, ...]


def told(facts: Facts, paths: Iterable[str], steps: int = 1) -> Told:
    """`paths`: those of all modules of the model. Counts are those of one step."""
    folder = Folder(paths)
    return Told(
        layers=folder.layers(),
        ops=tuple(_ops(facts, folder, steps)),
        communication=tuple(_communication(facts, folder, steps)),
        uneven=tuple(_uneven(facts, folder)),
        attention=tuple(
            Seen(
                call,
                tuple(name for name, _ in folder.fold(by_path)),
                _a_step(sum(by_path.values()), steps),
            )
            for call, by_path in facts.attention.items()
        ),
    )


def _a_step(count: int, steps: int) -> int:
    return max(1, round(count / steps)) if count else 0


def _ops(facts: Facts, folder: Folder, steps: int) -> Iterable[ModuleOp]:
    for kind, by_path in facts.ops.items():
        for module, calls in folder.fold(by_path):
            yield ModuleOp(
                module,
                kind.op,
                kind.phase,
                kind.inputs,
                kind.outputs,
                _a_step(calls, steps),
                kind.problem,
                kind.message,
                _line(facts, kind, by_path),
            )


def _communication(facts: Facts, folder: Folder, steps: int) -> Iterable[ModuleCommunication]:
    for kind, by_path in facts.traffic.items():
        sizes = {path: size for path, (_, size) in by_path.items()}
        calls = folder.fold({path: count for path, (count, _) in by_path.items()})
        for (module, count), (_, size) in zip(calls, folder.fold(sizes), strict=True):
            yield ModuleCommunication(
                module,
                kind.name,
                kind.phase,
                _a_step(count, steps),
                size // steps,
                kind.kernel_op,
                not kind.kernel_op,
                _line(facts, kind, by_path),
            )


def _line(facts: Facts, kind: Op | Traffic, by_path: Iterable[str]) -> str:
    lines = (facts.lines.get((kind, path)) for path in by_path)
    return next((line for line in lines if line), "")


def _uneven(facts: Facts, folder: Folder) -> Iterable[UnevenShard]:
    """Every parameter; of what ops took, each size once, where it is met first: what follows has it from
    there."""
    met: set[tuple[int, str]] = set()
    grouped: dict[tuple[str, str, str, int, int, str, int], dict[str, int]] = {}
    for found in facts.uneven:
        # A parameter is told by its module's name, which the folder knows, and its own.
        module, _, name = (found.path, "", "") if found.op else found.path.rpartition(".")
        key = (starred(module), name, found.op, found.dim, found.size, found.axis, found.ranks)
        if found.op and key not in grouped:
            if (found.size, found.axis) in met:
                continue
            met.add((found.size, found.axis))
        grouped.setdefault(key, {})[module] = 1
    for (_, name, op, dim, size, axis, ranks), modules in grouped.items():
        rows = -(-size // ranks)
        last = max(0, size - rows * (ranks - 1))
        for own, _ in folder.fold(modules):
            tensor = f"{own}: {op}" if op else f"{own}.{name}".strip(".")
            yield UnevenShard(tensor, dim, size, axis, ranks, min(rows, size), last)
