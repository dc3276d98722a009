"""What the stand-ins for PyTorch's CUDA attention kernels share: checks, masks, dropout state.

Dropout draws other random numbers than Philox; the mask is a function of what the forward returns.
"""

from __future__ import annotations

import itertools

import torch

from attncheck.standins import flash_dropout as dropout
from attncheck.standins import flash_math
from attncheck.standins.flash_checks import check

Maybe = torch.Tensor | None

# efficient's `custom_mask_type`; False and True of `is_causal` are the first two.
NO_MASK, CAUSAL_TOP_LEFT, CAUSAL_BOTTOM_RIGHT = 0, 1, 2


def expect(condition: bool, text: str) -> None:
    """What a TORCH_CHECK without a message of its own says."""
    check(
        condition,
        f"Expected {text} to be true, but got false.  (Could this error message be improved?  If so, "
        "please report an enhancement request to PyTorch.)",
    )


def check_lse(lse: torch.Tensor, shape: tuple[int, ...]) -> None:
    # The kernels read it through a bare pointer: a wrong shape would be read past its end.
    check(
        lse.dtype == torch.float32 and tuple(lse.shape) == shape,
        f"logsumexp is {lse.dtype} {tuple(lse.shape)}, the kernel reads it as float32 {shape}",
    )


def scale_of(query: torch.Tensor, scale: float | None) -> float:
    return float(query.shape[-1]) ** -0.5 if scale is None else scale


def spec(query: torch.Tensor, scale: float | None, dropout_p: float) -> flash_math.Attention:
    return flash_math.Attention(
        scale_of(query, scale), False, (-1, -1), 0.0, dropout_p, query.dtype
    )


def draw(dropout_p: float) -> tuple[torch.Tensor, torch.Tensor, torch.Generator | None]:
    """Seed and offset, int64 scalars, and the generator that they make."""
    state = dropout.draw_rng_state(dropout_p, None, torch.device("cpu"))
    return state[0].clone(), state[1].clone(), dropout.generator_of(dropout_p, state)


def generator(dropout_p: float, seed: torch.Tensor, offset: torch.Tensor) -> torch.Generator | None:
    return None if dropout_p == 0 else dropout.generator_of(dropout_p, torch.stack([seed, offset]))


def slices(starts: torch.Tensor) -> list[slice]:
    values = starts.tolist()
    return [slice(a, b) for a, b in itertools.pairwise(values)]


def mask(
    rows: int,
    columns: int,
    mask_type: int,
    window_size: int | None,
    seqlen_k: Maybe,
    bias: Maybe,
) -> Maybe:
    """The bias with -inf where a key is hidden; broadcasts to (batch, heads, rows, columns)."""
    shift = columns - rows if mask_type == CAUSAL_BOTTOM_RIGHT else 0
    i = torch.arange(rows)[:, None] + shift
    j = torch.arange(columns)[None, :]
    visible = torch.ones(1, 1, rows, columns, dtype=torch.bool)
    if mask_type != NO_MASK:
        visible = visible & (j <= i)
    if window_size:
        visible = visible & (j > i - window_size)
    if seqlen_k is not None:
        visible = visible & (j < seqlen_k[:, None, None, None])
    if bias is None and bool(visible.all()):
        return None
    hidden = torch.where(visible, 0.0, -torch.inf)
    return hidden if bias is None else bias.to(torch.float32) + hidden
