"""The flash-attn probe: its description, and every setting on the real package against its
reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attncheck import provision
from attncheck.model import Case
from attncheck.plan import Selection, plan
from attncheck.plugins import load_probe_file
from attncheck.probing import OTHER, Operator, Probe, Setting

REPOSITORY = Path(__file__).parents[3]
VERSIONS = ("2.7.4.post1", "2.8.3.post2")
MESH = {"tp": 2}


def load() -> Probe:
    return load_probe_file(REPOSITORY / "probes" / "flash_attn.py")


def cases(level: str) -> tuple[Case, ...]:
    return plan((load(),), MESH, Selection(level=level))


def pairs() -> list[tuple[Operator, Setting]]:
    return [(operator, setting) for operator in load().operators for setting in operator.settings]


def test_loads_without_torch_and_without_flash_attn() -> None:
    code = (
        "import sys; from pathlib import Path; from attncheck.plugins import load_probe_file; "
        f"load_probe_file(Path({str(REPOSITORY / 'probes' / 'flash_attn.py')!r})); "
        "sys.exit(bool({'torch', 'flash_attn'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_levels_have_their_sizes() -> None:
    """Quick stays a matter of seconds; default covers every function."""
    quick = cases("quick")
    assert {case.operator for case in quick} == {"flash_attn_func"}
    assert {case.setting_name for case in quick} == {"plain", "causal"}
    assert {case.placement for case in quick} == {"replicate", "batch", "heads"}
    assert len(quick) == 12
    default = cases("default")
    assert 150 <= len(default) <= 190
    assert len({case.operator for case in default}) == 4
    assert len(cases("full")) > len(default)


def test_default_covers_what_users_hit() -> None:
    default = {case.setting_name for case in cases("default") if case.operator == "flash_attn_func"}
    assert default >= {
        "plain", "causal", "window", "softcap", "alibi", "gqa", "mqa", "gqa_uneven_kv",
        "uneven_heads", "batch_1", "head_dim_20", "scale", "bfloat16", "float16",
    }  # fmt: skip


@pytest.mark.parametrize(("operator", "setting"), pairs(), ids=lambda x: x.name)
def test_sizes_hide_nothing(operator: Operator, setting: Setting) -> None:
    """No two dims of q have the same size or the same half: a wrong split cannot fit by chance."""
    tensors = operator.tensors(setting)
    q = tensors[0]
    sizes = [s for role, s in zip(q.dims, q.sizes, strict=True) if role != OTHER]
    halves = [-(-s // 2) for s in sizes]
    assert len(set(sizes)) == len(sizes)
    assert len(set(halves)) == len(halves)
    assert setting["heads"] % setting["kv_heads"] == 0
    assert {t.name for t in tensors if t.requires_grad} == {
        t.name for t in tensors if t.dtype is None
    }


def test_varlen_sequences_fill_the_tokens() -> None:
    operator = load().operators[-1]
    for setting in operator.settings:
        tensors = {t.name: t for t in operator.tensors(setting)}
        for name, tokens in (("cu_seqlens_q", tensors["q"]), ("cu_seqlens_k", tensors["k"])):
            assert tensors[name].values[-1] == tokens.sizes[0]
            assert tensors[name].dtype == "int32"
            wanted = "plain" if setting.name == "cu_seqlens_plain" else "replicate"
            assert tensors[name].wrap == wanted
        assert tensors["q"].sizes[0] // 2 not in tensors["cu_seqlens_q"].values


def test_placements_mean_the_right_dims() -> None:
    by_id = {case.id: case for case in cases("full")}
    dense = by_id["flash_attn/flash_attn_func/alibi/dtensor/tp=2/heads/forward"]
    assert dense.placements == {
        "q": ("S(2)",), "k": ("S(2)",), "v": ("S(2)",), "alibi_slopes": ("S(0)",),
    }  # fmt: skip
    packed = by_id["flash_attn/flash_attn_qkvpacked_func/plain/dtensor/tp=2/heads/forward"]
    assert packed.placements == {"qkv": ("S(3)",)}
    varlen = by_id["flash_attn/flash_attn_varlen_func/cu_seqlens_plain/dtensor/tp=2/heads/forward"]
    assert varlen.placements["cu_seqlens_q"] == ("plain",)
    assert varlen.placements["q"] == ("S(1)",)


@pytest.fixture(scope="module", params=VERSIONS)
def measured(request: pytest.FixtureRequest) -> dict[str, dict[str, list[float]]]:
    """{operator/setting: {tensor: [error, bound]}} of the real package on the stand-in,
    unsharded."""
    folder = provision.ensure(provision.parse(f"flash-attn=={request.param}"), log=print)
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("flash_attn_errors.py"))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    report: dict[str, dict[str, list[float]]] = json.loads(run.stdout)
    return report


def test_every_setting_agrees_with_its_reference(
    measured: dict[str, dict[str, list[float]]],
) -> None:
    assert set(measured) == {f"{operator.name}/{setting.name}" for operator, setting in pairs()}
    for name, errors in measured.items():
        assert "out" in errors
        assert any(tensor.startswith("grad.") for tensor in errors)
        for tensor, (error, bound) in errors.items():
            assert error <= bound, f"{name}, {tensor}: {error} above {bound}"
