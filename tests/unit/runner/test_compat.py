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
    error.__cause__ = UnsupportedOperatorException("flash_attn_3.fwd.default")
    assert compat.refusal(error) == ("propagation", None)


@pytest.mark.parametrize(
    ("placement", "text"), [(Replicate(), "R"), (Shard(2), "S(2)"), (Partial(), "P(sum)")]
)
def test_placements(placement: object, text: str) -> None:
    assert compat.placement_text(placement) == text  # type: ignore[arg-type]
    assert compat.placement_from_text(text) == placement
