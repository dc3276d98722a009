"""What a verification concludes from its cases, and which cases it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attncheck.fixes import verify
from attncheck.model import (
    Case,
    CaseResult,
    ErrorStat,
    KernelOp,
    MissingOp,
    Outcome,
    Report,
    Status,
)
from attncheck.probing import Operator, Setting

FORWARD, BACKWARD = "mine.attn_forward.default", "mine.attn_backward.default"
OPS = (FORWARD, BACKWARD)


def result(
    status: Status,
    before: Status | None = Status.MISSING_STRATEGY,
    message: str = "",
    kernel_op: str = "",
    reached: tuple[str, ...] = OPS,
    missing: tuple[str, ...] = (),
    ratio: float = 0.2,
    name: str = "plain",
) -> CaseResult:
    case = Case(
        f"p/o/{name}/dtensor/tp=2/heads/backward",
        "p", "o", "dtensor", {"name": name}, {"tp": 2}, "heads", {"q": ("S(1)",)}, "backward",
    )  # fmt: skip
    error = ErrorStat(ratio, ratio, ratio, 1.0, 1.0, ratio, 1.0)
    outcome = Outcome(
        status,
        message,
        kernel_op,
        kernel_ops=tuple(KernelOp(op, "forward") for op in reached),
        missing_ops=tuple(MissingOp(op, "forward", "strategy", "none") for op in missing),
        errors={"out": error},
    )
    return CaseResult(case, outcome, before)


def evidence(*results: CaseResult, op: str = FORWARD) -> verify.Evidence:
    return verify.evidence(op, OPS, results)


def test_verified_by_what_was_mended() -> None:
    found = evidence(result(Status.SUPPORTED, ratio=0.4), result(Status.REDISTRIBUTED))
    assert found.verified
    assert (found.right, found.mended, found.ratio) == (2, 2, 0.4)
    assert found.before == {"missing_strategy": 2}
    assert found.after == {"supported": 1, "redistributed": 1}


def test_nothing_that_never_ran_is_verified() -> None:
    assert not evidence().verified
    assert not evidence(result(Status.UNAVAILABLE)).verified
    assert not evidence(result(Status.SUPPORTED, reached=())).verified
    # Right, but right before: nobody knows what the fix is good for.
    assert not evidence(result(Status.SUPPORTED, before=Status.SUPPORTED)).verified


@pytest.mark.parametrize(
    "bad",
    [
        result(Status.WRONG, kernel_op=FORWARD),
        result(Status.WRONG),  # no op stands out
        result(Status.WRONG, kernel_op="p"),  # nor here
        result(Status.DIVERGED, kernel_op=FORWARD),
        result(Status.MISSING_STRATEGY, missing=(FORWARD,)),
        result(Status.REDISTRIBUTED, before=Status.SUPPORTED),  # it became worse
        result(Status.ERROR, before=Status.SUPPORTED, message="attncheck: other"),
        result(Status.CRASH, before=None, kernel_op=FORWARD),
    ],
)
def test_one_that_fails_is_enough(bad: CaseResult) -> None:
    found = evidence(result(Status.SUPPORTED), bad)
    assert not found.verified
    assert len(found.failed) == 1


def test_who_is_blamed() -> None:
    """The backward's fault is not held against the forward, nor that of an op that is not ours."""
    good = result(Status.SUPPORTED)
    wrong_backward = result(Status.WRONG, kernel_op=BACKWARD)
    assert evidence(good, wrong_backward).verified
    assert not evidence(good, wrong_backward, op=BACKWARD).verified
    missing_backward = result(Status.MISSING_STRATEGY, missing=(BACKWARD,))
    assert evidence(good, missing_backward).elsewhere
    other = result(Status.ERROR, kernel_op="aten.view.default", reached=(*OPS, "aten.view.default"))
    assert evidence(good, other).verified


def test_refusals_and_old_faults_are_counted_apart() -> None:
    said = (
        f"attncheck fix: {FORWARD} with dropout_p=0.1 has no right strategy: ...\n\nSharding failed"
    )
    refused = result(Status.ERROR, message=said, kernel_op=FORWARD)
    old = result(Status.WRONG, before=Status.WRONG, kernel_op=FORWARD)
    found = evidence(result(Status.SUPPORTED), refused, old)
    assert found.verified
    assert list(found.refused.values()) == [1]
    assert "with dropout_p=0.1" in next(iter(found.refused))
    assert len(found.unchanged) == 1
    assert not evidence(refused).verified


def operator(*settings: Setting) -> Operator:
    nothing = lambda *_: ()  # noqa: E731
    return Operator("o", nothing, nothing, nothing, settings)


SIZES = {"batch": 6, "heads": 12, "kv_heads": 12, "sequence": 10, "kv_sequence": 14}
SETTINGS = (
    Setting("plain", SIZES),
    Setting("causal", {**SIZES, "kv_sequence": 10}, options={"causal": "bottom_right"}),
    Setting("gqa", {**SIZES, "kv_heads": 6}),
    Setting("odd", {**SIZES, "heads": 7, "kv_heads": 7}),
    Setting("float_mask", SIZES, options={"mask": "float"}),
    Setting("mask_full", SIZES, options={"mask": "float"}, level="full"),
)


def test_a_function_is_reached_where_the_op_that_makes_its_wrapper_needless_is_not() -> None:
    function, needless = (
        "flash_attn_interface.flash_attn_func",
        "flash_attn_3._flash_attn_forward.default",
    )
    case = replace(result(Status.SUPPORTED).case, function=function)
    for reached, by_function in (((), True), ((FORWARD,), True), ((needless,), False)):
        found = replace(result(Status.SUPPORTED, reached=reached), case=case)
        assert verify.reaches(found, function) is by_function
    refused = result(Status.MISSING_STRATEGY, reached=(), missing=(needless,))
    assert not verify.reaches(replace(refused, case=case), function)
    assert not verify.reaches(result(Status.SUPPORTED), function)


def test_twins_differ_in_nothing_but_the_flag() -> None:
    plain, causal, grouped, grouped_causal = verify.flipped(operator(*SETTINGS))
    assert plain.sizes == causal.sizes == {**SIZES, "kv_sequence": 10}  # where all agree on causal
    assert (plain.options, causal.options) == ({}, {"causal": "bottom_right"})
    assert grouped.sizes == grouped_causal.sizes == {**SETTINGS[2].sizes, "kv_sequence": 10}
    square = replace(SETTINGS[0], sizes=plain.sizes)
    assert [s.name for s in verify.flipped(operator(square, SETTINGS[1]))] == [
        "plain_turned_causal"
    ]
    assert not verify.flipped(operator(SETTINGS[0]))


def test_a_twin_that_the_probe_cannot_make_is_left_out() -> None:
    def tensors(setting: Setting) -> tuple[()]:
        return () if "causal" not in setting.options else setting.options["mask_as"]

    made = verify.flipped(replace(operator(*SETTINGS), tensors=tensors))
    assert [s.name for s in made] == ["plain_turned", "gqa_turned"]


def test_neighbours_are_one_of_each_kind() -> None:
    assert verify.neighbours(operator(*SETTINGS)) == ("plain", "causal", "gqa", "odd", "float_mask")
    assert verify.neighbours(operator(SETTINGS[0])) == ("plain",)


def test_a_plain_tensor_among_dtensors_is_no_fault_of_a_strategy() -> None:
    mixed = result(Status.MIXED_TENSOR)
    outcome = replace(mixed.outcome, missing_ops=(MissingOp(FORWARD, "forward", "mixed", "mixed"),))
    mixed = replace(mixed, outcome=outcome)
    found = evidence(result(Status.SUPPORTED), mixed)
    assert found.verified
    assert len(found.elsewhere) == 1
    assert not evidence(mixed).verified


def test_a_joined_report_names_the_stand_ins_of_all_its_cases() -> None:
    def report(name: str, standin: str, restarts: int) -> Report:
        made = result(Status.SUPPORTED, name=name)
        made = replace(made, outcome=replace(made.outcome, standins=(standin,)))
        case = replace(made.case, id=f"p/o/{name}")
        environment = {"standins": [standin], "restarts": restarts, "wall_seconds": 1.5}
        return Report(environment, (replace(made, case=case),), ())

    joined = verify.joined([report("a", "kernels of flash", 1), report("b", "kernels of aten", 2)])
    assert joined.environment["standins"] == ["kernels of aten", "kernels of flash"]
    assert joined.environment["restarts"] == 3
    assert joined.environment["wall_seconds"] == 3.0
    assert len(joined.cases) == 2
