"""What is told of what was recorded: folded, a step's worth, with a line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attncheck.audit.seen import (
    BACKWARD,
    FORWARD,
    Argument,
    Attention,
    Facts,
    Op,
    Seen,
    Told,
    Traffic,
    Uneven,
    told,
)
from attncheck.audited import ModuleCommunication, ModuleOp, UnevenShard
from attncheck.runner.placements import chunk_bounds

PATHS = ["", "blocks", *(f"blocks.{n}{part}" for n in range(3) for part in ("", ".attn", ".norm"))]
HEADS = (("S(1)",), ("S(1)",), ("S(1)",))
SDPA = "aten._scaled_dot_product_flash_attention.default"
OP = Op(SDPA, FORWARD, HEADS, (("S(1)",),))
GATHER = Traffic("all_gather", BACKWARD, SDPA)
REDUCE = Traffic("all_reduce", FORWARD, "")
CALL = Attention(SDPA, (Argument("query", (2, 8, 16, 64), "bfloat16", ("S(1)",)),), "{}")
ATTENTION = ("blocks.0.attn", "blocks.1.attn", "blocks.2.attn")


def test_forty_layers_are_told_once() -> None:
    facts = Facts(
        ops={OP: dict.fromkeys(ATTENTION, 2)},
        traffic={GATHER: {path: [3, 300] for path in ATTENTION}, REDUCE: {"blocks.1": [1, 64]}},
        attention={CALL: dict.fromkeys(ATTENTION, 1)},
    )
    assert told(facts, PATHS) == Told(
        layers={"blocks.*": 3, "blocks.*.attn": 3, "blocks.*.norm": 3},
        ops=(ModuleOp("blocks.*.attn", SDPA, FORWARD, HEADS, (("S(1)",),), 6),),
        communication=(
            ModuleCommunication("blocks.*.attn", "all_gather", BACKWARD, 9, 900, SDPA, asked=False),
            ModuleCommunication("blocks.1", "all_reduce", FORWARD, 1, 64, asked=True),
        ),
        uneven=(),
        attention=(Seen(CALL, ("blocks.*.attn",), 3),),
    )


def test_what_layers_do_differently_is_told_apart() -> None:
    refused = Op(SDPA, FORWARD, HEADS, (), "strategy", "has no strategy")
    facts = Facts(ops={OP: {"blocks.0.attn": 1, "blocks.2.attn": 1}, refused: {"blocks.1.attn": 1}})
    (taken, failed) = told(facts, PATHS).ops
    assert (taken.module, taken.problem) == ("blocks.[0,2].attn", "")
    assert (failed.module, failed.problem, failed.message) == (
        "blocks.1.attn",
        "strategy",
        "has no strategy",
    )


@pytest.mark.parametrize(
    ("seen", "steps", "a_step"),
    [(3, 1, 3), (9, 3, 3), (10, 3, 3), (11, 3, 4), (1, 3, 1), (0, 3, 0)],
)
def test_counts_are_those_of_one_step(seen: int, steps: int, a_step: int) -> None:
    """What came in the first step alone came once a step: it is not left out."""
    facts = Facts(
        ops={OP: {"blocks": seen}},
        traffic={GATHER: {"blocks": [seen, seen * 3000]}},
        attention={CALL: {"blocks": seen}},
    )
    said = told(facts, PATHS, steps)
    assert said.ops[0].calls == said.attention[0].calls == a_step
    assert said.communication[0].calls == a_step
    assert said.communication[0].bytes == seen * 3000 // steps


def test_a_step_is_that_of_all_modules_together() -> None:
    """Two calls of three in each of three steps are two of a step, not three rounded ones."""
    facts = Facts(ops={OP: dict.fromkeys(ATTENTION, 2)})
    assert told(facts, PATHS, steps=3).ops[0].calls == 2


def test_the_line_of_the_first_module_that_has_one() -> None:
    facts = Facts(ops={OP: dict.fromkeys(ATTENTION, 1)}, traffic={REDUCE: {"blocks.1": [1, 64]}})
    facts.lines[OP, "blocks.1.attn"] = "wan.py:41"
    facts.lines[REDUCE, "blocks.1"] = "wan.py:50"
    facts.lines[OP, "blocks.2"] = "another.py:1"
    said = told(facts, PATHS)
    assert said.ops[0].line == "wan.py:41"
    assert said.communication[0].line == "wan.py:50"


# --- uneven shards -------------------------------------------------------------------------------


def uneven(*found: Uneven) -> tuple[UnevenShard, ...]:
    return told(Facts(uneven=dict.fromkeys(found)), PATHS).uneven


@given(st.integers(0, 300), st.integers(1, 64))
def test_what_the_first_and_the_last_rank_hold(size: int, ranks: int) -> None:
    (shard,) = uneven(Uneven("blocks.1.attn", SDPA, 1, size, "tp", ranks))
    assert shard == UnevenShard(
        f"blocks.1.attn: {SDPA}",
        *(1, size, "tp", ranks),
        first=chunk_bounds(size, ranks, 0)[1],
        last=size - chunk_bounds(size, ranks, ranks - 1)[0],
    )


def test_the_parameters_of_all_layers_are_told_once() -> None:
    found = (Uneven(f"blocks.{n}.attn.weight", "", 0, 10, "tp", 4) for n in range(3))
    assert [shard.tensor for shard in uneven(*found)] == ["blocks.*.attn.weight"]
    assert [shard.tensor for shard in uneven(Uneven("scale", "", 0, 10, "tp", 4))] == ["scale"]


def test_every_parameter_is_told() -> None:
    found = uneven(
        Uneven("blocks.0.attn.weight", "", 0, 10, "tp", 4),
        Uneven("blocks.0.attn.bias", "", 0, 10, "tp", 4),
        Uneven("blocks.0.attn.weight", "", 0, 10, "dp", 3),
    )
    assert [(shard.tensor, shard.axis) for shard in found] == [
        ("blocks.0.attn.weight", "tp"),
        ("blocks.0.attn.bias", "tp"),
        ("blocks.0.attn.weight", "dp"),
    ]


def test_an_activation_is_told_where_it_is_met_first() -> None:
    """By all the layers that do what the first one does; what comes after it has its size from there."""
    norm, matmul = "aten.native_layer_norm.default", "aten.mm.default"
    found = uneven(
        Uneven("blocks.0.norm", norm, 1, 10, "tp", 4),
        Uneven("blocks.0.attn", matmul, 0, 10, "tp", 4),
        Uneven("blocks.0.attn", matmul, 0, 10, "cp", 4),
        *(Uneven(f"blocks.{n}.norm", norm, 1, 10, "tp", 4) for n in (1, 2)),
    )
    assert [(shard.tensor, shard.axis) for shard in found] == [
        (f"blocks.*.norm: {norm}", "tp"),
        (f"blocks.0.attn: {matmul}", "cp"),
    ]


# --- anything ------------------------------------------------------------------------------------

COUNTS = st.dictionaries(st.sampled_from(PATHS), st.integers(1, 9), min_size=1)
OPS = st.builds(Op, st.sampled_from([SDPA, "aten.mm.default"]), st.sampled_from([FORWARD, BACKWARD]),
                st.just(HEADS), st.just(()))  # fmt: skip


@given(st.dictionaries(OPS, COUNTS, max_size=4), st.dictionaries(st.just(REDUCE), COUNTS))
def test_nothing_is_lost_or_told_twice(
    ops: dict[Op, dict[str, int]], counts: dict[Traffic, dict[str, int]]
) -> None:
    traffic = {kind: {p: [n, n * 10] for p, n in own.items()} for kind, own in counts.items()}
    said = told(Facts(ops=ops, traffic=traffic), PATHS)
    assert sum(op.calls for op in said.ops) == sum(sum(own.values()) for own in ops.values())
    total = sum(sum(own.values()) for own in counts.values())
    assert sum(each.calls for each in said.communication) == total
    assert sum(each.bytes for each in said.communication) == total * 10
