"""Planted bugs in the sharding strategies of ATen ops: PyTorch's own attention ops, and what composite
attention is made of.

A mutated strategy takes the place of PyTorch's (or of none) while its own case runs, and no longer: the
operator's `around` registers it and takes it out again. Twins get the right one in the same way. The ops of
CUDA run on attncheck's CPU stand-ins.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # loaded by path, here and in the workers
import planted_ops as po
from catalogue import Mutant, probe
from planted_ops import Row, Table, edited, unless_1

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
)

SIZES = {"batch": 6, "heads": 4, "kv_heads": 4, "sequence": 10, "kv_sequence": 14, "head_dim": 8}
WRONG, GRADIENT, DIFFER, SHAPE = "ATN201", "ATN202", "ATN204", "ATN206"
COST, RAISES = "ATN301", "ATN504"


def setting(pattern: str, sizes: Mapping[str, int] = {}, **options: Any) -> Setting:
    return Setting(
        "plain", {**SIZES, **sizes}, options=options, level="quick", placements=(pattern,)
    )


# --- strategies of the attention ops ----------------------------------------------------------------


# A strategy is not told of arguments that have their default value: the dispatcher leaves them out.
def forward_rows(dims: tuple[int, int], takes_query: bool, t: Mapping[str, Any]) -> dict[str, Row]:
    """`dims`: of the heads and of the sequence in q; the log-sum-exp is (batch, heads, sequence) always."""
    heads, sequence = dims
    rows: dict[str, Row] = {
        "replicate": ({}, {}),
        "batch": (
            {"out": 0, "lse": 0},
            {"query": 0, "key": 0, "value": 0, "attn_bias": unless_1(0)},
        ),
    }
    if t["key"].shape[heads] % t["query"].mesh.size() == 0:
        rows["heads"] = (
            {"out": heads, "lse": 1},
            {"query": heads, "key": heads, "value": heads, "attn_bias": unless_1(1)},
        )
    if takes_query and not t.get("is_causal"):
        rows["query"] = ({"out": sequence, "lse": 2}, {"query": sequence})
    return rows


def backward_rows(dims: tuple[int, int], takes_query: bool, t: Mapping[str, Any]) -> dict[str, Row]:
    heads, sequence = dims
    dout = "grad_out_" if "grad_out_" in t else "grad_out"

    def along(dim: int, lse: int, kv: bool) -> dict[str, Any]:
        ins: dict[str, Any] = {dout: dim, "query": dim, "out": dim, "logsumexp": lse}
        return {**ins, "key": dim, "value": dim} if kv else ins

    bias = t.get("attn_bias")
    # With the batch sharded, the gradient of a bias that broadcasts over it is a sum over the ranks.
    shared = bias is not None and bias.shape[0] == 1
    dbias = {"dbias": "P" if shared else 0} if bias is not None else {}
    rows: dict[str, Row] = {
        "replicate": ({}, {}),
        "batch": (
            {"dq": 0, "dk": 0, "dv": 0, **dbias},
            {**along(0, 0, True), "attn_bias": unless_1(0)},
        ),
    }
    if t["key"].shape[heads] % t["query"].mesh.size() == 0:
        rows["heads"] = (
            {"dq": heads, "dk": heads, "dv": heads, "dbias": 1},
            {**along(heads, 1, True), "attn_bias": unless_1(1)},
        )
    if takes_query and not t.get("is_causal"):
        rows["query"] = ({"dq": sequence, "dk": "P", "dv": "P"}, along(sequence, 2, False))
    return rows


@dataclass(frozen=True)
class Kernel:
    """An attention op of PyTorch: what it returns ('' is no tensor, or none that is ever defined), where
    its dims are, and from which argument on its flags come."""

    forward: str
    outputs: tuple[str, ...]
    grads: tuple[str, ...]
    static: tuple[int, int]
    call: Callable[[Any, Setting, Tensors], Any]
    dims: tuple[int, int] = (1, 2)
    takes_query: bool = True

    @property
    def ops(self) -> tuple[str, str]:
        backward = self.forward.replace("_forward", "_backward")
        if backward == self.forward:
            backward = f"{self.forward}_backward"
        return f"aten.{self.forward}.default", f"aten.{backward}.default"

    @property
    def tables(self) -> tuple[Table, Table]:
        given = self.dims, self.takes_query
        return partial(forward_rows, *given), partial(backward_rows, *given)


def _cpu(op: Any, s: Setting, t: Tensors) -> Any:
    return op(t["q"], t["k"], t["v"], 0.0, bool(s.get("causal")))


def _flash(op: Any, s: Setting, t: Tensors) -> Any:
    return op(t["q"], t["k"], t["v"], 0.0, bool(s.get("causal")), False)


def _biased(op: Any, s: Setting, t: Tensors) -> Any:
    return op(t["q"], t["k"], t["v"], t.get("bias"), True, 0.0, bool(s.get("causal")))


def _raw_flash(op: Any, s: Setting, t: Tensors) -> Any:
    lengths = s["sequence"], s["kv_sequence"]
    return op(t["q"], t["k"], t["v"], None, None, *lengths, 0.0, bool(s.get("causal")), False)


CPU = Kernel(
    "_scaled_dot_product_flash_attention_for_cpu", ("out", "lse"), ("dq", "dk", "dv"), (3, 6), _cpu
)
FLASH = Kernel(
    "_scaled_dot_product_flash_attention",
    ("out", "lse", "", "", "", "", "rng", "unused", "debug"),
    ("dq", "dk", "dv"),
    (3, 8),
    _flash,
)
EFFICIENT = Kernel(
    "_scaled_dot_product_efficient_attention",
    ("out", "lse", "seed", "offset"),
    ("dq", "dk", "dv", "dbias"),
    (4, 9),
    _biased,
    takes_query=False,  # its log-sum-exp is padded, and cannot be put together from shards
)
CUDNN = Kernel(
    "_scaled_dot_product_cudnn_attention",
    ("out", "lse", "", "", "", "", "seed", "offset", "debug"),
    ("dq", "dk", "dv"),
    (4, 11),
    _biased,
)
RAW_FLASH = Kernel(
    "_flash_attention_forward",
    ("out", "lse", "rng", "unused", "debug"),
    ("dq", "dk", "dv"),
    (5, 8),
    _raw_flash,
    dims=(2, 1),
)


# --- what they are called with ----------------------------------------------------------------------


def attention_tensors(kernel: Kernel, s: Setting) -> tuple[Tensor, ...]:
    """Options: `grads`; `bias`, the dims it broadcasts in; `learned`: the bias has a gradient."""
    grads = bool(s.get("grads"))
    q_dims, kv_dims = [BATCH, HEADS, SEQUENCE, HEAD_DIM], [BATCH, KV_HEADS, KV_SEQUENCE, HEAD_DIM]
    if kernel.dims == (2, 1):
        for dims in (q_dims, kv_dims):
            dims[1], dims[2] = dims[2], dims[1]
    out = [Tensor("q", tuple(q_dims), tuple(s[r] for r in q_dims), grads)]
    out += [Tensor(n, tuple(kv_dims), tuple(s[r] for r in kv_dims), grads) for n in "kv"]
    if "bias" in s.options:
        roles = (BATCH, HEADS, SEQUENCE, KV_SEQUENCE)
        dims = tuple(OTHER if at in s.options["bias"] else r for at, r in enumerate(roles))
        sizes = tuple(1 if r == OTHER else s[r] for r in dims)
        out.append(Tensor("bias", dims, sizes, bool(s.get("learned")), fill="float_mask"))
    return tuple(out)


def attention_call(kernel: Kernel, s: Setting, t: Tensors) -> Any:
    import torch

    op = getattr(torch.ops.aten, kernel.forward).default
    if s.get("two_layers"):
        causal = Setting("causal", s.sizes, options={"causal": True})
        plain = Setting("plain", s.sizes)
        return kernel.call(op, plain, t)[0] + kernel.call(op, causal, t)[0]
    out, lse = kernel.call(op, s, t)[:2]
    return {"out": out, "lse": lse} if s.get("lse") else out


def attention_reference(kernel: Kernel, s: Setting, t: Tensors) -> Any:
    from attncheck.runner.reference import attention_lse

    # Top left on the CPU, bottom right in flash; with equal lengths they are one.
    kind = "top_left" if kernel is CPU else "bottom_right"

    def layer(causal: bool) -> Any:
        return attention_lse(
            t["q"], t["k"], t["v"], layout="bhsd" if kernel.dims == (1, 2) else "bshd",
            causal=kind if causal else None, bias=t.get("bias"),
        )  # fmt: skip

    if s.get("two_layers"):
        return layer(False)[0] + layer(True)[0]
    out, lse = layer(bool(s.get("causal")))
    return (
        {"out": out, "lse": lse.unsqueeze(-1) if kernel is CUDNN else lse} if s.get("lse") else out
    )


def attention(
    name: str,
    mistake: str,
    rules: tuple[str, ...],
    kernel: Kernel,
    s: Setting,
    *,
    forward: tuple[Any, ...] = (),
    backward: tuple[Any, ...] = (),
    unkeyed: bool = False,
    mesh: str = "2",
    gathers: bool = False,
    blamed: str = "",
) -> Mutant:
    """`forward`, `backward`: what is edited in their tables (row, outputs, inputs). `unkeyed`: the flags are
    no part of the cache's key. `gathers`: the right strategy has no way without communication."""
    tables = kernel.tables
    wrong = [
        edited(table, *edit) if edit else table
        for table, edit in zip(tables, (forward, backward), strict=True)
    ]

    def strategies(which: Sequence[Table], static: tuple[int, int]) -> dict[str, Any]:
        outputs = kernel.outputs, kernel.grads
        return {op: made for op, *made in zip(kernel.ops, outputs, which, static, strict=True)}

    def operator(suffix: str, given: Mapping[str, Any]) -> Operator:
        return Operator(
            name=f"mutants.{name}{suffix}",
            tensors=partial(attention_tensors, kernel),
            call=partial(attention_call, kernel),
            reference=partial(attention_reference, kernel),
            settings=(s,),
            kernel_ops=kernel.ops,
            standins=() if kernel is CPU else ("aten_attention",),
            communicates=gathers,
            around=partial(po.instead, given),
        )

    grads = bool(s.get("grads"))
    fault = blamed or ("backward" if grads else "forward")
    return Mutant(
        name=name,
        family="strategy",
        layer="aten",
        mistake=mistake,
        rules=rules,
        kernel_op=kernel.ops[fault == "backward"],
        operator=operator("", strategies(wrong, (100, 100) if unkeyed else kernel.static)),
        twin=operator("_twin", strategies(tables, kernel.static)),
        direction="backward" if grads else "forward",
        mesh=mesh,
    )


# --- composite attention: (heads, sequence, head_dim), through bmm and softmax ------------------------


def bmm(t: Mapping[str, Any]) -> dict[str, Row]:
    return {
        "replicate": ({}, {}),
        "batch": ({"out": 0}, {"self": 0, "mat2": 0}),
        "rows": ({"out": 1}, {"self": 1}),
        "columns": ({"out": 2}, {"mat2": 2}),
        "contraction": ({"out": "P"}, {"self": 2, "mat2": 1}),
    }


def softmax(t: Mapping[str, Any]) -> dict[str, Row]:
    dims = len(t["self"].shape)
    kept = [d for d in range(dims) if d != t["dim"] % dims]
    return {"replicate": ({}, {}), **{str(d): ({"out": d}, {"self": d}) for d in kept}}


def softmax_backward(t: Mapping[str, Any]) -> dict[str, Row]:
    dims = len(t["output"].shape)
    kept = [d for d in range(dims) if d != t["dim"] % dims]
    rows: dict[str, Row] = {str(d): ({"out": d}, {"grad_output": d, "output": d}) for d in kept}
    return {"replicate": ({}, {}), **rows}


def transpose(t: Mapping[str, Any]) -> dict[str, Row]:
    dims = len(t["self"].shape)
    a, b = t["dim0"] % dims, t["dim1"] % dims
    moved = {a: b, b: a}
    rows: dict[str, Row] = {str(d): ({"out": moved.get(d, d)}, {"self": d}) for d in range(dims)}
    return {"replicate": ({}, {}), "partial": ({"out": "P"}, {"self": "P"}), **rows}


def pointwise(t: Mapping[str, Any]) -> dict[str, Row]:
    rows: dict[str, Row] = {str(d): ({"out": d}, {"self": d}) for d in range(len(t["self"].shape))}
    return {"replicate": ({}, {}), **rows}


def addmm(t: Mapping[str, Any]) -> dict[str, Row]:
    """bias (model,), x (tokens, hidden) and w (hidden, model)."""
    return {
        "replicate": ({}, {}),
        "rows": ({"out": 0}, {"mat1": 0}),
        "columns": ({"out": 1}, {"self": 0, "mat2": 1}),
        "contraction": ({"out": "P"}, {"self": "P", "mat1": 1, "mat2": 0}),
    }


TABLES: Mapping[str, tuple[Table, int]] = {
    "aten.bmm.default": (bmm, 2),
    "aten._softmax.default": (softmax, 1),
    "aten._softmax_backward_data.default": (softmax_backward, 2),
    "aten.transpose.int": (transpose, 1),
    "aten.tanh.default": (pointwise, 1),
    "aten.addmm.default": (addmm, 3),
}


def composite_tensors(s: Setting) -> tuple[Tensor, ...]:
    """Options: `grads`; `whole_q`: no pattern shards its sequence; `heads_second`: (sequence, heads,
    head_dim), as packed tokens are."""
    grads = bool(s.get("grads"))
    q_dims = (HEADS, OTHER if s.get("whole_q") else SEQUENCE, HEAD_DIM)
    q_sizes = (s["heads"], s["sequence"], s["head_dim"])
    kv_dims, kv_sizes = (
        (HEADS, KV_SEQUENCE, HEAD_DIM),
        (s["heads"], s["kv_sequence"], s["head_dim"]),
    )
    out = []
    for name, dims, sizes in (
        ("q", q_dims, q_sizes),
        ("k", kv_dims, kv_sizes),
        ("v", kv_dims, kv_sizes),
    ):
        if s.get("heads_second"):
            dims, sizes = (dims[1], dims[0], dims[2]), (sizes[1], sizes[0], sizes[2])
        out.append(Tensor(name, dims, sizes, grads))
    return tuple(out)


def composite_call(s: Setting, t: Tensors) -> Any:
    import torch

    q, k, v = t["q"], t["k"], t["v"]
    if s.get("heads_second"):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)) * s["head_dim"] ** -0.5
    if s.get("softcap"):
        scores = torch.tanh(scores)
    return torch.bmm(torch.softmax(scores, -1), v)


def composite_reference(s: Setting, t: Tensors) -> Any:
    from attncheck.runner.reference import attention as reference

    q, k, v = (x.transpose(0, 1) if s.get("heads_second") else x for x in t.values())
    softcap = 1.0 if s.get("softcap") else 0.0
    return reference(q[None], k[None], v[None], layout="bhsd", softcap=softcap)[0]


MODEL = 12


def projection_tensors(s: Setting) -> tuple[Tensor, ...]:
    """What attention gave, its heads merged, and the output projection with its bias."""
    hidden = s["heads"] * s["head_dim"]
    return (
        Tensor("x", (SEQUENCE, HEADS), (s["sequence"], hidden), requires_grad=False),
        Tensor("w", (HEADS, OTHER), (hidden, MODEL), requires_grad=False),
        Tensor("b", (OTHER,), (MODEL,), requires_grad=False),
    )


def projection_call(s: Setting, t: Tensors) -> Any:
    import torch

    return torch.addmm(t["b"], t["x"], t["w"])


def composite(
    name: str,
    mistake: str,
    rules: tuple[str, ...],
    op: str,
    s: Setting,
    edit: tuple[Any, ...] | Table,
    *,
    gathers: bool = False,
    projection: bool = False,
) -> Mutant:
    right, static = TABLES[op]
    wrong = edited(right, *edit) if isinstance(edit, tuple) else edit

    def operator(suffix: str, table: Table) -> Operator:
        ops = ("aten.addmm.default",) if projection else tuple(TABLES)[:-1]
        return Operator(
            name=f"mutants.{name}{suffix}",
            tensors=projection_tensors if projection else composite_tensors,
            call=projection_call if projection else composite_call,
            reference=projection_call if projection else composite_reference,
            settings=(s,),
            kernel_ops=ops,
            communicates=gathers,
            around=partial(po.instead, {op: (("out",), table, static)}),
        )

    return Mutant(
        name=name,
        family="strategy",
        layer="aten",
        mistake=mistake,
        rules=rules,
        kernel_op=op,
        operator=operator("", wrong),
        twin=operator("_twin", right),
        direction="backward" if s.get("grads") else "forward",
    )


def transpose_forgets(t: Mapping[str, Any]) -> dict[str, Row]:
    rows: dict[str, Row] = {str(d): ({"out": d}, {"self": d}) for d in range(len(t["self"].shape))}
    return {"replicate": ({}, {}), **rows}


QUERY_GRADS = setting("query", grads=True)
HEADS_GRADS = setting("heads", grads=True)
HEADS_LSE = setting("heads", lse=True)
SQUARE = {"kv_sequence": 10}

MUTANTS: tuple[Mutant, ...] = (
    attention(
        "cpu_lse_dim",
        "The log-sum-exp is (batch, heads, sequence): with the heads sharded, dim 1 of it is.",
        (SHAPE,), CPU, HEADS_LSE,
        forward=("heads", {"lse": 2}),
    ),
    attention(
        "cpu_out_partial",
        "The output of replicated inputs is replicated, not a sum over the ranks.",
        (WRONG,), CPU, setting("replicate"),
        forward=("replicate", {"out": "P"}),
    ),
    attention(
        "cpu_keys_sharded",
        "Softmax goes over all keys: they cannot be sharded as if each shard had its own.",
        (WRONG,), CPU, setting("sequence"),
        forward=("keys", {"out": 2, "lse": 2}, {"query": 2, "key": 2, "value": 2}),
        gathers=True,
    ),
    attention(
        "cpu_causal_query",
        "With a causal mask the queries cannot be sharded: the kernel aligns it to the local ones.",
        (WRONG,), CPU, setting("query", SQUARE, causal=True),
        forward=("query", {"out": 2, "lse": 2}, {"query": 2}),
        gathers=True,
    ),
    attention(
        "cpu_dkv_not_partial",
        "With the queries sharded, each rank has a part of the sums dk and dv: P(sum).",
        (GRADIENT, DIFFER), CPU, QUERY_GRADS,
        backward=("query", {"dk": "R", "dv": "R"}),
    ),
    attention(
        "cpu_dq_partial",
        "With the queries sharded dq is sharded with them, and no partial sum as dk and dv are.",
        (SHAPE,), CPU, QUERY_GRADS,
        backward=("query", {"dq": "P"}),
    ),
    attention(
        "cpu_dk_partial_in_heads",
        "With the heads sharded dk and dv are sharded too, and no sums.",
        (SHAPE,), CPU, HEADS_GRADS,
        backward=("heads", {"dk": "P", "dv": "P"}),
    ),
    attention(
        "flash_lse_dim",
        "The log-sum-exp is (batch, heads, sequence): with the heads sharded, dim 1 of it is.",
        (SHAPE,), FLASH, HEADS_LSE,
        forward=("heads", {"lse": 2}),
    ),
    attention(
        "flash_gqa_uneven",
        "Heads may be sharded only where the ranks divide the kv heads (PyTorch's own rule does not ask).",
        (WRONG,), FLASH, setting("heads", {"heads": 12, "kv_heads": 3}),
        forward=("heads", {"out": 1, "lse": 1}, {"query": 1, "key": 1, "value": 1}),
        gathers=True,
    ),
    attention(
        "flash_dkv_not_partial",
        "With the queries sharded, each rank has a part of the sums dk and dv: P(sum).",
        (GRADIENT, DIFFER), FLASH, QUERY_GRADS,
        backward=("query", {"dk": "R", "dv": "R"}),
    ),
    attention(
        "flash_lse_as_out",
        "Backward wants the log-sum-exp sharded along its heads, dim 1, and not along dim 2.",
        (RAISES,), FLASH, HEADS_GRADS,
        backward=("heads", {}, {"logsumexp": 2}),
    ),
    attention(
        "efficient_bias_broadcast",
        "A bias that broadcasts over the heads cannot be sharded along them; the row is dropped for it.",
        (COST,), EFFICIENT, setting("heads", bias=[1]),
        forward=("heads", {}, {"attn_bias": 1}),
    ),
    attention(
        "efficient_bias_whole",
        "A bias with heads of its own is sharded with them.",
        (RAISES,), EFFICIENT, setting("heads", bias=[]),
        forward=("heads", {}, {"attn_bias": "R"}),
    ),
    attention(
        "efficient_bias_gradient",
        "With the batch sharded, the gradient of a bias that broadcasts over it is P(sum).",
        (GRADIENT, DIFFER), EFFICIENT, setting("batch", bias=[0], learned=True, grads=True),
        backward=("batch", {"dbias": "R"}),
    ),
    attention(
        "cudnn_lse_replicated",
        "With the batch sharded the log-sum-exp is sharded too.",
        (SHAPE,), CUDNN, setting("batch", lse=True),
        forward=("batch", {"lse": "R"}),
    ),
    attention(
        "cudnn_dv_partial",
        "The gradients of replicated tensors are replicated, not sums over the ranks.",
        (GRADIENT,), CUDNN, setting("replicate", grads=True),
        backward=("replicate", {"dv": "P"}),
    ),
    attention(
        "raw_flash_lse_dim",
        "In (batch, sequence, heads, head_dim) the heads are dim 2, but in the log-sum-exp they are dim 1.",
        (SHAPE,), RAW_FLASH, HEADS_GRADS,
        forward=("heads", {"lse": 2}),
        blamed="forward",
    ),
    attention(
        # Not on an op whose flags have defaults: left out or not, they are another number of arguments.
        "raw_flash_causal_not_in_key",
        "The strategy depends on `is_causal`, and the key of the sharding cache does not have it.",
        (WRONG,), RAW_FLASH, setting("query", SQUARE, two_layers=True),
        unkeyed=True,
        gathers=True,
    ),
    attention(
        "raw_flash_rng_sharded",
        "The random state is one for all ranks, it has no batch to shard.",
        (SHAPE,), RAW_FLASH, setting("batch"),
        forward=("batch", {"rng": 0}),
    ),
    attention(
        "raw_flash_dv_not_partial",
        "With the queries sharded dv is P(sum) as dk is.",
        (GRADIENT, DIFFER), RAW_FLASH, QUERY_GRADS,
        backward=("query", {"dv": "R"}),
    ),
    composite(
        "softmax_of_shards",
        "Softmax over a sharded dim needs all of it.",
        (WRONG,), "aten._softmax.default", setting("sequence", whole_q=True),
        ("columns", {"out": 2}, {"self": 2}),
        gathers=True,
    ),
    composite(
        "softmax_backward_of_shards",
        "The gradient of a softmax over a sharded dim sums over all of it.",
        (GRADIENT,), "aten._softmax_backward_data.default",
        setting("sequence", whole_q=True, grads=True),
        ("columns", {"out": 2}, {"grad_output": 2, "output": 2}),
        gathers=True,
    ),
    composite(
        "bmm_not_partial",
        "With the contracted dim sharded, a product of matrices is P(sum).",
        (WRONG,), "aten.bmm.default", setting("head_dim"),
        ("contraction", {"out": "R"}),
        gathers=True,
    ),
    composite(
        "bmm_sharded",
        "With the contracted dim sharded, a product of matrices is P(sum), and not sharded.",
        (SHAPE,), "aten.bmm.default", setting("head_dim"),
        ("contraction", {"out": 1}),
        gathers=True,
    ),
    composite(
        "softcap_of_partial",
        "tanh of partial sums is not the partial sum of a tanh.",
        (WRONG,), "aten.tanh.default", setting("head_dim", softcap=True),
        ("partial", {"out": "P"}, {"self": "P"}),
        gathers=True,
    ),
    composite(
        "transpose_keeps_dim",
        "A transposed tensor is sharded along the dim that its shards were moved to.",
        (SHAPE,), "aten.transpose.int", setting("heads", heads_second=True),
        transpose_forgets,
    ),
    composite(
        "bias_on_every_rank",
        "With the contracted dim sharded the bias must be added once, and not on every rank.",
        (WRONG,), "aten.addmm.default", setting("heads"),
        ("contraction", {}, {"self": "R"}),
        projection=True,
    ),
)  # fmt: skip

PROBE = probe("mutants_aten", MUTANTS)
