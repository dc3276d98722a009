"""The observer and higher-order ops: it must neither be in their way nor hide what DTensor says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.attention.flex_attention as flex
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from attncheck.runner import compat
from attncheck.runner.observe import Observer, StateFile
from attncheck.standins import flex_attention as gradients_on_cpu

FORWARD, BACKWARD = "higher_order.flex_attention", "higher_order.flex_attention_backward"


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    gradients_on_cpu.provide()
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def observer(tmp_path: Path) -> Observer:
    torch.compiler.reset()
    return Observer(StateFile(tmp_path / "state"))


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """flex_attention reaches its op without torch.compile, as versions that skip it under a mode do."""
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def whole_qkv() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return [torch.randn(2, 3, n, 8, generator=random, requires_grad=True) for n in (5, 7, 7)]


def placed(mesh: DeviceMesh) -> list[torch.Tensor]:
    return [
        DTensor.from_local(x.detach(), mesh, [Replicate()]).detach().requires_grad_()
        for x in whole_qkv()
    ]


def forward_and_backward(
    observer: Observer, qkv: list[torch.Tensor]
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    observer.phase = "forward"
    out = flex.flex_attention(*qkv)
    assert isinstance(out, torch.Tensor)
    observer.phase = "backward"
    return out, torch.autograd.grad(out, qkv, torch.ones_like(out))


def test_plain_tensors_pass(mesh: DeviceMesh, observer: Observer) -> None:
    expected = forward_and_backward(observer, whole_qkv())
    with observer.watch() as trace:
        got = forward_and_backward(observer, whole_qkv())
    torch.testing.assert_close(got, expected)
    assert not trace.missing


def test_a_refusal_inside_torch_compile_is_pytorchs_own(
    mesh: DeviceMesh, observer: Observer
) -> None:
    """What the observer notes is what the same call raises with attncheck out of the way."""
    with pytest.raises(Exception, match="no rule registered") as bare:
        flex.flex_attention(*placed(mesh))
    with (
        pytest.raises(Exception, match="no rule registered") as observed,
        observer.watch() as trace,
    ):
        forward_and_backward(observer, placed(mesh))
    assert type(observed.value) is type(bare.value)
    assert observer.refused(observed.value)
    assert compat.refusal(bare.value) == ("strategy", FORWARD)
    assert trace.missing == {(FORWARD, "forward", "strategy"): compat.refusal_sentence(bare.value)}
    assert trace.missing[FORWARD, "forward", "strategy"].startswith("There was no rule registered")
    assert trace.last_op == FORWARD


def test_other_exceptions_stay_exceptions(observer: Observer) -> None:
    with observer.watch() as trace:
        pass
    assert not observer.refused(RuntimeError("out of luck"))
    assert not trace.missing


def test_what_comes_after_a_replicated_op_is_no_refusal_of_its_own(observer: Observer) -> None:
    with observer.watch() as trace:
        trace.missing["aten.first.default", "forward", "strategy"] = "refused"
    assert not observer.refused(
        RuntimeError("aten.second.default got mixed torch.Tensor and DTensor")
    )
    assert len(trace.missing) == 1


@pytest.mark.usefixtures("uncompiled")
def test_without_torch_compile_every_missing_rule_is_named(
    mesh: DeviceMesh, observer: Observer
) -> None:
    expected = forward_and_backward(observer, whole_qkv())
    with observer.watch() as trace:
        out, grads = forward_and_backward(observer, placed(mesh))
    assert list(trace.missing) == [
        (FORWARD, "forward", "strategy"),
        (BACKWARD, "backward", "strategy"),
    ]
    got = [t.full_tensor() for t in (out, *grads) if isinstance(t, DTensor)]
    torch.testing.assert_close(got, [expected[0], *expected[1]])


@pytest.fixture
def rule(mesh: DeviceMesh) -> Iterator[None]:
    """A rule for DTensor that communicates."""
    op = torch.ops.higher_order.flex_attention

    def reduced(*args: Any) -> Any:
        local = [a.to_local() if isinstance(a, DTensor) else a for a in args]
        out, *rest = op(*local)
        gathered = torch.ops._c10d_functional.all_reduce(out, "sum", mesh.get_group().group_name)
        gathered = torch.ops._c10d_functional.wait_tensor(gathered)
        return tuple(DTensor.from_local(x, mesh, [Replicate()]) for x in (gathered, *rest))

    op.py_impl(DTensor)(reduced)
    yield
    del op.python_key_table[DTensor]


@pytest.mark.usefixtures("uncompiled", "rule")
def test_a_rule_for_dtensor_runs_and_its_communication_counts(
    mesh: DeviceMesh, observer: Observer
) -> None:
    expected = flex.flex_attention(*(x.detach() for x in whole_qkv()))
    qkv = [x.detach() for x in placed(mesh)]
    with observer.watch() as trace:
        observer.phase = "forward"
        out = flex.flex_attention(*qkv)
    assert not trace.missing
    assert [op.op for op in trace.kernel_ops()] == [FORWARD]
    assert [(c.name, c.kernel_op, c.count) for c in trace.communication()] == [
        ("all_reduce", FORWARD, 1)
    ]
    assert isinstance(out, DTensor)
    torch.testing.assert_close(out.to_local(), expected)


@pytest.mark.skipif(
    not hasattr(TorchDispatchMode, "ignore_compile_internals"),
    reason="torch.compile steps aside for every mode",
)
def test_torch_compile_compiles_under_the_observer(observer: Observer) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward  # type: ignore[no-any-return]

    compiled = torch.compile(lambda x: x.sin().cos(), backend=backend)
    with observer.watch():
        compiled(torch.ones(3))
    assert len(graphs) == 1
