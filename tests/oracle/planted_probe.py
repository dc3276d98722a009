"""A probe file full of planted bugs: one operator per rule, and healthy twins that must stay silent.

Every operator is the same small attention, registered as a custom op of its own with a strategy of its
own; what differs is the one mistake that its name states. `EXPECTED` says which rules must name it.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from attncheck.probing import (
    BATCH,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    KV_SEQUENCE,
    SEQUENCE,
    Operator,
    Probe,
    Setting,
    Tensor,
    Tensors,
)

Q_DIMS = (BATCH, HEADS, SEQUENCE, HEAD_DIM)
KV_DIMS = (BATCH, KV_HEADS, KV_SEQUENCE, HEAD_DIM)
SIZES = {"batch": 3, "heads": 4, "kv_heads": 4, "sequence": 6, "kv_sequence": 10, "head_dim": 8}
PLAIN = Setting("plain", SIZES, level="quick")
DROPOUT = Setting("dropout", {**SIZES, "kv_sequence": 8}, level="quick", dropout=0.25)

Kernel = Callable[..., Any]


def attend(q: Any, k: Any, v: Any) -> Any:
    import torch

    scores = torch.matmul(q, k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return torch.matmul(torch.softmax(scores, dim=-1), v)


def gradients(dout: Any, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """By hand: a custom op's kernel runs below autograd."""
    import torch

    scale = q.shape[-1] ** -0.5
    p = torch.softmax(torch.matmul(q, k.transpose(-2, -1)) * scale, dim=-1)
    dp = torch.matmul(dout, v.transpose(-2, -1))
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    dv = torch.matmul(p.transpose(-2, -1), dout)
    return torch.matmul(ds, k), torch.matmul(ds.transpose(-2, -1), q), dv


def sharded(q: Any) -> bool:
    return int(q.shape[1]) < SIZES["heads"]


def rank() -> int:
    return int(os.environ["RANK"])


# --- kernels with one mistake each -----------------------------------------------------------------


def scale_from_local_heads(q: Any, k: Any, v: Any) -> Any:
    return attend(q, k, v) * (4 / q.shape[1])


def loses_precision(q: Any, k: Any, v: Any) -> Any:
    out = attend(q, k, v)
    return out * (1 + 6e-6) if sharded(q) else out


def rounds_coarsely(q: Any, k: Any, v: Any) -> Any:
    """As if the sum over keys were carried out in a coarser dtype: errors go up and down by the values."""
    out = attend(q, k, v)
    coarse = 4e-6 * out.detach().abs().max()
    return (out / coarse).round() * coarse if sharded(q) else out


def sums_in_any_order(q: Any, k: Any, v: Any) -> Any:
    """A coarse sum over keys in another order with every call, as atomic additions make it."""
    import torch

    if not sharded(q):
        return attend(q, k, v)
    scores = torch.matmul(q, k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    p = torch.softmax(scores, dim=-1)
    random = torch.Generator().manual_seed(time.perf_counter_ns())
    total = torch.zeros_like(q)
    for key in torch.randperm(k.shape[2], generator=random).tolist():
        total = total + p[..., key, None] * v[..., None, key, :]
        coarse = 2e-6 * v.abs().max()
        total = (total / coarse).round() * coarse
    return total


def noise_by_rank(q: Any, k: Any, v: Any) -> Any:
    out = attend(q, k, v)
    return out.nextafter(out + 1) if rank() == 1 and _distributed() else out


def _distributed() -> bool:
    # The unsharded call that every rank makes by itself must be the same everywhere.
    return bool(STATE.get("in_case"))


STATE: dict[str, Any] = {"calls": 0}


def worse_on_second_call(q: Any, k: Any, v: Any) -> Any:
    STATE["calls"] += 1
    # The first call is the unsharded one; then first and second call of each case alternate.
    return attend(q, k, v) * (1.5 if STATE["calls"] > 1 and STATE["calls"] % 2 else 1)


def dies(q: Any, k: Any, v: Any) -> Any:
    if sharded(q) and rank() == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    return attend(q, k, v)


def sleeps(q: Any, k: Any, v: Any) -> Any:
    if sharded(q) and rank() == 1:
        time.sleep(10_000)
    return attend(q, k, v)


def talks_alone(q: Any, k: Any, v: Any) -> Any:
    """A collective inside a kernel: below the dispatcher, where nobody can see it but by the clock."""
    if sharded(q) and rank() == 0:
        return _all_reduce(attend(q, k, v))
    return attend(q, k, v)


def _all_reduce(tensor: Any) -> Any:
    import torch.distributed as dist
    import torch.distributed._functional_collectives as funcol

    return funcol.all_reduce(tensor, "sum", dist.group.WORLD).clone()


def one_rank_raises(q: Any, k: Any, v: Any) -> Any:
    if sharded(q) and rank() == 1:
        raise RuntimeError("planted: only rank 1 refuses")
    return attend(q, k, v)


def all_ranks_raise(q: Any, k: Any, v: Any) -> Any:
    if sharded(q):
        raise RuntimeError("planted: heads must be whole")
    return attend(q, k, v)


def same_mask(q: Any, k: Any, v: Any) -> Any:
    import torch

    keep = torch.rand((*q.shape[:3], k.shape[2])) >= DROPOUT.dropout
    return torch.matmul(keep / k.shape[2] / (1 - DROPOUT.dropout), v)


def own_mask(q: Any, k: Any, v: Any) -> Any:
    import torch

    random = torch.Generator().manual_seed(torch.initial_seed() + rank())
    keep = torch.rand((*q.shape[:3], k.shape[2]), generator=random) >= DROPOUT.dropout
    return torch.matmul(keep / k.shape[2] / (1 - DROPOUT.dropout), v)


def mask_at_wrong_rate(q: Any, k: Any, v: Any) -> Any:
    import torch

    random = torch.Generator().manual_seed(torch.initial_seed() + rank())
    keep = torch.rand((*q.shape[:3], k.shape[2]), generator=random) >= 0.6
    return torch.matmul(keep / k.shape[2] / (1 - DROPOUT.dropout), v)


def gradient_scaled_by_local_heads(dout: Any, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    dq, dk, dv = gradients(dout, q, k, v)
    return dq, dk * (q.shape[1] / 4), dv


# --- strategies --------------------------------------------------------------------------------------


def rows(outputs: int, inputs: int, out_dim: int = 1) -> list[tuple[list[Any], list[Any]]]:
    """Replicated, and heads sharded (outputs along `out_dim`)."""
    from torch.distributed.tensor import Replicate, Shard

    everywhere = ([Replicate()] * outputs, [Replicate()] * inputs)
    return [everywhere, ([Shard(out_dim)] * outputs, [Shard(1)] * inputs)]


def strategy(name: str, outputs: int, inputs: int) -> Callable[..., Any]:
    def choose(*args: Any) -> Any:
        if name == "slow_propagation":
            time.sleep(5.5)
        if name == "illegal_placement" and outputs == 1:
            return rows(outputs, inputs, out_dim=2)
        if name == "replicate_only":
            return rows(outputs, inputs)[:1]
        return rows(outputs, inputs)

    return choose


@cache
def op(name: str) -> Callable[..., Any]:
    """Register `planted::<name>` with its backward and its strategies; once per process."""
    import torch
    from torch.distributed.tensor.experimental import register_sharding

    kernel, backward = KERNELS.get(name, (attend, gradients))

    # Schemas are given because `torch` is no global of a probe file, so annotations cannot be read.
    define = torch.library.custom_op

    @define(f"planted::{name}", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v) -> Tensor")
    def forward(q: Any, k: Any, v: Any) -> Any:
        return kernel(q, k, v).clone()

    @define(
        f"planted::{name}_backward",
        mutates_args=(),
        schema="(Tensor dout, Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor, Tensor)",
    )
    def grad(dout: Any, q: Any, k: Any, v: Any) -> Any:
        dq, dk, dv = backward(dout, q, k, v)
        return dq.clone(), dk.clone(), dv.clone()

    forward.register_fake(lambda q, k, v: torch.empty_like(q))
    grad.register_fake(
        lambda dout, q, k, v: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    )
    forward.register_autograd(
        lambda ctx, dout: grad(dout, *ctx.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    overloads = getattr(torch.ops.planted, name), getattr(torch.ops.planted, f"{name}_backward")
    if name != "missing_forward":
        register_sharding(overloads[0].default)(strategy(name, 1, 3))
    if name not in ("missing_forward", "missing_backward"):
        register_sharding(overloads[1].default)(strategy(name, 3, 4))
    return forward


KERNELS: dict[str, tuple[Kernel, Kernel]] = {
    "wrong_result": (scale_from_local_heads, gradients),
    "wrong_gradient": (attend, gradient_scaled_by_local_heads),
    "drift": (loses_precision, gradients),
    "drift_by_rounding": (rounds_coarsely, gradients),
    "drift_by_order": (sums_in_any_order, gradients),
    "replicas_differ": (noise_by_rank, gradients),
    "stale_second_call": (worse_on_second_call, gradients),
    "crash": (dies, gradients),
    "hang": (sleeps, gradients),
    "hang_in_kernel": (talks_alone, gradients),
    "diverged_exception": (one_rank_raises, gradients),
    "exception": (all_ranks_raise, gradients),
    "dropout_same_mask": (same_mask, gradients),
    "dropout_own_mask": (own_mask, gradients),
    "dropout_wrong_rate": (mask_at_wrong_rate, gradients),
}

# operator -> the rules that must name it in a `heads` case, and no others.
EXPECTED: dict[str, set[str]] = {
    "healthy": set(),
    "missing_forward": {"ATN101", "ATN102"},
    "missing_backward": {"ATN102"},
    "mixed_tensor": {"ATN103"},
    "bypasses_dispatcher": {"ATN104"},
    "bypasses_on_local_tensors": set(),
    "behind_the_dispatcher": {"ATN104"},
    "through_the_dispatcher": set(),
    "wrapped_tensor": set(),
    "wrong_result": {"ATN201"},
    "wrong_gradient": {"ATN202"},
    "second_output_wrong": {"ATN201"},
    "second_output_right": set(),
    "drift": {"ATN203"},
    "drift_by_rounding": {"ATN203"},
    "drift_by_order": {"ATN203"},
    "replicas_differ": {"ATN204"},
    "dropout_same_mask": {"ATN205"},
    "dropout_wrong_rate": {"ATN205"},
    "dropout_own_mask": set(),
    "illegal_placement": {"ATN206"},
    "stale_second_call": {"ATN207"},
    "placement_lost": {"ATN209"},
    "replicate_only": {"ATN301"},
    "slow_propagation": {"ATN302"},
    "package_missing": {"ATN401"},
    "op_missing": {"ATN401"},
    "extension_not_loadable": {"ATN402"},
    "version_unsupported": {"ATN403"},
    "crash": {"ATN501"},
    "hang": {"ATN502"},
    "hang_in_kernel": {"ATN502"},
    "diverged_collective": {"ATN503"},
    "diverged_exception": {"ATN503"},
    "exception": {"ATN504"},
    "check_failed": {"ATN505"},
    "reference_of_wrong_shape": {"ATN505"},
    "reference_forgotten": {"ATN505"},
    "reference_wrong": {"ATN505"},
    "returns_nothing": {"ATN505"},
    "mutates_argument": {"ATN505"},
    "mutates_declared_argument": set(),
    "calls_exit": {"ATN505"},
    "changes_the_process": set(),
    "after_the_change": set(),
}


def call(name: str) -> Callable[[Setting, Tensors], Any]:
    def run(setting: Setting, t: Tensors) -> Any:
        import torch
        from torch.distributed.tensor import DTensor, Replicate

        q, k, v = t["q"], t["k"], t["v"]
        STATE["in_case"] = isinstance(q, DTensor)
        if name == "extension_not_loadable":
            _import_broken_extension()
        if name == "calls_exit":
            sys.exit(0)
        if name == "after_the_change":
            assert torch.nn.functional.scaled_dot_product_attention is not _broken
        if name == "returns_nothing":
            return None
        if name == "bypasses_dispatcher":
            return no_op(q, k, v)
        if name == "bypasses_on_local_tensors":
            return _on_local_tensors(q, k, v)
        if name.endswith("_the_dispatcher"):
            return _fused(behind=name.startswith("behind")).apply(q, k, v)
        if name.startswith("mutates"):
            with torch.no_grad():
                q.mul_(1)
                k.add_(1)
        if name in ("mixed_tensor", "wrapped_tensor"):
            zeros = torch.zeros(q.shape[-1])
            if name == "wrapped_tensor" and isinstance(q, DTensor):
                zeros = DTensor.from_local(zeros, q.device_mesh, [Replicate()], run_check=False)
            q = torch.ops.aten.add.Tensor(q, zeros)
        out = op(name)(q, k, v)
        if name == "changes_the_process" and isinstance(q, DTensor):
            torch.nn.functional.scaled_dot_product_attention = _broken  # type: ignore[assignment]
        if name == "diverged_collective" and isinstance(out, DTensor) and rank() == 0:
            _all_reduce(out.to_local())
        if name == "placement_lost" and isinstance(out, DTensor):
            return out.full_tensor()  # as code does that forgets to wrap again
        if name.startswith("second_output"):
            return {"out": out, "largest": _largest(out, name == "second_output_wrong")}
        return out

    return run


def _broken(*unused: Any, **unused_too: Any) -> Any:
    """What one case puts in the place of PyTorch's function, and no later case may meet."""


def no_op(q: Any, k: Any, v: Any) -> Any:
    """Stands for a compiled function: takes tensors, reads their memory, is no dispatcher op."""
    assert q.data_ptr(), "the guard let a DTensor through"
    return attend(q, k, v)


@cache
def _fused(behind: bool) -> Any:
    """An `autograd.Function` of which the probe says nothing. `behind`: its forward fills the output
    through memory that it was not handed by the dispatcher, as a compiled extension does."""
    import torch

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            ctx.save_for_backward(q, k, v)
            if not behind:
                return attend(q, k, v)
            assert q.data_ptr(), "a DTensor was let through"
            out = torch.empty_like(q)
            out.numpy()[:] = attend(q, k, v).numpy()
            return out

        @staticmethod
        def backward(ctx: Any, dout: Any) -> Any:
            return gradients(dout, *ctx.saved_tensors)

    return Fused


def _on_local_tensors(q: Any, k: Any, v: Any) -> Any:
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.experimental import local_map

    if not isinstance(q, DTensor):
        return no_op(q, k, v)
    heads = [Shard(1)]
    return local_map(no_op, heads, (heads, heads, heads), device_mesh=q.device_mesh)(q, k, v)


def _largest(out: Any, wrong: bool) -> Any:
    """A second output: the largest value of each row. The wrong one is wrong on shards only."""
    from torch.distributed.tensor import DTensor

    if not isinstance(out, DTensor):
        return out.detach().abs().amax(-1)
    local = out.detach().to_local().abs().amax(-1) * (1.5 if wrong else 1)
    return DTensor.from_local(local, out.device_mesh, out.placements, run_check=False)


def _import_broken_extension() -> None:
    folder = tempfile.mkdtemp()
    (Path(folder) / "planted_extension.so").write_bytes(
        b"\x7fELF this was built for another machine"
    )
    sys.path.insert(0, folder)
    import planted_extension  # type: ignore[import-not-found]  # noqa: F401


def tensors(setting: Setting) -> tuple[Tensor, ...]:
    q = Tensor("q", Q_DIMS, tuple(setting[r] for r in Q_DIMS))
    k = Tensor("k", KV_DIMS, tuple(setting[r] for r in KV_DIMS))
    v = Tensor("v", KV_DIMS, tuple(setting[r] for r in KV_DIMS))
    if setting.dropout:
        q = Tensor("q", Q_DIMS, q.sizes, requires_grad=False, fill="zeros")
        k = Tensor("k", KV_DIMS, k.sizes, requires_grad=False)
        v = Tensor("v", KV_DIMS, v.sizes, fill="eye")
    return q, k, v


def mutated_tensors(declared: bool) -> Callable[[Setting], tuple[Tensor, ...]]:
    def make(setting: Setting) -> tuple[Tensor, ...]:
        q, k, v = tensors(setting)
        k = Tensor("k", k.dims, k.sizes, requires_grad=False, mutable=declared)
        return Tensor("q", q.dims, q.sizes, requires_grad=False), k, v

    return make


def reference(name: str) -> Callable[[Setting, Tensors], Any]:
    def compute(setting: Setting, t: Tensors) -> Any:
        if name == "check_failed":
            raise KeyError("planted: the reference is broken")
        k = t["k"] + 1 if name.startswith("mutates") else t["k"]
        out = attend(t["q"], k, t["v"])
        if name == "reference_of_wrong_shape":
            return out.transpose(1, 2)
        if name == "reference_wrong":  # of another scale than the operator
            return attend(t["q"] * 1.2, k, t["v"])
        if name.startswith("second_output"):
            return {"out": out, "largest": _largest(out, False)}
        return out

    return None if name == "reference_forgotten" else compute  # type: ignore[return-value]


NEEDS = {
    "package_missing": ("planted-and-not-installed>=1",),
    "version_unsupported": ("packaging<1",),
}


def operator(name: str) -> Operator:
    setting = DROPOUT if name.startswith("dropout") else PLAIN
    patterns = ("replicate",) if name == "replicas_differ" else ("heads",)
    return Operator(
        name=f"planted.{name}",
        tensors=mutated_tensors("declared" in name) if name.startswith("mutates") else tensors,
        call=call(name),
        reference=reference(name),
        settings=(
            Setting(
                setting.name,
                setting.sizes,
                level="quick",
                placements=patterns,
                dropout=setting.dropout,
            ),
        ),
        kernel_ops=()
        if name.endswith("_the_dispatcher")
        else (f"planted.{name}.default", f"planted.{name}_backward.default"),
        packages=NEEDS.get(name, ()),
        missing=(lambda: "planted: no such op") if name == "op_missing" else None,
        bypasses=(f"{__name__}:no_op",) if name.startswith("bypasses") else (),
    )


PROBE = Probe(
    "planted", "planted bugs and their healthy twins", tuple(operator(n) for n in EXPECTED)
)
