"""Random numbers of the flash-attn stand-in: the seed, the mask made from it, and S_dmask.

As in the extension, the mask is a function of `rng_state` alone, so that backward drops what
forward dropped. A different function: CUDA's Philox numbers cannot be had on a CPU.
"""

from __future__ import annotations

import torch


def keep_mask(
    shape: tuple[int, int, int, int], rate: float, generator: torch.Generator | None
) -> torch.Tensor | None:
    """True where a probability is kept, (b, h, sq, sk); None without dropout."""
    if generator is None:
        return None
    return torch.rand(shape, generator=generator, device=generator.device) >= rate


def round_128(length: int) -> int:
    return -(-length // 128) * 128


def empty_s_dmask(q: torch.Tensor, shape: tuple[int, int, int, int], wanted: bool) -> torch.Tensor:
    batch, heads, rows, columns = shape
    if not wanted:
        return q.new_empty(0)
    return q.new_zeros(batch, heads, round_128(rows), round_128(columns))


def write_s_dmask(
    s_dmask: torch.Tensor, probabilities: torch.Tensor, keep: torch.Tensor | None
) -> None:
    """Probabilities, negative where dropped, in the upper left corner."""
    signed = probabilities if keep is None else torch.where(keep, probabilities, -probabilities)
    rows, columns = probabilities.shape[-2:]
    s_dmask[..., :rows, :columns] = signed.to(s_dmask.dtype)


def draw_rng_state(
    p_dropout: float, generator: torch.Generator | None, device: torch.device
) -> torch.Tensor:
    """(seed, offset), int64: all that the dropout mask depends on. No draw without dropout."""
    state = torch.zeros(2, dtype=torch.int64, device=device)
    if p_dropout > 0:
        state[0] = torch.randint(2**62, (), generator=generator)
    return state


def generator_of(p_dropout: float, rng_state: torch.Tensor) -> torch.Generator | None:
    if p_dropout == 0:
        return None
    seed, offset = rng_state.tolist()
    return torch.Generator(device=rng_state.device).manual_seed(seed + offset)
