"""Going on past an op that DTensor refuses: shapes and placements that its results may have had."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_group import coordinate, fake_mesh, placed, texts_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor

from attncheck.audit.carry import carry_on
from attncheck.runner import compat
from attncheck.runner.placements import local_shape


@pytest.fixture(scope="module", autouse=True)
def ops() -> Iterator[Any]:
    """Custom ops without sharding strategies."""
    library = torch.library.Library("attncheck_carry", "DEF")

    def define(schema: str, meta: Any) -> None:
        library.define(schema)
        library.impl(schema.partition("(")[0], meta, "Meta")

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Any:
        """(batch, sequence, heads, head_dim); groups of heads share keys."""
        assert q.shape[2] % k.shape[2] == 0, "number of heads"
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
        return torch.empty_like(q), lse, 7

    define("attend(Tensor q, Tensor k, Tensor v, bool causal) -> (Tensor, Tensor, int)", attend)
    define("scaled_(Tensor(a!) self, float by) -> Tensor(a!)", lambda self, by: self)
    define("gram(Tensor self) -> Tensor", lambda self: self.new_empty(self.shape[0], self.shape[0]))
    define("total(Tensor self) -> Tensor", lambda self: self.new_empty(()))
    define(
        "doubled(Tensor[] parts) -> Tensor[]", lambda parts: [torch.empty_like(p) for p in parts]
    )

    def four_rows(self: torch.Tensor) -> torch.Tensor:
        assert self.shape[0] % 4 == 0, "wants rows by fours"
        return torch.empty_like(self)

    define("four_rows(Tensor self) -> Tensor", four_rows)
    yield
    library._destroy()


def op(name: str) -> Any:
    return getattr(torch.ops.attncheck_carry, name).default


def explains(tensor: DTensor) -> None:
    """This rank's part of it has the shape that its placements say."""
    mesh = tensor.device_mesh
    shape = local_shape(tensor.shape, texts_of(tensor), tuple(mesh.shape), coordinate(mesh))
    assert tuple(compat.local_tensor(tensor).shape) == shape


MESHES = st.sampled_from([{"tp": 2}, {"tp": 3}, {"dp": 2, "tp": 2}, {"dp": 2, "tp": 3}])
SIZES = st.integers(1, 9)


@st.composite
def meshes_and_texts(draw: st.DrawFn, dims: int) -> tuple[dict[str, int], int, list[str]]:
    """A mesh, a rank of it, and placements on it."""
    axes = draw(MESHES)
    ranks = math.prod(axes.values())
    texts = st.sampled_from(["R", *(f"S({dim})" for dim in range(dims))])
    return axes, draw(st.integers(0, ranks - 1)), [draw(texts) for _ in axes]


@settings(max_examples=50)
@given(meshes_and_texts(4), st.tuples(SIZES, SIZES, SIZES, SIZES))
def test_placements_explain_the_shapes_of_attention(
    where: tuple[dict[str, int], int, list[str]], shape: tuple[int, ...]
) -> None:
    axes, rank, texts = where
    with fake_mesh(axes, rank) as mesh:
        q, k, v = (placed(shape, texts, mesh) for _ in range(3))
        out, lse, number = carry_on(op("attend"), (q, k, v, True), {})
        assert number == 7
        assert tuple(out.shape) == shape
        assert tuple(lse.shape) == (shape[0], shape[2], shape[1])
        assert lse.dtype == torch.float32
        for result in (out, lse):
            explains(result)
        # What is as long as q lies as q does, on every rank alike; of a single row it cannot be told.
        one_row = {f"S({dim})" for dim, size in enumerate(shape) if size == 1}
        assert texts_of(out) == tuple("R" if text in one_row else text for text in texts)


DIM_OF_LSE = {"S(0)": "S(0)", "S(2)": "S(1)", "S(1)": "S(2)", "R": "R", "S(3)": "R"}


@pytest.mark.parametrize("texts", [*itertools.product(["R", "S(0)", "S(1)", "S(2)"], repeat=2)])
@pytest.mark.parametrize("rank", [0, 3])
def test_an_output_of_other_dims_lies_as_the_dims_it_has(texts: tuple[str, str], rank: int) -> None:
    with fake_mesh({"dp": 2, "tp": 2}, rank) as mesh:
        q, k, v = (placed((4, 12, 8, 16), texts, mesh) for _ in range(3))
        out, lse, _ = carry_on(op("attend"), (q, k, v), {"causal": False})
        assert texts_of(out) == texts
        assert texts_of(lse) == tuple(DIM_OF_LSE[text] for text in texts)


@settings(max_examples=50)
@given(meshes_and_texts(2), st.tuples(SIZES, SIZES))
def test_what_no_placement_explains_is_replicated(
    where: tuple[dict[str, int], int, list[str]], shape: tuple[int, int]
) -> None:
    """Rows by rows: on a rank both are fewer, which no axis alone can say."""
    axes, rank, texts = where
    with fake_mesh(axes, rank) as mesh:
        out = carry_on(op("gram"), (placed(shape, texts, mesh),), {})
        assert tuple(out.shape) == (shape[0], shape[0])
        explains(out)


def test_a_scalar_is_replicated() -> None:
    with fake_mesh({"tp": 2}) as mesh:
        out = carry_on(op("total"), (placed((4, 4), ["S(0)"], mesh),), {})
        assert (tuple(out.shape), texts_of(out)) == ((), ("R",))


@pytest.mark.parametrize("texts", [("S(0)", "S(1)"), ("R", "S(0)"), ("P(sum)", "R")])
@pytest.mark.parametrize("shape", [(4, 6), (1, 1)])
def test_an_op_in_place_returns_the_callers_tensor(
    texts: tuple[str, str], shape: tuple[int, int]
) -> None:
    with fake_mesh({"dp": 2, "tp": 2}) as mesh:
        tensor = placed(shape, texts, mesh)
        assert carry_on(op("scaled_"), (tensor, 2.0), {}) is tensor


def test_partial_sums_are_taken_whole() -> None:
    """What an op would make of parts, nobody can say."""
    with fake_mesh({"tp": 2}) as mesh:
        out = carry_on(op("four_rows"), (placed((8, 4), ["P(sum)"], mesh),), {})
        assert (tuple(out.shape), texts_of(out)) == ((8, 4), ("R",))
        explains(out)


def test_an_op_that_refuses_a_shard_is_taken_whole() -> None:
    with fake_mesh({"tp": 2}) as mesh:
        out = carry_on(op("four_rows"), (placed((4, 6), ["S(0)"], mesh),), {})
        assert (tuple(out.shape), texts_of(out)) == ((4, 6), ("R",))


def test_an_op_that_refuses_the_whole_raises_that() -> None:
    with fake_mesh({"tp": 2}) as mesh, pytest.raises(AssertionError, match="rows by fours"):
        carry_on(op("four_rows"), (placed((6, 6), ["R"], mesh),), {})


def test_plain_tensors_are_passed_as_they_are() -> None:
    """On a rank of heads that they fit; whole ones do not."""
    with fake_mesh({"tp": 2}) as mesh:
        q, k = placed((2, 8, 4, 16), ["S(2)"], mesh), torch.empty(2, 8, 4, 16)
        out, _, _ = carry_on(op("attend"), (q, k, k, False), {})
        assert (tuple(out.shape), texts_of(out)) == ((2, 8, 4, 16), ("R",))


def test_tensors_in_lists() -> None:
    with fake_mesh({"tp": 2}) as mesh:
        parts = [placed((4, 6), ["S(1)"], mesh), placed((8, 2), ["R"], mesh)]
        first, second = carry_on(op("doubled"), (parts,), {})
        assert texts_of(first) == ("S(1)",)
        assert texts_of(second) == ("R",)


def test_strides_are_those_of_the_whole() -> None:
    with fake_mesh({"tp": 2}) as mesh:
        q = placed((2, 8, 4, 16), ["S(2)"], mesh)
        out, _, _ = carry_on(op("attend"), (q, q, q, False), {})
        assert out.stride() == (512, 64, 16, 1)


def test_nothing_is_left_of_it() -> None:
    """Other tests must not see the group, nor a fake mode."""
    import torch.distributed as dist

    with fake_mesh({"tp": 2}):
        assert dist.get_world_size() == 2
    assert not dist.is_initialized()
    assert not compat.is_fake(torch.empty(1))
