"""The flash-attn 4 probe: unavailable on a CPU, with its reasons, and the switch behind SDPA."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import real_scan
import torch

from attncheck.plugins import load_probe_file
from attncheck.runner import case as cases
from attncheck.runner import guard

PROBE_FILE = Path(__file__).parents[3] / "probes" / "flash_attn_4.py"
OPERATORS = {operator.name: operator for operator in load_probe_file(PROBE_FILE).operators}
SDPA = [OPERATORS["sdpa[FA4]"], OPERATORS["sdpa[FA3]"]]
has_switch = pytest.mark.skipif(
    not hasattr(torch.nn.attention, "activate_flash_attention_impl"),
    reason="this torch cannot activate flash attention implementations",
)

# Two operators of one worker: one whose call and backward need a switch, one that must not find it on.
SWITCHED = '''
"""Operators around a switch of the process."""

import contextlib

from attncheck.probing import Operator, Probe, Setting, Tensor

DIMS = ("batch", "heads", "sequence", "head_dim")
SIZES = {"batch": 6, "heads": 4, "sequence": 18, "head_dim": 16}
SWITCH = []


@contextlib.contextmanager
def switched():
    SWITCH.append("on")
    try:
        yield
    finally:
        SWITCH.clear()


def tensors(setting):
    return tuple(Tensor(n, DIMS, tuple(SIZES.values())) for n in "qkv")


def call(wanted, setting, t):
    import torch

    class Checked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            assert SWITCH == wanted
            return x * 2

        @staticmethod
        def backward(ctx, dx):
            assert SWITCH == wanted
            return dx * 2

    return Checked.apply(t["q"]) + t["k"] + t["v"]


def reference(setting, t):
    return t["q"] * 2 + t["k"] + t["v"]


def operator(name, wanted, **more):
    return Operator(
        name, tensors, lambda s, t: call(wanted, s, t), reference, (Setting("plain", SIZES),),
        placements=("replicate", "heads"), **more,
    )


PROBE = Probe(
    "switched", "operators around a switch",
    (operator("switched.on", ["on"], around=switched), operator("switched.off", [])),
)
'''


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """By operator."""
    folder = tmp_path_factory.mktemp("flash_attn_4")
    (folder / "switched.py").write_text(SWITCHED)
    report = real_scan.scan(
        folder, "--probe", str(folder / "switched.py"), "--operator", "switched.*",
        "--operator", "flash_attn_4", "--operator", "sdpa[FA*",
        codes=(0, 3),  # 8 of 16 cases cannot run
    )  # fmt: skip
    by_operator: dict[str, list[dict[str, Any]]] = {}
    for case in report["cases"]:
        by_operator.setdefault(case["operator"], []).append(case["outcome"])
    return by_operator


@pytest.mark.parametrize(
    ("operator", "count", "words"),
    [
        ("flash_attn_4", 4, "does not run on cpu: its CuTe kernels are compiled for NVIDIA GPUs"),
        ("sdpa[FA4]", 2, "does not run on cpu: the implementation is registered for CUDA tensors"),
        ("sdpa[FA3]", 2, "does not run on cpu: the implementation is registered for CUDA tensors"),
    ],
)
def test_unavailable_on_a_cpu(
    outcomes: dict[str, list[dict[str, Any]]], operator: str, count: int, words: str
) -> None:
    assert len(outcomes[operator]) == count
    for outcome in outcomes[operator]:
        assert (outcome["status"], outcome["reason"]) == ("unavailable", "device_missing")
        assert words in outcome["message"]


def test_a_switch_holds_for_its_operator_alone(outcomes: dict[str, list[dict[str, Any]]]) -> None:
    for operator in ("switched.on", "switched.off"):
        assert [o["status"] for o in outcomes[operator]] == ["supported"] * 4, outcomes[operator]


class Implementation:
    """What `register_flash_attention_impl` takes: counts how often it is put on and taken off."""

    def __init__(self) -> None:
        self.on = self.off = 0

    def __call__(self) -> Implementation:
        self.on += 1
        return self

    def remove(self) -> None:
        self.off += 1


@has_switch
def test_the_implementation_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import _registry as registry
    from torch.nn.attention import (
        activate_flash_attention_impl,
        current_flash_attention_impl,
        register_flash_attention_impl,
        restore_flash_attention_impl,
    )

    monkeypatch.setattr(registry, "_FLASH_ATTENTION_IMPLS", dict(registry._FLASH_ATTENTION_IMPLS))
    fake, other = Implementation(), Implementation()
    register_flash_attention_impl("FA4", register_fn=fake)
    register_flash_attention_impl("other", register_fn=other)
    around, missing = SDPA[0].around, SDPA[0].missing
    assert around is not None
    assert missing is not None
    assert missing() == ""
    with around():
        assert current_flash_attention_impl() == "FA4"
    assert current_flash_attention_impl() is None
    assert (fake.on, fake.off) == (2, 2)
    with pytest.raises(RuntimeError, match="from inside"), around():
        raise RuntimeError("from inside")
    assert (fake.on, fake.off) == (3, 3)
    activate_flash_attention_impl("other")
    try:
        with around():
            assert current_flash_attention_impl() == "FA4"
        assert current_flash_attention_impl() == "other"
    finally:
        restore_flash_attention_impl()


@has_switch
def test_without_the_package_the_reason_says_so() -> None:
    for operator, module, words in (
        (SDPA[0], "flash_attn", "No module named 'flash_attn'"),
        (SDPA[1], "flash_attn_interface", "flash-attn 3 .* is on no package index"),
    ):
        if importlib.util.find_spec(module) is not None:
            continue
        assert operator.missing is not None
        with pytest.raises(ModuleNotFoundError, match=words):
            operator.missing()
        assert torch.nn.attention.current_flash_attention_impl() is None


def test_a_torch_without_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = SDPA[0].missing
    assert missing is not None
    monkeypatch.setattr(
        torch.nn.attention, "list_flash_attention_impls", lambda: ["FA3"], raising=False
    )
    monkeypatch.setattr(
        torch.nn.attention, "activate_flash_attention_impl", lambda name: None, raising=False
    )
    assert missing() == ("this PyTorch knows no flash attention implementation FA4, only ['FA3']")
    monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    assert missing() == "this PyTorch has no torch.nn.attention.activate_flash_attention_impl"


@pytest.mark.parametrize("setting", SDPA[0].settings, ids=lambda s: s.name)
def test_the_reference_of_sdpa_is_right(setting: Any) -> None:
    """PyTorch's own flash kernel on a CPU has the conventions of the one that is replaced on a GPU."""
    torch.manual_seed(0)
    tensors = {t.name: torch.randn(t.sizes) for t in SDPA[0].tensors(setting)}
    doubles = {name: t.double() for name, t in tensors.items()}
    torch.testing.assert_close(
        SDPA[0].call(setting, tensors),
        SDPA[0].reference(setting, doubles).float(),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.fixture
def cute(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the package's shape: `flash_attn_func` over `interface._flash_attn_fwd`."""
    from attncheck.runner.reference import attention

    modules = [
        ModuleType(n) for n in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")
    ]
    package, module, interface = modules

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Any:
        assert q.dtype != torch.float64, "inputs must be float16, bfloat16"
        aligned = "bottom_right" if causal else None
        return attention(q, k, v, layout="bshd", causal=aligned), None

    def flash_attn_func(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False
    ) -> Any:
        return interface._flash_attn_fwd(q, k, v, causal)

    interface._flash_attn_fwd = forward  # type: ignore[attr-defined]
    interface._flash_attn_bwd = lambda *tensors: tensors  # type: ignore[attr-defined]
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    module.interface = interface  # type: ignore[attr-defined]
    package.cute = module  # type: ignore[attr-defined]
    for each in modules:
        monkeypatch.setitem(sys.modules, each.__name__, each)
    return interface


@pytest.mark.parametrize("setting", OPERATORS["flash_attn_4"].settings, ids=lambda s: s.name)
def test_the_call_and_its_reference_fit(cute: ModuleType, setting: Any) -> None:
    operator = OPERATORS["flash_attn_4"]
    for target in operator.bypasses:
        guard.protect(target)
    prepared = cases.prepare(operator, setting, seed=3, device="cpu")
    assert prepared.refused is None
    reference = cases.run_reference(prepared, seed=3)
    for name, want in reference.items():
        got = prepared.unsharded[name]
        bound = 16 * torch.finfo(got.dtype).eps * float(want.abs().max())
        assert float((got.double() - want).abs().max()) <= bound, name


def test_what_the_package_refuses_by_assertion_is_a_refusal(cute: ModuleType) -> None:
    operator = OPERATORS["flash_attn_4"]
    q = torch.zeros(1, 4, 2, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"flash_attn\.cute refuses: inputs must be float16"):
        operator.call(operator.settings[0], {"q": q, "k": q, "v": q})


def test_no_dtensor_reaches_the_kernels(cute: ModuleType) -> None:
    """The two functions that take data pointers are guarded, and the call goes through them."""
    operator = OPERATORS["flash_attn_4"]
    for target in operator.bypasses:
        guard.protect(target)
    before = cute._flash_attn_fwd
    seen = []
    cute._flash_attn_fwd = lambda *args: seen.append(args) or before(*args)
    q = torch.zeros(1, 4, 2, 8)
    operator.call(operator.settings[0], {"q": q, "k": q, "v": q})
    assert len(seen) == 1
    assert [t.partition(":")[2] for t in operator.bypasses] == [
        "_flash_attn_fwd",
        "_flash_attn_bwd",
    ]
