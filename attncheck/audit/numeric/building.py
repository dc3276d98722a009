"""The user's functions: a model and what it is called with, from one seed wherever they run."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attncheck.audit import target
from attncheck.audit.comparing import Comparing
from attncheck.audit.numeric.words import why
from attncheck.errors import UserError
from attncheck.runner.compat import tree_leaves, tree_map


@dataclass(frozen=True)
class Users:
    """The functions that `asked` names, and how they are called."""

    asked: Comparing
    build: Callable[[Any], Any]
    inputs: Callable[[Any], Any]

    def model(self, mesh: Any) -> nn.Module:
        """Raises UserError for what build raises or returns."""
        with self._called():
            try:
                model = self.build(mesh)
            except (Exception, SystemExit) as error:
                raise UserError(f"{self.asked.target} raised {why(error)}.") from error
        if not isinstance(model, nn.Module):
            raise UserError(
                f"{self.asked.target} returned a {type(model).__name__}: expected an nn.Module."
            )
        return model

    def given(self, mesh: Any) -> Given:
        """Raises UserError for what inputs raises or returns."""
        name = self.asked.inputs
        with self._called():
            try:
                given = self.inputs(mesh)
            except (Exception, SystemExit) as error:
                raise UserError(f"{name} raised {why(error)}.") from error
        if isinstance(given, torch.Tensor):
            return Given((given,), {})
        if isinstance(given, Mapping) and all(isinstance(key, str) for key in given):
            return Given((), dict(given))
        if isinstance(given, (tuple, list)):
            return Given(tuple(given), {})
        raise UserError(
            f"{name} returned a {type(given).__name__}: expected a tensor, a tuple of the model's arguments "
            "or a dict of them by name."
        )

    @contextlib.contextmanager
    def _called(self) -> Iterator[None]:
        seed(self.asked.seed)
        on_cpu = self.asked.device == "cpu"
        with contextlib.nullcontext() if on_cpu else torch.device(self.asked.device):
            yield


@dataclass(frozen=True)
class Given:
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def afresh(self, dtype: torch.dtype | None = None) -> Given:
        """With copies of the tensors, so that no call sees what the one before wrote into them; floating ones
        in `dtype`."""

        def copy(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            fresh = value.detach().clone()
            if dtype is not None and fresh.is_floating_point():
                fresh = fresh.to(dtype)
            return fresh.requires_grad_(value.requires_grad)

        return Given(tree_map(copy, self.args), tree_map(copy, dict(self.kwargs)))

    def tensors(self) -> list[torch.Tensor]:
        leaves = tree_leaves((self.args, dict(self.kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def users(asked: Comparing) -> Users:
    """Imports the user's module. Raises UserError."""
    return Users(
        asked, _named(asked.target, "the build function"), _named(asked.inputs, "--inputs")
    )


def _named(text: str, option: str) -> Callable[..., Any]:
    try:
        return target.load(text, option)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        module = target.parse(text, option)[0]
        raise UserError(f"{module} does not import: {why(error)}.") from error


def count_devices(ranks: int) -> None:
    """Code that takes its device from its rank and how many there are (diffusers' `enable_parallelism`: rank
    modulo their number) finds one for each rank, where there is none."""
    if not torch.accelerator.device_count():
        torch.accelerator.device_count = lambda: ranks


def seed(number: int) -> None:
    """All generators that user code draws from."""
    torch.manual_seed(number)
    random.seed(number)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(number % 2**32)


def without_dropout(model: nn.Module) -> bool:
    """Turns dropout off in the modules that have a rate of their own; whether there was any. (The functions
    are caught where they are called, see `watching`.)"""
    found = False
    for module in model.modules():
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout:
            module.dropout = 0.0
            found = True
    return found
