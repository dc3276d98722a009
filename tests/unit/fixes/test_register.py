"""`attncheck.fixes.register`: what a module of its own does, without a file."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import pytest
import torch
from torch.distributed.tensor import DTensor

from attncheck import fixes
from attncheck.fixes.strategies import NotRegistered

CPU = "aten._scaled_dot_product_flash_attention_for_cpu.default"


@pytest.fixture(autouse=True)
def undone() -> Iterator[None]:
    yield
    fixes.unregister()


def strategies() -> dict[object, object]:
    tables: dict[object, object] = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
    return tables


def test_registers_what_matches_and_undoes_it() -> None:
    before = dict(strategies())
    became = fixes.register("aten.*_for_cpu*")
    assert became == {CPU: "registered", CPU.replace(".default", "_backward.default"): "registered"}
    assert torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default in strategies()
    assert set(fixes.register("aten.*_for_cpu*").values()) == {"registered before"}
    fixes.unregister()
    assert strategies() == before


def test_all_that_is_here() -> None:
    became = fixes.register()
    assert became[CPU] == "registered"
    assert became["flash_attn._flash_attn_forward.default"] == "absent"


def test_globs_that_match_nothing_are_refused() -> None:
    with pytest.raises(NotRegistered, match=r"No known kernel op matches 'nobodys\.\*'; known are"):
        fixes.register("nobodys.*")
    with pytest.raises(NotRegistered, match="import what registers it first"):
        fixes.register("npu.*")


def test_functions_of_imported_packages_are_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("sageattention")

    def sageattn(q: object, k: object, v: object) -> object:
        return q

    module.sageattn = sageattn  # type: ignore[attr-defined]
    assert "sageattention.sageattn" not in fixes.register()
    fixes.unregister()
    monkeypatch.setitem(sys.modules, "sageattention", module)
    assert fixes.register("sageattention.*")["sageattention.sageattn"] == "registered"
    assert module.sageattn is not sageattn
    fixes.unregister()
    assert module.sageattn is sageattn
