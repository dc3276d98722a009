"""Mistakes of distribution beside those of tests/models/planted.py: around F.scaled_dot_product_attention, in
fused projections with fewer kv heads, in tensor parallelism written by hand; and models that come to no end.

`build_NAME(mesh)`, most of them called with `inputs(mesh)`; `mesh` as in planted.py.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

BATCH, TOKENS, HEADS, KV_HEADS, HEAD_DIM = 4, 8, 4, 2, 8
WIDTH = HEADS * HEAD_DIM


def inputs(mesh: DeviceMesh | None) -> tuple[Tensor, ...]:
    torch.manual_seed(6)
    whole = torch.randn(BATCH, TOKENS, WIDTH)
    if mesh is None or "dp" not in (mesh.mesh_dim_names or ()):
        return (whole,)
    return (whole.chunk(mesh["dp"].size())[mesh["dp"].get_local_rank()],)


# --- attention on local heads ------------------------------------------------------------------------------


class Core(nn.Module):
    """A banded mask of bools; `mistake` is what the parallel model has instead."""

    def __init__(self, mistake: str) -> None:
        super().__init__()
        self.mistake = mistake

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(2)
        heads = (x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            *heads, attn_mask=None if self.mistake else mask, is_causal=self.mistake == "causal"
        )
        return out.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, mistake: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.core = Core(mistake)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(self.core(self.q(x), self.k(x), self.v(x)))
        return out


def attention(mesh: DeviceMesh | None, mistake: str = "") -> nn.Module:
    torch.manual_seed(5)
    model = Attention(mistake if mesh is not None else "")
    if mesh is None:
        return model
    into = {name: ColwiseParallel() for name in "qkv"}
    return parallelize_module(model, mesh["tp"], {**into, "o": RowwiseParallel()})


def data_parallel(mesh: DeviceMesh | None) -> nn.Module:
    """Over another axis the weights are sharded, and each rank has its part of the batch."""
    model = attention(mesh)
    return model if mesh is None else fully_shard(model, mesh=mesh["dp"])


class FusedCore(nn.Module):
    """q, k and v have 2 : 1 : 1 of the columns. What it gets as a plain tensor it takes for its own heads."""

    def forward(self, fused: Tensor) -> Tensor:
        parts = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
        if isinstance(fused, DTensor):
            whole = fused.redistribute(placements=[Replicate()])
            cut = [
                part.redistribute(placements=[Shard(2)]).to_local()
                for part in whole.split(parts, -1)
            ]
        else:
            mine = fused.shape[-1] / sum(parts)
            cut = list(fused.split([int(part * mine) for part in parts], -1))
        q, k, v = (x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for x in cut)
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class FusedGQA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.o = nn.Linear(WIDTH, WIDTH)
        self.core = FusedCore()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(self.core(self.qkv(x)))
        return out


def fused(mesh: DeviceMesh | None, planted: bool) -> nn.Module:
    torch.manual_seed(5)
    model = FusedGQA()
    if mesh is None:
        return model
    into = ColwiseParallel(use_local_output=planted)
    return parallelize_module(model, mesh, {"qkv": into, "o": RowwiseParallel()})


# --- tensor parallelism by hand ----------------------------------------------------------------------------


class Summed(torch.autograd.Function):
    """The sum over ranks; each of them has its whole gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class Copied(torch.autograd.Function):
    """The same on each rank, whose gradients add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


class Linear(nn.Module):
    """One rank's rows (dim 0) or columns (dim 1) of the weight, as a plain parameter."""

    def __init__(self, mesh: DeviceMesh | None, width: int, out: int, dim: int) -> None:
        super().__init__()
        whole = torch.randn(out, width) / width**0.5
        part = whole if mesh is None else whole.chunk(mesh.size(), dim)[mesh.get_local_rank()]
        self.weight = nn.Parameter(part.clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class ByHand(nn.Module):
    def __init__(self, mesh: DeviceMesh | None, mistake: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = Linear(mesh, WIDTH, 2 * WIDTH, 0)
        self.down = Linear(mesh, 2 * WIDTH, WIDTH, 1)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.parallel, self.mistake = mesh is not None, mistake
        if self.parallel and mistake == "doubled":
            self.out.weight.register_hook(lambda grad: self._summed(grad))

    def _summed(self, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if self.parallel and self.mistake != "uncopied":
            h = Copied.apply(h)
        # As one row of tokens: of a shard of the width this is no shard along any dim.
        h = F.gelu(self.up(h).flatten(0, 1)).unflatten(0, (BATCH, TOKENS))
        h = self.down(h)
        if self.parallel and self.mistake != "unsummed":
            h = Summed.apply(h)
        out: Tensor = self.out(x + h)
        return out


def by_hand(mesh: DeviceMesh | None, mistake: str = "") -> nn.Module:
    torch.manual_seed(5)
    return ByHand(mesh, mistake)


# --- all twins of planted.py in one model ------------------------------------------------------------------


class Each(nn.Module):
    def __init__(self, models: dict[str, nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleDict(models)

    def forward(self, causal: bool, **given: Any) -> dict[str, Tensor]:
        outputs = {}
        for name, model in self.each.items():
            own = given[name]
            args, kwargs = (own, {}) if isinstance(own, tuple) else ((), dict(own))
            if "causal" in kwargs:
                kwargs["causal"] = causal
            outputs[name] = model(*args, **kwargs)
        return outputs


def build_twins(mesh: DeviceMesh | None) -> nn.Module:
    planted = _planted()
    return Each({name: getattr(planted, f"build_{name}_healthy")(mesh) for name in planted.NAMES})


def inputs_twins(mesh: DeviceMesh | None) -> dict[str, Any]:
    planted = _planted()
    given = {name: getattr(planted, f"inputs_{name}")(mesh) for name in planted.NAMES}
    return {"causal": False, **given}


def _planted() -> Any:
    folder = str(Path(__file__).parents[1] / "models")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import planted

    return planted


# --- no end ------------------------------------------------------------------------------------------------


class Stop(nn.Module):
    def __init__(self, mesh: DeviceMesh | None, how: str) -> None:
        super().__init__()
        self.rank, self.how = 0 if mesh is None else mesh.get_local_rank(), how
        self.parallel = mesh is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.rank == 1 and self.how == "raises":
            raise ValueError("rank 1 does not like this")
        if self.parallel and self.training and self.how == "raises_in_training":
            raise ValueError("no rank likes this")
        if self.rank == 1 and self.how == "dies":
            os._exit(3)
        if self.rank == 1 and self.how == "hangs":
            time.sleep(600)
        if self.parallel:
            dist.all_reduce(x.detach().clone())
        return x


class Ends(nn.Module):
    def __init__(self, mesh: DeviceMesh | None, how: str) -> None:
        super().__init__()
        self.first, self.stop = nn.Linear(WIDTH, WIDTH), Stop(mesh, how)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.stop(self.first(x))
        return out


Build = Callable[[DeviceMesh | None], nn.Module]

build_mask: Build = partial(attention, mistake="mask")
build_causal: Build = partial(attention, mistake="causal")
build_fused_gqa: Build = partial(fused, planted=True)
build_unsummed: Build = partial(by_hand, mistake="unsummed")
build_uncopied: Build = partial(by_hand, mistake="uncopied")
build_doubled: Build = partial(by_hand, mistake="doubled")
build_healthy_fused_gqa: Build = partial(fused, planted=False)
build_healthy_by_hand: Build = by_hand
build_healthy_data_parallel: Build = data_parallel
build_raises: Build = partial(Ends, how="raises")
build_raises_in_training: Build = partial(Ends, how="raises_in_training")
build_dies: Build = partial(Ends, how="dies")
build_hangs: Build = partial(Ends, how="hangs")


# --- what the user's functions do wrong --------------------------------------------------------------------


def inputs_of_no_seed(mesh: DeviceMesh | None) -> tuple[Tensor, ...]:
    return (
        torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(os.getpid())),
    )


def inputs_that_raise(mesh: DeviceMesh | None) -> tuple[Tensor, ...]:
    raise KeyError("no input today")


def build_that_raises(mesh: DeviceMesh | None) -> nn.Module:
    raise KeyError("no model today")


def build_needs_mesh(mesh: DeviceMesh) -> nn.Module:
    """Has no unsharded form."""
    assert mesh.size()
    return attention(mesh)


def build_other_weights(mesh: DeviceMesh | None) -> nn.Module:
    """Each rank draws weights of its own."""
    torch.manual_seed(5 if mesh is None else 50 + mesh.get_local_rank())
    return ByHand(mesh, "")
