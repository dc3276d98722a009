"""A diffusion transformer of WAN's architecture, and the two tensor-parallel plans published for it.

Written for these tests; only module names and shapes follow WAN 2.1, so that the published plans apply. They
are those of modelscope/DiffSynth-Studio, `examples/wanvideo/wan_14b_text_to_video_tensor_parallel.py`:

- the first, of 2025-03-17 (commit 04d03500): q, k and v projections and the norms behind them as
  `SequenceParallel`, q, k and v brought from shards of the sequence to shards of heads before attention, `o`
  as `ColwiseParallel`, the FFN column- and row-wise. Norms, modulation and gates see whole plain tensors.
- the second, of 2025-03-25 (commit 6d405b66): as above, but norms and modulation too work on shards of the
  sequence, `o` is row-wise, and the gate becomes a module. It went with the example on 2025-06-13 (830b1b72).

Their users met `flash_attn._flash_attn_forward.default does not have a sharding strategy registered` (issue
477 there). The second plan has a mistake besides that raises no error: plain parameters (`modulation`, and
what makes `time`) meet shards of the sequence as plain tensors, so that each rank has the gradient of its own
tokens and nothing adds them up.

Targets: `build_*(mesh)` (`None`: unsharded), `inputs_real(mesh)` and `inputs_small(mesh)`. Suffixes: B batch,
S tokens, T text tokens, W width (heads x head_dim), H heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import local_map
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

SEED = 20250317


@dataclass(frozen=True)
class Sizes:
    """`grid`: latent frames, rows and columns after patching; `patch`: values per token, in and out."""

    layers: int
    dim: int
    ffn: int
    heads: int
    grid: tuple[int, int, int]
    text: int
    text_dim: int
    frequencies: int
    patch: int
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)


# WAN 2.1 T2V 14B: 81 frames of 832 x 480 are 21 x 30 x 52 = 32,760 tokens.
REAL = Sizes(
    layers=40,
    dim=5120,
    ffn=13824,
    heads=40,
    grid=(21, 30, 52),
    text=512,
    text_dim=4096,
    frequencies=256,
    patch=64,
    dtype=torch.bfloat16,
)
SMALL = Sizes(
    layers=2,
    dim=64,
    ffn=128,
    heads=8,
    grid=(3, 4, 4),
    text=16,
    text_dim=32,
    frequencies=16,
    patch=8,
    dtype=torch.float32,
)


# --- attention functions: q_BSHD, k_BTHD, v_BTHD -> out_BSHD ----------------------------------------------

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    import flash_attn

    out: Tensor = flash_attn.flash_attn_func(q, k, v)
    return out


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def on_local_heads(attend: Attend) -> Attend:
    """The mended form: q, k and v come to shards of heads, and `attend` sees plain local tensors."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not isinstance(q, DTensor):
            return attend(q, k, v)
        heads = [Shard(2)]
        local = local_map(
            attend,
            out_placements=list(heads),
            in_placements=(heads, heads, heads),
            device_mesh=q.device_mesh,
            redistribute_inputs=True,
        )
        out: Tensor = local(q, k, v)
        return out

    return attention


ATTENTION: Mapping[str, Attend] = {
    "flash_attn": flash,
    "sdpa": sdpa,
    "local_map": on_local_heads(flash),
    "local_map_sdpa": on_local_heads(sdpa),
}


# --- the model ---------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Over the whole width, as WAN norms q and k: a shard of heads does not know its own scale."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return (wide * scale).to(x.dtype) * self.weight


def turns(grid: tuple[int, int, int], head_dim: int) -> Tensor:
    """Rotary angles in three dimensions as complex numbers (S, 1, D/2): frames, then rows, then columns."""
    third = 2 * (head_dim // 6)
    widths = (head_dim - 2 * third, third, third)
    steps = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [
        step.reshape(-1, 1) / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
        for step, width in zip(steps, widths, strict=True)
    ]
    every = torch.cat(angles, 1).unsqueeze(1)
    return torch.polar(torch.ones_like(every), every)


def rotated(x_BSW: Tensor, turns_S1D: Tensor, heads: int) -> Tensor:  # noqa: N803
    pairs = x_BSW.to(torch.float64).unflatten(-1, (heads, -1, 2))
    spun = torch.view_as_real(torch.view_as_complex(pairs) * turns_S1D)
    return spun.flatten(2).to(x_BSW.dtype)


class Core(nn.Module):
    """Attention alone, a module of its own so that a plan can place q, k and v before it."""

    def __init__(self, heads: int, attend: Attend) -> None:
        super().__init__()
        self.heads = heads
        self.attend = attend

    def forward(self, q_BSW: Tensor, k_BTW: Tensor, v_BTW: Tensor) -> Tensor:  # noqa: N803
        split = [x.unflatten(-1, (self.heads, -1)) for x in (q_BSW, k_BTW, v_BTW)]
        return self.attend(*split).flatten(2)


class Attention(nn.Module):
    """The parts of self- and cross-attention."""

    def __init__(self, sizes: Sizes, attend: Attend) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.q, self.k, self.v, self.o = (nn.Linear(sizes.dim, sizes.dim) for _ in range(4))
        self.norm_q = RMSNorm(sizes.dim)
        self.norm_k = RMSNorm(sizes.dim)
        self.attn = Core(sizes.heads, attend)


class SelfAttention(Attention):
    def forward(self, x_BSW: Tensor, turns_S1D: Tensor) -> Tensor:  # noqa: N803
        q = rotated(self.norm_q(self.q(x_BSW)), turns_S1D, self.heads)
        k = rotated(self.norm_k(self.k(x_BSW)), turns_S1D, self.heads)
        out: Tensor = self.o(self.attn(q, k, self.v(x_BSW)))
        return out


class CrossAttention(Attention):
    def forward(self, x_BSW: Tensor, text_BTW: Tensor) -> Tensor:  # noqa: N803
        q, k = self.norm_q(self.q(x_BSW)), self.norm_k(self.k(text_BTW))
        out: Tensor = self.o(self.attn(q, k, self.v(text_BTW)))
        return out


class Modulate(nn.Module):
    """A module of its own for `plan_2_mended`; the published plans do not know it."""

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return x * (1 + scale) + shift


class Gate(nn.Module):
    def forward(self, x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
        return x + gate * residual


def modulation(sizes: Sizes, chunks: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(1, chunks, sizes.dim) / sizes.dim**0.5)


class Block(nn.Module):
    def __init__(self, sizes: Sizes, attend: Attend) -> None:
        super().__init__()
        self.self_attn = SelfAttention(sizes, attend)
        self.cross_attn = CrossAttention(sizes, attend)
        self.norm1, self.norm2 = (
            nn.LayerNorm(sizes.dim, eps=1e-6, elementwise_affine=False) for _ in range(2)
        )
        self.norm3 = nn.LayerNorm(sizes.dim, eps=1e-6)
        self.ffn = nn.Sequential(
            nn.Linear(sizes.dim, sizes.ffn),
            nn.GELU(approximate="tanh"),
            nn.Linear(sizes.ffn, sizes.dim),
        )
        self.modulation = modulation(sizes, 6)
        self.modulate = Modulate()
        self.gate = Gate()

    def forward(self, x: Tensor, text: Tensor, time_B6W: Tensor, turns_S1D: Tensor) -> Tensor:  # noqa: N803
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = (self.modulation + time_B6W).chunk(
            6, dim=1
        )
        attended = self.self_attn(self.modulate(self.norm1(x), shift, scale), turns_S1D)
        x = self.gate(x, gate, attended)
        x = x + self.cross_attn(self.norm3(x), text)
        fed = self.ffn(self.modulate(self.norm2(x), shift_ffn, scale_ffn))
        out: Tensor = self.gate(x, gate_ffn, fed)
        return out


class Head(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(sizes.dim, eps=1e-6, elementwise_affine=False)
        self.head = nn.Linear(sizes.dim, sizes.patch)
        self.modulation = modulation(sizes, 2)

    def forward(self, x: Tensor, time_BW: Tensor) -> Tensor:  # noqa: N803
        shift, scale = (self.modulation + time_BW.unsqueeze(1)).chunk(2, dim=1)
        out: Tensor = self.head(self.norm(x) * (1 + scale) + shift)
        return out


class Wan(nn.Module):
    """x (B, S, patch), timestep (B,), context (B, T, text_dim) -> (B, S, patch)."""

    def __init__(self, sizes: Sizes, attend: Attend) -> None:
        super().__init__()
        self.sizes = sizes
        dim = sizes.dim
        self.patch_embedding = nn.Linear(sizes.patch, dim)
        self.text_embedding = nn.Sequential(
            nn.Linear(sizes.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(sizes.frequencies, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(sizes, attend) for _ in range(sizes.layers))
        self.head = Head(sizes)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        half = self.sizes.frequencies // 2
        rates = 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = timestep.to(torch.float64).unsqueeze(1) * rates
        time = self.time_embedding(torch.cat([angles.cos(), angles.sin()], 1).to(x.dtype))
        time_B6W = self.time_projection(time).unflatten(1, (6, -1))  # noqa: N806
        turned = turns(self.sizes.grid, self.sizes.dim // self.sizes.heads)
        text = self.text_embedding(context)
        x = self.patch_embedding(x)
        for block in self.blocks:
            x = block(x, text, time_B6W, turned)
        out: Tensor = self.head(x, time)
        return out


# --- the plans ---------------------------------------------------------------------------------------------

TO_HEADS = PrepareModuleInput(
    input_layouts=(Shard(1), Shard(1), Shard(1)),
    desired_input_layouts=(Shard(2), Shard(2), Shard(2)),
)


def _on_sequence(name: str) -> dict[str, ParallelStyle]:
    """Projections and norms of one attention, in both plans."""
    parts = ("q", "k", "v", "norm_q", "norm_k")
    return {f"{name}.{part}": SequenceParallel() for part in parts} | {f"{name}.attn": TO_HEADS}


def _entering(
    name: str, held: tuple[Replicate | Shard, ...], wanted: Replicate | Shard
) -> dict[str, ParallelStyle]:
    return {name: PrepareModuleInput(input_layouts=held, desired_input_layouts=(held[0], wanted))}


def plan_1() -> dict[str, ParallelStyle]:
    """Of a block, as published on 2025-03-17."""
    whole = (Replicate(), Replicate())
    return {
        **_entering("self_attn", whole, Shard(0)),
        **_on_sequence("self_attn"),
        "self_attn.o": ColwiseParallel(output_layouts=Replicate()),
        **_entering("cross_attn", whole, Replicate()),
        **_on_sequence("cross_attn"),
        "cross_attn.o": ColwiseParallel(output_layouts=Replicate()),
        "ffn.0": ColwiseParallel(),
        "ffn.2": RowwiseParallel(),
    }


def plan_2() -> dict[str, ParallelStyle]:
    """Of a block, as published on 2025-03-25."""
    sharded = (Shard(1), Replicate())
    return {
        **_entering("self_attn", sharded, Shard(0)),
        **_on_sequence("self_attn"),
        "self_attn.o": RowwiseParallel(input_layouts=Shard(2), output_layouts=Replicate()),
        **_entering("cross_attn", sharded, Replicate()),
        **_on_sequence("cross_attn"),
        "cross_attn.o": RowwiseParallel(
            input_layouts=Shard(2), output_layouts=Replicate(), use_local_output=False
        ),
        "ffn.0": ColwiseParallel(input_layouts=Shard(1)),
        "ffn.2": RowwiseParallel(output_layouts=Replicate()),
        **{f"norm{n}": SequenceParallel(use_local_output=True) for n in (1, 2, 3)},
        "gate": PrepareModuleInput(
            input_layouts=(Shard(1), Replicate(), Replicate()),
            desired_input_layouts=(Replicate(), Replicate(), Replicate()),
        ),
    }


def plan_2_mended() -> dict[str, ParallelStyle]:
    """What the second plan lacks: shift and scale meet shards as replicated DTensors, whose gradients DTensor
    knows to be partial sums."""
    held = (Shard(1), Replicate(), Replicate())
    styles = plan_2()
    return styles | {
        "modulate": PrepareModuleInput(input_layouts=held, desired_input_layouts=held),
    }


def outside_blocks_2() -> dict[str, ParallelStyle]:
    """The second plan for the rest of the model."""
    whole = (Replicate(), None, None, None)
    return {
        "text_embedding.0": ColwiseParallel(),
        "text_embedding.2": RowwiseParallel(),
        "time_projection.1": ColwiseParallel(output_layouts=Replicate()),
        "blocks.0": PrepareModuleInput(input_layouts=whole, desired_input_layouts=whole),
        "head": PrepareModuleInput(
            input_layouts=(Replicate(), None),
            desired_input_layouts=(Replicate(), None),
            use_local_output=True,
        ),
    }


def built(
    sizes: Sizes,
    attention: str,
    mesh: DeviceMesh | None,
    block_plan: Callable[[], dict[str, ParallelStyle]] = plan_1,
    outside: Mapping[str, ParallelStyle] | None = None,
) -> nn.Module:
    """The same weights on every rank and for every plan. A mesh of several axes needs one named `tp`."""
    torch.manual_seed(SEED)
    # Not made in float32 and then cast: `Module.to` fails on fake tensors (2.13: "Couldn't swap").
    before = torch.get_default_dtype()
    torch.set_default_dtype(sizes.dtype)
    try:
        model = Wan(sizes, ATTENTION[attention])
    finally:
        torch.set_default_dtype(before)
    if mesh is None:
        return model
    tp = mesh if mesh.ndim == 1 else mesh["tp"]
    parallelize_module(model, tp, dict(outside or {}))
    for block in model.blocks:
        parallelize_module(block, tp, block_plan())
    return model


# --- targets -----------------------------------------------------------------------------------------------


def build_real(mesh: DeviceMesh | None) -> nn.Module:
    """14 B parameters: for `FakeTensorMode` only."""
    return built(REAL, "flash_attn", mesh)


def build_real_plan2(mesh: DeviceMesh | None) -> nn.Module:
    return built(REAL, "flash_attn", mesh, plan_2, outside_blocks_2())


def build_small(mesh: DeviceMesh | None) -> nn.Module:
    return built(SMALL, "flash_attn", mesh)


def build_small_sdpa(mesh: DeviceMesh | None) -> nn.Module:
    return built(SMALL, "sdpa", mesh)


def build_small_fixed(mesh: DeviceMesh | None) -> nn.Module:
    """Needs no registered strategy: flash-attn within `local_map`."""
    return built(SMALL, "local_map", mesh)


def build_small_sdpa_fixed(mesh: DeviceMesh | None) -> nn.Module:
    return built(SMALL, "local_map_sdpa", mesh)


def build_plan2(mesh: DeviceMesh | None) -> nn.Module:
    return built(SMALL, "flash_attn", mesh, plan_2, outside_blocks_2())


def build_plan2_local(mesh: DeviceMesh | None) -> nn.Module:
    """The second plan where attention works: its gradients are still wrong."""
    return built(SMALL, "local_map_sdpa", mesh, plan_2, outside_blocks_2())


def build_plan2_fixed(mesh: DeviceMesh | None) -> nn.Module:
    return built(SMALL, "local_map_sdpa", mesh, plan_2_mended, outside_blocks_2())


def _inputs(sizes: Sizes) -> dict[str, Tensor]:
    torch.manual_seed(SEED + 1)
    return {
        "x": torch.randn(1, sizes.tokens, sizes.patch, dtype=sizes.dtype),
        "timestep": torch.full((1,), 500.0, dtype=sizes.dtype),
        "context": torch.randn(1, sizes.text, sizes.text_dim, dtype=sizes.dtype),
    }


def inputs_real(mesh: DeviceMesh | None) -> dict[str, Tensor]:
    return _inputs(REAL)


def inputs_small(mesh: DeviceMesh | None) -> dict[str, Tensor]:
    return _inputs(SMALL)
