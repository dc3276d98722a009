"""The search without any process: planted failures are functions of the example."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from attncheck.hunt.finds import Find, causes_of, in_words, is_known, kinds_of, refusals_in
from attncheck.hunt.search import BELIEVED, SHRINK_DEAR_RUNS, Over, Search
from attncheck.hunt.strategy import Space, templates
from attncheck.model import CaseResult, Fact, MissingOp, Outcome, Reason, Report, Status
from attncheck.probing import (
    BATCH,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    KV_SEQUENCE,
    SEQUENCE,
    Operator,
    Setting,
    Tensor,
)
from attncheck.runner.rundir import Asked

Q = (BATCH, HEADS, SEQUENCE, HEAD_DIM)
KV = (BATCH, KV_HEADS, KV_SEQUENCE, HEAD_DIM)
SIZES = {"batch": 6, "heads": 4, "kv_heads": 4, "sequence": 18, "kv_sequence": 22, "head_dim": 16}
MESHES: tuple[Mapping[str, int], ...] = (
    {"tp": 1}, {"tp": 2}, {"tp": 3}, {"tp": 4}, {"dp": 2, "tp": 2},
)  # fmt: skip
EXAMPLES = 250

OK = Outcome(Status.SUPPORTED)


def tensors(setting: Setting) -> tuple[Tensor, ...]:
    if setting.get("causal") and setting["sequence"] != setting["kv_sequence"]:
        raise ValueError("this probe has square causal masks only")
    return (
        Tensor("q", Q, tuple(setting[r] for r in Q)),
        Tensor("k", KV, tuple(setting[r] for r in KV)),
        Tensor("v", KV, tuple(setting[r] for r in KV)),
    )


def never(*_: object) -> None:
    raise AssertionError("a search calls no operator")


OPERATOR = Operator(
    "planted",
    tensors=tensors,
    call=never,  # type: ignore[arg-type]
    reference=never,  # type: ignore[arg-type]
    settings=(
        Setting("causal", SIZES, options={"causal": True}),
        Setting("plain", SIZES),
        Setting("half", SIZES, "bfloat16"),
    ),
)


def wrong(op: str = "planted.op.default") -> Outcome:
    fact = Fact("wrong_result", "out", "max error 1")
    return Outcome(Status.WRONG, "wrong_result out", kernel_op=op, facts=(fact,))


def search(
    execute: Callable[[Asked], Outcome], seed: int = 1, examples: int = EXAMPLES, free: bool = True
) -> tuple[list[Find], Search]:
    now = time.monotonic()
    space = Space((("probe", OPERATOR),), MESHES, free)
    hunt = Search(space, execute, seed, now, now + 3600, examples)
    return list(hunt.run()), hunt


def ranks(asked: Asked) -> int:
    total = 1
    for size in asked.case.mesh.values():
        total *= size
    return total


def has_empty_shard(asked: Asked) -> bool:
    return "empty shard" in causes_of(asked, OPERATOR)


# What is planted, and its smallest case in words.
PLANTED: dict[str, tuple[Callable[[Asked], bool], Outcome, str]] = {
    "kv_sequence is odd and there are 3 ranks": (
        lambda a: a.setting["kv_sequence"] % 2 == 1 and ranks(a) == 3,
        wrong(),
        "forward, tp=3, replicate; batch 1, heads 1, kv_heads 1, sequence 3, kv_sequence 3, "
        "head_dim 8, float32",
    ),
    "tensors are not contiguous": (
        lambda a: a.setting.memory != "contiguous",
        wrong(),
        "forward, tp=1, replicate; batch 1, heads 1, kv_heads 1, sequence 1, kv_sequence 2, "
        "head_dim 8, float32, transposed memory",
    ),
    "a shard is empty": (
        has_empty_shard,
        Outcome(Status.CRASH, "the process died inside planted.op.default"),
        "forward, tp=2, batch; batch 1, heads 1, kv_heads 1, sequence 1, kv_sequence 2, "
        "head_dim 8, float32",
    ),
    "k is sharded otherwise than v": (
        lambda a: a.case.placements["k"] != a.case.placements["v"],
        wrong(),
        "forward, tp=1, each tensor placed by itself; batch 1, heads 1, kv_heads 1, sequence 1, "
        "kv_sequence 2, head_dim 8, float32; q R, k R, v S(0)",
    ),
    "6 query heads or more share 2 kv heads, in backward": (
        lambda a: (
            a.case.direction == "backward"
            and a.setting["kv_heads"] == 2
            and a.setting["heads"] >= 6
        ),
        wrong(),
        "backward, tp=1, replicate; batch 1, heads 6, kv_heads 2, sequence 1, kv_sequence 2, "
        "head_dim 8, float32",
    ),
    "a causal mask in half precision with heads sharded": (
        lambda a: (
            bool(a.setting.get("causal"))
            and a.setting.dtype != "float32"
            and a.case.placement == "heads"
        ),
        wrong(),
        "forward, tp=1, heads; batch 1, heads 1, kv_heads 1, sequence 2, kv_sequence 2, "
        "head_dim 8, bfloat16, causal=True",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_is_found_and_shrunk_to_its_smallest_case(name: str) -> None:
    fails, outcome, smallest = PLANTED[name]
    found, hunt = search(lambda asked: outcome if fails(asked) else OK)
    assert [in_words(find.asked) for find in found] == [smallest]
    assert found[0].complete
    assert hunt.tally.run <= EXAMPLES


def test_a_healthy_operator_gives_nothing() -> None:
    found, hunt = search(lambda asked: OK)
    assert found == []
    assert hunt.tally.run == EXAMPLES


def test_the_same_seed_draws_the_same() -> None:
    def drawn(seed: int) -> list[str]:
        seen: list[str] = []
        search(lambda asked: (seen.append(in_words(asked)), OK)[1], seed, 60)
        return seen

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_what_is_drawn_covers_the_space() -> None:
    seen: list[Asked] = []
    search(lambda asked: (seen.append(asked), OK)[1], examples=400)
    assert {len(a.case.mesh) for a in seen} == {1, 2}
    assert {ranks(a) for a in seen} == {1, 2, 3, 4}
    assert {a.setting.dtype for a in seen} == {"float32", "bfloat16", "float16"}
    assert {a.setting.memory for a in seen} == {
        "contiguous", "transposed", "sliced", "expanded",
    }  # fmt: skip
    causes = set().union(*(causes_of(a, OPERATOR) for a in seen))
    assert causes >= {
        "empty shard", "uneven shards", "grouped queries", "partial input", "placements of its own",
        "mesh of several axes", "low precision", "option causal", "kv_heads sharded",
    }  # fmt: skip
    assert any(a.setting["kv_heads"] == 1 < a.setting["heads"] for a in seen)


def test_goes_on_after_a_find_and_tells_two_bugs_of_one_op_apart() -> None:
    def execute(asked: Asked) -> Outcome:
        uneven = "uneven shards" in causes_of(asked, OPERATOR)
        return wrong() if uneven or asked.setting.memory == "sliced" else OK

    found, _ = search(execute, free=False)
    texts = [in_words(find.asked) for find in found]
    assert any("sliced memory" in text for text in texts)
    assert any("sliced memory" not in text for text in texts)
    assert len(found) in (
        2,
        3,
    )  # an empty shard is uneven, too: found first, it is a find of its own


def test_a_refusal_is_told_once_an_op() -> None:
    missing = tuple(
        MissingOp(op, "forward", "strategy", "") for op in ("a.b.default", "c.d.default")
    )
    found, _ = search(
        lambda asked: Outcome(Status.MISSING_STRATEGY, kernel_op="a.b.default", missing_ops=missing)
    )
    assert [find.kind.op for find in found] == ["a.b.default", "c.d.default"]


def test_refusals_that_a_report_knows_are_no_finds() -> None:
    missing = tuple(
        MissingOp(op, "forward", "strategy", "") for op in ("a.b.default", "c.d.default")
    )
    refused = Outcome(Status.MISSING_STRATEGY, kernel_op="a.b.default", missing_ops=missing)
    first, _ = search(lambda asked: refused, examples=30)
    known = refusals_in(Report({}, (CaseResult(first[0].asked.case, refused),), ()))
    now = time.monotonic()
    space = Space((("probe", OPERATOR),), MESHES)
    hunt = Search(space, lambda asked: refused, 1, now, now + 3600, 30, known=known)
    assert list(hunt.run()) == []


def test_a_hang_and_a_divergence_are_one_find() -> None:
    def execute(asked: Asked) -> Outcome:
        if "partial input" not in causes_of(asked, OPERATOR):
            return OK
        status = Status.HANG if asked.setting["batch"] % 2 else Status.DIVERGED
        return Outcome(status, kernel_op="planted.op.default")

    found, _ = search(execute, free=False)
    assert [find.kind.what for find in found] == ["stuck"]


def test_what_cannot_be_asked_is_counted_and_no_find() -> None:
    def execute(asked: Asked) -> Outcome:
        if asked.setting["batch"] == 2:
            return Outcome(Status.UNAVAILABLE, "no", reason=Reason.SETTING_REFUSED)
        if asked.setting["batch"] == 3:
            return Outcome(
                Status.UNKNOWN, "the check failed: planted: out differs from its reference"
            )
        if asked.setting["batch"] == 4:
            return Outcome(Status.UNKNOWN, "the check failed: KeyError: 7")
        return OK

    found, hunt = search(execute, examples=200)
    assert found == []
    assert hunt.tally.refused > 0
    assert hunt.tally.disagreeing > 0
    assert hunt.tally.disagreement.startswith("the check failed: planted: out differs")
    assert list(hunt.tally.unknown) == ["the check failed: KeyError: #"]


def test_out_of_time_keeps_what_it_has() -> None:
    calls = 0

    def execute(asked: Asked) -> Outcome:
        nonlocal calls
        calls += 1
        if calls > 30:
            raise Over
        return wrong()

    now = time.monotonic()
    space = Space((("probe", OPERATOR),), MESHES)
    hunt = Search(space, execute, 1, now, now + 3600)
    first = next(iter(hunt.run()))
    assert not first.complete or calls <= 30


def test_what_ends_the_workers_is_not_run_for_ever() -> None:
    died = 0

    def execute(asked: Asked) -> Outcome:
        nonlocal died
        if not has_empty_shard(asked):
            return OK
        died += 1
        return Outcome(Status.CRASH, kernel_op="planted.op.default")

    found, hunt = search(execute)
    assert len(found) == 1
    assert died <= 1 + SHRINK_DEAR_RUNS + BELIEVED
    assert hunt.tally.spared > 0


def test_templates_are_the_distinct_options_plainest_first() -> None:
    assert [t.name for t in templates(OPERATOR)] == ["plain", "causal"]


def test_options_that_keep_their_sizes_are_not_smaller_than_plain_ones() -> None:
    dropout = Setting("dropout", SIZES, dropout=0.25)
    operator = replace(OPERATOR, settings=(*OPERATOR.settings, dropout))
    now = time.monotonic()
    seen: list[Asked] = []

    def execute(asked: Asked) -> Outcome:
        seen.append(asked)
        empty = "empty shard" in causes_of(asked, operator)
        return wrong() if empty else OK

    hunt = Search(Space((("probe", operator),), MESHES), execute, 1, now, now + 3600, 200)
    found = list(hunt.run())
    assert [find.asked.setting.dropout for find in found] == [0.0]
    kept = [asked.setting for asked in seen if asked.setting.dropout]
    assert kept
    assert all(setting.sizes == SIZES for setting in kept)


def test_known_is_what_less_brought_about() -> None:
    asked = None

    def keep(example: Asked) -> Outcome:
        nonlocal asked
        asked = example
        return OK

    search(keep, examples=1)
    assert asked is not None
    (kind,) = kinds_of(asked, wrong())
    find = Find(asked, wrong(), kind, frozenset({"uneven shards"}))
    assert is_known(kind, frozenset({"uneven shards", "partial input"}), [find])
    assert not is_known(kind, frozenset({"partial input"}), [find])
    assert kinds_of(asked, OK) == []
