"""The attention kernel that kernel and process mutants are made of: right, and easy to break in one place.

`Kernel` is a small flash-style attention (backward recomputes from the log-sum-exp). A mutant is a
subclass that overrides the one method which carries its mistake; its twin overrides nothing, or the same
method rightly. `operator()` puts a kernel behind a custom op of its own, with strategies that are right
for it: whatever goes wrong is the kernel's. `aten_operator()` puts functions in the place of ATen's CPU
kernels, in force inside the operator's own calls only.

Real kernels are right on the shapes they were tested with. So is every mutant here on whole tensors: its
mistake depends on what a shard changes (local sizes, local indices, the path chosen by size, the rank).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from attncheck.probing import (
    BATCH,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    KV_SEQUENCE,
    OTHER,
    SEQUENCE,
    Operator,
    Setting,
    Tensor,
    Tensors,
    fixed,
)

NAMESPACE = "planted_kernel"
Q_DIMS = (BATCH, HEADS, SEQUENCE, HEAD_DIM)
KV_DIMS = (BATCH, KV_HEADS, KV_SEQUENCE, HEAD_DIM)

# All sizes differ, and so do their halves; keys are a square's where a mask wants one.
SIZES = {"batch": 3, "heads": 4, "kv_heads": 4, "sequence": 12, "kv_sequence": 20, "head_dim": 16}
# Below this many (batch, head) pairs a kernel takes the path that splits the keys, as real ones do to
# fill the device: 12 on whole tensors, 6 on two ranks.
FULL_DEVICE = 8

# What every op takes after its tensors.
FLAGS = (
    "float scale, bool causal, int window, float softcap, float dropout, int group_size, str group"
)
TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? rows, Tensor? heads"


@dataclass(frozen=True)
class Call:
    """What a kernel is told besides q, k, v (batch, heads, sequence, head_dim).

    `rows` (sequence,) and `heads` (heads,): the global index of each local query and query head, where
    the caller gives them. `window`: how far back a query sees, -1 for all. `group_size`: query heads a kv
    head, 0 for local heads over local kv heads. `group`: name of the process group, '' on whole tensors.
    """

    rows: Any
    heads: Any
    scale: float
    causal: bool
    window: int
    softcap: float
    dropout: float
    group_size: int
    group: str


def rank(group: str = "") -> int:
    """This process's rank in the group; in the world without one."""
    if not group:
        return int(os.environ["RANK"])
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _resolve_process_group

    return dist.get_rank(_resolve_process_group(group))


def splits_keys(q: Any) -> bool:
    """Whether the kernel is short of work, and takes the path that splits the keys."""
    return bool(q.shape[0] * q.shape[1] < FULL_DEVICE)


def all_reduce(x: Any, group: str) -> Any:
    import torch.distributed._functional_collectives as funcol

    return funcol.wait_tensor(funcol.all_reduce(x.contiguous(), "sum", group))


class Kernel:
    """Attention as it should be. Each method is a place for one mistake."""

    def forward(self, q: Any, k: Any, v: Any, c: Call) -> tuple[Any, Any]:
        """(out in the dtype of q, lse float32)."""
        import torch

        q32, k32, v32 = q.float(), self.expand(k, q, c).float(), self.expand(v, q, c).float()
        value, visible, _ = self.scores(q32, k32, v32, c)
        lse = torch.logsumexp(value, -1)
        some = visible.any(-1).expand(lse.shape)
        lse = torch.where(some, lse, torch.inf)
        p = torch.exp(value - lse[..., None]).masked_fill(~visible, 0.0)
        out = self.weighted_sum(self.drop(p, c, "forward"), v32, q)
        return self.store(out, some, q), self.store_lse(lse, some, q)

    def backward(
        self, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, c: Call
    ) -> tuple[Any, Any, Any]:
        import torch

        q32, k32, v32 = q.float(), self.expand(k, q, c).float(), self.expand(v, q, c).float()
        dout32 = self.read_gradient(dout.float(), q)
        value, visible, slope = self.scores(q32, k32, v32, c, backward=True)
        p = torch.exp(value - self.read_lse(lse, q)[..., None]).masked_fill(~visible, 0.0)
        p = self.backward_probabilities(p, visible, q)
        dp = self.drop(self.reduce(dout32 @ v32.transpose(-1, -2), c), c, "backward")
        row_dot = self.reduce((dout32 * out.float()).sum(-1, keepdim=True), c)
        ds = p * (dp - row_dot) * slope * self.scale(q, v, c, backward=True)
        dq = ds @ k32
        dk = self.sum_over_rows(ds, q32, q)
        dv = self.drop(p, c, "backward").transpose(-1, -2) @ dout32
        return self.store_gradients(
            dq, self.group_sum(dk, k, q, c), self.group_sum(dv, v, q, c), q, k
        )

    # --- what the mistakes are made in ---

    def scale(self, q: Any, v: Any, c: Call, backward: bool = False) -> float:
        return c.scale

    def rows(self, q: Any, c: Call, backward: bool = False) -> Any:
        """The position of each query, (sequence,)."""
        import torch

        return torch.arange(q.shape[2]) if c.rows is None else c.rows

    def heads(self, q: Any, c: Call, backward: bool = False) -> Any:
        """The index of each query head among all heads, (heads,)."""
        import torch

        return torch.arange(q.shape[1]) if c.heads is None else c.heads

    def kv_heads(self, q: Any, k: Any, c: Call, backward: bool = False) -> Any:
        """Which of the local kv heads each query head reads, (heads,)."""
        import torch

        if c.group_size:  # all kv heads are here, and not all query heads
            return self.heads(q, c) // c.group_size
        return torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])

    def expand(self, k: Any, q: Any, c: Call) -> Any:
        return k[:, self.kv_heads(q, k, c)]

    def reduce(self, x: Any, c: Call) -> Any:
        """A sum over head_dim, where head_dim is sharded: see `HeadDimSharded`."""
        return x

    def softcap(self, value: Any, q: Any, c: Call, backward: bool) -> tuple[Any, Any]:
        """(scores, their derivative)."""
        import torch

        if c.softcap == 0:
            return value, 1.0
        capped = torch.tanh(value / c.softcap)
        return capped * c.softcap, 1 - capped.square()

    def slopes(self, q: Any, c: Call, backward: bool) -> Any:
        """ALiBi slopes, (heads,), where the operator has them: see `Alibi`."""
        return None

    def visible(self, i: Any, j: Any, q: Any, c: Call, backward: bool) -> Any:
        """(sequence, kv_sequence) from the positions i of queries and j of keys."""
        import torch

        seen = torch.ones(len(i), len(j), dtype=torch.bool)
        if c.causal:
            seen = seen & (j[None, :] <= i[:, None])
        if c.window >= 0:
            seen = seen & (j[None, :] >= i[:, None] - c.window)
        return seen

    def scores(
        self, q: Any, k: Any, v: Any, c: Call, backward: bool = False
    ) -> tuple[Any, Any, Any]:
        """(scores, -inf where hidden; visible; d scores / d (scale * q k^T))."""
        import torch

        value = self.reduce(q @ k.transpose(-1, -2), c) * self.scale(q, v, c, backward)
        value, slope = self.softcap(value, q, c, backward)
        i, j = self.rows(q, c, backward), torch.arange(k.shape[2])
        slopes = self.slopes(q, c, backward)
        if slopes is not None:
            value = value - slopes[:, None, None] * (i[:, None] - j[None, :]).abs()
        visible = self.visible(i, j, q, c, backward).expand(value.shape)
        return value.masked_fill(~visible, -torch.inf), visible, slope

    def seed(self, c: Call, phase: str) -> int:
        """Of the dropout mask: one for forward and backward, another on every rank."""
        import torch

        return torch.initial_seed() + (rank(c.group) if c.group else 0)

    def drop(self, p: Any, c: Call, phase: str) -> Any:
        import torch

        if c.dropout == 0:
            return p
        random = torch.Generator().manual_seed(self.seed(c, phase))
        keep = torch.rand(p.shape, generator=random) >= c.dropout
        return self.rescale(p * keep, c)

    def rescale(self, p: Any, c: Call) -> Any:
        return p / (1 - c.dropout)

    def weighted_sum(self, p: Any, v: Any, q: Any) -> Any:
        return p @ v

    def store(self, out: Any, some: Any, q: Any) -> Any:
        """`some` (batch, heads, sequence): whether the row sees any key."""
        return out.to(q.dtype)

    def store_lse(self, lse: Any, some: Any, q: Any) -> Any:
        return lse

    def read_lse(self, lse: Any, q: Any) -> Any:
        return lse

    def read_gradient(self, dout: Any, q: Any) -> Any:
        return dout

    def backward_probabilities(self, p: Any, visible: Any, q: Any) -> Any:
        return p

    def sum_over_rows(self, ds: Any, q32: Any, q: Any) -> Any:
        return ds.transpose(-1, -2) @ q32

    def group_sum(self, x: Any, k: Any, q: Any, c: Call) -> Any:
        """(batch, heads, ...) to (batch, kv_heads, ...): query heads of a group add up."""
        import torch

        whole = torch.zeros(x.shape[0], k.shape[1], *x.shape[2:])
        return whole.index_add_(1, self.kv_heads(q, k, c, backward=True), x)

    def store_gradients(self, dq: Any, dk: Any, dv: Any, q: Any, k: Any) -> tuple[Any, Any, Any]:
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


class HeadDimSharded(Kernel):
    """For q, k and v sharded over head_dim: the scores are added up over the ranks inside the kernel."""

    def reduce(self, x: Any, c: Call) -> Any:
        return all_reduce(x, c.group) if c.group else x


class Alibi(Kernel):
    """With ALiBi: the slope of head h is 2 ** -(h + 1)."""

    def slopes(self, q: Any, c: Call, backward: bool) -> Any:
        return 2.0 ** -(self.heads(q, c, backward) + 1.0)


# --- custom ops ------------------------------------------------------------------------------------


def rows_of(kind: str, backward: bool) -> list[tuple[list[Any], list[Any]]]:
    """What an op accepts, one mesh axis at a time: (outputs, inputs); the same rows for every kernel.

    `kind` `plain`: replicated, batch, heads, and queries sharded with keys and values whole. `kv_whole`:
    keys and values whole beside sharded query heads. `value_dim`: the head_dim of v. `head_dim`: that of
    all three, for kernels that add up over the ranks.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    r, p = Replicate(), Partial()
    batch, heads, seq, dim = (Shard(i) for i in range(4))
    # q, k, v, rows, heads; out, lse; what becomes of dk and dv where k and v are whole.
    found: list[tuple[Any, ...]] = [
        ((r, r, r, r, r), (r, r), None),
        ((batch, batch, batch, r, r), (batch, batch), None),
    ]
    if kind == "kv_whole":
        found.append(((heads, r, r, r, batch), (heads, heads), (heads, p, p)))
    else:
        found.append(((heads, heads, heads, r, batch), (heads, heads), None))
        found.append(((seq, r, r, batch, r), (seq, seq), (seq, p, p)))
    if kind == "value_dim":
        # q and k are whole, dp is a sum over the dims of v: dq and dk are partial.
        found.append(((r, r, dim, r, r), (dim, r), (p, p, dim)))
    if kind == "head_dim":
        found.append(((dim, dim, dim, r, r), (dim, r), None))
    if not backward:
        return [(list(outputs), list(inputs)) for inputs, outputs, _ in found]
    return [
        (list(grads or inputs[:3]), [outputs[0], *inputs[:3], *outputs, *inputs[3:]])
        for inputs, outputs, grads in found
    ]


def strategy(kind: str, backward: bool) -> Callable[..., Any]:
    """The rows, with None where an optional tensor is not given and for every flag."""

    def choose(*args: Any) -> Any:
        tensors = 8 if backward else 5
        given = [a is not None for a in args[:tensors]] + [False] * (len(args) - tensors)
        return [
            (
                outputs,
                [p if ok else None for p, ok in zip([*inputs, *[None] * 9], given, strict=False)],
            )
            for outputs, inputs in rows_of(kind, backward)
        ]

    return choose


@cache
def op(name: str, kernel: Kernel, kind: str = "plain") -> Any:
    """`planted_kernel::<name>` and `<name>_backward` with their strategies; registered once a process."""
    import torch
    from torch.distributed.tensor.experimental import register_sharding

    define = torch.library.custom_op

    @define(
        f"{NAMESPACE}::{name}",
        mutates_args=(),
        schema=f"({TENSORS}, {FLAGS}) -> (Tensor, Tensor)",
    )
    def forward(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        out, lse = kernel.forward(q, k, v, Call(*rest))
        return out.contiguous(), lse.contiguous()

    @define(
        f"{NAMESPACE}::{name}_backward",
        mutates_args=(),
        schema=f"(Tensor dout, {TENSORS.replace('v,', 'v, Tensor out, Tensor lse,')}, {FLAGS})"
        " -> (Tensor, Tensor, Tensor)",
    )
    def backward(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rest: Any) -> Any:
        grads = kernel.backward(dout, q, k, v, out, lse, Call(*rest))
        return tuple(grad.contiguous() for grad in grads)

    forward.register_fake(
        lambda q, k, v, *rest: (
            q.new_empty(*q.shape[:3], v.shape[3]),
            q.new_empty(q.shape[:3], dtype=torch.float32),
        )
    )
    backward.register_fake(
        lambda dout, q, k, v, *rest: (
            torch.empty(q.shape, dtype=q.dtype, device=q.device),
            torch.empty(k.shape, dtype=q.dtype, device=q.device),
            torch.empty(v.shape, dtype=q.dtype, device=q.device),
        )
    )

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, rows, heads, *ctx.flags = inputs
        ctx.save_for_backward(q, k, v, *output, rows, heads)
        ctx.set_materialize_grads(False)

    def run_backward(ctx: Any, dout: Any, dlse: Any) -> Any:
        return (*backward(dout, *ctx.saved_tensors, *ctx.flags), *[None] * (2 + len(ctx.flags)))

    forward.register_autograd(run_backward, setup_context=setup_context)
    ops = getattr(torch.ops, NAMESPACE)
    for suffix, is_backward in (("", False), ("_backward", True)):
        overload = getattr(ops, name + suffix).default
        register_sharding(overload)(strategy(kind, is_backward))
    return forward


def op_names(name: str) -> tuple[str, str]:
    return f"{NAMESPACE}.{name}.default", f"{NAMESPACE}.{name}_backward.default"


def tensors(value_dim_only: bool, setting: Setting) -> tuple[Tensor, ...]:
    """q, k, v and, where the setting says so, the global indices of queries (`rows`) and heads (`heads`).

    `value_dim_only`: v alone has a head_dim that is sharded.
    """
    q_dims = (*Q_DIMS[:3], OTHER) if value_dim_only else Q_DIMS
    kv_dims = (*KV_DIMS[:3], OTHER) if value_dim_only else KV_DIMS
    sizes, kv_sizes = (tuple(setting[r] for r in dims) for dims in (Q_DIMS, KV_DIMS))
    wrap = "replicate" if setting.get("kv_whole") else "pattern"
    drop = setting.dropout > 0  # see runner.oracle.judge_dropout
    out = [
        Tensor("q", q_dims, sizes, requires_grad=not drop, fill="zeros" if drop else "normal"),
        Tensor("k", kv_dims, kv_sizes, requires_grad=not drop, wrap=wrap),
        Tensor("v", KV_DIMS, kv_sizes, fill="eye" if drop else "normal", wrap=wrap),
    ]
    for name, role in (("rows", SEQUENCE), ("heads", HEADS)):
        if setting.get(name):
            indices = tuple(range(setting[role]))
            out.append(fixed(name, indices, dims=(role,), wrap="pattern", dtype="int64"))
    return tuple(out)


def group_of(q: Any, axis: int = -1) -> str:
    """The name of the process group of a DTensor's mesh axis; '' for a plain tensor."""
    from torch.distributed.tensor import DTensor

    if not isinstance(q, DTensor):
        return ""
    return str(q.device_mesh.get_group(q.device_mesh.ndim + axis).group_name)


def call_op(name: str, kernel: Kernel, kind: str, setting: Setting, t: Tensors) -> Any:
    out, lse = op(name, kernel, kind)(
        t["q"],
        t["k"],
        t["v"],
        t.get("rows"),
        t.get("heads"),
        setting["head_dim"] ** -0.5,
        bool(setting.get("causal")),
        setting.get("window", -1),
        float(setting.get("softcap", 0.0)),
        setting.dropout,
        setting["heads"] // setting["kv_heads"] if setting.get("kv_whole") else 0,
        group_of(t["q"]),
    )
    return {"out": out, "lse": lse}


def reference(alibi: bool, setting: Setting, t: Tensors) -> Any:
    import torch

    from attncheck.runner.reference import attention_lse

    q, k, v = t["q"], t["k"], t["v"]
    i, j = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    bias = None
    if alibi:
        slopes = 2.0 ** -(torch.arange(q.shape[1], dtype=q.dtype) + 1)
        bias = -slopes[:, None, None] * (i[:, None] - j[None, :]).abs()
    visible = torch.ones(len(i), len(j), dtype=torch.bool)
    if setting.get("window", -1) >= 0:
        visible = j[None, :] >= i[:, None] - setting.get("window")
    out, lse = attention_lse(
        q,
        k,
        v,
        causal="top_left" if setting.get("causal") else None,
        softcap=float(setting.get("softcap", 0.0)),
        bool_mask=visible,
        bias=bias,
        empty_lse=torch.inf,
    )
    return {"out": out, "lse": lse}


def setting(
    name: str,
    placement: str,
    sizes: Mapping[str, int] | None = None,
    dtype: str = "float32",
    dropout: float = 0.0,
    **options: Any,
) -> Setting:
    """A setting that is run with one placement."""
    merged = {**SIZES, **(sizes or {})}
    return Setting(
        name, merged, dtype, options, level="default", placements=(placement,), dropout=dropout
    )


def operator(
    name: str,
    kernel: Kernel,
    where: Setting,
    kind: str = "plain",
    call: Callable[[Setting, Tensors], Any] | None = None,
    **more: Any,
) -> Operator:
    """The custom op of a kernel in one setting. `call` where something goes on around the op."""
    return Operator(
        name=f"kernel.{name}",
        tensors=partial(tensors, kind == "value_dim"),
        call=call or partial(call_op, name, kernel, kind),
        reference=partial(reference, isinstance(kernel, Alibi)),
        settings=(where,),
        output_dims=Q_DIMS,
        kernel_ops=op_names(name),
        **more,
    )


# --- ATen ops --------------------------------------------------------------------------------------


def builtin_probe(name: str) -> Any:
    """The module of a built-in probe, of which operators and references are taken."""
    known = f"planted_builtin_{name}"
    if known not in sys.modules:
        path = Path(__file__).resolve().parents[2] / "probes" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(known, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[known] = module
        spec.loader.exec_module(module)
    return sys.modules[known]


@contextlib.contextmanager
def kernels_replaced(kernels: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """`kernels` in the place of ATen's CPU kernels of these names. What was there comes back."""
    import warnings

    import torch

    library = torch.library.Library("aten", "IMPL", "CPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is overridden is the point
        for name, kernel in kernels.items():
            library.impl(name, kernel, allow_override=True)
    try:
        yield
    finally:
        library._destroy()
