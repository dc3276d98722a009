"""`torch.nn.attention.varlen` on a CPU.

The bodies of its ops `torch_attn::_varlen_attn*` are PyTorch's own Python, registered for every device, and
run unchanged; so do their autograd formula and fake kernels. They call aten's flash attention ops, which
have CPU kernels from aten_attention; the one that writes into the caller's output is here.
"""

from __future__ import annotations

from typing import Any

import torch

from attncheck.standins import aten_attention, aten_flash
from attncheck.standins.aten_common import Maybe
from attncheck.standins.flash_checks import check, check_buffer

SENTENCE = (
    "torch.nn.attention.varlen: CPU reference kernels by attncheck for aten's flash attention ops; "
    "PyTorch's own op bodies, fake kernels and autograd formula run unchanged"
)
OUT_OP = "_flash_attention_forward_no_dropout_inplace"

# The library unregisters its kernels when it dies.
_libraries: list[torch.library.Library] = []


def provide() -> None:
    """Register the CPU kernels; twice is harmless. A torch without the ops is left as it is."""
    aten_attention.provide()
    packet = getattr(torch.ops.aten, OUT_OP, None)  # came with `varlen_attn_out`
    if packet is None or packet.default.has_kernel_for_dispatch_key("CPU"):
        return
    library = torch.library.Library("aten", "IMPL", "CPU")  # type: ignore[no-untyped-call]
    library.impl(OUT_OP, forward_out)  # type: ignore[no-untyped-call]
    _libraries.append(library)


def forward_out(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: Maybe,
    cum_seq_k: Maybe,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    **options: Any,
) -> torch.Tensor:
    """The log-sum-exp; the output goes into `out`, whose shape and dtype are the query's."""
    check(dropout_p == 0, "this op has no dropout")
    names = (
        "total_q, num_heads, head_size" if query.dim() == 3 else "batch, seqlen, heads, head_size"
    )
    check_buffer("Output", out, query.dtype, names, (*query.shape[:-1], value.shape[-1]))
    result = aten_flash.forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, 0.0, is_causal, return_debug_mask,
        **options,
    )  # fmt: skip
    out.copy_(result[0])
    return result[1]
