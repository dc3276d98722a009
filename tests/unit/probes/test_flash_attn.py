"""The flash-attn probe: its description. `test_flash_attn_versions.py` runs it on the real package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from attncheck.model import Case
from attncheck.plan import Selection, plan
from attncheck.plugins import load_probe_file
from attncheck.probing import OTHER, Operator, Probe, Setting

REPOSITORY = Path(__file__).parents[3]
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
    assert 190 <= len(default) <= 220
    assert len({case.operator for case in default}) == 6
    assert len(cases("full")) > len(default)


def test_default_covers_what_users_hit() -> None:
    default = {case.setting_name for case in cases("default") if case.operator == "flash_attn_func"}
    assert default >= {
        "plain", "causal", "window", "softcap", "alibi", "gqa", "mqa", "gqa_uneven_kv",
        "uneven_heads", "batch_1", "head_dim_20", "scale", "bfloat16", "float16", "attn_probs",
        "dropout",
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
    wanted = {t.name for t in tensors if t.dtype is None}
    if setting.dropout:
        wanted = {"v"}  # q is 0, v the identity: runner.oracle.judge_dropout
    elif setting.name == "paged":
        wanted = set()  # flash-attn has no backward for pages
    assert {t.name for t in tensors if t.requires_grad} == wanted


def by_name(operator: str) -> Operator:
    return next(o for o in load().operators if o.name == operator)


def test_varlen_sequences_fill_the_tokens() -> None:
    operator = by_name("flash_attn_varlen_func")
    for setting in operator.settings:
        tensors = {t.name: t for t in operator.tensors(setting)}
        if setting.name == "paged":
            continue
        for name, tokens in (("cu_seqlens_q", tensors["q"]), ("cu_seqlens_k", tensors["k"])):
            assert tensors[name].values[-1] == tokens.sizes[0]
            assert tensors[name].dtype == "int32"
            wanted = "plain" if setting.name == "cu_seqlens_plain" else "replicate"
            assert tensors[name].wrap == wanted
        assert tensors["q"].sizes[0] // 2 not in tensors["cu_seqlens_q"].values


def test_packed_sequences_fill_the_tokens_too() -> None:
    for name, first in (("qkvpacked", "cu_seqlens"), ("kvpacked", "cu_seqlens_q")):
        operator = by_name(f"flash_attn_varlen_{name}_func")
        for setting in operator.settings:
            tensors = {t.name: t for t in operator.tensors(setting)}
            tokens = [t.sizes[0] for t in tensors.values() if t.requires_grad]
            ends = [t.values[-1] for n, t in tensors.items() if n.startswith("cu_seqlens")]
            assert tokens == ends
            assert first in tensors


def test_pages_are_named_once_by_who_reads_them() -> None:
    operator = by_name("flash_attn_varlen_func")
    (setting,) = (s for s in operator.settings if s.name == "paged")
    tensors = {t.name: t for t in operator.tensors(setting)}
    pages, rows = tensors["k"].sizes[:2]
    assert rows % 256 == 0
    assert max(tensors["block_table"].values) < pages
    assert max(setting.options["kv_lengths"]) <= tensors["block_table"].sizes[1] * rows
    assert sum(setting.options["kv_lengths"]) == setting["kv_sequence"]


def test_every_operator_is_guarded_and_has_its_stand_in() -> None:
    for operator in load().operators:
        assert operator.bypasses == ("flash_attn_2_cuda",)
        assert operator.standins == ("flash_attn_2_cuda",)
        assert operator.packages == ("flash-attn>=2.5.9",)
        assert operator.function == f"flash_attn.{operator.name}"


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
