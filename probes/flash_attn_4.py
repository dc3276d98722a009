"""flash-attn 4 (CuTe DSL, NVIDIA GPUs only), by itself and behind `scaled_dot_product_attention`.

The package's functions are no dispatcher ops: a DTensor reaches the kernel through DLPack with a null
pointer. `torch.nn.attention.activate_flash_attention_impl` puts its kernels, or those of flash-attn 3,
behind PyTorch's own op on CUDA instead, which DTensor knows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

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

# (batch, sequence, heads, head_dim), as flash-attn lays tensors out, and heads first, as PyTorch does.
Q_DIMS = (BATCH, SEQUENCE, HEADS, HEAD_DIM)
KV_DIMS = (BATCH, KV_SEQUENCE, KV_HEADS, HEAD_DIM)
SDPA_Q_DIMS = (BATCH, HEADS, SEQUENCE, HEAD_DIM)
SDPA_KV_DIMS = (BATCH, KV_HEADS, KV_SEQUENCE, HEAD_DIM)

# All sizes differ, and so do their halves: a swapped or wrongly split dim cannot fit by chance.
BASE = {"batch": 6, "heads": 4, "kv_heads": 4, "sequence": 18, "kv_sequence": 22, "head_dim": 64}
GQA = {**BASE, "heads": 20}
INDEPENDENT = ("replicate", "batch", "heads")  # dims that attention never mixes

NO_CPU = (
    "its CuTe kernels are compiled for NVIDIA GPUs, and there is no dispatcher op to stand in for"
)
NO_CPU_SDPA = (
    "the implementation is registered for CUDA tensors alone; on a CPU SDPA runs as without it"
)


def tensors(
    q_dims: tuple[str, ...], kv_dims: tuple[str, ...], setting: Setting
) -> tuple[Tensor, ...]:
    dims = {"q": q_dims, "k": kv_dims, "v": kv_dims}
    return tuple(Tensor(n, d, tuple(setting[role] for role in d)) for n, d in dims.items())


def call(setting: Setting, t: Tensors) -> torch.Tensor:
    from flash_attn.cute import flash_attn_func

    try:
        out, *_ = flash_attn_func(t["q"], t["k"], t["v"], causal=bool(setting.get("causal")))
    except AssertionError as error:  # how the package refuses sizes, dtypes and GPUs
        raise RuntimeError(f"flash_attn.cute refuses: {error}") from error
    result: torch.Tensor = out
    return result


def call_sdpa(setting: Setting, t: Tensors) -> torch.Tensor:
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(
            t["q"],
            t["k"],
            t["v"],
            is_causal=bool(setting.get("causal")),
            enable_gqa=setting["heads"] != setting["kv_heads"],
        )


def reference(layout: str, setting: Setting, t: Tensors) -> torch.Tensor:
    from attncheck.runner.reference import attention

    aligned = "bottom_right" if layout == "bshd" else "top_left"
    causal = aligned if setting.get("causal") else None
    return attention(t["q"], t["k"], t["v"], layout=layout, causal=causal)


def missing(implementation: str) -> str:
    """Why PyTorch cannot activate the implementation, or ''. Raises what activating it raises."""
    from torch.nn import attention

    if not hasattr(attention, "activate_flash_attention_impl"):
        return "this PyTorch has no torch.nn.attention.activate_flash_attention_impl"
    known = attention.list_flash_attention_impls()
    if implementation not in known:
        return (
            f"this PyTorch knows no flash attention implementation {implementation}, only {known}"
        )
    if implementation == "FA3":
        from attncheck.standins import flash_attn_3

        flash_attn_3.import_package()  # PyTorch's own error does not say where to get it
    with activated(implementation):
        return ""


@contextlib.contextmanager
def activated(implementation: str) -> Iterator[None]:
    """SDPA's flash kernels are those of `implementation`, in the whole process, as long as it holds."""
    from torch.nn.attention import (
        activate_flash_attention_impl,
        current_flash_attention_impl,
        restore_flash_attention_impl,
    )

    before = current_flash_attention_impl()
    activate_flash_attention_impl(implementation)
    try:
        yield
    finally:
        restore_flash_attention_impl()
        if before is not None:
            activate_flash_attention_impl(before)


SETTINGS = (
    Setting("plain", BASE, "bfloat16", placements=("replicate", "heads")),
    Setting("causal", BASE, "bfloat16", {"causal": True}, "full"),
    Setting("gqa", GQA, "bfloat16", level="full"),
    Setting("float16", BASE, "float16", level="full"),
)
SQUARE = {**BASE, "kv_sequence": 18}
SDPA_SETTINGS = (
    Setting("plain", BASE, "bfloat16", placements=("heads",)),
    # PyTorch's causal is aligned to the top left, flash-attn's to the bottom right: square, they agree.
    Setting("causal", SQUARE, "bfloat16", {"causal": True}, "full"),
    Setting("gqa", GQA, "bfloat16", level="full"),
    Setting("float16", BASE, "float16", level="full"),
)


def _sdpa(implementation: str, packages: tuple[str, ...]) -> Operator:
    return Operator(
        name=f"sdpa[{implementation}]",
        function="torch.nn.functional.scaled_dot_product_attention",
        tensors=partial(tensors, SDPA_Q_DIMS, SDPA_KV_DIMS),
        call=call_sdpa,
        reference=partial(reference, "bhsd"),
        settings=SDPA_SETTINGS,
        output_dims=SDPA_Q_DIMS,
        kernel_ops=(
            "aten._scaled_dot_product_flash_attention.default",
            "aten._scaled_dot_product_flash_attention_backward.default",
        ),
        placements=INDEPENDENT,
        packages=packages,
        missing=partial(missing, implementation),
        devices=("cuda",),
        devices_because=NO_CPU_SDPA,
        around=partial(activated, implementation),
    )


PROBE = Probe(
    name="flash_attn_4",
    summary="flash-attn 4 (flash_attn.cute), and SDPA with flash-attn 4 or 3 activated behind it",
    operators=(
        Operator(
            name="flash_attn_4",
            function="flash_attn.cute.flash_attn_func",
            tensors=partial(tensors, Q_DIMS, KV_DIMS),
            call=call,
            reference=partial(reference, "bshd"),
            settings=SETTINGS,
            output_dims=Q_DIMS,
            placements=INDEPENDENT,
            packages=("flash-attn-4",),
            bypasses=(
                "flash_attn.cute.interface:_flash_attn_fwd",
                "flash_attn.cute.interface:_flash_attn_bwd",
            ),
            devices=("cuda",),
            devices_because=NO_CPU,
        ),
        _sdpa("FA4", ("flash-attn-4",)),
        _sdpa("FA3", ()),
    ),
)
