"""What a model calls in forward, as far as it tells a likely cause: attention and its flags, how much of the
scores is masked, plain tensors that meet DTensors, and DTensors made from local tensors.

A mode over torch's functions; it also turns dropout off, which no two models draw alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from attncheck.audit.lines import user_line
from attncheck.audit.numeric.captured import Captured, capture
from attncheck.audit.numeric.recording import Recorder
from attncheck.runner import attention_ops, compat
from attncheck.runner.compat import tree_leaves

# Scores that are masked are -inf, or so small that the softmax takes them for nothing.
MASKED = -5e3
# A plain tensor above it is no mask and no table: its values are not kept.
VALUES = 2**22
_DROPOUT = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
    torch.alpha_dropout,
    torch.feature_dropout,
    torch.feature_alpha_dropout,
)
_SOFTMAX = (F.softmax, torch.softmax, torch.Tensor.softmax, torch.special.softmax)
_SDPA = F.scaled_dot_product_attention
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")

ATTENTION, SOFTMAX, MIXED, FROM_LOCAL = "attention", "softmax", "mixed", "from_local"


@dataclass(frozen=True)
class Sighting:
    """`at`: how many tensors the recorder had noted before it; `line`: the user's. `flags` of an attention
    call; `masked`: the share of scores that a softmax masks; `captured`: the plain tensor that met a DTensor
    (`ranks`: of its mesh), or the DTensor that was made."""

    kind: str
    path: str
    at: int
    name: str
    line: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    masked: float = 0.0
    captured: Captured | None = None


class Watch(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.sightings: list[Sighting] = []
        self.dropout = False  # there was some, and it was turned off

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        original = DTensor.from_local

        def from_local(*args: Any, **kwargs: Any) -> Any:
            made = original(*args, **kwargs)
            if not (self.recorder.busy or compat.in_backward()):
                self._see(FROM_LOCAL, "from_local", captured=self._capture(made))
            return made

        setattr(DTensor, "from_local", staticmethod(from_local))
        try:
            with self:
                yield
        finally:
            setattr(DTensor, "from_local", staticmethod(original))

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self.recorder.busy or compat.in_backward():
            return func(*args, **kwargs)
        if func in _DROPOUT:
            given = {**dict(zip(("input", "p", "training"), args, strict=False)), **kwargs}
            drops = bool(given.get("p", 0.5) and given.get("training", True))
            self.dropout = self.dropout or drops
            return given["input"]
        if func is _SDPA:
            given = {**dict(zip(_SDPA_ARGUMENTS, args, strict=False)), **kwargs}
            self.dropout = self.dropout or bool(given.get("dropout_p"))
            args, kwargs = (), self.on_sdpa({**given, "dropout_p": 0.0})
        elif func in _SOFTMAX:
            scores = args[0] if args else kwargs["input"]
            self._see(SOFTMAX, "softmax", masked=_masked(scores))
        elif hasattr(func, "overloads") or compat.schema_of(func) is not None:
            self._op(func, args, kwargs)
        self._look_for_mixed(func, args, kwargs)
        return self.on_result(func, func(*args, **kwargs), args, kwargs)

    # What a replay does otherwise.

    def on_sdpa(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments with which attention is called, of those the model gives."""
        mask = given.get("attn_mask")
        flags = {
            name: value
            for name, value in given.items()
            if name in ("is_causal", "scale", "enable_gqa")
        }
        flags = {"is_causal": False, **flags, "attn_mask": mask is not None}
        share = 0.0 if mask is None else _masked(mask)
        if flags["is_causal"]:
            rows, columns = given["query"].shape[-2], given["key"].shape[-2]
            share = 1 - float(torch.ones(rows, columns).tril().mean())
        self._see(ATTENTION, "scaled_dot_product_attention", flags=flags, masked=share)
        return given

    def on_result(self, func: Any, out: Any, args: Any, kwargs: Any) -> Any:
        """What a function returns, as the model gets it."""
        return out

    def _op(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        """A call of an op by name (`torch.ops...`): attention of a package's own."""
        op = getattr(func, "default", func)
        schema = compat.schema_of(op)
        if schema is None or not attention_ops.looks_like(compat.op_name(op), schema):
            return
        named = {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **kwargs}
        flags = {
            name: True if isinstance(value, torch.Tensor) else value
            for name, value in named.items()
            if value is None or isinstance(value, (bool, int, float, str, torch.Tensor))
        }
        self._see(ATTENTION, compat.op_name(op), flags=flags)

    def _look_for_mixed(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if len(tensors) < 2 or not any(isinstance(each, DTensor) for each in tensors):
            return
        name = getattr(func, "__name__", str(func))
        met = next(each for each in tensors if isinstance(each, DTensor)).device_mesh.mesh
        ranks = tuple(int(rank) for rank in met.flatten())
        for each in tensors:
            if not isinstance(each, DTensor) and 1 < each.numel() <= VALUES:
                self._see(MIXED, name, captured=replace(capture(each), ranks=ranks))

    def _capture(self, tensor: torch.Tensor) -> Captured | None:
        return capture(tensor) if tensor.numel() <= VALUES else None

    def _see(self, kind: str, name: str, **of: Any) -> None:
        at = len(self.recorder.keys)
        self.sightings.append(Sighting(kind, self.recorder.path, at, name, user_line(), **of))


def _masked(scores: torch.Tensor) -> float:
    """The share of scores, or of an additive mask, that a softmax takes for nothing; of a mask of bools, the
    share that is False. Of a DTensor, on this rank."""
    local = compat.local_tensor(scores) if isinstance(scores, DTensor) else scores
    hidden = ~local if local.dtype == torch.bool else local <= MASKED
    return float(hidden.double().mean()) if local.numel() else 0.0
