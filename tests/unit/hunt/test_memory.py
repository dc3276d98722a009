"""Whether the strides that a setting asks for really arrive at the operator: whole, in shards, simulated."""

from __future__ import annotations

import pytest
import torch

from attncheck.probing import BATCH, HEAD_DIM, HEADS, MEMORY, SEQUENCE, Setting, Tensor
from attncheck.runner.inputs import in_memory, laid_out, whole_tensors

DIMS = (BATCH, HEADS, SEQUENCE, HEAD_DIM)
SIZES = dict(zip(DIMS, (2, 3, 5, 8), strict=True))
SHAPE = (2, 3, 5, 8)


def setting(memory: str) -> Setting:
    return Setting("plain", SIZES, memory=memory)


@pytest.mark.parametrize(
    ("memory", "strides"),
    [
        ("contiguous", (120, 40, 8, 1)),
        ("transposed", (120, 8, 24, 1)),
        ("sliced", (360, 120, 24, 1)),
        ("expanded", (0, 40, 8, 1)),
    ],
)
def test_strides(memory: str, strides: tuple[int, ...]) -> None:
    values = torch.randn(1, *SHAPE[1:]).expand(SHAPE).contiguous()
    laid = in_memory(values, memory)
    assert laid.stride() == strides
    assert torch.equal(laid, values)
    assert laid.untyped_storage().data_ptr() != values.untyped_storage().data_ptr() or (
        memory == "contiguous"
    )


def test_every_memory_is_known_and_others_are_refused() -> None:
    for memory in MEMORY:
        assert setting(memory).memory == memory
    with pytest.raises(AssertionError, match="memory 'reversed' is none of"):
        setting("reversed")


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("shape", [(4, 3, 5, 8), (0, 3, 5, 8), (2, 0, 5, 8), (7, 4, 8), (5, 8)])
def test_a_shard_has_the_strides_that_dtensor_expects(memory: str, shape: tuple[int, ...]) -> None:
    """Empty shards and fewer dims included; sharding must not change what is dense and what is not."""
    laid = in_memory(torch.ones(shape), memory)
    assert laid.shape == shape
    if memory == "transposed" and 0 not in shape and len(shape) > 2:
        assert laid.transpose(-3, -2).is_contiguous()


def test_values_do_not_depend_on_memory_but_for_expanded() -> None:
    spec = Tensor("q", DIMS, SHAPE)
    contiguous = whole_tensors("op", setting("contiguous"), (spec,), 1)["q"]
    for memory in ("transposed", "sliced"):
        assert torch.equal(whole_tensors("op", setting(memory), (spec,), 1)["q"], contiguous)
    expanded = whole_tensors("op", setting("expanded"), (spec,), 1)["q"]
    assert torch.equal(expanded[0], contiguous[0])
    assert torch.equal(expanded[1], expanded[0])
    assert not torch.equal(expanded, contiguous)


def test_weights_given_values_and_what_is_written_into_stay_as_they_are() -> None:
    assert laid_out(Tensor("q", DIMS, SHAPE))
    assert not laid_out(Tensor("w", ("-", "-"), (4, 4), fill="weight"))
    assert not laid_out(Tensor("cu", ("-",), (4,), fill="values", values=(0, 1, 2, 3)))
    assert not laid_out(Tensor("cache", DIMS, SHAPE, mutable=True))


def test_the_report_says_so_unless_contiguous() -> None:
    assert "memory" not in setting("contiguous").to_dict()
    assert setting("sliced").to_dict()["memory"] == "sliced"
