"""Running one case on one rank: build the DTensors, call under observation, call again, note everything."""

from __future__ import annotations

import resource
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from attncheck.model import Case, Reason
from attncheck.probing import Operator, Setting, Tensor
from attncheck.runner import compat
from attncheck.runner.inputs import cotangent, whole_tensors
from attncheck.runner.observe import Observer, Trace
from attncheck.runner.placements import shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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
    failure: str = ""  # the check itself failed: a traceback
    trace: Trace = field(default_factory=Trace)
    results: dict[str, Local] = field(default_factory=dict)
    warm: dict[str, Local] | None = None
    timings: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_mib: float = 0.0


@dataclass(frozen=True)
class Prepared:
    """An operator in a setting, ready to run: whole arguments, and what the unsharded call gave."""

    operator: Operator
    setting: Setting
    specs: tuple[Tensor, ...]
    wholes: Mapping[str, torch.Tensor]
    unsharded: Mapping[str, torch.Tensor]
    refused: tuple[Reason, str] | None = None


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
    try:
        unsharded = run_whole(operator, setting, specs, wholes, seed, device)
    except ModuleNotFoundError as error:
        refused = (Reason.PACKAGE_MISSING, str(error))
    except (ImportError, OSError) as error:
        refused = (Reason.EXTENSION_NOT_LOADABLE, str(error))
    except (RuntimeError, ValueError) as error:
        # What kernels raise when they refuse. Anything else (TypeError, NameError ...) is a fault of the
        # probe, and is left to end as `unknown`.
        refused = (Reason.SETTING_REFUSED, f"{type(error).__name__}: {error}")
    return Prepared(operator, setting, specs, wholes, unsharded, refused)


def run_whole(
    operator: Operator,
    setting: Setting,
    specs: Sequence[Tensor],
    wholes: Mapping[str, torch.Tensor],
    seed: int,
    device: str,
) -> dict[str, torch.Tensor]:
    """`out` and `grad.*` of the operator on ordinary whole tensors, on the CPU."""
    leaves = {
        spec.name: wholes[spec.name].to(device).detach().requires_grad_(spec.requires_grad)
        for spec in specs
    }
    torch.manual_seed(seed)
    out = operator.call(setting, leaves)
    results = {"out": out.detach().cpu()}
    wanted = [spec.name for spec in specs if spec.requires_grad]
    dout = cotangent(operator.name, setting, out.shape, out.dtype, seed).to(device)
    grads = torch.autograd.grad(out, [leaves[n] for n in wanted], dout, allow_unused=True)
    for name, grad in zip(wanted, grads, strict=True):
        if grad is not None:
            results[f"grad.{name}"] = grad.detach().cpu()
    return results


def run_reference(prepared: Prepared, seed: int) -> dict[str, torch.Tensor]:
    """`out` and `grad.*` of the probe's float64 reference."""
    leaves = {}
    for spec in prepared.specs:
        whole = prepared.wholes[spec.name]
        if whole.is_floating_point():
            whole = whole.to(torch.float64)
        leaves[spec.name] = whole.detach().requires_grad_(spec.requires_grad)
    out = prepared.operator.reference(prepared.setting, leaves)
    dtype = prepared.unsharded["out"].dtype
    dout = cotangent(prepared.operator.name, prepared.setting, out.shape, dtype, seed)
    wanted = [spec.name for spec in prepared.specs if spec.requires_grad]
    grads = torch.autograd.grad(
        out, [leaves[n] for n in wanted], dout.to(torch.float64), allow_unused=True
    )
    results = {"out": out.detach()}
    for name, grad in zip(wanted, grads, strict=True):
        if grad is not None:
            results[f"grad.{name}"] = grad
    return results


def distribute(
    prepared: Prepared, case: Case, mesh: DeviceMesh, device: str
) -> dict[str, torch.Tensor]:
    """The rank's DTensors (and plain tensors), leaves that require grad. No communication."""
    sizes = tuple(case.mesh.values())
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    out = {}
    for spec in prepared.specs:
        whole = prepared.wholes[spec.name]
        texts = case.placements[spec.name]
        if texts == ("plain",):
            out[spec.name] = whole.to(device).detach().requires_grad_(spec.requires_grad)
            continue
        local = shard(whole, texts, sizes, coordinate).to(device)
        placed = DTensor.from_local(
            local,
            mesh,
            [compat.placement_from_text(t) for t in texts],
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )
        out[spec.name] = placed.detach().requires_grad_(spec.requires_grad)
    return out


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
    out = prepared.operator.call(prepared.setting, leaves)
    results = {"out": _local(out)}
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
    whole = cotangent(prepared.operator.name, prepared.setting, out.shape, out.dtype, seed)
    if not isinstance(out, DTensor):
        return whole.to(device)
    texts = [compat.placement_text(p) for p in out.placements]
    texts = ["R" if t.startswith("P") else t for t in texts]
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    local = shard(whole, texts, tuple(case.mesh.values()), coordinate).to(device)
    placements = [compat.placement_from_text(t) for t in texts]
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
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
) -> RankRecord:
    """Run the case twice: watched, and (if PyTorch took it) again without attncheck in the way."""
    record = RankRecord(rank)
    if prepared.refused is not None:
        record.unavailable = prepared.refused
        return record
    began = time.perf_counter()
    try:
        with observer.watch() as trace:
            record.trace = trace
            record.results = run_once(prepared, case, mesh, device, seed, observer)
    except Exception as error:
        record.exception = _describe(error, observer.trace.last_op)
    record.timings["first"] = (time.perf_counter() - began) * 1e3
    if record.exception is None and not record.trace.missing:
        began = time.perf_counter()
        try:
            record.warm = run_once(prepared, case, mesh, device, seed, None)
        except Exception as error:
            kind, text, op = _describe(error, observer.trace.last_op)
            record.exception = (kind, f"on the second call: {text}", op)
        record.timings["warm"] = (time.perf_counter() - began) * 1e3
    record.peak_rss_mib = peak_rss_mib()
    return record


def failed_record(rank: int) -> RankRecord:
    """The record of a rank on which attncheck or the probe's own code failed."""
    return RankRecord(rank, failure=traceback.format_exc(limit=-4))


def _describe(error: BaseException, op: str) -> tuple[str, str, str]:
    text = str(error).strip() or type(error).__name__
    return type(error).__name__, text[:2000], op
