"""The guard in front of functions that are no dispatcher ops."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

from attncheck.runner import guard


@pytest.fixture(scope="module")
def dtensor() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield DTensor.from_local(torch.ones(3), mesh, [Replicate()])
    dist.destroy_process_group()


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("planted_extension")
    module.fwd = lambda *args, **kwargs: "ran"  # type: ignore[attr-defined]
    module.bwd = lambda *args, **kwargs: "ran"  # type: ignore[attr-defined]
    module.Kept = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "planted_extension", module)
    return module


def test_the_premise_a_dtensor_has_a_null_pointer(dtensor: DTensor) -> None:
    assert dtensor.data_ptr() == 0


def test_a_dtensor_is_stopped_wherever_it_hides(extension: Any, dtensor: DTensor) -> None:
    guard.protect("planted_extension")
    for args, kwargs in (
        ((dtensor,), {}),
        ((torch.ones(1), [dtensor]), {}),
        ((), {"k": dtensor}),
        (({"deep": (1, dtensor)},), {}),
    ):
        with pytest.raises(guard.BypassesDispatcher, match=r"planted_extension\.fwd is no") as info:
            extension.fwd(*args, **kwargs)
        assert info.value.function == "planted_extension.fwd"


def test_plain_tensors_pass(extension: Any) -> None:
    guard.protect("planted_extension")
    assert extension.fwd(torch.ones(1), "text", causal=True) == "ran"


def test_one_function_of_a_module(extension: Any, dtensor: DTensor) -> None:
    guard.protect("planted_extension:fwd")
    assert extension.bwd(dtensor) == "ran"
    with pytest.raises(guard.BypassesDispatcher):
        extension.fwd(dtensor)


def test_twice_guards_once_and_classes_are_left_alone(extension: Any) -> None:
    guard.protect("planted_extension")
    first = extension.fwd
    guard.protect("planted_extension")
    assert extension.fwd is first
    assert extension.Kept is dict


def test_what_is_not_there_is_said(extension: Any) -> None:
    with pytest.raises(AttributeError, match="planted_extension has no function gone"):
        guard.protect("planted_extension:gone")
    with pytest.raises(ModuleNotFoundError):
        guard.protect("planted_and_not_installed")
