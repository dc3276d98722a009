"""Degrees against brute force, the reduction to a few ranks, and settings that the shelf's probes take."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attncheck import models, plugins
from attncheck.errors import UserError
from attncheck.models import Verdict
from attncheck.models.dividing import RING, TENSOR, ULYSSES, USP, chunks, divide_heads
from attncheck.models.planning import FORMS, OPERATORS, SEQUENCE_SHARDED
from attncheck.models.reducing import DIVIDES, FEWER, UNEVEN, reduce_length, status
from attncheck.plan import Selection, plan
from attncheck.probing import EXPLICIT

GROUPED = st.tuples(st.integers(1, 12), st.integers(1, 24)).map(
    lambda pair: (pair[0] * pair[1], pair[1])
)
AXES = st.lists(st.integers(1, 6), min_size=1, max_size=2).map(tuple)


def chunked(items: list[int], axes: tuple[int, ...]) -> list[list[int]]:
    """The items of each rank: as torch.chunk splits, and with nothing for the ranks that it leaves out."""
    if not axes:
        return [items]
    rows = math.ceil(len(items) / axes[0])
    parts = [items[at * rows : (at + 1) * rows] for at in range(axes[0])]
    return [rank for part in parts for rank in chunked(part, axes[1:])]


# --- degrees -------------------------------------------------------------------------------------


@given(st.integers(1, 200), AXES)
def test_chunks_are_what_is_left_when_items_are_dealt_out(size: int, axes: tuple[int, ...]) -> None:
    assert chunks(size, axes) == [len(part) for part in chunked(list(range(size)), axes)]


@given(GROUPED, AXES)
def test_heads_against_dealing_them_out(pair: tuple[int, int], axes: tuple[int, ...]) -> None:
    heads, kv_heads = pair
    group = heads // kv_heads
    q, kv = chunked(list(range(heads)), axes), chunked(list(range(kv_heads)), axes)
    needed = [sorted({head // group for head in local}) for local in q]
    equal = len({len(local) for local in q}) == 1
    if not all(q):
        expected = Verdict.IMPOSSIBLE
    elif equal and needed == kv:
        expected = Verdict.WORKS
    elif equal and all(len(keys) == 1 for keys in needed):
        expected = Verdict.REPLICATE_KV
    elif kv_heads == 1 or all(kv):
        expected = Verdict.UNEVEN
    else:
        expected = Verdict.IMPOSSIBLE

    found = divide_heads(heads, kv_heads, axes)
    assert found.verdict is expected, found.why
    for split, parts in zip(found.splits, (q, kv), strict=True):
        assert (split.first, split.last) == (len(parts[0]), len(parts[-1]))
    if expected is Verdict.REPLICATE_KV:
        assert found.copies == sum(keys == needed[0] for keys in needed)


@given(GROUPED, AXES)
def test_silence_is_said_where_local_groups_fit_and_are_wrong(
    pair: tuple[int, int], axes: tuple[int, ...]
) -> None:
    heads, kv_heads = pair
    group = heads // kv_heads
    found = divide_heads(heads, kv_heads, axes)
    if found.verdict is not Verdict.UNEVEN or kv_heads in (1, heads):
        return
    q, kv = chunked(list(range(heads)), axes), chunked(list(range(kv_heads)), axes)
    if not all(len(local) % len(keys) == 0 for local, keys in zip(q, kv, strict=True)):
        assert "raise while the others go on" in found.why
        return
    # Query head h of a rank reads key h // (heads / kv_heads) of that rank.
    read = [
        keys[at // (len(local) // len(keys))]
        for local, keys in zip(q, kv, strict=True)
        for at in range(len(local))
    ]
    right = read == [head // group for head in range(heads)]
    assert ("in whole groups" if right else "wrong without an error") in found.why


def test_what_was_measured_of_grouped_queries() -> None:
    """12 heads with 3 of keys on 2 ranks are silently wrong, 6 with 3 raise on one of them (torch 2.13)."""
    assert "wrong without an error" in divide_heads(12, 3, (2,)).why
    assert "raise while the others go on" in divide_heads(6, 3, (2,)).why


def by_way(divisions: tuple[models.Division, ...], call: str) -> dict[str, models.Division]:
    return {d.way: d for d in divisions if d.call == call}


def test_degrees_of_a_video_model() -> None:
    found = models.degrees(models.find("wan2.1-14b"), tp=8, cp=2)
    own, text = by_way(found, "self"), by_way(found, "text")
    assert own[TENSOR].verdict is Verdict.WORKS
    assert own[ULYSSES].verdict is Verdict.UNEVEN  # 5 heads on a rank, for 2
    heads = next(split for split in own[ULYSSES].splits if split.dim == "heads")
    assert (heads.ranks, heads.first, heads.last) == (16, 3, 2)
    assert "all-to-all" in own[ULYSSES].why
    assert own[RING].verdict is Verdict.WORKS
    assert USP not in own  # 2 has no two degrees
    # Queries on both ranks, the text on each of them whole: its heads are not split further.
    assert {d.verdict for d in text.values()} == {Verdict.WORKS}
    assert text[ULYSSES].heads_ranks == 8


def test_degrees_of_language_models() -> None:
    llama = by_way(models.degrees(models.find("llama3-8b"), tp=16, cp=1), "self")
    assert list(llama) == [TENSOR]
    assert (llama[TENSOR].verdict, llama[TENSOR].copies) == (Verdict.REPLICATE_KV, 2)
    falcon = by_way(models.degrees(models.find("falcon-7b"), tp=8, cp=1), "self")[TENSOR]
    assert (falcon.verdict, falcon.splits[0].first, falcon.splits[0].last) == (Verdict.UNEVEN, 9, 8)
    phi = by_way(models.degrees(models.find("phi-4"), tp=4, cp=1), "self")[TENSOR]
    assert (phi.verdict, phi.splits[1].first, phi.splits[1].last) == (Verdict.UNEVEN, 3, 1)
    krea = by_way(models.degrees(models.find("krea2"), tp=16, cp=1), "joint")[TENSOR]
    assert (
        krea.verdict is Verdict.IMPOSSIBLE
    )  # 12 heads of keys: no 16 ranks can share them equally


def test_sequences() -> None:
    found = models.degrees(models.find("wan2.1-14b"), tp=1, cp=16)
    ring = by_way(found, "self")[RING]
    assert (ring.verdict, ring.splits[-1].first, ring.splits[-1].last) == (
        Verdict.UNEVEN,
        2048,
        2040,
    )
    depends = by_way(models.degrees(models.find("minimax-h3"), tp=1, cp=4), "joint")[RING]
    assert depends.verdict is Verdict.WORKS
    assert "the request's" in depends.why
    ltx = by_way(models.degrees(models.find("ltx-2"), tp=1, cp=200), "audio")[RING]
    assert ltx.verdict is Verdict.IMPOSSIBLE  # 126 tokens


def test_usp_names_each_pair_of_degrees() -> None:
    found = models.degrees(models.find("deepseek-v3"), tp=1, cp=8)
    usp = [(d.heads_ranks, d.sequence_ranks) for d in found if d.way == USP]
    assert usp == [(2, 8), (4, 8)]


def test_every_sentence_is_one_and_says_something() -> None:
    for model in models.load():
        for tp, cp in ((1, 1), (3, 1), (8, 2), (16, 4)):
            for division in models.degrees(model, tp, cp):
                assert division.why
                assert "\n" not in division.why


@pytest.mark.parametrize(("tp", "cp", "named"), [(0, 1, "tp 0"), (1, -2, "cp -2")])
def test_degrees_below_one_are_refused(tp: int, cp: int, named: str) -> None:
    with pytest.raises(UserError, match=named):
        models.degrees(models.find("llama3-8b"), tp, cp)


@pytest.mark.parametrize("name", ["wan2.1-14b", "llama3-8b", "falcon-7b", "ltx-2", "gemma2-2b"])
def test_working_degrees_are_those_of_the_worst_call(name: str) -> None:
    model = models.find(name)
    for degrees in models.working_degrees(model, upto=24):
        listed = {
            Verdict.WORKS: degrees.works,
            Verdict.REPLICATE_KV: degrees.replicate_kv,
            Verdict.UNEVEN: degrees.uneven,
            Verdict.IMPOSSIBLE: degrees.impossible,
        }
        every = sorted(degree for some in listed.values() for degree in some)
        if degrees.way == USP:
            assert 5 not in every  # a prime
            assert {1, 4, 6} <= set(every)
            continue
        assert every == list(range(1, 25))
        for verdict, some in listed.items():
            for degree in some:
                if degree == 1:
                    continue
                tp, cp = (degree, 1) if degrees.way == TENSOR else (1, degree)
                ones = [d for d in models.degrees(model, tp, cp) if d.way == degrees.way]
                assert max((d.verdict for d in ones), key=lambda v: v.rank) is verdict


def test_working_degrees_say_what_a_deployment_can_take() -> None:
    tensor = models.working_degrees(models.find("llama3-8b"))[0]
    assert tensor.works == (1, 2, 4, 8)
    assert tensor.replicate_kv == (16, 32)
    with pytest.raises(UserError, match="upto 0"):
        models.working_degrees(models.find("llama3-8b"), upto=0)


# --- the reduction -------------------------------------------------------------------------------

DEGREES = st.tuples(st.integers(2, 32), st.integers(2, 4)).filter(lambda pair: pair[1] <= pair[0])


def kinds(heads: int, kv_heads: int, ranks: int) -> tuple[str, str]:
    """By dealing them out: how many each rank gets."""
    found = []
    for size in (heads, kv_heads):
        parts = {len(part) for part in chunked(list(range(size)), (ranks,))}
        found.append(FEWER if size < ranks else DIVIDES if len(parts) == 1 else UNEVEN)
    return found[0], found[1]


@given(GROUPED, DEGREES)
def test_a_reduction_keeps_what_is_difficult(pair: tuple[int, int], sizes: tuple[int, int]) -> None:
    (heads, kv_heads), (degree, ranks) = pair, sizes
    many, few = models.reduce(heads, kv_heads, degree, ranks)
    assert many % few == 0
    assert kinds(many, few, ranks) == kinds(heads, kv_heads, degree)
    assert (status(many, ranks), status(few, ranks)) == kinds(heads, kv_heads, degree)
    if kinds(heads, kv_heads, degree) == (DIVIDES, DIVIDES):
        assert (many * degree, few * degree) == (heads * ranks, kv_heads * ranks)
    # Fewer than 2 heads, as there are on 2 ranks where many had fewer, have no groups.
    if heads >= degree or ranks > 2:
        assert (many == few) == (heads == kv_heads)


@given(GROUPED)
def test_nothing_that_is_split_leaves_the_group_alone(pair: tuple[int, int]) -> None:
    heads, kv_heads = pair
    many, few = models.reduce(heads, kv_heads, 1, 1)
    assert many // few == heads // kv_heads
    assert few == min(kv_heads, 4)


def test_reductions_that_were_asked_for() -> None:
    assert models.reduce(40, 40, 8, 2) == (10, 10)
    assert models.reduce(32, 8, 8, 2) == (8, 2)
    assert models.reduce(32, 8, 16, 2) == (4, 1)
    assert models.reduce(71, 1, 8, 2) == (17, 1)
    assert models.reduce(12, 3, 2, 2) == (12, 3)


@given(st.integers(1, 100_000), DEGREES)
def test_lengths_keep_whether_they_divide(tokens: int, sizes: tuple[int, int]) -> None:
    degree, ranks = sizes
    length = reduce_length(tokens, degree, ranks, 48)
    assert 30 < length <= 48
    for parts in (1, 2):
        assert (length % (parts * ranks) == 0) == (tokens % (parts * degree) == 0)


# --- settings ------------------------------------------------------------------------------------

MESHES = (
    {"tp": 8},
    {"cp": 4},
    {"dp": 2, "tp": 4},
    {"dp": 2, "tp": 8, "cp": 2},
    {"tp": 3},
    {"dp": 2},
)


@pytest.fixture(scope="module")
def shelf() -> dict[str, tuple[object, object]]:
    probes = plugins.load_probes().probes
    return {operator.name: (probe, operator) for probe in probes for operator in probe.operators}


def test_every_operator_that_is_planned_is_on_the_shelf(shelf: dict[str, object]) -> None:
    assert set(OPERATORS) <= set(shelf)


@pytest.mark.parametrize(
    "mesh", MESHES, ids=lambda mesh: ",".join(f"{k}={v}" for k, v in mesh.items())
)
def test_every_setting_is_one_that_its_probe_takes(
    mesh: dict[str, int], shelf: dict[str, tuple[object, object]]
) -> None:
    """Two cases each, forward and backward, placed as the setting says."""
    import dataclasses

    ran = set()
    for model in models.load():
        planned = models.settings(model, mesh)
        assert {one.call for one in planned} == {call.name for call in model.calls}
        for one in planned:
            assert math.prod(one.mesh.values()) <= 4
            assert (one.setting is None) == bool(one.why), one
            if one.setting is None:
                continue
            ran.add(one.operator)
            probe, operator = shelf[one.operator]
            alone = dataclasses.replace(operator, settings=(one.setting,))
            cases = plan(
                [dataclasses.replace(probe, operators=(alone,))], one.mesh, Selection(level="full")
            )
            assert [case.direction for case in cases] == ["forward", "backward"]
            for case in cases:
                assert case.placement == EXPLICIT
                for tensor in "qkv":
                    assert case.placements[tensor] == one.setting.explicit[tensor]
    ways = {
        operator
        for operator, form in FORMS.items()
        if form.ring == (mesh.get("cp", 1) > 1) or not form.ring
    }
    assert ran == ways


def roles(one: models.PlannedCall, tensor: str) -> dict[str, str]:
    """By mesh axis: the role of the dim that a tensor is split over there."""
    assert one.setting is not None
    dims = FORMS[one.operator].dims
    texts = one.setting.explicit[tensor]
    return {
        axis: "" if text == "R" else dims[int(text[2:-1])]
        for axis, text in zip(one.mesh, texts, strict=True)
    }


def only(
    name: str, mesh: dict[str, int], operator: str
) -> dict[tuple[str, str], models.PlannedCall]:
    planned = models.settings(models.find(name), mesh, operators=(operator,))
    return {(one.call, one.way): one for one in planned}


def test_placements_of_each_way() -> None:
    found = only("wan2.1-14b", {"tp": 8, "cp": 2}, "flash_attn_func")
    assert list(found) == [
        ("self", ULYSSES),
        ("self", SEQUENCE_SHARDED),
        ("text", SEQUENCE_SHARDED),
    ]
    ulysses, sequence, text = found.values()
    assert roles(ulysses, "q") == roles(ulysses, "k") == {"tp": "heads", "cp": "heads"}
    assert roles(sequence, "q") == roles(sequence, "v") == {"tp": "heads", "cp": "sequence"}
    assert roles(text, "q") == {"tp": "heads", "cp": "sequence"}
    assert roles(text, "k") == {"tp": "heads", "cp": ""}
    (ring,) = only("llama3-8b", {"tp": 8, "cp": 2}, "context_parallel[FLASH_ATTENTION]").values()
    assert roles(ring, "q") == {"tp": "heads", "cp": ""}  # it splits the sequence itself
    (batch,) = only("llama3-8b", {"dp": 2, "tp": 8}, "sdpa[MATH]").values()
    assert roles(batch, "q") == {"dp": "batch", "tp": "heads"}
    (packed,) = only("llama3-8b", {"dp": 2, "tp": 8}, "varlen_attn").values()
    assert roles(packed, "q") == {"dp": "", "tp": "heads"}
    (replicated,) = only("llama3-8b", {"tp": 16}, "flash_attn_func").values()
    assert roles(replicated, "q") == {"tp": "heads"}
    assert roles(replicated, "k") == {"tp": ""}


def test_options_are_the_calls_own() -> None:
    found = only("gemma2-27b", {"tp": 8}, "flash_attn_func")
    window = found["window", TENSOR].setting
    full = found["full", TENSOR].setting
    assert window is not None
    assert full is not None
    assert window.options["window"] == [6, 0]
    assert "window" not in full.options
    assert window.options["softcap"] == full.options["softcap"] == 1.5
    # Half the head_dim, so by the root of 2 more, as 1 / sqrt(head_dim) would be.
    assert window.options["scale"] == pytest.approx(144**-0.5 * 2**0.5)
    chunks_ = only("llama4-scout", {"tp": 8}, "flash_attn_varlen_func")["chunked", TENSOR].setting
    assert chunks_ is not None
    assert chunks_.options["q_lengths"] == chunks_.options["kv_lengths"] == [16, 16, 16]
    assert chunks_.options["causal"]
    text = only("wan2.1-14b", {"tp": 8}, "flash_attn_varlen_func")["text", TENSOR].setting
    assert text is not None
    assert sum(text.options["q_lengths"]) == text["sequence"] != text["kv_sequence"]
    assert sum(text.options["kv_lengths"]) == text["kv_sequence"]


@pytest.mark.parametrize(
    ("model", "call", "operator", "says"),
    [
        ("gpt-oss-20b", "full", "flash_attn_func", "has no sinks"),
        ("gpt-oss-20b", "full", "flex_attention", "the probe of flex_attention has no sinks"),
        ("gemma2-9b", "full", "sdpa", "has no softcap"),
        ("gemma3-4b", "window", "sdpa_cuda.flash", "has no window"),
        ("hunyuan-video", "joint", "flash_attn_func", "has no mask for padding"),
        ("llama3-8b", "self", "fallback.matmul", "has no causal mask"),
        ("llama3-8b", "self", "sdpa_cuda.efficient", "as many heads of keys"),
        ("krea2", "joint", "sdpa[MATH]", "no number of copies"),
    ],
)
def test_what_cannot_be_run_is_said(model: str, call: str, operator: str, says: str) -> None:
    one = only(model, {"tp": 16}, operator)[call, TENSOR]
    assert one.setting is None
    assert says in one.why


def test_what_is_left_out_is_said() -> None:
    (one,) = only(
        "deepseek-v3", {"dp": 2, "tp": 8, "cp": 2}, "context_parallel[FLASH_ATTENTION]"
    ).values()
    said = "; ".join(one.notes)
    assert "32 heads on 2 ranks stand for 128 on 8" in said
    assert "values are 128 wide and keys 192" in said
    assert "dp is left out" in said


def test_reduced_meshes() -> None:
    assert models.reduced_mesh({"tp": 8}) == {"tp": 2}
    assert list(models.reduced_mesh({"cp": 2, "tp": 4, "dp": 1})) == ["tp", "cp"]
    assert models.reduced_mesh({"dp": 2, "tp": 4, "cp": 2}, ranks=8) == {"dp": 2, "tp": 2, "cp": 2}
    assert models.reduced_mesh({"tp": 1}) == {"tp": 2}
    with pytest.raises(UserError, match="Unknown mesh axis 'pp'"):
        models.reduced_mesh({"pp": 2})
    with pytest.raises(UserError, match="axis tp has 0 ranks"):
        models.reduced_mesh({"tp": 0})
    with pytest.raises(UserError, match="2 ranks are too few for the axes tp, cp; expected 4"):
        models.reduced_mesh({"tp": 8, "cp": 2}, ranks=2)


def test_unknown_operators_are_refused_with_near_names() -> None:
    with pytest.raises(UserError, match=r"Did you mean .*flash_attn_func"):
        models.settings(models.find("llama3-8b"), {"tp": 2}, operators=("flash_attn_fun",))


def test_settings_of_a_scan_by_operator() -> None:
    planned = models.settings(
        models.find("gemma2-2b"), {"tp": 4}, operators=("flash_attn_func", "sdpa")
    )
    found = models.by_operator(planned)
    assert list(found) == ["flash_attn_func"]  # SDPA has no softcap
    assert [s.name for s in found["flash_attn_func"]] == [
        "gemma2-2b.window.tensor",
        "gemma2-2b.full.tensor",
    ]


def test_torch_stays_out() -> None:
    code = (
        "import sys; from attncheck import models; m = models.find('wan2.1-14b'); "
        "models.degrees(m, 8, 2); models.settings(m, {'tp': 8}); models.working_degrees(m); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    lazy = "import sys; import attncheck.models; assert 'tomllib' not in sys.modules"
    subprocess.run([sys.executable, "-c", lazy], check=True, timeout=60)
