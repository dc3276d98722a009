"""What flash-attn's extension checks before it starts a kernel, with its messages.

The messages are what users of flash-attn 2.7 and 2.8 see and search for. Not mirrored: the device
and GPU checks, and the refusal of float32 (a stand-in in float32 lets rounding be told apart from
bugs).
"""

from __future__ import annotations

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check(condition: bool, message: str) -> None:
    """RuntimeError, as TORCH_CHECK in the extension raises it."""
    if not condition:
        raise RuntimeError(message)


def check_inputs(q: torch.Tensor, **others: torch.Tensor) -> None:
    """dtypes and strides of q and of k, v (and out, dout, by these names)."""
    check(q.dtype in DTYPES, "FlashAttention only support fp16 and bf16 data type")
    names = {"k": "key", "v": "value"}
    for name, tensor in others.items():
        subject = names.get(name, name)
        check(tensor.dtype == q.dtype, f"query and {subject} must have the same dtype")
    for name, tensor in {"q": q, **others}.items():
        subject = f"{name} tensor" if name in ("out", "dout") else "Input tensor"
        check(tensor.stride(-1) == 1, f"{subject} must have contiguous last dimension")


def check_sizes(batch: int, heads: int, kv_heads: int, head_dim: int, direction: str) -> None:
    """The sizes a kernel can take; `direction` is `forward` or `backward`."""
    check(batch > 0, "batch size must be positive")
    check(head_dim <= 256, f"FlashAttention {direction} only supports head dimension at most 256")
    multiple = {
        "forward": "query, key, value, and out_ must have a head_size that is a multiple of 8",
        "backward": "head_size should be a multiple of 8",
    }[direction]
    check(head_dim % 8 == 0, multiple)
    # What C++ makes of the modulo below, said in words instead of ending the process.
    check(
        kv_heads > 0,
        "num_heads_k is 0: the compiled extension divides by it and kills the process (SIGFPE)",
    )
    check(
        heads % kv_heads == 0,
        "Number of heads in key/value must divide number of heads in query",
    )


def check_grid(heads: int, seqlen_q: int) -> None:
    """A forward kernel is launched on a (query blocks, batch, heads) grid, and none may be zero."""
    check(
        heads > 0 and seqlen_q > 0,
        f"CUDA error: invalid configuration argument (num_heads {heads}, seqlen_q {seqlen_q})",
    )


def check_shape(name: str, tensor: torch.Tensor, names: str, sizes: tuple[int, ...]) -> None:
    """`names`: how the extension writes the shape, e.g. `batch_size, num_heads, head_size`."""
    check(tuple(tensor.shape) == sizes, f"{name} must have shape ({names})")


def check_buffer(
    name: str, buffer: torch.Tensor, dtype: torch.dtype, names: str, sizes: tuple[int, ...]
) -> None:
    """An output that the caller allocated: `Output` (out_), `dq`, `dk` or `dv`."""
    if name == "Output":
        check(buffer.dtype == dtype, "Output must have the same dtype as inputs")
        check(buffer.stride(-1) == 1, "Output tensor must have contiguous last dimension")
        check_shape("out", buffer, names, sizes)
        return
    check(buffer.dtype == dtype, f"{name} must have the same dtype as q")
    check(buffer.stride(-1) == 1, f"{name} must have contiguous last dimension")
    check_shape(name, buffer, names, sizes)


def check_cu_seqlens(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> None:
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check(tensor.dtype == torch.int32, f"{name} must have dtype int32")
        check(tensor.is_contiguous(), f"{name} must be contiguous")
        check_shape(name, tensor, "batch_size + 1", (cu_seqlens_q.numel(),))


def check_softmax(
    dropout: float, softcap: float, return_softmax: bool, generator: object | None
) -> None:
    check(dropout < 1.0, "p_dropout must be below 1")
    check(not (softcap > 0 and dropout > 0), "Softcapping does not support dropout for now")
    check(
        dropout > 0 or not return_softmax,
        "return_softmax is only supported when p_dropout > 0.0",
    )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise RuntimeError("gen_ must be a torch.Generator or None")


def check_slopes(slopes: torch.Tensor | None, batch: int, heads: int) -> None:
    if slopes is None:
        return
    check(slopes.dtype == torch.float32, "ALiBi slopes must have dtype fp32")
    check(slopes.stride(-1) == 1, "ALiBi slopes tensor must have contiguous last dimension")
    check(
        tuple(slopes.shape) in ((heads,), (batch, heads)),
        f"ALiBi slopes must have shape ({heads},) or ({batch}, {heads}), not {tuple(slopes.shape)}",
    )
