"""Values for a case: fresh, asymmetric, the same on every rank, and remade from the recorded seed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch

from attncheck.probing import KV_SEQUENCE, Setting, Tensor

# Each tensor gets its own mean, so that swapped arguments or gradients show even where shapes agree.
_OFFSETS = (0.05, -0.15, 0.25, -0.35)

DTYPES: Mapping[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}


def generator(seed: int, *names: str) -> torch.Generator:
    """A CPU generator whose stream depends on `seed` and `names` only: never on the order of cases."""
    digest = hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def whole_tensors(
    operator: str, setting: Setting, specs: tuple[Tensor, ...], seed: int
) -> dict[str, torch.Tensor]:
    """The whole, unsharded arguments in their own dtypes, on the CPU.

    Floating tensors that an operator takes in half precision are *rounded* values: the reference starts
    from the same rounded numbers, so that input rounding is nobody's error.
    """
    out = {}
    for position, spec in enumerate(specs):
        random = generator(seed, operator, setting.name, spec.name)
        whole = _fill(spec, setting, position, random)
        if setting.memory == "expanded" and laid_out(spec):
            whole = whole[:1].expand(whole.shape).contiguous()  # what stride 0 can say
        out[spec.name] = whole
    return out


def laid_out(spec: Tensor) -> bool:
    """Whether `Setting.memory` is about this tensor: activations and masks of two dims or more."""
    activation = spec.fill in ("normal", "float_mask", "bool_mask") and not spec.mutable
    return activation and len(spec.sizes) > 1


def lay_out(tensor: torch.Tensor, spec: Tensor, setting: Setting) -> torch.Tensor:
    """The argument's values (whole, or a shard) in memory as the setting wants them."""
    return in_memory(tensor, setting.memory) if laid_out(spec) else tensor


def in_memory(tensor: torch.Tensor, memory: str) -> torch.Tensor:
    """The same values as a view of fresh memory, with strides as `probing.MEMORY` says.

    A shard laid out so has the strides that DTensor computes for it from the whole's.
    """
    if memory == "transposed" and tensor.ndim > 1:
        a, b = (-3, -2) if tensor.ndim > 2 else (-2, -1)
        # `contiguous` alone keeps the strides where a dim is 1 or 0 and both orders look the same.
        stored = torch.empty_like(tensor.transpose(a, b), memory_format=torch.contiguous_format)
        return stored.copy_(tensor.transpose(a, b)).transpose(a, b)
    if memory == "sliced":
        width = tensor.shape[-1]
        buffer = torch.zeros(
            (*tensor.shape[:-1], 3 * width), dtype=tensor.dtype, device=tensor.device
        )
        middle = buffer[..., width : 2 * width]
        return middle.copy_(tensor)
    if memory == "expanded":
        return tensor[:1].clone().expand(tensor.shape)
    return tensor


def _fill(spec: Tensor, setting: Setting, position: int, random: torch.Generator) -> torch.Tensor:
    dtype = DTYPES[spec.dtype or setting.dtype]
    shape = spec.sizes
    if spec.fill == "normal":
        values = torch.randn(shape, generator=random, dtype=torch.float64)
        return (values + _OFFSETS[position % len(_OFFSETS)]).to(dtype)
    if spec.fill == "bool_mask":
        keep = torch.rand(shape, generator=random) < 0.7
        keep[..., 0] = (
            True  # a row that masks everything is a setting of its own, never an accident
        )
        return keep
    if spec.fill == "float_mask":
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
    if spec.fill == "weight":
        values = torch.randn(shape, generator=random, dtype=torch.float64)
        return ((values + _OFFSETS[position % len(_OFFSETS)]) / math.sqrt(shape[-1])).to(dtype)
    if spec.fill == "slopes":
        return (0.05 + torch.rand(shape, generator=random, dtype=torch.float64)).to(dtype)
    if spec.fill == "zeros":
        return torch.zeros(shape, dtype=dtype)
    if spec.fill == "eye":
        at = spec.dims.index(KV_SEQUENCE) if KV_SEQUENCE in spec.dims else len(shape) - 2
        others = [size for dim, size in enumerate(shape[:-1]) if dim != at]
        eye = torch.eye(shape[at], shape[-1], dtype=dtype)
        return eye.expand(*others, *eye.shape).movedim(-2, at).contiguous()
    if spec.fill == "values":
        return torch.tensor(spec.values, dtype=dtype).reshape(shape)
    raise ValueError(f"{spec.name}: unknown fill {spec.fill!r}")


def cotangent(
    operator: str, setting: Setting, shape: torch.Size, dtype: torch.dtype, seed: int
) -> torch.Tensor:
    """The gradient that backward starts from: random, whole, contiguous, the same on every rank."""
    random = generator(seed, operator, setting.name, "cotangent")
    return (torch.randn(shape, generator=random, dtype=torch.float64) + 0.1).to(dtype)


def lay_out_cotangent(tensor: torch.Tensor, setting: Setting) -> torch.Tensor:
    """The gradient of the output (whole, or a shard) in memory as that of the setting's output is."""
    usual = setting.memory in ("transposed", "sliced") and tensor.ndim > 1
    return in_memory(tensor, setting.memory) if usual else tensor
