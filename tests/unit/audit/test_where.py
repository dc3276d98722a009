"""Which module an op belongs to, forward and backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from attncheck.audit.where import Where
from attncheck.runner import compat
from attncheck.runner.compat import TorchDispatchMode

FORWARD, BACKWARD = "forward", "backward"
# `x * weight` and `-x`, and the same again in their backwards.
TAKEN = {"aten.mul.Tensor": "mul", "aten.neg.default": "neg"}


class Watch(TorchDispatchMode):
    """Writes down where each op of interest is run."""

    def __init__(self, where: Where) -> None:
        super().__init__()
        self.where = where
        self.ops: list[tuple[str, str, str]] = []  # (phase, op, path)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        backward = compat.in_backward()
        op = TAKEN.get(compat.op_name(func))
        if op is not None:
            phase = BACKWARD if backward else FORWARD
            self.ops.append((phase, op, self.where.path(backward)))
        return func(*args, **(kwargs or {}))

    def paths(self, phase: str, op: str) -> list[str]:
        return [path for own, name, path in self.ops if (own, name) == (phase, op)]


@contextlib.contextmanager
def watched(where: Where) -> Iterator[Watch]:
    with where.watching(), Watch(where) as watch:
        yield watch


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Block(nn.Module):
    """An op of its own between two of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Scale(), Scale()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).neg())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = Scale()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


SCALES = ["blocks.0.first", "blocks.0.second", "blocks.1.first", "blocks.1.second", "head"]


def step(model: nn.Module, where: Where) -> Watch:
    with watched(where) as watch:
        model(torch.rand(4, requires_grad=True)).sum().backward()
    return watch


def test_forward_and_backward_of_each_module() -> None:
    where, model = Where(), Model()
    where.name(model)
    watch = step(model, where)
    assert watch.paths(FORWARD, "mul") == SCALES
    # Two of each: to the input, and to the weight.
    assert watch.paths(BACKWARD, "mul") == [path for path in SCALES[::-1] for _ in range(2)]
    assert watch.paths(FORWARD, "neg") == ["blocks.0", "blocks.1"]
    assert where.outermost == 1


def test_a_model_is_named_when_it_is_first_called() -> None:
    where, model = Where(), Model()
    watch = step(model, where)
    assert watch.paths(FORWARD, "mul") == SCALES
    assert where.models == [model]
    assert {*where.paths.values()} == {name for name, _ in model.named_modules()}


def test_what_runs_in_no_module_is_nobodys() -> None:
    where = Where()
    with watched(where) as watch:
        (torch.rand(4, requires_grad=True) * 2).sum().backward()
    assert watch.ops == [(FORWARD, "mul", ""), (BACKWARD, "mul", "")]
    assert where.outermost == 0


def test_a_loss_behind_the_model_is_nobodys() -> None:
    where, model = Where(), Scale()
    with watched(where) as watch:
        ((model(torch.rand(4)) * 3).neg() * 5).sum().backward()
    assert watch.paths(FORWARD, "mul") == ["", "", ""]  # a model's own path is empty, too
    model = nn.Sequential(Scale())
    where = Where()
    with watched(where) as watch:
        (model(torch.rand(4)) * 3).sum().backward()
    assert watch.paths(FORWARD, "mul") == ["0", ""]
    assert watch.paths(BACKWARD, "mul") == ["", "0"]


def test_a_module_that_is_called_twice() -> None:
    where, shared = Where(), Scale()
    model = nn.Sequential(shared, Scale(), shared)
    watch = step(model, where)
    assert watch.paths(FORWARD, "mul") == ["0", "1", "0"]
    assert watch.paths(BACKWARD, "mul") == ["0", "0", "1", "1", "0", "0"]


@pytest.mark.parametrize(
    ("reentrant", "again"),
    # Without re-entering, it ends with the last tensor that backward needs: before the last op.
    [(True, ["first", "second"]), (False, ["first"])],
)
def test_a_module_that_is_run_again_in_backward(reentrant: bool, again: list[str]) -> None:
    """What a checkpoint runs again belongs where it belonged; so does the backward that follows."""

    class Checkpointed(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.head(x)

    where = Where()
    watch = step(Checkpointed(), where)
    assert watch.paths(FORWARD, "mul") == SCALES
    parts = [*again, "second", "second", "first", "first"]
    assert watch.paths(BACKWARD, "mul") == [
        *("head", "head"),
        *(f"blocks.1.{part}" for part in parts),
        *(f"blocks.0.{part}" for part in parts),
    ]
    assert where.outermost == 1  # what runs again is no call of the model


def test_an_exception_leaves_nothing_behind() -> None:
    """A model that raises, and is called again."""

    class Fails(nn.Module):
        fails = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.fails:
                raise ValueError("mine")
            return x

    where = Where()
    model = nn.Sequential(Scale(), nn.Sequential(Scale(), Fails()), Scale())
    with watched(where) as watch:
        with pytest.raises(ValueError, match="mine"):
            model(torch.rand(4))
        assert where.path(False) == ""
        Fails.fails = False
        model(torch.rand(4)).sum().backward()
    assert watch.paths(FORWARD, "mul") == ["0", "1.0", "0", "1.0", "2"]
    assert watch.paths(BACKWARD, "mul") == ["2", "2", "1.0", "1.0", "0"]


def test_an_exception_that_a_module_survives() -> None:
    class Falls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fast, self.slow = nn.Bilinear(1, 1, 1), Scale()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return self.fast(x)
            except TypeError:
                return self.slow(x).neg()

    where = Where()
    with watched(where) as watch:
        nn.Sequential(Falls())(torch.rand(4))
    assert watch.ops == [(FORWARD, "mul", "0.slow"), (FORWARD, "neg", "0")]


def test_a_pre_hook_that_raises_leaves_nothing_behind() -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("mine")

    where, model = Where(), nn.Sequential(Scale())
    model[0].register_forward_pre_hook(refuse)
    with watched(where), pytest.raises(ValueError, match="mine"):
        model(torch.rand(4))
    assert where.path(False) == ""


def test_what_the_hooks_of_a_module_do_is_its_own() -> None:
    """A parallel plan redistributes in them."""

    def after(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.neg()

    where, model = Where(), nn.Sequential(Scale())
    where.name(model)
    model[0].register_forward_hook(after)
    model[0].register_forward_pre_hook(lambda module, args: (args[0].neg(),))
    watch = step(model, where)
    assert watch.paths(FORWARD, "neg") == ["0", "0"]


def test_wrappers_are_no_part_of_a_path() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.ModuleDict({"block": checkpoint_wrapper(Block())})
    where = Where()
    where.name(model)
    compiled = torch.compile(Model(), backend="eager")
    where.name(compiled)  # type: ignore[arg-type]
    assert {"block", "block.first", "blocks.0", "head"} < {*where.paths.values()}
    assert not [path for path in where.paths.values() if "_" in path]


def test_a_model_within_another() -> None:
    where, model = Where(), Model()
    where.name(model, prefix="text_encoder.")
    assert step(model, where).paths(FORWARD, "mul")[0] == "text_encoder.blocks.0.first"


def test_a_module_that_no_model_has_is_told_by_its_class() -> None:
    class Makes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Scale()(x)

    where = Where()
    watch = step(nn.Sequential(Makes()), where)
    assert watch.paths(FORWARD, "mul") == ["0.Scale"]
    assert watch.paths(BACKWARD, "mul") == ["0.Scale"] * 2


def test_two_steps() -> None:
    where, model = Where(), Model()
    where.name(model)
    with watched(where) as watch:
        for _ in range(2):
            model(torch.rand(4, requires_grad=True)).sum().backward()
            where.forget()
    assert watch.paths(FORWARD, "mul") == SCALES * 2
    assert watch.paths(BACKWARD, "mul") == [path for path in SCALES[::-1] for _ in range(2)] * 2
    assert where.outermost == 2


def test_nothing_is_followed_afterwards() -> None:
    where, model = Where(), Model()
    where.name(model)
    step(model, where)
    assert not any(module._forward_hooks for module in model.modules())
    model(torch.rand(4)).sum().backward()
    assert where.outermost == 1
