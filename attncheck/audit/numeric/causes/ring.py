"""A ring (or any attention over shards of the sequence) whose backward works with other keys or values than
its forward: those that stayed where they were, or came a step too early or too late."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from attncheck.audit.numeric.captured import OUTPUT, Key
from attncheck.audit.numeric.recording import Recorder
from attncheck.audit.numeric.scene import Difference, Scene
from attncheck.audit.numeric.verdict import explains
from attncheck.audit.numeric.watching import MASKED, Watch
from attncheck.runner.compat import tree_leaves

# Relative to the largest score: what is left of scores once q k^T is taken off, where no bias was added.
_NOTHING = 1e-3


@dataclass(frozen=True)
class Attention:
    """One attention of the unsharded model: q (..., S, D), k and v (..., T, D), how the scores are scaled,
    which of them are masked (..., S, T; True: they count), and what it gives, with its graph."""

    path: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    counts: torch.Tensor
    out: torch.Tensor


# Which chunk of the keys, or values, is used where rank r meets chunk j.
Used = Callable[[int, int], int]


class Attentions(Watch):
    """Finds the attention calls of a replay: F.scaled_dot_product_attention, or a softmax of scaled scores
    between two matrix products."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(recorder)
        self.found: list[Attention] = []
        self._products: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._weights: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._sdpa: dict[str, Any] = {}
        self._kept: list[Any] = []  # an id means something only as long as its tensor lives

    def on_sdpa(self, given: dict[str, Any]) -> dict[str, Any]:
        self._sdpa = given
        return super().on_sdpa(given)

    def on_result(self, func: Any, out: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(func, "__name__", "")
        self._kept.append((out, args))
        if not isinstance(out, torch.Tensor):
            return out
        if name == "scaled_dot_product_attention":
            self._from_sdpa(out)
        elif name in ("matmul", "__matmul__", "bmm") and id(args[0]) in self._weights:
            self._from_product(out, *self._weights[id(args[0])], args[1])
        elif name in ("matmul", "__matmul__", "bmm"):
            self._products[id(out)] = args[0], args[1]
        elif "softmax" in name and args and id(args[0]) in self._products:
            self._weights[id(out)] = *self._products[id(args[0])], args[0]
        else:
            for leaf in tree_leaves(args):
                same = isinstance(leaf, torch.Tensor) and leaf.shape == out.shape
                if same and id(leaf) in self._products:
                    self._products[id(out)] = self._products[id(leaf)]
        return out

    def _from_sdpa(self, out: torch.Tensor) -> None:
        q, k, v = (self._sdpa[name] for name in ("query", "key", "value"))
        mask = self._sdpa.get("attn_mask")
        counts = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
        if mask is not None and mask.dtype == torch.bool:
            counts = counts & mask.cpu()
        elif mask is not None:
            if bool((mask[mask > MASKED] != 0).any()):
                return  # a bias of its own
            counts = counts & (mask > MASKED).cpu()
        if self._sdpa.get("is_causal"):
            counts = counts.tril()
        scale = self._sdpa.get("scale") or 1 / math.sqrt(q.shape[-1])
        if q.shape[:-2] == k.shape[:-2]:
            self.found.append(Attention(self.recorder.path, q, k, v, scale, counts, out))

    def _from_product(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        turned: torch.Tensor,
        scores: torch.Tensor,
        v: torch.Tensor,
    ) -> None:
        with torch.no_grad():
            product = q.double() @ turned.double()
            counts = scores > MASKED
            seen = torch.where(counts, product, 0.0)
            scaled = torch.where(counts, scores.double(), 0.0)
            scale = float((seen * scaled).sum() / (seen * seen).sum())
            left = (scaled - scale * seen).abs().max()
        if left <= _NOTHING * scaled.abs().max():
            k = turned.transpose(-2, -1)
            self.found.append(Attention(self.recorder.path, q, k, v, scale, counts.cpu(), out))


def cause(scene: Scene, difference: Difference) -> str:
    """Puts together what the unsharded attention's gradients would be with other chunks of keys or values,
    and holds that against what came."""
    if len(difference.users) != 1:
        return ""
    module = difference.users[0]
    into = _taken(scene, module, difference.key)
    gave = Key(module, into.nth, OUTPUT, 0)
    upstream = scene.own[gave].gradient if gave in scene.own else None
    if upstream is None:
        return ""
    _, watch = scene.unsharded.replay(scene.at, watch=Attentions, graph=True)
    assert isinstance(watch, Attentions)
    inside = [
        each for each in watch.found if each.path == module or each.path.startswith(f"{module}.")
    ]
    if len(inside) != 1:
        return ""
    attention, recorder = inside[0], watch.recorder
    grad = _through(recorder.tensor(gave), attention.out, upstream.local)
    if grad is None:
        return ""
    captures = scene.captures(difference.key, gradient=True)
    for ranks in sorted({n for n in scene.mesh if n > 1}):
        for words, keys, values in hypotheses(ranks):
            made = gradients(attention, grad, ranks, keys, values)
            whole = None if made is None else _back(attention, recorder.tensor(into), made)
            if whole is not None and explains(
                captures, whole, difference.verdict, scene.mesh, True
            ):
                names = scene.records[0].functions.get(module, ())
                return f"the backward{f' of {names[0]}' if names else ''} works with {words}"
    return ""


def _taken(scene: Scene, module: str, key: Key) -> Key:
    """The tensor as the module takes it."""
    captured = scene.own[key].captured
    return next(
        other
        for other, event in scene.own.items()
        if event.captured is captured and other.path == module and other.kind != OUTPUT
    )


def _through(out: torch.Tensor, inner: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor | None:
    """The gradient of an inner tensor, for that of an outer one; None where the one does not lead there."""
    (grad,) = torch.autograd.grad(
        out, inner, upstream.to(out), retain_graph=True, allow_unused=True
    )
    return grad


def _back(
    attention: Attention, into: torch.Tensor, made: tuple[torch.Tensor, ...]
) -> torch.Tensor | None:
    """The gradient of what the module takes, for those of q, k and v."""
    sources = (attention.q, attention.k, attention.v)
    whole = torch.zeros_like(into)
    for source, gradient in zip(sources, made, strict=True):
        (part,) = torch.autograd.grad(
            source, into, gradient.to(source), retain_graph=True, allow_unused=True
        )
        whole = whole if part is None else whole + part
    return whole


def hypotheses(ranks: int) -> Iterator[tuple[str, Used, Used]]:
    """(in words, keys, values): what each rank may use instead."""

    def right(r: int, j: int) -> int:
        return j

    for shift in range(ranks):

        def kept(r: int, j: int, shift: int = shift) -> int:
            return (r + shift) % ranks

        whose = "its own" if shift == 0 else f"those of rank + {shift}"
        yield f"stale keys: in every step each rank uses {whose}", kept, right
        yield f"stale values: in every step each rank uses {whose}", right, kept
        yield f"stale keys and values: in every step each rank uses {whose}", kept, kept
    for shift in range(1, ranks):

        def early(r: int, j: int, shift: int = shift) -> int:
            return (j + shift) % ranks

        where = f"of the step {shift} before or behind"
        yield f"other keys than forward: those {where}", early, right
        yield f"other values than forward: those {where}", right, early
        yield f"other keys and values than forward: those {where}", early, early


def gradients(
    attention: Attention, grad: torch.Tensor, ranks: int, keys: Used, values: Used
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Of q, k and v, for that of what attention gives, where rank r uses other chunks of keys and values for
    chunk j. None where the ranks do not divide the sequence."""
    with torch.no_grad():
        q, k, v = (each.cpu().double() for each in (attention.q, attention.k, attention.v))
        if q.shape[-2] % ranks or k.shape[-2] % ranks:
            return None
        added = torch.zeros(()).where(attention.counts, torch.tensor(-math.inf)).double()
        added = added.expand(*q.shape[:-1], k.shape[-2])
        scores = attention.scale * q @ k.transpose(-2, -1) + added
        lse = scores.logsumexp(-1, keepdim=True)
        grad = grad.cpu().double()
        inner = (grad * (scores.softmax(-1) @ v)).sum(-1, keepdim=True)
        queries = [each.chunk(ranks, -2) for each in (q, grad, lse, inner)]
        chunks_k, chunks_v = k.chunk(ranks, -2), v.chunk(ranks, -2)
        dq = [torch.zeros_like(each) for each in queries[0]]
        dk, dv = ([torch.zeros_like(each) for each in chunks] for chunks in (chunks_k, chunks_v))
        for r in range(ranks):
            own_q, own_grad, own_lse, own_inner = (each[r] for each in queries)
            for j in range(ranks):
                key, value = chunks_k[keys(r, j)], chunks_v[values(r, j)]
                mask = added.chunk(ranks, -2)[r].chunk(ranks, -1)[j]
                weights = (attention.scale * own_q @ key.transpose(-2, -1) + mask - own_lse).exp()
                slopes = weights * (own_grad @ value.transpose(-2, -1) - own_inner)
                slopes = slopes * attention.scale
                dq[r] += slopes @ key
                dk[j] += slopes.transpose(-2, -1) @ own_q
                dv[j] += weights.transpose(-2, -1) @ own_grad
        return torch.cat(dq, -2), torch.cat(dk, -2), torch.cat(dv, -2)
