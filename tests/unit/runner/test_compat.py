"""PyTorch's own words, read: the texts are those that 2.6 to 2.15 print."""

from __future__ import annotations

import pytest
from torch.distributed.tensor import Partial, Replicate, Shard

from attncheck.runner import compat

MISSING = (
    "Operator flash_attn._flash_attn_forward.default does not have a sharding strategy registered."
)
TEXTS = [
    (MISSING, ("strategy", "flash_attn._flash_attn_forward.default")),
    (f"{MISSING}\n\nSharding propagation failed for Op(...)", ("strategy", MISSING.split()[1])),
    (
        "aten.add.Tensor got mixed torch.Tensor and DTensor, need to convert all torch.Tensor",
        ("mixed", "aten.add.Tensor"),
    ),
    (
        "aten.add.Tensor: got mixed torch.Tensor and DTensor, need to convert all: torch.Tensor",
        ("mixed", "aten.add.Tensor"),
    ),
    ("shape '[2]' is invalid for input of size 3", None),
    ("bad\n\nSharding propagation failed for Op(...)", None),
]


@pytest.mark.parametrize(("text", "expected"), TEXTS)
def test_refusals(text: str, expected: tuple[str, str] | None) -> None:
    assert compat.refusal(RuntimeError(text)) == expected


def test_an_op_without_a_meta_kernel_is_refused_in_other_words() -> None:
    class UnsupportedOperatorException(RuntimeError):
        pass

    error = RuntimeError("flash_attn_3.fwd.default\n\nSharding propagation failed for Op(...)")
    cause = UnsupportedOperatorException("flash_attn_3.fwd.default")
    error.__cause__ = cause
    assert compat.refusal(error) == ("propagation", None)
    # Before 2.10 the cause came through bare.
    assert compat.refusal(cause) == ("propagation", None)
    assert compat.refusal_sentence(cause) == (
        "Sharding propagation failed for flash_attn_3.fwd.default: it has no Meta kernel, and DTensor "
        "runs an op on meta tensors before it asks for a sharding strategy"
    )
    assert compat.refusal_sentence(error) == (
        "Sharding propagation failed for Op: it has no Meta kernel, and DTensor runs an op on meta "
        "tensors before it asks for a sharding strategy"
    )


@pytest.mark.parametrize(
    ("placement", "text"), [(Replicate(), "R"), (Shard(2), "S(2)"), (Partial(), "P(sum)")]
)
def test_placements(placement: object, text: str) -> None:
    assert compat.placement_text(placement) == text  # type: ignore[arg-type]
    assert compat.placement_from_text(text) == placement


def test_a_refusal_inside_torch_compile_is_found_and_quoted_alone() -> None:
    rule = (
        "There was no rule registered for HOP flex_attention and subclass "
        "<class 'torch.distributed.tensor.DTensor'>. We recommend filing an issue."
    )
    compiled = RuntimeError(
        "NotImplementedError when running FX node\n  Explanation: failed: call_function "
        f'flex_attention(*(DTensor(...),), **{{}}): got NotImplementedError("{rule}")\n  Hint: none'
    )
    assert compat.refusal(compiled) == ("strategy", "higher_order.flex_attention")
    assert compat.refusal_sentence(compiled) == rule
    mixed = "aten.index.Tensor got mixed torch.Tensor and DTensor, need to convert all!"
    compiled = RuntimeError(
        f"RuntimeError when making fake tensor call: got RuntimeError('{mixed}')"
    )
    assert compat.refusal(compiled) == ("mixed", "aten.index.Tensor")
    assert compat.refusal_sentence(compiled) == mixed


def test_a_mode_without_a_rule_is_no_refusal_of_dtensor() -> None:
    text = (
        "There was no rule registered for HOP flex_attention and mode <Mode object>. We recommend"
    )
    assert compat.refusal(NotImplementedError(text)) is None
