"""What `attncheck fix` goes for: ops that no strategy can be right for, and the functions that are wrapped
instead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from attncheck.fixes import fixing, output, packages, synthesis, telling, verify
from attncheck.fixes.verify import Evidence
from attncheck.model import (
    BYPASSES_DISPATCHER,
    Case,
    CaseResult,
    MissingOp,
    Outcome,
    Report,
    Status,
)
from attncheck.runner.scan import ScanRequest

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


# --- from findings to a module, without running anything ---------------------------------------------

CPU = "aten._scaled_dot_product_flash_attention_for_cpu.default"
KVCACHE = "flash_attn.flash_attn_with_kvcache"
REQUEST = fixing.FixRequest(None, ScanRequest())


def of(name: str, outcome: Outcome, function: str = "") -> CaseResult:
    case = replace(refused().case, id=f"p/{name}/plain", operator=name, function=function)
    return CaseResult(case, outcome)


def fixed(monkeypatch: pytest.MonkeyPatch, found: list[CaseResult], good: bool) -> fixing.Fixed:
    """A fix in which whatever is verified turns out right, or wrong."""
    environment = {"wall_seconds": 0.0, "standins": [], "packages": {}}
    report = Report(environment, tuple(found), ())
    monkeypatch.setattr(fixing, "_found", lambda request, log, show: (request, report))

    def verified(self: Any, asked: Any, beside: Any) -> list[Evidence]:
        ops = {s.op for s in asked}
        right = Outcome(Status.SUPPORTED)
        cases = [r for r in found if any(verify.reaches(r, op) for op in ops)]
        run = tuple(replace(r, outcome=right if good else r.outcome) for r in cases)
        self.reports.append(Report(environment, run, ()))
        return [
            Evidence(op, mended=int(good), failed=() if good else ("it is wrong",)) for op in ops
        ]

    monkeypatch.setattr(fixing._Verification, "_verify", verified)
    return fixing.fix(REQUEST, lambda text: None, lambda done, total, case: None)


MISSING = Outcome(
    Status.MISSING_STRATEGY,
    kernel_op=CPU,
    missing_ops=(MissingOp(CPU, "forward", "strategy", "none"),),
)
BYPASSED = Outcome(Status.ERROR, exception_type=BYPASSES_DISPATCHER)


def test_functions_that_no_strategy_reaches_are_wrapped_beside_strategies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [of("sdpa", MISSING), of("kvcache", BYPASSED, KVCACHE)]
    made = fixed(monkeypatch, found, good=True)
    assert {e.op for e in made.evidence} == {CPU, KVCACHE}
    assert f'"{CPU}",' in made.text
    assert f'"{KVCACHE}",' in made.text
    assert output.exit_code(made) == 0


def test_what_is_wrong_is_not_written_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fixed(monkeypatch, [of("sdpa", MISSING)], good=False)
    assert made.text == ""
    assert output.exit_code(made) == 1
    said = "\n".join(telling.summary(made))
    assert f"NOT VERIFIED  {CPU}" in said
    assert "it is wrong" in said


def test_an_op_that_nobody_knows_is_unmended(monkeypatch: pytest.MonkeyPatch) -> None:
    flex = "higher_order.flex_attention"
    missing = replace(MISSING, missing_ops=(MissingOp(flex, "forward", "strategy", "none"),))
    made = fixed(monkeypatch, [of("flex", missing)], good=True)
    assert made.text == ""
    assert "takes functions besides tensors" in made.unmended[flex]
    assert output.exit_code(made) == 1


def test_nothing_missing_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fixed(monkeypatch, [of("sdpa", Outcome(Status.SUPPORTED))], good=True)
    assert (made.text, output.exit_code(made)) == ("", 0)
    assert telling.summary(made)[0].startswith("Nothing to mend")
