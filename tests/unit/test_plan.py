"""Planning: selection, levels, placements by role, order, and the sentences for what does not exist."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attncheck import plugins
from attncheck.errors import UserError
from attncheck.plan import Selection, _fewest_rows, parse_mesh, placement_texts, plan, plan_meshes
from attncheck.probing import OTHER, PATTERNS, Tensor

ROOT = Path(__file__).resolve().parents[2]
PROBES = tuple(plugins.load_probe_file(path) for path in sorted((ROOT / "probes").glob("*.py")))
TP2 = {"tp": 2}


def test_ids_are_unique_and_name_everything() -> None:
    cases = plan(PROBES, TP2, Selection(level="full"))
    assert len({c.id for c in cases}) == len(cases)
    for case in cases:
        parts = (case.probe, case.operator, case.setting_name, case.placement, case.direction)
        assert all(part in case.id for part in parts)


def test_levels_are_nested() -> None:
    ids = {
        level: {c.id for c in plan(PROBES, TP2, Selection(level=level))}
        for level in ("quick", "default", "full")
    }
    assert ids["quick"] < ids["default"] < ids["full"]
    assert len(ids["quick"]) >= 80
    assert len(ids["default"]) >= 400


def test_a_role_means_another_dim_in_another_layout() -> None:
    bhsd = Tensor("q", ("batch", "heads", "sequence", "head_dim"), (2, 3, 4, 5))
    bshd = Tensor("q", ("batch", "sequence", "heads", "head_dim"), (2, 4, 3, 5))
    assert placement_texts(bhsd, ("heads",), first=True) == ("S(1)",)
    assert placement_texts(bshd, ("heads",), first=True) == ("S(2)",)
    assert placement_texts(bshd, ("batch", "heads"), first=True) == ("S(0)", "S(2)")


def test_broadcast_dims_stay_whole_and_plain_stays_plain() -> None:
    mask = Tensor("mask", ("batch", OTHER, "sequence", "kv_sequence"), (2, 1, 4, 6))
    assert placement_texts(mask, ("heads",), first=False) == ("R",)
    assert placement_texts(mask, ("batch",), first=False) == ("S(0)",)
    plain = Tensor("mask", ("batch",), (2,), wrap="plain")
    assert placement_texts(plain, ("batch",), first=False) == ("plain",)


@given(st.sampled_from(sorted(PATTERNS)), st.booleans())
def test_only_the_first_tensor_is_partial(pattern: str, first: bool) -> None:
    tensor = Tensor("q", ("batch", "heads", "sequence", "head_dim"), (2, 3, 4, 5))
    texts = placement_texts(tensor, (pattern,), first)
    assert (texts == ("P(sum)",)) == (pattern == "partial" and first)


def test_risky_cases_come_last() -> None:
    cases = plan(PROBES, TP2, Selection())
    where = {c.id: i for i, c in enumerate(cases)}
    empty_shard = min(i for id, i in where.items() if "/batch_1/" in id and "/batch/" in id)
    partial = min(i for id, i in where.items() if "sdpa/plain" in id and "/partial/" in id)
    safe = max(i for id, i in where.items() if "/plain/" in id and "/heads/" in id)
    assert safe < partial < empty_shard


def test_several_meshes_one_after_the_other() -> None:
    meshes = [{"tp": 3}, {"dp": 2, "tp": 2}]
    selection = Selection(operators=("sdpa[MATH]",), settings=("plain",))
    apart = [case for mesh in meshes for case in plan(PROBES, mesh, selection)]
    assert plan_meshes(PROBES, meshes, selection) == tuple(apart)
    # A placement of two axes is one that some mesh knows; the other has no case of it.
    both = Selection(operators=("sdpa[MATH]",), placements=("batch,heads",))
    assert {tuple(c.mesh) for c in plan_meshes(PROBES, meshes, both)} == {("dp", "tp")}
    with pytest.raises(UserError, match="batch,heads"):
        plan(PROBES, meshes[0], both)


def test_the_same_mesh_twice_gives_the_same_order() -> None:
    assert plan(PROBES, TP2, Selection()) == plan(PROBES, TP2, Selection())


def test_two_axes() -> None:
    cases = plan(PROBES, {"dp": 2, "tp": 2}, Selection(operators=("sdpa[MATH]",)))
    assert {"replicate,heads", "batch,heads", "heads,heads"} <= {c.placement for c in cases}
    assert all(len(p) == 2 for c in cases for p in c.placements.values() if p != ("plain",))


def test_selection_by_globs() -> None:
    selection = Selection(
        operators=("sdpa*",), settings=("plain",), placements=("he*",), directions=("forward",)
    )
    cases = plan([p for p in PROBES if p.name == "sdpa"], TP2, selection)
    assert {c.operator for c in cases} == {"sdpa", "sdpa[MATH]", "sdpa[FLASH_ATTENTION]"}
    assert {c.placement for c in cases} == {"heads", "head_dim"}
    assert {c.direction for c in cases} == {"forward"}


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        (Selection(operators=("spda",)), ["operator 'spda'", "sdpa"]),
        (Selection(settings=("casual",)), ["setting 'casual'", "causal"]),
        (Selection(placements=("head",)), ["placement 'head'", "heads"]),
        (Selection(directions=("backwards",)), ["direction 'backwards'", "backward"]),
        (Selection(routes=("local_map",)), ["route 'local_map'", "dtensor"]),
        (Selection(level="fast"), ["level 'fast'", "full"]),
        (
            Selection(operators=("fallback.matmul",), settings=("causal",)),
            ["Nothing to run", "attncheck list --cases"],
        ),
    ],
)
def test_what_does_not_exist_is_named_with_what_does(
    selection: Selection, words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        plan(PROBES, TP2, selection)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("text", "mesh"),
    [("4", {"tp": 4}), ("2x3", {"dp": 2, "tp": 3}), ("a=2,b=3", {"a": 2, "b": 3})],
)
def test_meshes(text: str, mesh: dict[str, int]) -> None:
    assert parse_mesh(text) == mesh


@pytest.mark.parametrize(
    "text", ["2x", "", "x", "0", "2x0", "a=2,a=3", "a=", "2x2x2x2", "-1", "a=b"]
)
def test_bad_meshes_are_quoted_back(text: str) -> None:
    with pytest.raises(UserError, match="Mesh"):
        parse_mesh(text)


@given(st.text(max_size=12))
def test_any_mesh_text_is_a_mesh_or_a_sentence(text: str) -> None:
    try:
        mesh = parse_mesh(text)
    except UserError as error:
        message = str(error)
    else:
        message = ""
        assert all(size >= 1 for size in mesh.values())
    assert repr(text) in message or not message


def test_no_two_roles_share_a_size_even_when_halved() -> None:
    """A swapped or wrongly split dim must not fit by coincidence on 2 ranks."""
    for probe in PROBES:
        for operator in probe.operators:
            for setting in operator.settings:
                # Self-attention needs equal lengths, equal heads are no GQA, and 1 is 1.
                if setting.dropout or setting.name == "batch_1":
                    continue
                role_sizes: dict[str, set[int]] = {}
                for tensor in operator.tensors(setting):
                    for role, size in zip(tensor.dims, tensor.sizes, strict=True):
                        kind = role.removeprefix("kv_")
                        role_sizes.setdefault(kind, set()).add(size)
                role_sizes.pop(OTHER, None)
                groups = list(role_sizes.values())
                sizes = [{s for n in g for s in (n, n // 2, n - n // 2)} for g in groups]
                together = set().union(*sizes)
                assert len(together) == sum(map(len, sizes)), (operator.name, setting.name, sizes)


@pytest.mark.parametrize(
    ("size", "axes", "fewest"),
    [
        (7, [2, 3], 0),  # 4 and 3 rows; the 4 are 2, 2 and none
        (7, [2], 3),
        (5, [4], 0),
        (12, [2, 3], 2),
        (1, [], 1),
    ],
)
def test_the_rank_with_fewest_rows_need_not_be_the_last(
    size: int, axes: list[int], fewest: int
) -> None:
    import torch

    pieces = [torch.empty(size)]
    for ranks in axes:
        chunks = [piece.chunk(ranks) for piece in pieces]
        pieces = [c for cs in chunks for c in (*cs, *[torch.empty(0)] * (ranks - len(cs)))]
    assert _fewest_rows(size, axes) == fewest == min(map(len, pieces))
