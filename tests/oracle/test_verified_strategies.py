"""The strategies written by hand are right: each row, piece by piece, without DTensor; and they go away."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import verified_strategies as strategies

HERE = Path(__file__).parent


def test_rows_follow_from_the_table() -> None:
    op = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    shapes = {"query": (7, 12, 5, 8), "key": (7, 6, 9, 8), "value": (7, 6, 9, 8)}
    shapes["attn_mask"] = (1, 12, 5, 9)
    replicate, batch, heads = strategies.rows(op, shapes, 2)
    assert set(replicate.arguments.values()) == {None}
    assert batch.arguments == {"query": 0, "key": 0, "value": 0, "attn_mask": None}  # it broadcasts
    assert heads.arguments == {"query": 1, "key": 1, "value": 1, "attn_mask": 1}
    assert heads.results == (1, 1)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "offered"),
    [
        (12, 6, 2, True),
        (12, 3, 2, False),  # the trap: 6 query heads, and 2 and 1 kv heads
        (12, 6, 4, False),
        (5, 5, 2, True),  # uneven, but each head has its own
        (5, 5, 4, False),  # the fourth rank would be empty
    ],
)
def test_no_group_of_heads_is_torn(heads: int, kv_heads: int, ranks: int, offered: bool) -> None:
    op = "flash_attn._flash_attn_forward.default"
    shapes = {"q": (8, 4, heads, 8), "k": (8, 6, kv_heads, 8), "v": (8, 6, kv_heads, 8)}
    patterns = [row.pattern for row in strategies.rows(op, shapes, ranks)]
    assert ("heads" in patterns) is offered


def test_the_gradient_of_a_bias_that_broadcasts_is_a_sum() -> None:
    op = "aten._efficient_attention_backward.default"
    q, lse = (4, 5, 6, 8), (4, 6, 32)
    shapes = dict.fromkeys(("grad_out_", "query", "key", "value", "out"), q)
    shapes |= {"bias": (4, 1, 5, 5), "logsumexp": lse}
    by_pattern = {row.pattern: row.results for row in strategies.rows(op, shapes, 2)}
    assert by_pattern == {"replicate": (None,) * 4, "batch": (0,) * 4, "heads": (2, 2, 2, "sum")}


def test_registered_and_undone() -> None:
    from torch.distributed.tensor import DTensor

    from attncheck.runner import compat

    name = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    op = compat.find_overload(name)
    propagator = DTensor._op_dispatcher.sharding_propagator
    before = dict(propagator.op_strategy_funcs), dict(propagator.op_to_schema_info)
    assert not compat.has_strategy(op)
    with strategies.registered(name):
        assert compat.has_strategy(op)
    assert not compat.has_strategy(op)
    assert (propagator.op_strategy_funcs, propagator.op_to_schema_info) == before


def gaps(*operators: str) -> dict[str, dict[str, float]]:
    import verify_strategies

    return verify_strategies.main(operators)


def test_rows_are_right_piece_by_piece() -> None:
    """What needs no package: dense, packed, masks, a bias that broadcasts and its gradient."""
    found = gaps("verified.sdpa[FLASH_ATTENTION]", "verified.sdpa_cuda.raw_efficient")
    assert len(found) == 4  # two forwards, two backwards
    assert {f"{row} on 3" for row in strategies.PATTERNS} <= set(min(found.values(), key=len))
    wrong = {op: row for op, rows in found.items() for row, gap in rows.items() if gap > 1e-5}
    assert not wrong


@pytest.mark.parametrize("op", ["aten._scaled_dot_product_flash_attention_for_cpu.default"])
def test_a_wrong_row_shows(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    from dataclasses import replace

    table = strategies.TABLES[op]
    out, _ = table.results
    wrong = replace(table, results=(out, strategies.dims("h b -")))
    monkeypatch.setitem(strategies.TABLES, op, wrong)
    assert max(gaps("verified.sdpa[FLASH_ATTENTION]")[op].values()) > 0.1


@pytest.mark.slow
def test_all_rows_are_right_with_the_real_packages() -> None:
    import json
    import os

    from attncheck import provision

    folders = [
        provision.ensure(provision.parse(package), log=print)
        for package in ("flash-attn", "xformers")
    ]
    done = subprocess.run(
        [sys.executable, str(HERE / "verify_strategies.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*folders, HERE.parents[1])))},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert set(found) == set(strategies.TABLES)
    assert not {op for op, rows in found.items() if max(rows.values()) > 1e-5}
