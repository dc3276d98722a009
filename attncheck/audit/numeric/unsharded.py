"""The process of the unsharded model.

It makes the reference, tells the ranks what they need of it, waits on stdin until they are done, and judges
what they left: it can run the model again, and so try what a likely cause would give.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from attncheck.audit.comparing import Answer, Comparing
from attncheck.audit.numeric import calls, weights
from attncheck.audit.numeric.building import Given, Users, count_devices, users, without_dropout
from attncheck.audit.numeric.calls import Call
from attncheck.audit.numeric.captured import Key, capture
from attncheck.audit.numeric.folder import Folder, put
from attncheck.audit.numeric.recording import Override, Recorder
from attncheck.audit.numeric.running import (
    Record,
    placed_cotangent,
    run,
    whole_cotangent,
)
from attncheck.audit.numeric.watching import Watch
from attncheck.audit.numeric.words import why
from attncheck.audit.put_in_place import put_in_place
from attncheck.audited import Numeric
from attncheck.errors import UserError
from attncheck.model import from_json
from attncheck.runner import compat
from attncheck.runner.compat import tree_map


class NoReferenceError(Exception):
    """What stands in for the unsharded model fails as the parallel one will."""


@dataclass(frozen=True)
class Shown:
    """What the ranks get: weights by name, and each call with what the unsharded model returned."""

    weights: Mapping[str, torch.Tensor]
    calls: Mapping[int, Call]
    outputs: Mapping[int, tuple[torch.Tensor, ...]]


@dataclass
class Unsharded:
    """The reference. `own`, `wide`: records by the call's place in the sequence, in the model's own dtype and
    in float64; `how`: how the model was made; `uncompared`: {what: why}."""

    users: Users
    mesh: Any
    how: str
    models: list[nn.Module]
    given: Given
    dropout: bool
    calls: dict[int, Call] = field(default_factory=dict)
    own: dict[int, Record] = field(default_factory=dict)
    wide: dict[int, Record] = field(default_factory=dict)
    uncompared: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def run(self) -> None:
        """All calls in the model's own dtype. Raises UserError where the first goes wrong, NoReferenceError
        where that is a parallel model's on one rank."""
        for at, call in enumerate(calls.SEQUENCE):
            record = self._try(at, call)
            if record is not None:
                self.own[at] = record

    def _try(self, at: int, call: Call) -> Record | None:
        """The record of a call, with flags flipped where that is something the model takes."""
        try:
            record = self._call(self.models[call.model], call)
        except Exception as error:
            if call.flipped and calls.flags(self.given.kwargs):
                self.notes.append(
                    f"Flags were not flipped: the unsharded model raised {why(error)}."
                )
                return self._try(at, replace(call, flipped=False))
            if call is calls.TRAINING and self.mesh is not None:
                raise NoReferenceError(
                    f"on a mesh of 1 rank the model raised {why(error)}"
                ) from error
            if call is calls.TRAINING:
                target = self.users.asked.target
                raise UserError(f"{target}: the unsharded model raised {why(error)}.") from error
            self.uncompared[call.mode] = f"the unsharded model raised {why(error)}"
            return None
        self.calls[at] = call
        return record

    def _call(
        self,
        model: nn.Module,
        call: Call,
        dtype: torch.dtype | None = None,
        given: Given | None = None,
        like: Record | None = None,
    ) -> Record:
        """`like`: a record of the same call in the model's own dtype, in which cotangents are drawn."""

        def cotangent(number: int, out: torch.Tensor) -> torch.Tensor | None:
            drawn = capture(out).local if like is None else like.outputs[number].local
            whole = whole_cotangent(number, drawn, self.users.asked.seed)
            return placed_cotangent(out, whole, drawn)

        return run(model, given or self.given, call, cotangent, Recorder(), dtype=dtype)

    def shown(self) -> Shown:
        return Shown(
            {name: whole_values(tensor) for name, tensor in weights.named(self.models[0]).items()},
            self.calls,
            {at: tuple(c.local for c in record.outputs) for at, record in self.own.items()},
        )

    def widen(self) -> None:
        """The same calls in float64. Where the model cannot (a kernel of two dtypes), in its own, and once
        more with every weight and input moved by a rounding: that is what its rounding may do."""
        try:
            wide = self._built_twice(lambda tensor: tensor)
            for model in wide:
                model.double()
            for at, call in self.calls.items():
                model = wide[call.model]
                self.wide[at] = self._call(model, call, torch.float64, like=self.own[at])
        except Exception as error:
            self.notes.append(
                f"The unsharded model does not run in float64 ({why(error)}): the bound is what moving every "
                "weight and input by a rounding does to it."
            )
            self.wide = self.own
            moved = self._built_twice(_moved)
            given = replace(
                self.given,
                args=tree_map(_moved, self.given.args),
                kwargs=tree_map(_moved, dict(self.given.kwargs)),
            )
            self.own = {
                at: self._call(moved[call.model], call, given=given, like=self.own[at])
                for at, call in self.calls.items()
            }

    def _built_twice(self, change: Callable[[Any], Any]) -> list[nn.Module]:
        """Models with changed weights. A deepcopy would need a copy of the mesh that some hold."""
        values = {
            name: change(whole_values(tensor))
            for name, tensor in weights.named(self.models[0]).items()
        }
        built = []
        for _ in self.models:
            model = self.users.model(self.mesh)
            without_dropout(model)
            weights.give(model, values)
            built.append(model)
        return built

    def replay(
        self,
        at: int,
        overrides: Mapping[Key, Override] | None = None,
        watch: Callable[[Recorder], Watch] = Watch,
        graph: bool = False,
    ) -> tuple[Record, Watch]:
        """A call once more, up to backward, with something in it that is otherwise. `graph`: one is made."""
        call = replace(self.calls[at], backward=graph)
        recorder = Recorder(overrides=overrides or {})
        watched = watch(recorder)
        model = self.models[call.model]
        record = run(model, self.given, call, lambda number, out: None, recorder, watched)
        return record, watched


def whole_values(tensor: torch.Tensor) -> torch.Tensor:
    """On one rank a DTensor's own part is all of it."""
    local = compat.local_tensor(tensor) if isinstance(tensor, DTensor) else tensor
    return local.detach().cpu().clone()


def _moved(value: Any) -> Any:
    """Each number by up to one rounding, at random."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    by = torch.rand(value.shape, device=value.device) * 2 - 1
    eps = torch.finfo(value.dtype).eps
    return (value.detach().double() * (1 + eps * by)).to(value.dtype)


# --- making it -----------------------------------------------------------------------------------


def make(asked: Comparing) -> Unsharded:
    """Raises UserError."""
    torch.set_num_threads(1)
    count_devices(asked.ranks)
    functions = users(asked)
    try:
        model: nn.Module | None = functions.model(None)
        refusal = "" if model is not None and not _is_parallel(model) else "returned DTensors"
    except UserError as error:
        model, refusal = None, _without(asked.target, error)
    mesh = None
    how = "the unsharded model of build(None), with the same weights"
    if refusal:
        mesh = _mesh_of_one(asked)
        try:
            model = functions.model(mesh)
        except UserError as error:
            if _without(asked.target, error) == refusal:
                raise
            raise UserError(
                f"{asked.target} makes no unsharded model to compare with: build(None) {refusal}, and on a "
                f"mesh of 1 rank it {_without(asked.target, error)}."
            ) from error
        how = f"the model on a mesh of 1 rank, with the same weights (build(None) {refusal})"
    assert model is not None
    second = functions.model(mesh)
    dropout = bool(without_dropout(model) | without_dropout(second))
    weights.give(second, {name: whole_values(t) for name, t in weights.named(model).items()})
    return Unsharded(functions, mesh, how, [model, second], _inputs(functions, mesh), dropout)


def _without(target: str, error: UserError) -> str:
    """`raised ValueError at m.py:3: ...`"""
    return str(error).removeprefix(target).strip().rstrip(".")


def _is_parallel(model: nn.Module) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in weights.named(model).values())


def _inputs(functions: Users, mesh: Any) -> Given:
    try:
        return functions.given(mesh)
    except UserError:
        if mesh is not None:
            raise
    # It wants a mesh; what it places on one rank is whole.
    given = functions.given(_mesh_of_one(functions.asked))

    def plain(value: Any) -> Any:
        return compat.local_tensor(value) if isinstance(value, DTensor) else value

    return Given(tree_map(plain, given.args), tree_map(plain, dict(given.kwargs)))


def _mesh_of_one(asked: Comparing) -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return init_device_mesh(asked.device, (1,) * len(asked.mesh), mesh_dim_names=tuple(asked.mesh))


def save(value: Any, path: Path) -> None:
    """Whoever sees the file sees all of it."""
    beside = path.with_suffix(".new")
    torch.save(value, beside)
    beside.replace(path)


def serve(folder: Folder) -> None:
    """Makes the reference, tells the ranks of it, and judges when it is told that they are done."""
    from attncheck.audit.numeric.judging import judge  # it builds on this module

    asked = from_json(Comparing, json.loads(folder.asked.read_text(encoding="utf-8")), "asked")
    put_in_place(asked.path, asked.probe_files, asked.fixes, asked.device)
    try:
        unsharded = make(asked)
        unsharded.run()
    except UserError as error:
        put(folder.answer, Answer(error=str(error)))
        return
    except NoReferenceError as error:
        put(folder.answer, Answer(Numeric(asked.ranks, unsharded.how, failure=str(error))))
        return
    save(unsharded.shown(), folder.unsharded)
    unsharded.widen()
    failure = json.loads(sys.stdin.readline() or '""')
    put(folder.answer, judge(unsharded, folder, failure))
