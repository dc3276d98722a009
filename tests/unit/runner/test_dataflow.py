"""Functions that fill their output behind the dispatcher's back, and those that only look like it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from attncheck.runner.dataflow import bypasses_dispatcher

Q, K, V = (torch.randn(2, 3, 4, 8) for _ in range(3))


def raw_copy(out: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """What a compiled kernel does: reads and writes memory by its address."""
    out.numpy()[:] = source.numpy()
    return out


def filled_behind() -> torch.Tensor:
    return raw_copy(torch.empty_like(Q), Q)


def filled_behind_after_ops() -> torch.Tensor:
    """Padded, filled, transposed: ops before and after do not make it a dispatcher op."""
    padded = F.pad(Q, (0, 8))
    return raw_copy(torch.zeros_like(padded), padded)[..., :8].transpose(1, 2)


def by_ops() -> torch.Tensor:
    return F.scaled_dot_product_attention(Q, K, V)


def written_in_place() -> torch.Tensor:
    out = torch.zeros_like(Q)
    out[:, :2] = Q[:, :2]
    return out


def compiled() -> torch.Tensor:
    return torch.compile(by_ops)()


def raises() -> torch.Tensor:
    raise RuntimeError


@pytest.mark.parametrize("call", [filled_behind, filled_behind_after_ops])
def test_recognised(call: Callable[[], torch.Tensor]) -> None:
    assert bypasses_dispatcher(lambda: {"out": call()}, (Q, K, V))


@pytest.mark.parametrize("call", [by_ops, written_in_place, compiled, raises, lambda: Q.view(-1)])
def test_silent(call: Callable[[], torch.Tensor]) -> None:
    assert not bypasses_dispatcher(lambda: {"out": call()}, (Q, K, V))


def _fill(q: torch.Tensor, out: torch.Tensor) -> None:
    raw_copy(out, q)


def test_custom_ops_are_dispatcher_ops() -> None:
    with torch.library._scoped_library("attncheck_dataflow", "FRAGMENT") as library:
        library.define("fill(Tensor q, Tensor(a!) out) -> ()")
        library.impl("fill", _fill, "CPU")

        def call() -> torch.Tensor:
            out = torch.empty_like(Q)
            torch.ops.attncheck_dataflow.fill(Q, out)
            return out

        assert not bypasses_dispatcher(lambda: {"out": call()}, (Q,))
