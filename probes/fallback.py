"""The pure PyTorch forms of attention that projects fall back to when no fused kernel is there.

Each is written here from the mathematics, in the shape in which such code is usually found: (batch,
heads, sequence, head_dim) with matmul; (batch * heads, ...) with baddbmm; einsum over (batch, sequence,
heads, head_dim); sliced over heads or queries to save memory; chunked over keys with a running
log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from attncheck.probing import (
    BATCH,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    KV_SEQUENCE,
    SEQUENCE,
    Operator,
    Probe,
    Setting,
    Tensor,
    Tensors,
)

if TYPE_CHECKING:
    import torch

BASE = {"batch": 6, "heads": 4, "kv_heads": 4, "sequence": 18, "kv_sequence": 22, "head_dim": 16}
UNEVEN_HEADS = {**BASE, "batch": 14, "heads": 5, "kv_heads": 5}
UNEVEN_SEQUENCE = {**BASE, "sequence": 19, "kv_sequence": 25}

ROLES = {
    "bhsd": ((BATCH, HEADS, SEQUENCE, HEAD_DIM), (BATCH, KV_HEADS, KV_SEQUENCE, HEAD_DIM)),
    "bshd": ((BATCH, SEQUENCE, HEADS, HEAD_DIM), (BATCH, KV_SEQUENCE, KV_HEADS, HEAD_DIM)),
}


def tensors_in(layout: str) -> Callable[[Setting], tuple[Tensor, ...]]:
    q_dims, kv_dims = ROLES[layout]

    def tensors(setting: Setting) -> tuple[Tensor, ...]:
        return (
            Tensor("q", q_dims, tuple(setting[r] for r in q_dims)),
            Tensor("k", kv_dims, tuple(setting[r] for r in kv_dims)),
            Tensor("v", kv_dims, tuple(setting[r] for r in kv_dims)),
        )

    return tensors


def reference_in(layout: str) -> Callable[[Setting, Tensors], torch.Tensor]:
    def reference(setting: Setting, t: Tensors) -> torch.Tensor:
        from attncheck.runner.reference import attention

        return attention(t["q"], t["k"], t["v"], layout=layout)

    return reference


def matmul(setting: Setting, t: Tensors) -> torch.Tensor:
    """softmax(q k^T * scale) v with 4-D matmul."""
    import torch

    scores = torch.matmul(t["q"], t["k"].transpose(-2, -1)) * setting["head_dim"] ** -0.5
    return torch.matmul(torch.softmax(scores, dim=-1), t["v"])


def baddbmm(setting: Setting, t: Tensors) -> torch.Tensor:
    """(batch * heads) folded into one dim; the scale goes into baddbmm, as in latent-diffusion code."""
    import torch

    b, h, sq, d = t["q"].shape
    sk = t["k"].shape[2]
    q, k, v = (x.reshape(b * h, -1, d) for x in (t["q"], t["k"], t["v"]))
    unused = torch.zeros((b * h, sq, sk), dtype=q.dtype, device=q.device)
    unused = like(unused, q)
    scores = torch.baddbmm(unused, q, k.transpose(1, 2), beta=0, alpha=d**-0.5)
    return torch.bmm(scores.softmax(dim=-1), v).reshape(b, h, sq, d)


def like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`tensor` as a replicated DTensor where `other` is a DTensor: baddbmm wants all of one kind."""
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(other, DTensor):
        return tensor
    mesh = other.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def einsum(setting: Setting, t: Tensors) -> torch.Tensor:
    """einsum over (batch, sequence, heads, head_dim)."""
    import torch

    scores = torch.einsum("bqhd,bkhd->bhqk", t["q"], t["k"]) * setting["head_dim"] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), t["v"])


def sliced_heads(setting: Setting, t: Tensors) -> torch.Tensor:
    """One head at a time, then concatenated."""
    import torch

    outs = []
    for head in range(t["q"].shape[1]):
        q, k, v = (t[name][:, head : head + 1] for name in "qkv")
        scores = torch.matmul(q, k.transpose(-2, -1)) * setting["head_dim"] ** -0.5
        outs.append(torch.matmul(scores.softmax(dim=-1), v))
    return torch.cat(outs, dim=1)


def sliced_queries(setting: Setting, t: Tensors) -> torch.Tensor:
    """A block of queries at a time against all keys, then concatenated."""
    import torch

    outs = []
    for q in torch.split(t["q"], 7, dim=2):
        scores = torch.matmul(q, t["k"].transpose(-2, -1)) * setting["head_dim"] ** -0.5
        outs.append(torch.matmul(scores.softmax(dim=-1), t["v"]))
    return torch.cat(outs, dim=2)


def chunked_lse(setting: Setting, t: Tensors) -> torch.Tensor:
    """Keys and values in chunks; partial outputs merged by their log-sum-exp."""
    import torch

    out = lse = None
    for k, v in zip(torch.split(t["k"], 9, dim=2), torch.split(t["v"], 9, dim=2), strict=True):
        scores = torch.matmul(t["q"], k.transpose(-2, -1)) * setting["head_dim"] ** -0.5
        chunk_lse = torch.logsumexp(scores, dim=-1, keepdim=True)
        chunk_out = torch.matmul(torch.exp(scores - chunk_lse), v)
        if out is None or lse is None:
            out, lse = chunk_out, chunk_lse
            continue
        merged = torch.logaddexp(lse, chunk_lse)
        out = out * torch.exp(lse - merged) + chunk_out * torch.exp(chunk_lse - merged)
        lse = merged
    assert out is not None
    return out


def settings(quick: bool, uneven: tuple[str, ...]) -> tuple[Setting, ...]:
    everything = ("replicate", "batch", "heads", "sequence", "query", "head_dim", "partial")
    return (
        Setting("plain", BASE, level="quick" if quick else "default", placements=everything),
        Setting("bfloat16", BASE, "bfloat16", placements=("replicate", "batch", "heads")),
        Setting("uneven_heads", UNEVEN_HEADS, placements=uneven),
        Setting("uneven_sequence", UNEVEN_SEQUENCE, level="full"),
        Setting("float16", BASE, "float16", level="full"),
        Setting("batch_1", {**BASE, "batch": 1}, level="full"),
    )


FORMS: tuple[tuple[Callable[[Setting, Tensors], torch.Tensor], str, bool, tuple[str, ...]], ...] = (
    (matmul, "bhsd", True, ("aten.bmm.default", "aten._softmax.default")),
    (baddbmm, "bhsd", False, ("aten.baddbmm.default", "aten._softmax.default")),
    (einsum, "bshd", True, ("aten.bmm.default", "aten._softmax.default")),
    (sliced_heads, "bhsd", False, ("aten.slice.Tensor", "aten.bmm.default", "aten.cat.default")),
    (sliced_queries, "bhsd", False, ("aten.split.Tensor", "aten.bmm.default", "aten.cat.default")),
    (chunked_lse, "bhsd", False, ("aten.logsumexp.default", "aten.logaddexp.default")),
)

PROBE = Probe(
    name="fallback",
    summary="pure PyTorch attention: matmul, baddbmm, einsum, sliced, chunked with log-sum-exp",
    operators=tuple(
        Operator(
            name=f"fallback.{form.__name__}",
            function=f"attncheck probes/fallback.py:{form.__name__}",
            tensors=tensors_in(layout),
            call=form,
            reference=reference_in(layout),
            settings=settings(quick, ("heads", "batch")),
            output_dims=ROLES[layout][0],
            kernel_ops=kernel_ops,
        )
        for form, layout, quick, kernel_ops in FORMS
    ),
)
