"""The KV cache probe: its description, its cases. `test_flash_attn_versions.py` runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from attncheck.plan import Selection, plan
from attncheck.plugins import load_probe_file
from attncheck.probing import Setting

PROBE = load_probe_file(Path(__file__).parents[3] / "probes" / "flash_attn_kvcache.py")
(OPERATOR,) = PROBE.operators


def test_it_has_no_backward() -> None:
    default = plan((PROBE,), {"tp": 2}, Selection())
    assert {case.direction for case in default} == {"forward"}
    assert 20 <= len(default) <= 35
    assert not any(t.requires_grad for s in OPERATOR.settings for t in OPERATOR.tensors(s))


def test_default_covers_what_users_hit() -> None:
    default = {case.setting_name for case in plan((PROBE,), {"tp": 2}, Selection())}
    assert default >= {"plain", "append", "gqa", "rotary", "paged", "cache_batch_idx", "lse"}


@pytest.mark.parametrize("setting", OPERATOR.settings, ids=lambda s: s.name)
def test_settings_fit_together(setting: Setting) -> None:
    """Room for what is appended, tables long enough, and no page written by two sequences."""
    tensors = {t.name: t for t in OPERATOR.tensors(setting)}
    options = setting.options
    new = setting["sequence"] if options.get("append") else 0
    lengths = options["cache_seqlens"]
    lengths = lengths if isinstance(lengths, list) else [lengths] * setting["batch"]
    assert len(lengths) == setting["batch"]
    assert max(lengths) + new <= setting["kv_sequence"]
    assert tensors["k_cache"].mutable
    assert tensors["v_cache"].mutable
    if "cache_seqlens" in tensors:
        assert tensors["cache_seqlens"].values == tuple(lengths)
    if "rotary" in options:
        assert tensors["rotary_cos"].sizes == (setting["kv_sequence"], options["rotary_dim"] // 2)
        assert options["rotary_dim"] <= setting["head_dim"]
    if "cache_batch_idx" in options:
        rows = options["cache_batch_idx"]
        assert len(set(rows)) == len(rows) == setting["batch"]
        assert max(rows) < tensors["k_cache"].sizes[0]
    if "block_table" in options:
        rows_of_page = tensors["k_cache"].sizes[1]
        assert rows_of_page % 256 == 0
        used = [
            page
            for table, length in zip(options["block_table"], lengths, strict=True)
            for page in table[: -(-(length + new) // rows_of_page)]
        ]
        assert len(set(used)) == len(used)
        assert max(used) < tensors["k_cache"].sizes[0]


def test_the_cache_is_sharded_as_the_query_is() -> None:
    by_id = {case.id: case for case in plan((PROBE,), {"tp": 2}, Selection(level="full"))}
    prefix = "flash_attn_kvcache/flash_attn_with_kvcache"
    heads = by_id[f"{prefix}/rotary/dtensor/tp=2/heads/forward"].placements
    assert heads["q"] == heads["k_cache"] == heads["v"] == ("S(2)",)
    assert heads["cache_seqlens"] == heads["rotary_cos"] == ("R",)
    batch = by_id[f"{prefix}/append/dtensor/tp=2/batch/forward"].placements
    assert set(batch.values()) == {("S(0)",)}
    paged = by_id[f"{prefix}/paged/dtensor/tp=2/heads/forward"].placements
    assert paged["k_cache"] == ("S(2)",)
    assert paged["block_table"] == ("R",)
