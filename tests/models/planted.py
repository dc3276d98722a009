"""Small models with one mistake of distribution each, and their healthy twins.

`build_NAME(mesh)`, `build_NAME_healthy(mesh)` and `inputs_NAME(mesh)` for each of `NAMES`. `mesh`: a device
mesh of one axis, or None for the unsharded model, which a plant and its twin share with all names and
weights. None of the mistakes raises: the parallel model runs, and is wrong in its output, in some gradients,
or on its second call. Shapes: B batch, S tokens, H heads, D head_dim, W = H x D.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication, local_map
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

NAMES = (
    "wrong_dim",
    "fused_qkv",
    "rank_mask",
    "lost_reduction",
    "stale_keys",
    "uneven_shape",
    "dropped_mask",
    "stale_flag",
    "stale_mode",
)

SEED = 7
# One sequence: before 2.13, DTensor does not flatten a batch of several over a sharded dim behind it.
BATCH, TOKENS, HEADS, HEAD_DIM = 1, 8, 4, 8
WIDTH = HEADS * HEAD_DIM
UNEVEN_TOKENS = 9

Plan = dict[str, ParallelStyle]


def attention(
    q_BHSD: Tensor,  # noqa: N803
    k_BHSD: Tensor,  # noqa: N803
    v_BHSD: Tensor,  # noqa: N803
    bias: Tensor | None = None,
) -> Tensor:
    """Of plain operators, which all have strategies."""
    scores = q_BHSD @ k_BHSD.transpose(-2, -1) / math.sqrt(HEAD_DIM)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1) @ v_BHSD


def split(x_BSW: Tensor) -> Tensor:  # noqa: N803
    """(B, S, W) -> (B, H, S, D), whole or with the heads of one rank."""
    return x_BSW.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


def merged(x_BHSD: Tensor) -> Tensor:  # noqa: N803
    return x_BHSD.transpose(1, 2).flatten(2)


def masked(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores where `keep` says which keys count."""
    return torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, -math.inf)


def causal_bias(tokens: int, dtype: torch.dtype, first: int = 0) -> Tensor:
    """(S, S), for rows that stand `first` tokens further on than the columns."""
    return masked(torch.ones(tokens, tokens, dtype=torch.bool).tril(first), dtype)


def on_local_heads(call: Callable[..., Tensor], mesh: DeviceMesh) -> Callable[..., Tensor]:
    heads = [Shard(1)]
    local: Callable[..., Tensor] = local_map(
        call,
        out_placements=list(heads),
        in_placements=(heads, heads, heads),
        device_mesh=mesh,
        redistribute_inputs=True,
    )
    return local


class Core(nn.Module):
    """q, k, v (B, S, W) to what `o` projects, without parameters. The mistake of most plants is in here.

    `mesh` is None in the unsharded model, which a plant and its twin share.
    """

    def __init__(self, mesh: DeviceMesh | None = None, planted: bool = False) -> None:
        super().__init__()
        self.mesh = mesh
        self.planted = planted

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return merged(attention(split(q), split(k), split(v)))


class Attention(nn.Module):
    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.core = core

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        out: Tensor = self.o(self.core(self.q(x), self.k(x), self.v(x), **options))
        return out


def by_heads(local: bool, entering: Replicate | Shard | None = None) -> Plan:
    """The usual plan of an `Attention`; `local`: its core sees plain shards, otherwise DTensors."""
    into = ColwiseParallel(input_layouts=entering or Replicate(), use_local_output=local)
    return {"q": into, "k": into, "v": into, "o": RowwiseParallel()}


ENTER_SEQUENCE = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),))


def made(
    make: Callable[[DeviceMesh | None, bool], nn.Module],
    mesh: DeviceMesh | None,
    planted: bool,
    plan: Plan,
) -> nn.Module:
    torch.manual_seed(SEED)
    model = make(mesh, planted)
    return model if mesh is None else parallelize_module(model, mesh, plan)


def around(core: type[Core]) -> Callable[[DeviceMesh | None, bool], nn.Module]:
    return lambda mesh, planted: Attention(core(mesh, planted))


def tokens(count: int = TOKENS) -> Tensor:
    torch.manual_seed(SEED + 1)
    return torch.randn(BATCH, count, WIDTH)


# --- a from_local whose Shard dim is wrong before a transpose -----------------------------------------------


class WrongDim(Core):
    """Heads are dim 2 where they become a DTensor, and dim 1 only after the transpose."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        by_head = [self._distributed(x.unflatten(-1, (-1, HEAD_DIM))) for x in (q, k, v)]
        out = attention(*(x.transpose(1, 2) for x in by_head)).transpose(1, 2)
        if isinstance(out, DTensor):
            out = out.redistribute(self.mesh, by_head[0].placements).to_local()
        return out.flatten(2)

    def _distributed(self, x_BSHD: Tensor) -> Tensor:  # noqa: N803
        if self.mesh is None:
            return x_BSHD
        return DTensor.from_local(x_BSHD, self.mesh, [Shard(1 if self.planted else 2)])


def build_wrong_dim(mesh: DeviceMesh | None) -> nn.Module:
    return made(around(WrongDim), mesh, True, by_heads(local=True))


def build_wrong_dim_healthy(mesh: DeviceMesh | None) -> nn.Module:
    return made(around(WrongDim), mesh, False, by_heads(local=True))


def inputs_wrong_dim(mesh: DeviceMesh | None) -> tuple[Tensor, ...]:
    return (tokens(),)


# --- a fused qkv projection sharded column-wise without interleaving ----------------------------------------


class FusedCore(nn.Module):
    def forward(self, fused: Tensor) -> Tensor:
        if isinstance(fused, DTensor):  # the twin's: whole, cut in three, and then each by heads
            whole = fused.redistribute(placements=[Replicate()]).unflatten(-1, (3, -1, HEAD_DIM))
            cut = whole.redistribute(placements=[Shard(3)]).to_local()
        else:
            cut = fused.unflatten(-1, (3, -1, HEAD_DIM))
        return merged(attention(*(x.transpose(1, 2) for x in cut.unbind(2))))


class FusedQKV(nn.Module):
    """The first rank of two has all of q and half of k, and cuts them in three as if they were q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.o = nn.Linear(WIDTH, WIDTH)
        self.core = FusedCore()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(self.core(self.qkv(x)))
        return out


def _fused(mesh: DeviceMesh | None, planted: bool) -> nn.Module:
    into = ColwiseParallel(use_local_output=planted)
    return made(lambda *_: FusedQKV(), mesh, planted, {"qkv": into, "o": RowwiseParallel()})


def build_fused_qkv(mesh: DeviceMesh | None) -> nn.Module:
    return _fused(mesh, True)


def build_fused_qkv_healthy(mesh: DeviceMesh | None) -> nn.Module:
    return _fused(mesh, False)


def build_fused_qkv_as_cut(mesh: None) -> nn.Module:
    """Unsharded, with the weights that the plant's two ranks take for q, k and v."""
    model = _fused(None, True)
    with torch.no_grad():
        for parameter in model.qkv.parameters():  # type: ignore[union-attr]
            by_rank = parameter.unflatten(0, (2, 3, -1))
            parameter.copy_(by_rank.transpose(0, 1).flatten(0, 2))
    return model


def inputs_fused_qkv(mesh: DeviceMesh | None) -> tuple[Tensor, ...]:
    return (tokens(),)


# --- a rank-dependent mask under implicit_replication -------------------------------------------------------


class RankMask(Core):
    """Causal. The plant begins the mask's rows at the rank's own tokens, which suits shards of the sequence.
    Here each rank has all rows, of its own heads, and DTensor takes the plain mask for the same on all."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size, first = q.shape[1], 0
        if self.planted and self.mesh is not None:
            first = self.mesh.get_local_rank() * (size // self.mesh.size())
        bias = causal_bias(size, q.dtype, first)
        with nullcontext() if self.mesh is None else implicit_replication():
            return merged(attention(split(q), split(k), split(v), bias))


def build_rank_mask(mesh: DeviceMesh | None) -> nn.Module:
    return made(around(RankMask), mesh, True, by_heads(local=False))


def build_rank_mask_healthy(mesh: DeviceMesh | None) -> nn.Module:
    return made(around(RankMask), mesh, False, by_heads(local=False))


def inputs_rank_mask(mesh: DeviceMesh | None) -> tuple[Tensor, ...]:
    return (tokens(),)


# --- plain parameters that meet sequence shards and lose their gradient reduction ---------------------------


class LostReduction(nn.Module):
    """AdaLN-like: `scale` and `shift` apply to normalised shards of the sequence. The twin has them as
    replicated DTensors, whose gradients DTensor knows for partial sums; the plant, as plain tensors."""

    def __init__(self, mesh: DeviceMesh | None, planted: bool) -> None:
        super().__init__()
        self.enter = nn.Identity()
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.shift = nn.Parameter(torch.randn(WIDTH))
        self.attn = Attention(Core())
        if mesh is not None and not planted:
            for name in ("scale", "shift"):
                whole = distribute_tensor(getattr(self, name).detach(), mesh, [Replicate()])
                self.register_parameter(name, nn.Parameter(whole))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(self.enter(x))
        out: Tensor = self.attn(normed * (1 + self.scale) + self.shift)
        return out


def _sequence_then_heads(local: bool) -> Plan:
    inside = by_heads(local=True, entering=Shard(1))
    return {
        "enter": ENTER_SEQUENCE,
        "norm": SequenceParallel(use_local_output=local),
        **{f"attn.{name}": style for name, style in inside.items()},
    }


def build_lost_reduction(mesh: DeviceMesh | None) -> nn.Module:
    return made(LostReduction, mesh, True, _sequence_then_heads(local=True))


def build_lost_reduction_healthy(mesh: DeviceMesh | None) -> nn.Module:
    return made(LostReduction, mesh, False, _sequence_then_heads(local=False))


def inputs_lost_reduction(mesh: DeviceMesh | None) -> tuple[Tensor, ...]:
    return (tokens(),)


# --- ring attention: a backward with stale keys -------------------------------------------------------------


def passed_on(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """To the next rank of the ring, from the one before."""
    ranks = mesh.size()
    to = [(rank + 1) % ranks for rank in range(ranks)]
    moved: Tensor = collectives.permute_tensor(x.flatten(), to, mesh)
    return collectives.wait_tensor(moved).view(x.shape)


class Ring(torch.autograd.Function):
    """Attention of local queries to keys and values that go round; all (B, H, S / ranks, D).

    Backward sends them round again, each with the gradient that it gathers on its way home. The plant
    (`stale`) does not send the keys, and computes every step with those it received last in forward.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mesh: DeviceMesh, stale: bool) -> Tensor:
        ctx.mesh, ctx.stale = mesh, stale
        keys, values = k, v
        parts, sizes = [], []
        for step in range(mesh.size()):
            if step:
                keys, values = passed_on(keys, mesh), passed_on(values, mesh)
            scores = q @ keys.transpose(-2, -1) / math.sqrt(HEAD_DIM)
            sizes.append(scores.logsumexp(-1, keepdim=True))
            parts.append(scores.softmax(-1) @ values)
        lse = torch.stack(sizes).logsumexp(0)
        shares = torch.stack([(size - lse).exp() for size in sizes])
        out = (torch.stack(parts) * shares).sum(0)
        ctx.save_for_backward(q, k, v, out, lse, keys)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        q, k, v, out, lse, last = ctx.saved_tensors
        mesh, scale = ctx.mesh, 1 / math.sqrt(HEAD_DIM)
        keys, values = (last if ctx.stale else k), v
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        inner = (grad * out).sum(-1, keepdim=True)
        for _ in range(mesh.size()):
            weights = (q @ keys.transpose(-2, -1) * scale - lse).exp()
            slopes = weights * (grad @ values.transpose(-2, -1) - inner) * scale
            dq = dq + slopes @ keys
            dk = dk + slopes.transpose(-2, -1) @ q
            dv = dv + weights.transpose(-2, -1) @ grad
            dk, dv, values = (passed_on(x, mesh) for x in (dk, dv, values))
            if not ctx.stale:
                keys = passed_on(keys, mesh)
        return dq, dk, dv, None, None


class RingCore(Core):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.mesh is None:
            return super().forward(q, k, v)
        local = [split(x.to_local()) for x in (q, k, v)]  # type: ignore[attr-defined]
        out = merged(Ring.apply(*local, self.mesh, self.planted))
        return DTensor.from_local(out, self.mesh, [Shard(1)])


class RingAttention(nn.Module):
    def __init__(self, mesh: DeviceMesh | None, planted: bool) -> None:
        super().__init__()
        self.enter, self.leave = nn.Identity(), nn.Identity()
        self.attn = Attention(RingCore(mesh, planted))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.leave(self.attn(self.enter(x)))
        return out


def _ring(mesh: DeviceMesh | None, planted: bool) -> nn.Module:
    plan: Plan = {
        "enter": ENTER_SEQUENCE,
        **{f"attn.{name}": SequenceParallel() for name in ("q", "k", "v", "o")},
        "leave": PrepareModuleInput(
            input_layouts=(Shard(1),),
            desired_input_layouts=(Replicate(),),
            use_local_output=True,
        ),
    }
    return made(RingAttention, mesh, planted, plan)


def build_stale_keys(mesh: DeviceMesh | None) -> nn.Module:
    return _ring(mesh, True)


def build_stale_keys_healthy(mesh: DeviceMesh | None) -> nn.Module:
    return _ring(mesh, False)


def inputs_stale_keys(mesh: DeviceMesh | None) -> tuple[Tensor, ...]:
    return (tokens(),)


# --- ranks that disagree about the global shape of uneven shards --------------------------------------------


class Entry(Core):
    """The rank's own tokens as a DTensor. Nine on two ranks are five and four: without `shape` the first
    takes the whole for ten, and the second for eight."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if self.mesh is None:
            return x
        mine = x.chunk(self.mesh.size(), 1)[self.mesh.get_local_rank()].contiguous()
        known = {} if self.planted else {"shape": x.shape, "stride": x.stride()}
        return DTensor.from_local(mine, self.mesh, [Shard(1)], **known)


class Pool(nn.Module):
    """The mean over tokens: the plant's ranks divide one sum by numbers of their own."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.sum(1)
        return (total.full_tensor() if isinstance(total, DTensor) else total) / x.shape[1]


class UnevenShape(nn.Module):
    def __init__(self, mesh: DeviceMesh | None, planted: bool) -> None:
        super().__init__()
        self.enter = Entry(mesh, planted)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.pool = Pool()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.pool(self.embed(self.enter(x)).tanh()))
        return out


def build_uneven_shape(mesh: DeviceMesh | None) -> nn.Module:
    return made(UnevenShape, mesh, True, {"embed": SequenceParallel()})


def build_uneven_shape_healthy(mesh: DeviceMesh | None) -> nn.Module:
    return made(UnevenShape, mesh, False, {"embed": SequenceParallel()})


def inputs_uneven_shape(mesh: DeviceMesh | None) -> tuple[Tensor, ...]:
    return (tokens(UNEVEN_TOKENS),)


# --- a dropped mask -----------------------------------------------------------------------------------------


class DroppedMask(Core):
    """`keep` (B, S): which keys are no padding. The plant's parallel path does not hand it on."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:  # type: ignore[override]
        call = partial(attention, bias=masked(keep, q.dtype)[:, None, None, :])
        if self.mesh is not None:
            call = on_local_heads(attention if self.planted else call, self.mesh)
        return merged(call(split(q), split(k), split(v)))


def build_dropped_mask(mesh: DeviceMesh | None) -> nn.Module:
    return made(around(DroppedMask), mesh, True, by_heads(local=False))


def build_dropped_mask_healthy(mesh: DeviceMesh | None) -> nn.Module:
    return made(around(DroppedMask), mesh, False, by_heads(local=False))


def inputs_dropped_mask(mesh: DeviceMesh | None) -> dict[str, Tensor]:
    return {"x": tokens(), "keep": torch.arange(TOKENS).expand(BATCH, -1) < TOKENS - 3}


def inputs_dropped_mask_without(mesh: DeviceMesh | None) -> dict[str, Tensor]:
    return {"x": tokens(), "keep": torch.ones(BATCH, TOKENS, dtype=torch.bool)}


# --- a flag that is read once -------------------------------------------------------------------------------


class StaleFlag(Core):
    """Keeps what it made for a shape. The plant forgets that it depends on `causal` too: the second call,
    with the flag flipped, does what the first did."""

    def __init__(self, mesh: DeviceMesh | None, planted: bool) -> None:
        super().__init__(mesh, planted)
        self.kept: dict[Any, Callable[..., Tensor]] = {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        read_once = self.planted and self.mesh is not None
        key = (q.shape, q.dtype, None if read_once else causal)
        if key not in self.kept:
            bias = causal_bias(q.shape[1], q.dtype) if causal else None
            call = partial(attention, bias=bias)
            self.kept[key] = call if self.mesh is None else on_local_heads(call, self.mesh)
        return merged(self.kept[key](split(q), split(k), split(v)))


class StaleMode(StaleFlag):
    """Sees both ways in training and is causal in evaluation."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(q, k, v, causal=not self.training)


def build_stale_flag(mesh: DeviceMesh | None) -> nn.Module:
    return made(around(StaleFlag), mesh, True, by_heads(local=False))


def build_stale_flag_healthy(mesh: DeviceMesh | None) -> nn.Module:
    return made(around(StaleFlag), mesh, False, by_heads(local=False))


def inputs_stale_flag(mesh: DeviceMesh | None) -> dict[str, Any]:
    return {"x": tokens(), "causal": False}


def build_stale_mode(mesh: DeviceMesh | None) -> nn.Module:
    return made(around(StaleMode), mesh, True, by_heads(local=False))


def build_stale_mode_healthy(mesh: DeviceMesh | None) -> nn.Module:
    return made(around(StaleMode), mesh, False, by_heads(local=False))


def inputs_stale_mode(mesh: DeviceMesh | None) -> tuple[Tensor, ...]:
    return (tokens(),)
