"""`torch.distributed.tensor.experimental.context_parallel`: what each SDPA backend does under it.

A user hands it whole q, k and v, which it cuts along the sequence in place, and calls
`F.scaled_dot_product_attention` inside. That is what a case does: its DTensors are replicated (a placement
that shards is gathered first), each rank cuts its part, attends, and `context_parallel_unshard` puts
the output together again; on a mesh of several axes the last one is the context's. The gathers of that
belong to the bytes that a report shows.

Backward has to run inside the context too, where the ring is: an `autograd.Function` enters it again.

On a CPU `F.scaled_dot_product_attention` never chooses the kernels that the ring is written for. There the
operators named after them call the kernel op as the dispatch would on CUDA, on the DTensors that
`context_parallel`'s own patch makes of q, k and v; the kernels are stand-ins, the ring is PyTorch's.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

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

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

Q_DIMS = (BATCH, HEADS, SEQUENCE, HEAD_DIM)
KV_DIMS = (BATCH, KV_HEADS, KV_SEQUENCE, HEAD_DIM)
SEQUENCE_DIM = 2

# The load balancer wants two equal parts of the sequence for each rank: 24 has them for 2, 3, 4 and 6
# ranks, 18 has not for 2. Below 2.10 its strategies stay in DTensor's cache after the context: no other
# probe shares these sizes.
BASE = {"batch": 6, "heads": 4, "kv_heads": 4, "sequence": 24, "kv_sequence": 24, "head_dim": 16}
GQA = {**BASE, "heads": 20}
ODD_PARTS = {**BASE, "sequence": 18, "kv_sequence": 18}
# The memory-efficient kernel pads its log-sum-exp to a multiple of 32 queries: 128 is one for each part.
ALIGNED = {**BASE, "sequence": 128, "kv_sequence": 128}
UNEVEN = {**BASE, "sequence": 25, "kv_sequence": 25}

# What the ring is written for; the arguments after q, k and v up to dropout_p.
KERNEL_OPS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "FLASH_ATTENTION": ("_scaled_dot_product_flash_attention", ()),
    "EFFICIENT_ATTENTION": ("_scaled_dot_product_efficient_attention", (None, True)),
    "CUDNN_ATTENTION": ("_scaled_dot_product_cudnn_attention", (None, True)),
}


def tensors(setting: Setting) -> tuple[Tensor, ...]:
    return (
        Tensor("q", Q_DIMS, tuple(setting[r] for r in Q_DIMS)),
        Tensor("k", KV_DIMS, tuple(setting[r] for r in KV_DIMS)),
        Tensor("v", KV_DIMS, tuple(setting[r] for r in KV_DIMS)),
    )


def reference(setting: Setting, t: Tensors) -> torch.Tensor:
    from attncheck.runner.reference import attention

    return attention(t["q"], t["k"], t["v"], causal="top_left" if setting.get("causal") else None)


def call(backend: str | None, setting: Setting, t: Tensors) -> torch.Tensor:
    from torch.distributed.tensor import DTensor, Replicate

    arguments = [t["q"], t["k"], t["v"]]
    q = arguments[0]
    if not isinstance(q, DTensor):
        return attend(backend, setting, None, *arguments)
    mesh, axes = q.device_mesh, q.device_mesh.mesh_dim_names
    assert axes is not None
    placements = [*q.placements[:-1], Replicate()]
    whole = [cast("DTensor", x).redistribute(placements=placements).to_local() for x in arguments]
    context_mesh = mesh if mesh.ndim == 1 else mesh[axes[-1]]
    out = in_context(backend, setting, context_mesh, whole)
    return DTensor.from_local(out, mesh, placements, run_check=False)


def attend(
    backend: str | None,
    setting: Setting,
    mesh: DeviceMesh | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> torch.Tensor:
    """Attention of one rank's part of the sequence, or without a mesh of the whole."""
    import torch
    import torch.nn.functional as F
    from torch.distributed.tensor import DTensor, Shard
    from torch.nn.attention import SDPBackend, sdpa_kernel

    causal = bool(setting.get("causal"))
    if backend in KERNEL_OPS and q.device.type == "cpu":
        name, arguments = KERNEL_OPS[backend]
        op = getattr(torch.ops.aten, name)
        if mesh is None:
            plain: torch.Tensor = op(q, k, v, *arguments, 0.0, causal)[0]
            return plain
        parts = [
            DTensor.from_local(x, mesh, [Shard(SEQUENCE_DIM)], run_check=False) for x in (q, k, v)
        ]
        out: torch.Tensor = op(*parts, *arguments, 0.0, causal)[0].to_local()
        return out
    choice = sdpa_kernel(SDPBackend.__members__[backend]) if backend else contextlib.nullcontext()
    with choice:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=setting["heads"] != setting["kv_heads"]
        )


def in_context(
    backend: str | None, setting: Setting, mesh: DeviceMesh, whole: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The whole output from whole q, k and v, forward and backward under `context_parallel`."""
    import torch

    from attncheck.runner import compat

    tools = compat.context_parallel_tools()

    @contextlib.contextmanager
    def context(*wholes: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """Inside it, each rank's part of the tensors."""
        buffers = [x.detach().clone() for x in wholes]
        options = compat.context_parallel_options(
            setting.get("load_balance") != "off", setting.get("rotate", "allgather")
        )
        # What is restored on the way out cannot be part of an autograd graph.
        cut = {"buffer_seq_dims": [SEQUENCE_DIM] * len(buffers), "no_restore_buffers": {*buffers}}
        with options, tools.context_parallel(mesh, buffers=buffers, **cut):
            yield buffers

    def unshard(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        wholes: list[torch.Tensor] = tools.context_parallel_unshard(
            mesh, [part.detach() for part in parts], [SEQUENCE_DIM] * len(parts)
        )
        return wholes

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *wholes: torch.Tensor) -> torch.Tensor:
            with context(*wholes) as parts, torch.enable_grad():
                for part in parts:
                    part.requires_grad_()
                ctx.parts = parts
                ctx.out = attend(backend, setting, mesh, *parts)
                return unshard([ctx.out])[0]

        @staticmethod
        def backward(ctx: Any, *douts: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with context(*douts) as parts:
                return tuple(unshard(torch.autograd.grad(ctx.out, ctx.parts, parts)))

    out: torch.Tensor = Attention.apply(*whole)  # type: ignore[no-untyped-call]
    return out


def missing() -> str:
    """Why there is no `context_parallel`, or ''. Raises ModuleNotFoundError for a package that it needs."""
    from attncheck.runner import compat

    try:
        compat.context_parallel_tools()
    except ImportError as error:
        return f"this torch has no context_parallel: {error}"
    # Entering it imports this module, and that numpy, without which torch is content otherwise (2.13).
    try:
        importlib.import_module("torch.distributed.tensor.debug")
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("torch"):  # an older torch has no such module
            raise
    return ""


PLAIN = Setting("plain", BASE)
CAUSAL = Setting("causal", BASE, options={"causal": True})
CAUSAL_BF16 = Setting("bfloat16_causal", BASE, "bfloat16", options={"causal": True})
# Load balancing is on by default where the sequence has the parts for it, and refuses what is not causal.
PLAIN_UNBALANCED = Setting("plain_unbalanced", BASE, options={"load_balance": "off"})
CAUSAL_UNBALANCED = Setting(
    "causal_unbalanced", BASE, options={"causal": True, "load_balance": "off"}, level="full"
)

FLASH_CPU_OPS = (
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
)


def operator(
    backend: str | None, settings: tuple[Setting, ...], kernel_ops: tuple[str, ...] = ()
) -> Operator:
    if backend in KERNEL_OPS:
        name = KERNEL_OPS[backend][0]
        kernel_ops = (f"aten.{name}.default", f"aten.{name}_backward.default")
    return Operator(
        name=f"context_parallel[{backend}]" if backend else "context_parallel",
        function="attncheck probes/context_parallel.py:call",
        tensors=tensors,
        call=partial(call, backend),
        reference=reference,
        settings=settings,
        output_dims=Q_DIMS,
        kernel_ops=kernel_ops,
        placements=("replicate",),
        missing=missing,
        standins=("aten_attention",) if backend in KERNEL_OPS else (),
        communicates=True,
    )


PROBE = Probe(
    name="context_parallel",
    summary="context_parallel around F.scaled_dot_product_attention, per backend",
    operators=(
        # Not causal, the default dispatch sends DTensor into a search over decompositions: a minute.
        operator(None, (CAUSAL, replace(PLAIN, level="full")), FLASH_CPU_OPS),
        operator("MATH", (PLAIN, CAUSAL, replace(CAUSAL_BF16, level="full"), CAUSAL_UNBALANCED)),
        operator(
            "FLASH_ATTENTION",
            (
                CAUSAL,
                PLAIN,
                PLAIN_UNBALANCED,
                Setting("odd_parts", ODD_PARTS),
                Setting("causal_alltoall", BASE, options={"causal": True, "rotate": "alltoall"}),
                Setting("gqa_causal", GQA, options={"causal": True}),
                CAUSAL_BF16,
                CAUSAL_UNBALANCED,
                # Not for the default level: ranks with unequal parts die or hang in the ring.
                Setting("uneven_sequence", UNEVEN, options={"causal": True}, level="full"),
            ),
        ),
        operator(
            "EFFICIENT_ATTENTION",
            (
                CAUSAL,
                Setting("causal_aligned", ALIGNED, options={"causal": True}),
                # Here one rank skips a step and the other fails in it: one waits for the other.
                CAUSAL_UNBALANCED,
            ),
        ),
        operator("CUDNN_ATTENTION", (CAUSAL, PLAIN_UNBALANCED, CAUSAL_BF16, CAUSAL_UNBALANCED)),
    ),
)
