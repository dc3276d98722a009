"""What a probe file is made of. Public: a user's own probe imports from here.

A probe file defines one module-level `PROBE: Probe`. It says how operators are called; it never
launches, measures or judges. It must import without torch (`attncheck list` and the planner read it in
a process that never loads torch): import torch inside the functions that need it.

The words for dims are the field's: a tensor dim is named by the role it plays, so that a placement can
be stated once (`heads`) and mean `S(1)` in a (batch, heads, sequence, head_dim) layout and `S(2)` in a
(batch, sequence, heads, head_dim) one.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Union

if TYPE_CHECKING:
    import torch

    from attncheck.inventory import RegisteredOp

BATCH = "batch"
HEADS = "heads"
KV_HEADS = "kv_heads"
SEQUENCE = "sequence"
KV_SEQUENCE = "kv_sequence"
HEAD_DIM = "head_dim"
OTHER = "-"  # a dim that no placement pattern shards (packed qkv, cu_seqlens, broadcast)

ROLES = (BATCH, HEADS, KV_HEADS, SEQUENCE, KV_SEQUENCE, HEAD_DIM)

LEVELS = ("quick", "default", "full")

# How tensors lie in memory, for `Setting.memory`. Their values do not depend on it, but for `expanded`.
MEMORY: Mapping[str, str] = {
    "contiguous": "one element behind the other",
    "transposed": "stored with the two dims before the last swapped, as a (batch, sequence, heads, "
    "head_dim) projection is that is used as (batch, heads, sequence, head_dim); so is the gradient "
    "of the output",
    "sliced": "the middle third of a buffer three times as wide, as k is of a packed qkv projection; "
    "so is the gradient of the output",
    "expanded": "the first index of the first dim stands for all of them (stride 0), as one prompt "
    "does that is shared by a batch",
}
# The placement of a case whose setting places each tensor itself.
EXPLICIT = "explicit"

# A placement pattern, for one mesh axis: which roles it shards. Tensors without such a dim, and dims of
# size 1 that broadcast, stay replicated.
PATTERNS: Mapping[str, tuple[str, ...]] = {
    "replicate": (),
    "batch": (BATCH,),
    "heads": (HEADS, KV_HEADS),
    "sequence": (SEQUENCE, KV_SEQUENCE),
    "query": (SEQUENCE,),  # queries sharded over the sequence, keys and values whole
    "head_dim": (HEAD_DIM,),
    "partial": (),  # the first tensor is P(sum), as after a row-wise linear without its reduction
}


@dataclass(frozen=True)
class Setting:
    """One configuration of a call.

    `sizes`: the sizes by role (`batch`, `heads`, `kv_heads`, `sequence`, `kv_sequence`, `head_dim`).
    `options`: whatever else the operator needs (`causal`, `window`, `mask` ...), JSON values only.
    `level`: the lowest scan level that includes it. `placements`: the patterns it is run with at that
    level (None: the operator's own list). `dropout`: a rate above 0 makes the oracle compare
    distributions instead of values. `memory`: how its tensors lie in memory, one of `MEMORY`; weights,
    given values and what the operator writes into stay contiguous. `explicit`: placements by tensor, one
    for each mesh axis as PyTorch prints them (`S(1)`, `R`, `P(sum)`), where no pattern says it: the
    setting is then run with these alone, on meshes of as many axes, under the placement `explicit`.
    Tensors that it does not name are replicated; those that are passed plain stay so.
    """

    name: str
    sizes: Mapping[str, int]
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)
    level: str = "default"
    placements: tuple[str, ...] | None = None
    dropout: float = 0.0
    memory: str = "contiguous"
    explicit: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.memory in MEMORY, (
            f"{self.name}: memory {self.memory!r} is none of {list(MEMORY)}"
        )

    def __getitem__(self, role: str) -> int:
        return self.sizes[role]

    def get(self, option: str, default: Any = None) -> Any:
        return self.options.get(option, default)

    def to_dict(self) -> dict[str, Any]:
        """What the report shows: name, dtype, sizes and options in one flat object."""
        out: dict[str, Any] = {"name": self.name, "dtype": self.dtype, **self.sizes, **self.options}
        if self.dropout:
            out["dropout"] = self.dropout
        if self.memory != "contiguous":
            out["memory"] = self.memory
        return out

    @classmethod
    def from_dict(
        cls, shown: Mapping[str, Any], explicit: Mapping[str, tuple[str, ...]]
    ) -> Setting:
        """The setting that a report shows so, with the placements of its tensors: of level `quick`."""
        beside = {"name", "dtype", "dropout", "memory", *ROLES}
        return cls(
            name=str(shown["name"]),
            sizes={role: int(shown[role]) for role in ROLES if role in shown},
            dtype=str(shown["dtype"]),
            options={name: value for name, value in shown.items() if name not in beside},
            level="quick",
            dropout=float(shown.get("dropout", 0.0)),
            memory=str(shown.get("memory", "contiguous")),
            explicit=explicit,
        )


@dataclass(frozen=True)
class Tensor:
    """A tensor argument of an operator.

    `dims` names the role of each dim, `sizes` gives its size. `fill`: `normal` (asymmetric random
    values), `weight` (the same over the root of the last size, as a layer's), `bool_mask`, `float_mask`,
    `slopes` (positive, one a head), `zeros`, `eye` (identity in the dims kv_sequence and head_dim, or
    the last two), or `values` for the integers in `values`. `wrap`: how it meets the operator:
    `pattern` (a DTensor placed by the case's pattern), `replicate` (always a replicated DTensor) or
    `plain` (an ordinary tensor). `dtype`: None for the setting's own. `mutable`: the operator writes
    into it (a KV cache), so it is judged as a result; any other argument that changes is a fault of the
    probe.
    """

    name: str
    dims: tuple[str, ...]
    sizes: tuple[int, ...]
    requires_grad: bool = True
    fill: str = "normal"
    wrap: str = "pattern"
    dtype: str | None = None
    values: tuple[int, ...] = ()
    mutable: bool = False

    def __post_init__(self) -> None:
        assert len(self.dims) == len(self.sizes), f"{self.name}: {self.dims} against {self.sizes}"


def fixed(
    name: str,
    rows: Sequence[int] | Sequence[Sequence[int]],
    dims: tuple[str, ...] = (OTHER,),
    wrap: str = "replicate",
    dtype: str = "int32",
) -> Tensor:
    """An argument whose values are the setting's own, in one dim or two: lengths, a block table, a mask."""
    sizes: tuple[int, ...] = (len(rows),)
    values: list[int] = []
    for row in rows:
        values += [row] if isinstance(row, int) else row
    if len(dims) == 2:
        sizes = (len(rows), len(values) // len(rows))
    return Tensor(
        name,
        dims,
        sizes,
        requires_grad=False,
        fill="values",
        wrap=wrap,
        dtype=dtype,
        values=tuple(values),
    )


def cu_seqlens(name: str, lengths: Sequence[int], wrap: str = "replicate") -> Tensor:
    """Where each packed sequence starts, and where the last one ends: int32, (sequences + 1,)."""
    return fixed(name, (0, *accumulate(lengths)), wrap=wrap)


def refuse_unknown(function: Callable[..., Any], keywords: Iterable[str]) -> None:
    """Raise ValueError for keywords that this version's `function` does not take.

    For a probe's `call`: what an older version lacks is a setting that it refuses, and the outcome says
    so; the TypeError of the call itself would be a fault of the probe.
    """
    parameters = inspect.signature(function).parameters
    if unknown := sorted(set(keywords) - set(parameters)):
        package = function.__module__.partition(".")[0]
        version = getattr(sys.modules.get(package), "__version__", "this version")
        raise ValueError(f"{function.__name__} of {package} {version} has no {', '.join(unknown)}")


Tensors = Mapping[str, "torch.Tensor"]
# What a call or a reference returns: the output, or several by name with the output under `out`.
Results = Union["torch.Tensor", Mapping[str, "torch.Tensor"]]


@dataclass(frozen=True)
class Operator:
    """An attention function as a user calls it.

    `tensors(setting)` describes its tensor arguments, `call(setting, tensors)` calls it (on plain
    tensors and on DTensors alike), and `reference(setting, tensors)` computes the same in float64 on
    whole plain tensors, differentiably. Both return the output, or a mapping that holds it as `out`
    beside whatever else is worth judging (`lse`); gradients are taken of `out`. `output_dims` names the
    roles of the output's dims. `kernel_ops`: the dispatcher ops it is expected to reach, as PyTorch
    writes them. `packages`: requirement strings of the distributions it needs. `missing()`, asked in the
    worker once the stand-ins are in place, says why the operator is not there, or ''. `standins`: what
    `attncheck.standins` can provide for it on a CPU. `bypasses`: functions that take tensors but are no
    dispatcher ops, as `module:function` or `module` for all of a module's; a DTensor has a null data
    pointer there, so they are guarded and never see one. `function` is the import path of the function
    where `name` is a shorthand (one function, several backends). `slow`: known to be dear to propagate;
    the planner runs it after the others. `devices_because`: why it runs on `devices` alone, for whoever
    asks for another. `around()` makes the context that holds during each call and its backward, for an
    operator that is chosen by a switch of the process; the others run without it. `communicates`:
    communication is what it is for (ring attention), and is not held against it.
    """

    name: str
    tensors: Callable[[Setting], tuple[Tensor, ...]]
    call: Callable[[Setting, Tensors], Results]
    reference: Callable[[Setting, Tensors], Results]
    settings: tuple[Setting, ...]
    output_dims: tuple[str, ...] = ()
    kernel_ops: tuple[str, ...] = ()
    placements: tuple[str, ...] = ("replicate", "batch", "heads", "sequence")
    packages: tuple[str, ...] = ()
    missing: Callable[[], str] | None = None
    standins: tuple[str, ...] = ()
    bypasses: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    function: str = ""
    slow: bool = False
    communicates: bool = False
    devices_because: str = ""
    around: Callable[[], AbstractContextManager[object]] | None = None


@dataclass(frozen=True)
class Probe:
    """A family of operators: what one file on the probes shelf defines as `PROBE`.

    `imports` maps distributions to the module of each whose import registers its ops: it is imported
    where the distribution is installed. `discover` makes operators of ops that were found registered
    and that no probe names; such a probe needs no `operators` of its own.
    """

    name: str
    summary: str
    operators: tuple[Operator, ...] = ()
    imports: Mapping[str, str] = field(default_factory=dict)
    discover: Callable[[Sequence[RegisteredOp]], tuple[Operator, ...]] | None = None
