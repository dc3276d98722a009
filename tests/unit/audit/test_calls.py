"""From an attention call of a model to a setting of a probe that runs it here, made small."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from attncheck import plugins
from attncheck.audit import calls
from attncheck.audit.calls import KINDS, Planned, plan, reduced_mesh, reduced_sizes
from attncheck.audit.seen import Argument, Attention, Seen, Texts
from attncheck.model import Case
from attncheck.models.reducing import status
from attncheck.plan import Selection, plan_meshes
from attncheck.probing import EXPLICIT, Operator, Probe

FLASH_ATTN = "flash_attn._flash_attn_forward.default"
FLASH = "aten._scaled_dot_product_flash_attention.default"
EFFICIENT = "aten._scaled_dot_product_efficient_attention.default"
CUDNN = "aten._scaled_dot_product_cudnn_attention.default"
MATH = "aten._scaled_dot_product_attention_math.default"
FOR_CPU = "aten._scaled_dot_product_flash_attention_for_cpu.default"
MASKED = (EFFICIENT, CUDNN, MATH, FOR_CPU)
# What attention is called with that runs over one axis of heads.
HEADS = {"bshd": ("S(2)",), "bhsd": ("S(1)",)}


def layout(op: str) -> str:
    return "bshd" if op == FLASH_ATTN else "bhsd"


def shaped(op: str, batch: int, heads: int, tokens: int, head_dim: int) -> tuple[int, ...]:
    middle = (tokens, heads) if layout(op) == "bshd" else (heads, tokens)
    return (batch, *middle, head_dim)


def seen(
    op: str,
    *,
    q: Sequence[str] | None = None,
    kv: Sequence[str] | None = None,
    sizes: Sequence[int] = (2, 40, 40, 32760, 32760, 128),
    dtype: str = "bfloat16",
    mask: Argument | None = None,
    **flags: Any,
) -> Seen:
    """`sizes`: batch, heads, kv_heads, sequence, kv_sequence, head_dim."""
    batch, heads, kv_heads, sequence, kv_sequence, head_dim = sizes
    q = HEADS[layout(op)] if q is None else tuple(q)
    kv = q if kv is None else tuple(kv)
    names = KINDS[op].names
    tensors = [
        Argument(names[0], shaped(op, batch, heads, sequence, head_dim), dtype, tuple(q)),
        *(
            Argument(name, shaped(op, batch, kv_heads, kv_sequence, head_dim), dtype, tuple(kv))
            for name in names[1:]
        ),
    ]
    if mask is not None:
        tensors.append(replace(mask, name=KINDS[op].mask))
    return Seen(Attention(op, tuple(tensors), json.dumps(flags)), ("blocks.*.attn",), 40)


def planned(one: Seen, **mesh: int) -> Planned:
    (only,) = plan([one], mesh or {"tp": 8})
    return only


@functools.cache
def operators() -> dict[str, tuple[Probe, Operator]]:
    return {o.name: (p, o) for p in plugins.load_probes().probes for o in p.operators}


def cases(one: Planned) -> tuple[Case, ...]:
    """What a scan would run of it."""
    assert one.setting is not None, one.call.note
    probe, operator = operators()[one.call.operator]
    own = replace(probe, operators=(replace(operator, settings=(one.setting,)),))
    selection = Selection(operators=(operator.name,), placements=(EXPLICIT,), level="quick")
    return plan_meshes([own], [one.mesh], selection)


# --- each op -------------------------------------------------------------------------------------


def test_every_op_is_planned_here() -> None:
    assert {*KINDS} == {FLASH_ATTN, FLASH, *MASKED}


@pytest.mark.parametrize(
    ("op", "operator", "function"),
    [
        (FLASH_ATTN, "flash_attn_func", "flash_attn.flash_attn_func"),
        (FLASH, "sdpa_cuda.flash", "F.scaled_dot_product_attention"),
        (EFFICIENT, "sdpa_cuda.efficient", "F.scaled_dot_product_attention"),
        (CUDNN, "sdpa_cuda.cudnn", "F.scaled_dot_product_attention"),
        (MATH, "sdpa[MATH]", "F.scaled_dot_product_attention"),
        (FOR_CPU, "sdpa[FLASH_ATTENTION]", "F.scaled_dot_product_attention"),
    ],
)
def test_what_runs_each_op(op: str, operator: str, function: str) -> None:
    one = planned(seen(op), tp=8)
    assert one.call.kernel_op == op
    assert (one.call.operator, one.call.function, one.call.setting) == (operator, function, "call1")
    assert one.call.sizes == {
        "batch": 2,
        "heads": 40,
        "sequence": 32760,
        "head_dim": 128,
        "kv_heads": 40,
        "kv_sequence": 32760,
    }
    assert one.call.note == ""
    assert one.mesh == {"tp": 2}
    setting = one.setting
    assert setting is not None
    assert (setting.name, setting.dtype, setting.options) == ("call1", "bfloat16", {})
    # 40 heads on 8 ranks are 5 to each, and so are 10 on 2; tokens are few, and divide as theirs do.
    assert setting.sizes == {
        "batch": 2,
        "heads": 10,
        "sequence": 36,
        "head_dim": 64,
        "kv_heads": 10,
        "kv_sequence": 36,
    }
    sharded = HEADS[layout(op)]
    assert setting.explicit == {"q": sharded, "k": sharded, "v": sharded}
    run = cases(one)
    assert [case.direction for case in run] == ["forward", "backward"]
    assert all(case.placement == EXPLICIT for case in run)
    assert run[0].placements == {"q": sharded, "k": sharded, "v": sharded}
    # The operator reaches this very op, or is made of what F itself makes it of.
    assert op in operators()[operator][1].kernel_ops or op == MATH


@pytest.mark.parametrize("op", sorted(KINDS))
@pytest.mark.parametrize("causal", [True, False])
def test_causal(op: str, causal: bool) -> None:
    flag = "causal" if op == FLASH_ATTN else "is_causal"
    one = planned(seen(op, **{flag: causal}))
    aligned: object = "top_left" if op in (FLASH, EFFICIENT, CUDNN) else True
    assert one.setting is not None
    assert one.setting.options == ({"causal": aligned} if causal else {})
    assert one.call.options == one.setting.options
    assert len(cases(one)) == 2


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ({}, {}),
        ({"window_size_left": -1, "window_size_right": -1}, {}),
        ({"causal": True, "window_size_left": -1, "window_size_right": 0}, {"causal": True}),
        (
            {"causal": True, "window_size_left": 4095, "window_size_right": 0},
            {"causal": True, "window": [8, 0]},
        ),
        ({"window_size_left": 3, "window_size_right": -1}, {"window": [3, -1]}),
        ({"softcap": 0.0}, {}),
        # Scores of random numbers do not come near 50: a softcap that they feel stands for it.
        ({"softcap": 50.0}, {"softcap": 1.5}),
        ({"softcap": 0.5}, {"softcap": 0.5}),
    ],
)
def test_flags_of_flash_attn(flags: dict[str, Any], options: dict[str, Any]) -> None:
    one = planned(seen(FLASH_ATTN, **flags))
    assert one.setting is not None
    assert one.setting.options == options
    assert len(cases(one)) == 2


def test_flags_that_no_reduced_case_has_are_told() -> None:
    one = planned(seen(FLASH, dropout_p=0.1))
    assert one.call.note == "run without its dropout of 0.1"
    assert one.setting is not None
    assert one.setting.dropout == 0
    alibi = seen(FLASH_ATTN)
    slopes = Argument("alibi_slopes", (40,), "float32", ("S(0)",))
    call = replace(alibi.call, tensors=(*alibi.call.tensors, slopes))
    one = planned(replace(alibi, call=call))
    assert one.call.note == "run without its alibi slopes"
    assert len(cases(one)) == 2


# --- masks ---------------------------------------------------------------------------------------

FULL, SHARDED = (2, 40, 32760, 32760), ("S(1)",)


@pytest.mark.parametrize("op", [MATH, FOR_CPU])
@pytest.mark.parametrize(
    ("shape", "broadcast", "dims"),
    [
        (FULL, "full", ("batch", "heads", "sequence", "kv_sequence")),
        ((1, 40, 32760, 32760), "batch", ("-", "heads", "sequence", "kv_sequence")),
        ((2, 1, 32760, 32760), "heads", ("batch", "-", "sequence", "kv_sequence")),
        ((1, 1, 32760, 32760), "both", ("-", "-", "sequence", "kv_sequence")),
        ((32760, 32760), "both", ("-", "-", "sequence", "kv_sequence")),
        ((40, 32760, 32760), "batch", ("-", "heads", "sequence", "kv_sequence")),
    ],
)
@pytest.mark.parametrize("dtype", ["bool", "bfloat16"])
def test_masks(
    op: str, shape: tuple[int, ...], broadcast: str, dims: tuple[str, ...], dtype: str
) -> None:
    one = planned(seen(op, mask=Argument("", shape, dtype, ("R",))))
    (case, _) = cases(one)
    assert one.call.options["mask"] == ("bool" if dtype == "bool" else "float")
    assert one.call.options["mask_broadcast"] == broadcast
    assert case.tensor_dims["mask"] == dims
    assert case.placements["mask"] == ("R",)


@pytest.mark.parametrize("op", MASKED)
@pytest.mark.parametrize(
    ("placements", "run_as"), [(SHARDED, SHARDED), (("R",), ("R",)), ((), ("plain",))]
)
def test_a_mask_is_passed_as_the_model_passes_it(op: str, placements: Texts, run_as: Texts) -> None:
    """A plain one among DTensors is what DTensor refuses: it must not become a replicated one."""
    one = planned(seen(op, mask=Argument("", FULL, "bfloat16", placements)))
    (case, _) = cases(one)
    name = KINDS[op].tensors[3]
    assert case.placements[name] == run_as
    assert one.call.placements[name] == run_as


@pytest.mark.parametrize("op", [MATH, FOR_CPU])
def test_dims_of_a_mask_are_counted_from_the_last(op: str) -> None:
    mask = Argument("", (32760, 32760), "bool", ("S(0)",))
    one = planned(seen(op, q=("S(2)",), kv=("R",), mask=mask), cp=4)
    (case, _) = cases(one)
    assert case.placements["mask"] == ("S(2)",)
    assert case.tensor_dims["mask"][2] == "sequence"
    assert one.call.placements["mask"] == ("S(2)",)


@pytest.mark.parametrize("shape", [(2, 1, 1, 32760), (1, 1, 32760, 1)])
def test_a_mask_that_broadcasts_over_tokens_is_run_whole_and_told(shape: tuple[int, ...]) -> None:
    one = planned(seen(MATH, mask=Argument("", shape, "bool", ("R",))))
    assert "a row for each query and a column for each key" in one.call.note
    assert len(cases(one)) == 2


def test_a_bias_shards_dims_of_its_own() -> None:
    mask = Argument("", FULL, "bfloat16", ("S(0)", "S(1)"))
    one = planned(seen(EFFICIENT, q=("S(0)", "S(1)"), mask=mask), dp=2, tp=8)
    (case, _) = cases(one)
    assert case.placements == dict.fromkeys(("q", "k", "v", "bias"), ("S(0)", "S(1)"))
    assert case.setting["bias_expanded"]


# --- what cannot be run --------------------------------------------------------------------------

UNKNOWN = replace(seen(FLASH).call, op="vendor.attention.default")


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (Seen(UNKNOWN, (), 1), "attncheck has no operator that calls this op"),
        (seen(FLASH, q=()), "its tensors are ordinary ones"),
        (seen(FLASH, kv=()), "some of q, k and v are ordinary tensors and some are DTensors"),
        (seen(FLASH, sizes=(2, 40, 3, 64, 64, 64)), "its heads are no multiple of those"),
        (seen(FLASH, q=("_S(1, 2)",)), r"query is _S\(1, 2\), in which no probe places a tensor"),
        (seen(FLASH, q=("P(max)",)), r"query is P\(max\), in which"),
        (seen(FLASH, q=("S(1)", "R")), "query lies on a mesh whose axes are none of tp"),
    ],
)
def test_why_a_call_is_not_run(one: Seen, why: str) -> None:
    plan = planned(one, tp=8)
    assert plan.setting is None
    assert plan.call.setting == ""
    assert re.match(why, plan.call.note), plan.call.note
    assert plan.call.modules == one.modules
    assert plan.call.calls == one.calls
    assert plan.call.placements


def test_a_call_without_a_batch_dim_is_not_run() -> None:
    """The math path of F.scaled_dot_product_attention takes it."""
    one = seen(MATH)
    tensors = tuple(replace(tensor, shape=tensor.shape[1:]) for tensor in one.call.tensors)
    plan = planned(replace(one, call=replace(one.call, tensors=tensors)))
    assert plan.setting is None
    assert plan.call.note == "q has 3 dims and k has 3, where probes have 4"
    assert plan.call.sizes == {}


def test_values_of_another_head_dim_are_not_run() -> None:
    """As in multi-head latent attention."""
    one = seen(FLASH)
    q, k, v = one.call.tensors
    narrow = replace(v, shape=(*v.shape[:-1], 64))
    plan = planned(replace(one, call=replace(one.call, tensors=(q, k, narrow))))
    assert plan.setting is None
    assert plan.call.note == "q and v have different head_dims, which no probe calls"


# --- meshes --------------------------------------------------------------------------------------


def test_a_tensor_on_a_submesh_lies_on_the_whole_mesh() -> None:
    """`parallelize_module(model, mesh["tp"], plan)`: DTensor knows nothing of the dp axis."""
    one = seen(FLASH)
    tensors = tuple(replace(tensor, axes=("tp",)) for tensor in one.call.tensors)
    plan = planned(replace(one, call=replace(one.call, tensors=tensors)), dp=4, tp=8)
    assert plan.mesh == {"dp": 1, "tp": 2}
    assert plan.setting is not None
    assert plan.setting.explicit == dict.fromkeys("qkv", ("R", "S(1)"))
    assert plan.setting.sizes["heads"] == 10
    assert len(cases(plan)) == 2


def test_axes_count_by_their_names() -> None:
    one = seen(FLASH, q=("S(2)", "S(1)"))
    tensors = tuple(replace(tensor, axes=("cp", "tp")) for tensor in one.call.tensors)
    plan = planned(replace(one, call=replace(one.call, tensors=tensors)), tp=4, dp=2, cp=2)
    assert plan.mesh == {"tp": 2, "dp": 1, "cp": 2}
    assert plan.call.placements["q"] == ("S(1)", "R", "S(2)")


def test_a_mesh_of_other_axes_is_told() -> None:
    one = seen(FLASH)
    tensors = tuple(replace(tensor, axes=("dp_cp",)) for tensor in one.call.tensors)
    plan = planned(replace(one, call=replace(one.call, tensors=tensors)), dp=2, cp=4)
    assert plan.setting is None
    assert plan.call.note == "query lies on a mesh whose axes are none of dp, cp"


@pytest.mark.parametrize(
    ("mesh", "roles", "small"),
    [
        ({"tp": 8}, {"heads": (0,)}, {"tp": 2}),
        ({"dp": 2, "tp": 4}, {"heads": (1,)}, {"dp": 1, "tp": 2}),
        ({"dp": 2, "tp": 4}, {"heads": (1,), "batch": (0,)}, {"dp": 2, "tp": 2}),
        ({"dp": 2, "cp": 2, "tp": 2}, {"batch": (0,), "sequence": (1,), "heads": (2,)},
         {"dp": 1, "cp": 2, "tp": 2}),
        ({"tp": 2, "cp": 2, "dp": 2}, {"batch": (2,), "sequence": (1,), "heads": (0,)},
         {"tp": 2, "cp": 2, "dp": 1}),
        # Nothing is sharded: still ranks, which may disagree.
        ({"dp": 4, "tp": 8}, {}, {"dp": 1, "tp": 2}),
        ({"dp": 4, "tp": 1}, {}, {"dp": 2, "tp": 1}),
        ({"dp": 4, "tp": 1}, {"heads": (1,)}, {"dp": 2, "tp": 1}),
        ({"world": 1}, {}, {"world": 1}),
    ],
)  # fmt: skip
def test_reduced_meshes(
    mesh: dict[str, int], roles: dict[str, tuple[int, ...]], small: dict[str, int]
) -> None:
    assert reduced_mesh(mesh, roles) == small
    assert [*reduced_mesh(mesh, roles)] == [*mesh]


def test_an_axis_that_has_no_ranks_left_is_told() -> None:
    one = planned(seen(FLASH, q=("S(0)", "S(2)", "S(1)")), dp=2, cp=2, tp=2)
    assert one.mesh == {"dp": 1, "cp": 2, "tp": 2}
    assert one.call.note == "run with one rank on dp, for want of ranks"


def test_names_are_numbered() -> None:
    names = [one.call.setting for one in plan([seen(FLASH), seen(MATH), seen(FLASH)], {"tp": 2})]
    assert names == ["call1", "call2", "call3"]


# --- any call ------------------------------------------------------------------------------------

ROLES = ("", "batch", "heads", "sequence", "head_dim")
KV_OF = {"heads": "kv_heads", "sequence": "kv_sequence"}
AXES = st.lists(st.sampled_from(["dp", "cp", "tp", "pp"]), min_size=1, max_size=4, unique=True)


@st.composite
def meshes(draw: st.DrawFn) -> dict[str, int]:
    mesh = {axis: draw(st.sampled_from([1, 2, 3, 4, 8])) for axis in draw(AXES)}
    assume(max(mesh.values()) > 1)
    return mesh


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, ...]:
    kv_heads = draw(st.integers(1, 24))
    heads = kv_heads * draw(st.integers(1, 9))
    tokens = draw(st.integers(1, 300))
    kv_tokens = draw(st.just(tokens) | st.integers(1, 300))
    return (draw(st.integers(1, 40)), heads, kv_heads, tokens, kv_tokens, draw(st.integers(1, 256)))


@st.composite
def sharded_calls(draw: st.DrawFn) -> tuple[Seen, dict[str, int], tuple[str, ...]]:
    """A call, its mesh, and the role that each axis shards; keys and values may be whole."""
    op, mesh = draw(st.sampled_from(sorted(KINDS))), draw(meshes())
    roles = tuple(draw(st.sampled_from(ROLES)) for _ in mesh)
    dims = KINDS[op].layout
    q = tuple(f"S({dims.index(role)})" if role else "R" for role in roles)
    whole = draw(st.booleans())
    kv = tuple(
        "R" if whole and role in KV_OF else text for role, text in zip(roles, q, strict=True)
    )
    return seen(op, q=q, kv=kv, sizes=draw(sizes())), mesh, roles


def product(mesh: Mapping[str, int], roles: Sequence[str], role: str) -> int:
    return math.prod(ranks for ranks, own in zip(mesh.values(), roles, strict=True) if own == role)


@given(sharded_calls())
def test_what_ranks_divide_they_divide_on_the_reduced_mesh(
    call: tuple[Seen, dict[str, int], tuple[str, ...]],
) -> None:
    one, mesh, roles = call
    made = planned(one, **mesh)
    assert made.setting is not None
    assert 2 <= math.prod(made.mesh.values()) <= calls.RANKS
    kv_is_whole = one.call.tensors[1].placements != one.call.tensors[0].placements
    for role in {*roles} - {""}:
        many, few = product(mesh, roles, role), product(made.mesh, roles, role)
        if few == 1:
            continue
        names = [role] if kv_is_whole or role not in KV_OF else [role, KV_OF[role]]
        for name in names:
            wanted = status(made.call.sizes[name], many)
            assert status(made.setting.sizes[name], few) == wanted, (name, many, few)
    small = made.setting.sizes
    assert small["heads"] % small["kv_heads"] == 0
    assert max(small.values()) < 400


@given(sharded_calls())
def test_whatever_is_planned_a_scan_can_run(
    call: tuple[Seen, dict[str, int], tuple[str, ...]],
) -> None:
    one, mesh, _ = call
    made = planned(one, **mesh)
    run = cases(made)
    assert [case.direction for case in run] == ["forward", "backward"]
    assert made.setting is not None
    assert run[0].mesh == made.mesh
    for name, texts in made.setting.explicit.items():
        assert run[0].placements[name] == texts
        assert len(texts) == len(mesh)


@given(sizes(), meshes())
def test_nothing_is_made_larger_where_nothing_is_sharded(
    sizes: tuple[int, ...], mesh: dict[str, int]
) -> None:
    names = ("batch", "heads", "kv_heads", "sequence", "kv_sequence", "head_dim")
    whole = dict(zip(names, sizes, strict=True))
    small = reduced_sizes(whole, {}, mesh, reduced_mesh(mesh, {}))
    assert all(small[name] <= whole[name] for name in names)
    assert (small["sequence"] == small["kv_sequence"]) or whole["sequence"] != whole["kv_sequence"]


TEXTS = st.lists(
    st.sampled_from(["R", "S(0)", "S(1)", "S(2)", "S(3)", "P(sum)", "P(max)", "_S(1, 2)"]),
    max_size=3,
)


@given(
    st.sampled_from([*KINDS, "vendor.attention.default"]),
    meshes(),
    st.lists(TEXTS, min_size=4, max_size=4),
    st.sampled_from([(), FULL, (32760, 32760), (2, 1, 1, 32760)]),
    sizes(),
)
def test_any_call_is_planned_or_told_why_not(
    op: str,
    mesh: dict[str, int],
    texts: list[list[str]],
    mask: tuple[int, ...],
    sizes: tuple[int, ...],
) -> None:
    known = op if op in KINDS else FLASH
    one = seen(known, q=texts[0], kv=texts[1], sizes=sizes)
    if mask and KINDS[known].mask:
        # A mask has the placements of dims that it has.
        own = tuple(t for t in texts[3] if not t.startswith("S(") or int(t[2]) < len(mask))
        extra = Argument(KINDS[known].mask, mask, "bool", own)
        one = replace(one, call=replace(one.call, tensors=(*one.call.tensors, extra)))
    made = planned(replace(one, call=replace(one.call, op=op)), **mesh)
    if made.setting is None:
        assert made.call.note
        assert not made.call.setting
    else:
        assert len(cases(made)) == 2
