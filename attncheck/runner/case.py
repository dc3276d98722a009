"""Running one case on one rank: build the DTensors, call under observation, call again, note everything."""

from __future__ import annotations

import resource
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from attncheck.model import Case, Reason
from attncheck.probing import Operator, Results, Setting, Tensor
from attncheck.runner import compat
from attncheck.runner.dataflow import bypasses_dispatcher
from attncheck.runner.guard import BypassesDispatcher
from attncheck.runner.inputs import cotangent, lay_out, lay_out_cotangent, whole_tensors
from attncheck.runner.observe import Observer, Trace
from attncheck.runner.placements import coordinates, shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


# Calls on the same values beyond the first and the warm one, where a case is repeated: a reduction whose
# order changes shows in one of them.
SAME_VALUES = 2


# Stands for the type of an exception that PyTorch's simulation of ranks raised, and no real rank would.
NOT_SIMULATED = "NotSimulated"


class ProbeError(Exception):
    """The probe breaks its contract: it returns something else, or changes its arguments."""


@dataclass(frozen=True)
class Local:
    """One result on this rank: its local tensor (CPU), the global shape, placements (None: no DTensor)."""

    tensor: torch.Tensor
    shape: tuple[int, ...]
    placements: tuple[str, ...] | None


@dataclass
class RankRecord:
    """What one rank has to say about a case. Travels to rank 0."""

    rank: int
    unavailable: tuple[Reason, str] | None = None
    exception: tuple[str, str, str] | None = None  # type, text, the op it came from
    failure: str = ""  # the check itself failed: why
    changed: tuple[str, ...] = ()  # what the case left changed in the process
    trace: Trace = field(default_factory=Trace)
    results: dict[str, Local] = field(default_factory=dict)
    warm: dict[str, Local] | None = None
    # Results with other values, in their order; and those whose bits changed on the same values.
    repeats: list[dict[str, Local]] = field(default_factory=list)
    unrepeatable: tuple[str, ...] = ()
    timings: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_mib: float = 0.0


@dataclass(frozen=True)
class Prepared:
    """An operator in a setting, ready to run: whole arguments, and what the unsharded call gave.

    `bypasses`: the function that fills its output behind the dispatcher's back, or ''.
    """

    operator: Operator
    setting: Setting
    specs: tuple[Tensor, ...]
    wholes: Mapping[str, torch.Tensor]
    unsharded: Mapping[str, torch.Tensor]
    refused: tuple[Reason, str] | None = None
    bypasses: str = ""


def peak_rss_mib() -> float:
    """This process's peak resident memory, MiB (Linux counts KiB, macOS bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def prepare(operator: Operator, setting: Setting, seed: int, device: str) -> Prepared:
    """Make the arguments and run the operator whole, forward and backward: if it refuses that, no
    placement can be asked of it."""
    specs = operator.tensors(setting)
    wholes = whole_tensors(operator.name, setting, specs, seed)
    refused = None
    unsharded: dict[str, torch.Tensor] = {}
    compat.forget_compiled()
    try:
        with _around(operator):
            unsharded = run_whole(operator, setting, specs, wholes, seed, device)
    except ModuleNotFoundError as error:
        refused = (Reason.PACKAGE_MISSING, str(error))
    except (ImportError, OSError) as error:
        refused = (Reason.EXTENSION_NOT_LOADABLE, str(error))
    except (RuntimeError, ValueError) as error:
        # What kernels raise when they refuse. Anything else (TypeError, NameError ...) is a fault of the
        # probe, and is left to end as `unknown`.
        refused = (Reason.SETTING_REFUSED, f"{type(error).__name__}: {error}")
    except ProbeError:
        raise
    except (Exception, SystemExit) as error:
        raise ProbeError(
            f"{operator.name}: the call on whole plain tensors raised {type(error).__name__}: {error}"
        ) from error
    bypasses = "" if refused else _bypasses(operator, setting, specs, wholes, device)
    return Prepared(operator, setting, specs, wholes, unsharded, refused, bypasses)


def _around(operator: Operator) -> AbstractContextManager[object]:
    return operator.around() if operator.around is not None else nullcontext()


def _bypasses(
    operator: Operator,
    setting: Setting,
    specs: Sequence[Tensor],
    wholes: Mapping[str, torch.Tensor],
    device: str,
) -> str:
    """The operator's function where no dispatcher op makes its output; '' too where the probe says what
    it reaches, or guards it, and where a fix stands in front of it."""
    if operator.kernel_ops or operator.bypasses or _is_wrapped(operator.function or operator.name):
        return ""
    tensors = {
        spec.name: lay_out(wholes[spec.name].clone().to(device), spec, setting) for spec in specs
    }

    def call() -> dict[str, torch.Tensor]:
        with _around(operator):
            return named_outputs(operator.call(setting, tensors), f"{operator.name}: call")

    if not bypasses_dispatcher(call, tuple(tensors.values())):
        return ""
    return operator.function or operator.name


def _is_wrapped(path: str) -> bool:
    """Whether the function is one with which a fix (attncheck/fixes/local_calls.py) takes DTensors."""
    module, _, name = path.rpartition(".")
    return getattr(getattr(sys.modules.get(module), name, None), "made_by", "") == "attncheck"


def run_whole(
    operator: Operator,
    setting: Setting,
    specs: Sequence[Tensor],
    wholes: Mapping[str, torch.Tensor],
    seed: int,
    device: str,
) -> dict[str, torch.Tensor]:
    """`out`, other outputs by name and `grad.*` of the operator on ordinary whole tensors, on the CPU.

    Raises ProbeError, and whatever the operator raises.
    """
    # Clones: an operator may write into its arguments, and the next case starts from the same ones.
    leaves = {
        spec.name: lay_out(wholes[spec.name].clone().to(device), spec, setting)
        .detach()
        .requires_grad_(spec.requires_grad)
        for spec in specs
    }
    torch.manual_seed(seed)
    outputs = named_outputs(operator.call(setting, leaves), f"{operator.name}: call")
    out = outputs["out"]
    judged = {**_written(specs, leaves), **outputs}
    results = {name: value.detach().cpu().clone() for name, value in judged.items()}
    for spec in specs:
        if not spec.mutable and not _same(leaves[spec.name].detach().cpu(), wholes[spec.name]):
            raise ProbeError(
                f"{operator.name}: the call changed its argument {spec.name}; an argument that an "
                "operator writes into must be declared mutable"
            )
    wanted = [spec.name for spec in specs if spec.requires_grad]
    if not wanted:
        return results
    if not out.requires_grad:
        raise ProbeError(
            f"{operator.name}: the output has no gradient, but {wanted[0]} is declared to require one"
        )
    dout = cotangent(operator.name, setting, out.shape, out.dtype, seed).to(device)
    dout = lay_out_cotangent(dout, setting)
    grads = torch.autograd.grad(out, [leaves[n] for n in wanted], dout, allow_unused=True)
    for name, grad in zip(wanted, grads, strict=True):
        if grad is not None:
            results[f"grad.{name}"] = grad.detach().cpu()
    return results


def _written(
    specs: Sequence[Tensor], leaves: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What the operator writes into (a KV cache) is a result too, whether it is returned or not: an op whose
    strategy redistributes it writes into a temporary, and nobody else would notice."""
    return {s.name: leaves[s.name] for s in specs if s.mutable and s.wrap != "plain"}


def named_outputs(returned: Results, who: str) -> dict[str, torch.Tensor]:
    """What a call or a reference returned, by name. Raises ProbeError where it breaks the contract."""
    named = {"out": returned} if isinstance(returned, torch.Tensor) else returned
    if (
        not isinstance(named, Mapping)
        or "out" not in named
        or not all(isinstance(value, torch.Tensor) for value in named.values())
    ):
        raise ProbeError(
            f"{who} returned {type(returned).__name__}; expected a tensor, or a mapping of tensors "
            "with the output as `out`"
        )
    return dict(named)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        if a.is_floating_point()
        else (torch.equal(a, b))
    )


def run_reference(prepared: Prepared, seed: int) -> dict[str, torch.Tensor]:
    """`out`, other outputs by name and `grad.*` of the probe's float64 reference.

    Raises ProbeError where it does not fit what the operator returns on whole tensors.
    """
    who = f"{prepared.operator.name}: reference"
    leaves = {}
    for spec in prepared.specs:
        whole = prepared.wholes[spec.name]
        if whole.is_floating_point():
            whole = whole.to(torch.float64)
        leaves[spec.name] = whole.detach().clone().requires_grad_(spec.requires_grad)
    if not callable(prepared.operator.reference):
        raise ProbeError(f"{who} is missing; expected a function that computes the same in float64")
    try:
        returned = prepared.operator.reference(prepared.setting, leaves)
    except (Exception, SystemExit) as error:
        raise ProbeError(f"{who} raised {type(error).__name__}: {error}") from error
    outputs = named_outputs(returned, who)
    out = outputs["out"]
    for name, value in prepared.unsharded.items():
        if not name.startswith("grad.") and name in outputs and outputs[name].shape != value.shape:
            raise ProbeError(
                f"{who} gives {name} of shape {tuple(outputs[name].shape)}, the operator on whole "
                f"tensors {tuple(value.shape)}"
            )
    dtype = prepared.unsharded["out"].dtype
    dout = cotangent(prepared.operator.name, prepared.setting, out.shape, dtype, seed)
    results = {name: value.detach() for name, value in outputs.items()}
    wanted = [spec.name for spec in prepared.specs if spec.requires_grad]
    if not wanted:
        return results
    grads = torch.autograd.grad(
        out, [leaves[n] for n in wanted], dout.to(torch.float64), allow_unused=True
    )
    for name, grad in zip(wanted, grads, strict=True):
        if grad is not None:
            results[f"grad.{name}"] = grad
    return results


def distribute(
    prepared: Prepared, case: Case, mesh: DeviceMesh, device: str
) -> dict[str, torch.Tensor]:
    """The rank's DTensors (and plain tensors), leaves that require grad. No communication."""
    return {spec.name: _leaf(spec, prepared, case, mesh, device) for spec in prepared.specs}


def _leaf(
    spec: Tensor, prepared: Prepared, case: Case, mesh: DeviceMesh, device: str
) -> torch.Tensor:
    setting, whole, texts = prepared.setting, prepared.wholes[spec.name], case.placements[spec.name]
    is_plain = texts == ("plain",)

    def part(rank: int) -> torch.Tensor:
        mine = whole.clone() if is_plain else _shard_of(whole, texts, case, rank)
        return lay_out(mine.to(device), spec, setting)

    local = compat.map_ranks(part)
    if is_plain:
        return local.detach().requires_grad_(spec.requires_grad)
    placed = DTensor.from_local(
        local,
        mesh,
        [compat.placement_from_text(t) for t in texts],
        run_check=False,
        shape=whole.shape,
        stride=lay_out(whole, spec, setting).stride(),
    )
    return placed.detach().requires_grad_(spec.requires_grad)


def _shard_of(whole: torch.Tensor, texts: Sequence[str], case: Case, rank: int) -> torch.Tensor:
    sizes = tuple(case.mesh.values())
    return shard(whole, texts, sizes, coordinates(sizes)[rank])


def run_once(
    prepared: Prepared,
    case: Case,
    mesh: DeviceMesh,
    device: str,
    seed: int,
    observer: Observer | None,
) -> dict[str, Local]:
    """One call (and its backward), on fresh leaves. The caller watches, and catches what it raises."""
    leaves = distribute(prepared, case, mesh, device)
    torch.manual_seed(seed)
    if observer is not None:
        observer.phase = "forward"
    operator = prepared.operator
    outputs = named_outputs(operator.call(prepared.setting, leaves), f"{operator.name}: call")
    out = outputs["out"]
    judged = {**_written(prepared.specs, leaves), **outputs}
    results = {name: _local(value) for name, value in judged.items()}
    if case.direction == "forward":
        return results
    if observer is not None:
        observer.phase = "backward"
    wanted = [spec.name for spec in prepared.specs if spec.requires_grad]
    dout = _cotangent_like(out, prepared, case, mesh, seed, device)
    grads = torch.autograd.grad(out, [leaves[n] for n in wanted], dout, allow_unused=True)
    for name, grad in zip(wanted, grads, strict=True):
        if grad is not None:
            results[f"grad.{name}"] = _local(grad)
    return results


def _cotangent_like(
    out: torch.Tensor, prepared: Prepared, case: Case, mesh: DeviceMesh, seed: int, device: str
) -> torch.Tensor:
    """The output gradient, placed as the output is (the gradient of a `P(sum)` is replicated)."""
    setting = prepared.setting

    def whole(shape: torch.Size) -> torch.Tensor:
        return cotangent(prepared.operator.name, setting, shape, out.dtype, seed).to(device)

    if not isinstance(out, DTensor):
        return compat.map_ranks(
            lambda rank: lay_out_cotangent(whole(compat.on_rank(out, rank).shape), setting)
        )
    texts = [compat.placement_text(p) for p in out.placements]
    texts = ["R" if t.startswith("P") else t for t in texts]
    with compat.unsimulated():
        dout = whole(out.shape)
    return DTensor.from_local(
        compat.map_ranks(
            lambda rank: lay_out_cotangent(_shard_of(dout, texts, case, rank), setting)
        ),
        mesh,
        [compat.placement_from_text(t) for t in texts],
        run_check=False,
        shape=dout.shape,
        stride=lay_out_cotangent(dout, setting).stride(),
    )


def _local(tensor: torch.Tensor) -> Local:
    if not isinstance(tensor, DTensor):
        return Local(tensor.detach().cpu(), tuple(tensor.shape), None)
    local = compat.local_tensor(tensor).detach()
    wait = getattr(local, "wait", None)  # an AsyncCollectiveTensor
    if wait is not None:
        local = wait()
    texts = tuple(compat.placement_text(p) for p in tensor.placements)
    return Local(local.cpu().clone(), tuple(tensor.shape), texts)


def run_case(
    prepared: Prepared,
    case: Case,
    rank: int,
    mesh: DeviceMesh,
    device: str,
    seed: int,
    observer: Observer,
    others: Sequence[tuple[int, Prepared]] = (),
) -> RankRecord:
    """Run the case twice: watched, and (if PyTorch took it) again without attncheck in the way.

    `others`: further values by their seed, to run it with once each.
    """
    record = RankRecord(rank)
    if prepared.refused is not None:
        record.unavailable = prepared.refused
        return record
    compat.forget_compiled()  # a case must not depend on the cases before it
    if prepared.bypasses:  # never called on a DTensor: it would read from address 0
        error = BypassesDispatcher(prepared.bypasses)
        record.exception = (type(error).__name__, str(error), error.function)
        return record
    began = time.perf_counter()
    try:
        with _around(prepared.operator), observer.watch() as trace:
            record.trace = trace
            record.results = run_once(prepared, case, mesh, device, seed, observer)
    except (Exception, SystemExit) as error:  # an operator's exit() is one that it raises
        if not observer.refused(error):
            record.exception = _describe(error, observer.trace.raised_in)
    record.timings["first"] = (time.perf_counter() - began) * 1e3
    if record.exception is None and not record.trace.missing:
        observer.state.set("again")  # a peer that raised in the first call will not join this one
        began = time.perf_counter()
        try:
            with _around(prepared.operator):
                record.warm = run_once(prepared, case, mesh, device, seed, observer)
        except (Exception, SystemExit) as error:
            kind, text, op = _describe(error, _op_of(prepared, observer))
            record.exception = (kind, f"on the second call: {text}", op)
        record.timings["warm"] = (time.perf_counter() - began) * 1e3
    if record.warm is not None:
        again = [(seed, prepared)] * SAME_VALUES if others else []
        _repeat(record, case, mesh, device, again, others)
    record.peak_rss_mib = peak_rss_mib()
    return record


def _op_of(prepared: Prepared, observer: Observer) -> str:
    """The operator's op of the phase that an unwatched call has come to; else the last one seen before."""
    ops = prepared.operator.kernel_ops
    return ops[observer.phase == "backward"] if len(ops) == 2 else observer.trace.last_op


def _repeat(
    record: RankRecord,
    case: Case,
    mesh: DeviceMesh,
    device: str,
    again: Sequence[tuple[int, Prepared]],
    others: Sequence[tuple[int, Prepared]],
) -> None:
    """Run the case with the same values again, and once with each of the others; note what came."""
    made = []
    for seed, prepared in (*again, *others):
        try:
            with _around(prepared.operator):
                made.append(run_once(prepared, case, mesh, device, seed, None))
        except (Exception, SystemExit) as error:  # as in the calls before
            kind, text, op = _describe(error, record.trace.last_op)
            record.exception = (kind, f"with the values of seed {seed}: {text}", op)
            return
    record.repeats = made[len(again) :]
    same = [record.warm or {}, *made[: len(again)]]
    record.unrepeatable = tuple(
        name
        for name, first in record.results.items()
        if any(name in call and not _same(first.tensor, call[name].tensor) for call in same)
    )


def failed_record(rank: int, error: BaseException) -> RankRecord:
    """The record of a rank on which attncheck or the probe's own code failed; the trace goes to its log."""
    traceback.print_exception(error, limit=-4)
    text = str(error) if isinstance(error, ProbeError) else f"{type(error).__name__}: {error}"
    return RankRecord(rank, failure=text)


def _describe(error: BaseException, op: str) -> tuple[str, str, str]:
    if why := compat.not_simulated(error):
        return NOT_SIMULATED, why, op
    text = compat.error_text(error)
    if isinstance(error, BypassesDispatcher):
        op = error.function
    return type(error).__name__, text[:2000], op
