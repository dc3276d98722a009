"""Is an op the one we mean: by its schema, as PyTorch prints it."""

from __future__ import annotations

import pytest
import torch

from attncheck.standins.schemas import registered_schema, schema_difference

LIBRARY = torch.library.Library("attncheck_test_schemas", "FRAGMENT")
LIBRARY.define(
    "op(Tensor q, Tensor(a!)? out=None, int[2] window=[-1, -1], *, float scale=0.5) "
    "-> (Tensor(a!), Tensor[])"
)
LIBRARY.define("op.two(Tensor q) -> Tensor")
NAME = "attncheck_test_schemas::op"


@pytest.mark.parametrize(
    "schema",
    [
        # as it is; other alias names, defaults and spelling; SymInt takes what int takes
        "(Tensor q, Tensor(a!)? out=None, int[2] window=[-1, -1], *, float scale=0.5) "
        "-> (Tensor(a!), Tensor[])",
        "(Tensor q,Tensor(out!)? out = None,int[2] window=0,*,float scale = 1e-3) -> "
        "( Tensor(out!), Tensor[] )",
        "(Tensor q, Tensor(a!)? out, SymInt[2] window, *, float scale) -> (Tensor(a!), Tensor[])",
    ],
)
def test_the_same_op(schema: str) -> None:
    assert schema_difference(NAME, NAME + schema) == ""


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (
            "(Tensor query, Tensor(a!)? out, int[2] window, *, float scale) -> (Tensor(a!), Tensor[])",
            "argument 1 is `Tensor q`, expected `Tensor query`",
        ),
        (
            "(Tensor q, Tensor(a!) out, int[2] window, *, float scale) -> (Tensor(a!), Tensor[])",
            "argument 2 is `Tensor(!)? out`, expected `Tensor(!) out`",
        ),
        (
            "(Tensor q, Tensor? out, int[2] window, *, float scale) -> (Tensor, Tensor[])",
            "argument 2 is `Tensor(!)? out`, expected `Tensor? out`",
        ),
        (
            "(Tensor q, int[2] window, Tensor(a!)? out, *, float scale) -> (Tensor(a!), Tensor[])",
            "argument 2 is `Tensor(!)? out`, expected `int[2] window`",
        ),
        (
            "(Tensor q, Tensor(a!)? out, int[2] window, float scale) -> (Tensor(a!), Tensor[])",
            "argument 4 is `*`, expected `float scale`",
        ),
        (
            "(Tensor q, Tensor(a!)? out, int[2] window, *, float scale, int n=0) -> (Tensor(a!), Tensor[])",
            "it takes 5 arguments, expected 6",
        ),
        (
            "(Tensor q, Tensor(a!)? out, int[2] window, *, float scale) -> Tensor(a!)",
            "it returns (Tensor(!), Tensor[]), expected (Tensor(!))",
        ),
        (
            "(Tensor q, Tensor(a!)? out, int[2] window, *, float scale) -> (Tensor, Tensor[])",
            "it returns (Tensor(!), Tensor[]), expected (Tensor, Tensor[])",
        ),
    ],
)
def test_another_op_of_that_name(schema: str, words: str) -> None:
    said = schema_difference(NAME, NAME + schema)
    assert said.startswith(f"{NAME} is registered with another schema: {words}; expected {NAME}(")
    assert said.endswith(f"found {registered_schema(NAME)}")


def test_overloads_and_what_is_not_there() -> None:
    assert schema_difference(f"{NAME}.two", f"{NAME}.two(Tensor q) -> Tensor") == ""
    assert schema_difference(f"{NAME}.three", f"{NAME}.three() -> ()") == (
        f"{NAME}.three is not registered"
    )
    assert (
        schema_difference("nowhere::op", "nowhere::op() -> ()") == "nowhere::op is not registered"
    )


def test_every_attention_op_of_torch_is_itself() -> None:
    names = [n for n in dir(torch.ops.aten) if "attention" in n]
    assert len(names) > 10
    for name in names:
        for overload in getattr(torch.ops.aten, name).overloads():
            op = f"aten::{name}.{overload}"
            schema = registered_schema(op)
            assert schema is not None
            assert schema_difference(op, schema) == ""
