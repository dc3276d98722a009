"""What an audit knows of a whole model: which ops met DTensors in which module, and what that costs.

Plain data beside the report's cases (`Report.audit`), with the same JSON codec. Torch-free. A module path in
which `*` stands for a number (`blocks.*.attn`) names all of these modules: they did the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# How the facts were come by: from `fake` tensors (coverage and communication, never values), `observed` in a
# real run, or from what is known of a `preset` model's attention calls, with no model at all.
FAKE = "fake"
OBSERVED = "observed"
PRESET = "preset"


@dataclass(frozen=True)
class ModuleOp:
    """A kernel op that met DTensors, in the modules that `module` names.

    `inputs` and `outputs` hold one entry per tensor: its placements, or `plain`. `calls` counts those of all
    the modules. `problem`: how DTensor refused it (`strategy`, `mixed`, `propagation`), `error` where it
    raised otherwise, empty where it was taken; `message` is then what PyTorch said. `line`: the user's line
    that called it (`wan.py:41`), where it is known.
    """

    module: str
    op: str
    phase: str
    inputs: tuple[tuple[str, ...], ...] = ()
    outputs: tuple[tuple[str, ...], ...] = ()
    calls: int = 1
    problem: str = ""
    message: str = ""
    line: str = ""


@dataclass(frozen=True)
class ModuleCommunication:
    """Collectives of one kind in the modules that `module` names, in one step.

    `bytes`: what one rank sends, over all `calls` (see `attncheck.rings`). `asked`: the model or its plan
    redistributes there; otherwise DTensor did it on its own, for `kernel_op`.
    """

    module: str
    name: str
    phase: str
    calls: int
    bytes: int
    kernel_op: str = ""
    asked: bool = True
    line: str = ""


@dataclass(frozen=True)
class UnevenShard:
    """A dim that the ranks do not divide. `tensor` names a parameter, or an argument of an op in a module;
    `first` and `last` are the sizes that the first and the last rank of the axis hold."""

    tensor: str
    dim: int
    size: int
    axis: str
    ranks: int
    first: int
    last: int


@dataclass(frozen=True)
class RankDifference:
    """What the first and the last rank did differently: a shape, an op, a failure."""

    module: str
    first: str
    last: str


@dataclass(frozen=True)
class AttentionCall:
    """One distinct attention call of the model, and the cases that were run of it.

    `function`: what the user calls; `sizes`: by role (`heads`, `sequence` ...) at the model's own size;
    `placements`: by tensor, as in a case; `operator`, `setting`: what was run instead at reduced size.
    `note`: why nothing was run, or what the reduced case leaves out.
    """

    modules: tuple[str, ...]
    function: str
    kernel_op: str
    calls: int
    sizes: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    placements: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    operator: str = ""
    setting: str = ""
    cases: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Unequal:
    """Something of the parallel model that is not what the unsharded one has.

    `mode`: `training`, `evaluation`, or `second call` (with flipped flags); `subject`: `output`, or the name
    of the parameter whose gradient it is. `module`: the first module, in the order of execution, from which
    on values differ; empty where none does. `error` is the largest absolute difference, `bound` what
    rounding explains. `cause`: the likely cause in words, empty where attncheck knows none.
    """

    mode: str
    subject: str
    module: str = ""
    error: float = 0.0
    bound: float = 0.0
    cause: str = ""


@dataclass(frozen=True)
class Uncompared:
    """A tensor that could not be compared, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Numeric:
    """The parallel model with real numbers on real ranks, against the unsharded one with the same weights.

    `reference`: how the unsharded one was made. `compared`: how many outputs and gradients were compared.
    `failure`: why it came to no end, empty where it did. `notes`: what was done otherwise than users would,
    in sentences.
    """

    ranks: int
    reference: str
    compared: int = 0
    unequal: tuple[Unequal, ...] = ()
    uncompared: tuple[Uncompared, ...] = ()
    failure: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fit:
    """How one way of distribution splits a call of a known model: over `heads_ranks` by heads, over
    `sequence_ranks` by the sequence. `verdict`: `works`, `replicate_kv`, `uneven` or `impossible`."""

    call: str
    way: str
    heads_ranks: int
    sequence_ranks: int
    verdict: str
    why: str = ""


@dataclass(frozen=True)
class Degrees:
    """The numbers of ranks over which one way splits the worst of a known model's calls, by verdict."""

    way: str
    works: tuple[int, ...] = ()
    replicate_kv: tuple[int, ...] = ()
    uneven: tuple[int, ...] = ()


@dataclass(frozen=True)
class Audit:
    """A whole model on a mesh.

    `inputs`: what it was called with, in words; `parameters`, `parameter_bytes`: of the whole model, and what
    one rank holds of it; `layers`: how many modules each path with a `*` stands for. `failure`: where the
    pass ended before its end, empty where it went through. `steps`: how many were seen. `seconds`,
    `peak_mib`: what the pass itself took.
    """

    target: str
    mesh: Mapping[str, int]
    kind: str = FAKE
    inputs: str = ""
    parameters: int = 0
    parameter_bytes: int = 0
    layers: Mapping[str, int] = field(default_factory=dict)
    steps: int = 1
    ops: tuple[ModuleOp, ...] = ()
    communication: tuple[ModuleCommunication, ...] = ()
    uneven: tuple[UnevenShard, ...] = ()
    differences: tuple[RankDifference, ...] = ()
    attention: tuple[AttentionCall, ...] = ()
    numeric: Numeric | None = None
    fits: tuple[Fit, ...] = ()
    degrees: tuple[Degrees, ...] = ()
    notes: tuple[str, ...] = ()
    failure: str = ""
    seconds: float = 0.0
    peak_mib: float = 0.0
