"""What `attncheck fix` goes for: ops that no strategy can be right for, and the functions that are wrapped
instead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from attncheck.fixes import fixing, packages, synthesis
from attncheck.model import Case, CaseResult, MissingOp, Outcome, Status

HOPELESS = "flash_attn_3.bwd.default"
FUNCTION = "flash_attn_interface.flash_attn_func"


def refused(*ops: str) -> CaseResult:
    case = Case(
        "p/o/plain/dtensor/tp=2/heads/backward",
        "p", "o", "dtensor", {"name": "plain"}, {"tp": 2}, "heads", {"q": ("S(1)",)}, "backward", FUNCTION,
    )  # fmt: skip
    missing = tuple(MissingOp(op, "backward", "propagation", "none") for op in ops)
    return CaseResult(case, Outcome(Status.MISSING_STRATEGY, missing_ops=missing))


def test_an_op_that_can_have_no_strategy_is_told_and_not_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("tried all the same")

    monkeypatch.setattr(synthesis, "for_operators", never)
    request: Any = None
    found: Any = None
    assert fixing._synthesised(request, found, [HOPELESS], never) == (
        [],
        {HOPELESS: packages.NO_STRATEGY[HOPELESS]},
    )


def test_who_can_have_no_strategy_has_no_signature() -> None:
    assert not {s.op for s in packages.known()} & {*packages.NO_STRATEGY}


@pytest.mark.parametrize(
    ("globs", "wanted"),
    [
        ((), True),
        (("flash_attn_3::bwd",), True),
        (("flash_attn_interface.*",), True),
        (("flash_attn_3::fwd",), False),
    ],
)
def test_the_function_around_it_is_wrapped_instead(globs: tuple[str, ...], wanted: bool) -> None:
    results = [refused("flash_attn_3.fwd.default", HOPELESS)]
    names = [f.op for f in fixing.wanted_functions(results, globs)]
    assert names == [FUNCTION] * wanted


def test_where_strategies_do_no_function_is_wrapped() -> None:
    case = refused("flash_attn_3.fwd.default", "flash_attn_3._flash_attn_backward.default")
    assert fixing.wanted_functions([case], ()) == []
    newer = refused("flash_attn_3._flash_attn_forward.default", HOPELESS)
    assert fixing.wanted_functions([newer], ()) == []
    elsewhere = replace(refused(HOPELESS).case, function="mine.attention")
    assert fixing.wanted_functions([replace(refused(HOPELESS), case=elsewhere)], ()) == []
