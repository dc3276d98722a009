"""A report made by hand that looks like a real audit of a parallel model."""

from __future__ import annotations

import dataclasses

from attncheck.audited import (
    OBSERVED,
    PRESET,
    AttentionCall,
    Audit,
    Degrees,
    Fit,
    ModuleCommunication,
    ModuleOp,
    Numeric,
    RankDifference,
    Uncompared,
    Unequal,
    UnevenShard,
)
from attncheck.model import Case, CaseResult, MissingOp, Outcome, Reason, Report, Status, case_id

FORWARD = "flash_attn._flash_attn_forward.default"
BACKWARD = "flash_attn._flash_attn_backward.default"
REFUSED = "does not have a sharding strategy registered."
SHARDED = (("S(2)",), ("S(2)",), ("S(2)",))
COMMAND = "attncheck audit wan.py:build --mesh tp=8 --with flash-attn --inputs wan.py:inputs_real"


def sample(text: str = "blocks.*.self_attn.attn") -> Report:
    """`text`: the name of a module in it."""
    cases = (
        *_cases("call1", Status.MISSING_STRATEGY, Status.MISSING_STRATEGY),
        *_cases("call2", Status.SUPPORTED, Status.REDISTRIBUTED),
        *_cases("call3", Status.UNAVAILABLE, Status.UNAVAILABLE),
    )
    return Report(environment(), cases, (), audit=audit(cases, text))


def environment() -> dict[str, object]:
    return {
        "attncheck": "0.1.0",
        "python": "3.11.9",
        "packages": {"torch": "2.13.0+cpu", "flash-attn": "2.8.3.post2"},
        "device": "cpu",
        "mesh": {"tp": 2},
        "seed": 20260801,
        "command": COMMAND,
    }


def audit(cases: tuple[CaseResult, ...] = (), text: str = "blocks.*.self_attn.attn") -> Audit:
    return Audit(
        target="wan.py:build",
        mesh={"tp": 8},
        inputs="x [1, 32760, 5120] bfloat16; context [1, 512, 5120] bfloat16",
        parameters=14_288_491_584,
        parameter_bytes=3_573_120_000,
        layers={"blocks.*": 40, text: 40},
        ops=(
            ModuleOp(
                text, FORWARD, "forward", SHARDED, (), 40, "strategy",
                f"Operator {FORWARD} {REFUSED}", "wan.py:41",
            ),
            ModuleOp(text, BACKWARD, "backward", SHARDED, (), 40, "strategy", REFUSED),
            ModuleOp(
                "blocks.*.norm", "aten.mul.Tensor", "forward", (("S(1)",), ("plain",)), (), 40,
                "mixed", "got mixed torch.Tensor and DTensor", "wan.py:50",
            ),
            ModuleOp(
                "blocks.*.q", "aten.mm.default", "forward", (("R",), ("S(1)",)), (("S(1)",),), 40
            ),
            ModuleOp(
                "blocks.*.o", "aten.mm.default", "backward", (("S(1)",), ("S(0)",)), (("P(sum)",),),
                80,
            ),
        ),
        communication=(
            ModuleCommunication(
                "blocks.*.o", "all_reduce", "forward", 40, 23_482_368_000, line="wan.py:62"
            ),
            ModuleCommunication(
                "blocks.*.norm", "all_gather", "backward", 80, 46_964_736_000,
                "aten._fused_rms_norm_backward.default", asked=False,
            ),
        ),
        uneven=(UnevenShard("blocks.*.q.weight", 0, 5121, "tp", 8, 641, 634),),
        differences=(RankDifference("", "goes through", "RuntimeError at wan.py:70: sizes"),),
        attention=_calls(cases, text),
        numeric=Numeric(
            2,
            "the same model before it is parallelised",
            compared=71,
            unequal=(
                Unequal("training", "blocks.0.modulation", "blocks.0", 0.31, 2e-6, "no reduction"),
                Unequal("evaluation", "output", "", 0.002, 1e-6),
            ),
            uncompared=(Uncompared("rope.freqs", "it is complex"),),
        ),
        notes=("F.scaled_dot_product_attention is taken as CUDA would choose: flash for 80 calls.",),
        seconds=9.4,
        peak_mib=331.2,
    )  # fmt: skip


def _calls(cases: tuple[CaseResult, ...], text: str) -> tuple[AttentionCall, ...]:
    def call(name: str, module: str, keys: int, **more: object) -> AttentionCall:
        return AttentionCall(
            modules=(module,),
            function="flash_attn.flash_attn_func",
            kernel_op=FORWARD,
            calls=40,
            sizes={
                "batch": 1,
                "sequence": 32760,
                "heads": 40,
                "head_dim": 128,
                "kv_sequence": keys,
            },
            placements={"q": ("S(2)",), "k": ("S(2)",), "v": ("S(2)",)},
            operator="flash_attn_func",
            setting=name,
            cases=tuple(r.case.id for r in cases if r.case.setting_name == name),
            **more,  # type: ignore[arg-type]
        )

    return (
        call("call1", text, 32760),
        call("call2", "blocks.*.cross_attn.attn", 512, options={"causal": True, "softcap": 1.5}),
        call("call3", "head", 32760, note="run without its dropout of 0.1"),
        AttentionCall(
            ("blocks.*.own",), "vendor.attention.default", "vendor.attention.default", 40,
            note="attncheck has no operator that calls this op with the arguments of another model",
        ),
    )  # fmt: skip


def _cases(name: str, forward: Status, backward: Status) -> tuple[CaseResult, ...]:
    out = []
    for direction, status in (("forward", forward), ("backward", backward)):
        op = FORWARD if direction == "forward" else BACKWARD
        mesh = {"tp": 2}
        case = Case(
            id=case_id(
                "flash_attn", "flash_attn_func", name, "dtensor", mesh, "explicit", direction
            ),
            probe="flash_attn",
            operator="flash_attn_func",
            route="dtensor",
            setting={"name": name, "dtype": "bfloat16", "heads": 10},
            mesh=mesh,
            placement="explicit",
            placements={"q": ("S(2)",), "k": ("S(2)",), "v": ("S(2)",)},
            direction=direction,
        )
        missing = (MissingOp(op, direction, "strategy", f"Operator {op} {REFUSED}"),)
        refused = status is Status.MISSING_STRATEGY
        outcome = Outcome(
            status,
            kernel_op=op,
            missing_ops=missing if refused else (),
            message=f"Operator {op} {REFUSED}" if refused else "",
            reason=Reason.SETTING_REFUSED if status is Status.UNAVAILABLE else None,
        )
        out.append(CaseResult(case, outcome))
    return tuple(out)


def observed() -> Report:
    """The same of a real run: nothing is run beside it."""
    report = sample()
    assert report.audit is not None
    attention = tuple(dataclasses.replace(c, cases=(), note="") for c in report.audit.attention)
    audit = dataclasses.replace(
        report.audit,
        kind=OBSERVED,
        target="train.py",
        steps=3,
        attention=attention,
        numeric=None,
        notes=(),
        failure=f"NotImplementedError at wan.py:41: Operator {FORWARD} {REFUSED}",
    )
    return dataclasses.replace(report, cases=(), audit=audit)


def preset() -> Report:
    """A known model, of which attention alone is known."""
    report = sample()
    assert report.audit is not None
    calls = tuple(
        dataclasses.replace(call, modules=(f"{call.setting} (tensor)",), options={"mask": "none"})
        for call in report.audit.attention[:3]
    )
    audit = Audit(
        target="wan2.1-t2v-14b",
        mesh={"tp": 8, "cp": 2},
        kind=PRESET,
        attention=calls,
        fits=(
            Fit("self", "tensor", 8, 1, "works", "40 heads on 8 ranks, 5 to each"),
            Fit("self", "ulysses", 16, 2, "uneven", "40 heads on 16 ranks: 3 and 1"),
        ),
        degrees=(Degrees("tensor", (1, 2, 4, 5, 8), (), (3, 6)),),
    )
    return dataclasses.replace(report, audit=audit)
