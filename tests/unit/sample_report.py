"""A report made by hand that looks like a real default scan, and the helper for snapshots.

A table below says for every operator, placement and direction what each setting came to: one letter
a setting, in the order of the operator's settings. ATTNCHECK_UPDATE_SNAPSHOTS=1 rewrites snapshots.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from attncheck.model import (
    Case,
    CaseResult,
    Collective,
    ErrorStat,
    Fact,
    Finding,
    KernelOp,
    MissingOp,
    Outcome,
    RankState,
    Reason,
    Remedy,
    Report,
    Severity,
    Status,
    case_id,
    fingerprint,
)

SNAPSHOTS = Path(__file__).parent.parent / "snapshots"

LETTERS = {
    "h": Status.HANG,
    "c": Status.CRASH,
    "v": Status.DIVERGED,
    "w": Status.WRONG,
    "m": Status.MISSING_STRATEGY,
    "x": Status.MIXED_TENSOR,
    "e": Status.ERROR,
    "d": Status.DRIFT,
    "r": Status.REDISTRIBUTED,
    "s": Status.SUPPORTED,
    "u": Status.UNAVAILABLE,
    "?": Status.UNKNOWN,
}

FLASH_FORWARD = "flash_attn._flash_attn_forward.default"
FLASH_BACKWARD = "flash_attn._flash_attn_backward.default"
CPU_FORWARD = "aten._scaled_dot_product_flash_attention_for_cpu.default"
CPU_BACKWARD = "aten._scaled_dot_product_flash_attention_for_cpu_backward.default"

SDPA_SETTINGS = ("plain", "causal", "gqa", "mask", "bfloat16", "uneven_heads", "dropout")
FLASH_SETTINGS = ("plain", "causal", "gqa", "gqa_uneven_kv", "window")
FALLBACK_SETTINGS = ("plain", "bfloat16", "uneven_heads")

# operator -> (probe, settings, kernel op forward and backward, {placement: (forward, backward)})
TABLE: dict[str, tuple[str, tuple[str, ...], str, str, dict[str, tuple[str, str]]]] = {
    "sdpa": (
        "sdpa", SDPA_SETTINGS, CPU_FORWARD, CPU_BACKWARD,
        {
            "replicate": ("smsssss", "mmmmmmm"),
            "batch": ("rmrrrru", "mmmmmmu"),
            "heads": ("rmrrrru", "mmmmmmu"),
            "sequence": ("rmrrrru", "mmmmmmu"),
            "query": ("rmrrrr", "mmmmmm"),
            "head_dim": ("rmrrr", "mmmmm"),
            "partial": ("rmrwr", "mmmmm"),
        },
    ),
    "sdpa[MATH]": (
        "sdpa", SDPA_SETTINGS, "aten.bmm.default", "aten.bmm.default",
        {
            "replicate": ("sxsxsss", "sxsxsss"),
            "batch": ("sxsxsss", "sxsxsss"),
            "heads": ("sxsxssw", "sxsxssw"),
            "sequence": ("rxrxrrr", "rxrxrrr"),
            "query": ("sxsxss", "rxrxrr"),
            "head_dim": ("rxrxr", "rxrxd"),
            "partial": ("rxrxr", "rxrxr"),
        },
    ),
    "sdpa[FLASH_ATTENTION]": (
        "sdpa", ("plain", "causal", "gqa", "gqa_uneven_kv", "bfloat16"),
        "aten._scaled_dot_product_flash_attention.default",
        "aten._scaled_dot_product_flash_attention_backward.default",
        {
            "replicate": ("sssss", "sssss"),
            "batch": ("sssss", "sssss"),
            "heads": ("sssws", "sssws"),
            "sequence": ("rrrrr", "rrrrr"),
            "query": ("rrrrr", "rrvrr"),
        },
    ),
    "flash_attn_func": (
        "flash_attn", FLASH_SETTINGS, FLASH_FORWARD, FLASH_BACKWARD,
        dict.fromkeys(
            ("replicate", "batch", "heads", "sequence", "query", "partial"), ("mmmmm", "mmmmm")
        ),
    ),
    "flash_attn_qkvpacked_func": (
        "flash_attn", ("plain", "causal"), FLASH_FORWARD, FLASH_BACKWARD,
        dict.fromkeys(("replicate", "batch", "heads", "sequence"), ("mm", "mm")),
    ),
    "flash_attn_varlen_func": (
        "flash_attn", ("plain", "causal"),
        "flash_attn._flash_attn_varlen_forward.default",
        "flash_attn._flash_attn_varlen_backward.default",
        dict.fromkeys(("replicate", "heads", "sequence"), ("mx", "mx")),
    ),
    "flash_attn_with_kvcache": (
        "flash_attn", ("plain", "causal"), "", "",
        {"replicate": ("cu", ""), "heads": ("hu", "")},
    ),
    "fallback.matmul": (
        "fallback", FALLBACK_SETTINGS, "aten.bmm.default", "aten.bmm.default",
        {
            "replicate": ("sss", "sss"),
            "batch": ("sss", "sss"),
            "heads": ("sss", "sss"),
            "sequence": ("rr?", "rr?"),
            "query": ("ss", "rr"),
            "head_dim": ("rr", "rr"),
            "partial": ("rr", "rr"),
        },
    ),
    "fallback.einsum": (
        "fallback", FALLBACK_SETTINGS, "aten.bmm.default", "aten.bmm.default",
        {
            "replicate": ("sss", "sss"),
            "batch": ("sss", "sss"),
            "heads": ("sse", "sse"),
            "sequence": ("rr", "rr"),
        },
    ),
}  # fmt: skip

DIMS = {"batch": "S(0)", "heads": "S(1)", "sequence": "S(2)", "query": "S(2)", "head_dim": "S(3)"}


def results() -> tuple[CaseResult, ...]:
    return tuple(_results())


def _results() -> Iterator[CaseResult]:
    for operator, (probe, settings, forward_op, backward_op, placements) in TABLE.items():
        for placement, columns in placements.items():
            for direction, letters in zip(("forward", "backward"), columns, strict=True):
                op = forward_op if direction == "forward" else backward_op
                for setting, letter in zip(settings, letters, strict=False):
                    case = _case(probe, operator, setting, placement, direction)
                    yield CaseResult(case, _outcome(case, LETTERS[letter], op))


def _case(probe: str, operator: str, setting: str, placement: str, direction: str) -> Case:
    q = DIMS.get(placement, "P(sum)" if placement == "partial" else "R")
    kv = "R" if placement in ("query", "partial") else q
    mesh = {"tp": 2}
    return Case(
        id=case_id(probe, operator, setting, "dtensor", mesh, placement, direction),
        probe=probe,
        operator=operator,
        route="dtensor",
        setting={
            "name": setting, "dtype": "bfloat16" if setting == "bfloat16" else "float32",
            "batch": 6, "heads": 4, "sequence": 18, "head_dim": 16, "causal": setting == "causal",
        },
        mesh=mesh,
        placement=placement,
        placements={"q": (q,), "k": (kv,), "v": (kv,)},
        direction=direction,
    )  # fmt: skip


def _outcome(case: Case, status: Status, op: str) -> Outcome:
    common = {"kernel_op": op, "seed": 20260801, "timings": {"first": 41.5, "warm": 2.25}}
    if case.operator.startswith("flash"):
        common["standins"] = ("flash_attn_2_cuda",)
    if status in (Status.SUPPORTED, Status.REDISTRIBUTED, Status.WRONG, Status.DRIFT):
        common |= _measured(case, status, op)
        return Outcome(status, **common)
    return Outcome(status, **common | _failed(case, status, op))


def _measured(case: Case, status: Status, op: str) -> dict[str, object]:
    error = {Status.WRONG: 2.6, Status.DRIFT: 4e-5}.get(status, 3e-7)
    codes = {Status.WRONG: "wrong_result", Status.DRIFT: "drift_gradient"}
    q = tuple(case.placements["q"])
    gathers = 3 if case.placement != "query" else 1
    moved = Collective("all_gather", op, case.direction, gathers, gathers * 27648)
    return {
        "kernel_ops": (KernelOp(op, case.direction, (q, q, q), (q,)),),
        "collectives": (moved,) if status is Status.REDISTRIBUTED else (),
        "outputs": {"out": ("R",) if status is Status.REDISTRIBUTED else q},
        "errors": {"out": ErrorStat(error, error / 3, error / 2, 2e-7, 4e-6, error / 4e-6, 3.1)},
        "facts": (Fact(codes[status], "out", f"max error {error:g}"),) if status in codes else (),
    }


def _failed(case: Case, status: Status, op: str) -> dict[str, object]:
    missing = f"Operator {op} does not have a sharding strategy registered."
    mixed = f"{op}: got mixed torch.Tensor and DTensor, need to convert all to DTensor."
    states = tuple(RankState(r, 6 + r, "c10d.allgather_.default" if r else op) for r in range(2))
    facts: dict[Status, dict[str, object]] = {
        Status.MISSING_STRATEGY: {
            "message": missing,
            "exception_type": "NotImplementedError",
            "missing_ops": (MissingOp(op, case.direction, "strategy", missing),),
        },
        Status.MIXED_TENSOR: {
            "message": mixed,
            "exception_type": "RuntimeError",
            "missing_ops": (MissingOp(op, case.direction, "mixed", mixed),),
        },
        Status.ERROR: {
            "message": "RuntimeError: shape '[6, 18, 4, 16]' is invalid for input of size 8640",
            "exception_type": "RuntimeError",
        },
        Status.CRASH: {"message": "Segmentation fault (signal 11)", "ranks": states},
        Status.HANG: {"message": "no answer within 20 s", "ranks": states},
        Status.DIVERGED: {"message": "rank 0 gathers, rank 1 reduces", "ranks": states},
        Status.UNKNOWN: {"message": "the reference failed: out of memory"},
        Status.UNAVAILABLE: {
            "message": f"{case.operator} refuses {case.setting['name']} on cpu",
            "reason": Reason.SETTING_REFUSED,
        },
    }
    return facts[status]


NOT_RUN = "Not run in this scan."  # as rules write it
LOCAL_MAP = """\
from torch.distributed.tensor import Shard
from torch.distributed.tensor.experimental import local_map

heads = [Shard(2)]  # (batch, sequence, heads, head_dim)
attention = local_map(
    flash_attn_func,
    out_placements=list(heads),
    in_placements=(heads, heads, heads),
    redistribute_inputs=True,
    device_mesh=mesh,
)
out = attention(q, k, v)"""


def sample() -> Report:
    """About 400 cases, every status, findings with and without proof."""
    cases = results()
    return Report(environment(), cases, findings(cases))


def environment() -> dict[str, object]:
    return {
        "attncheck": "0.1.0",
        "python": "3.11.9",
        "platform": "Linux-6.8.0-x86_64-with-glibc2.39",
        "packages": {"numpy": "2.1.0", "torch": "2.13.0+cpu", "flash-attn": "2.8.3.post2"},
        "cpus": 8,
        "gpu": "none",
        "device": "cpu",
        "ranks": 2,
        "mesh": {"tp": 2},
        "seed": 20260801,
        "hash_seeds": [6, 7],
        "level": "default",
        "standins": ["flash_attn_2_cuda: reference kernels on CPU, not the compiled ones"],
        "phases": {"start": 4.31, "propagation": 38.2, "cases": 21.75, "rules": 0.04},
        "peak_rss_mib": [611.5, 604.0],
        "wall_seconds": 66.4,
        "restarts": 2,
        "command": "attncheck scan --with flash-attn",
        "notes": ["Values were judged against float64 on unsharded tensors."],
        "probe_errors": ["my_kernel.py: Probe file my_kernel.py defines no PROBE."],
    }


def findings(cases: tuple[CaseResult, ...]) -> tuple[Finding, ...]:
    def ids(status: str, op: str = "", operator: str = "", direction: str = "") -> tuple[str, ...]:
        return tuple(
            r.case.id
            for r in cases
            if r.outcome.status is LETTERS[status]
            and op in ("", r.outcome.kernel_op)
            and operator in ("", r.case.operator)
            and direction in ("", r.case.direction)
        )

    working = tuple(
        r.case.id
        for r in cases
        if r.case.operator == "fallback.matmul" and r.case.placement == "heads"
    )
    whole = tuple(
        r.case.id
        for r in cases
        if (r.case.operator, r.case.placement) == ("sdpa[FLASH_ATTENTION]", "replicate")
        and r.case.setting["name"] == "gqa_uneven_kv"
    )
    return (
        _missing("ATN101", FLASH_FORWARD, ids("m", FLASH_FORWARD), working, LOCAL_MAP),
        _missing("ATN102", FLASH_BACKWARD, ids("m", FLASH_BACKWARD), working, LOCAL_MAP),
        _missing("ATN101", CPU_FORWARD, ids("m", CPU_FORWARD), working, ""),
        _missing("ATN102", CPU_BACKWARD, ids("m", CPU_BACKWARD), working, ""),
        _finding(
            "ATN201", "wrong-result", Severity.ERROR, "sdpa[FLASH_ATTENTION] gives wrong results",
            "aten._scaled_dot_product_flash_attention.default",
            ids("w", operator="sdpa[FLASH_ATTENTION]", direction="forward"),
            "Operators: sdpa[FLASH_ATTENTION].\nWorst case: out is off by 2.6 against float64, "
            "6.5e+05 times the bound 4e-06.\nIn every one of these cases the ranks do not divide "
            "the sharded size: 3 kv_heads over 2 ranks.",
            Remedy("redistribute", "Replicate q, k and v before the call.", "", whole),
        ),
        _finding(
            "ATN502", "hang", Severity.ERROR, "flash_attn_with_kvcache hangs", "", ids("h"),
            "rank 0 (hash seed 6): no op entered\n"
            "rank 1 (hash seed 7): last op c10d.allgather_.default",
        ),
        _finding(
            "ATN501", "crash", Severity.ERROR, "flash_attn_with_kvcache kills the process", "",
            ids("c"), "", Remedy("operator", "Call it on local tensors: it is no dispatcher op."),
        ),
        _finding(
            "ATN301", "implicit-redistribution", Severity.WARNING,
            "sdpa is right, but gathers what was sharded", CPU_FORWARD, ids("r", operator="sdpa"),
            "Heads sharded come back replicated after 3 all_gather, 81 KiB a rank.",
            Remedy("operator", "fallback.matmul needs no communication with heads.", "", working),
        ),
        _finding(
            "ATN401", "operator-unavailable", Severity.INFO, "sdpa refuses dropout on cpu", "",
            ids("u"),
        ),
    )  # fmt: skip


def _missing(
    rule: str, op: str, cases: tuple[str, ...], working: tuple[str, ...], code: str
) -> Finding:
    direction = "forward" if rule == "ATN101" else "backward"
    return _finding(
        rule, f"missing-{direction}-strategy", Severity.ERROR,
        f"{op} has no sharding strategy: {direction} fails for {len(cases)} cases", op, cases,
        "Operators: flash_attn_func.\nPlacements affected: all; not affected: none in this scan.\n"
        f"PyTorch: Operator {op} does not have a sharding strategy registered.",
        Remedy("operator", "fallback.matmul works in the same settings with heads.", "", working),
        *([Remedy("route", f"Call it through `local_map`. {NOT_RUN}", code)] if code else []),
        Remedy("strategy", f"Register a strategy for forward and backward. {NOT_RUN}"),
    )  # fmt: skip


def _finding(
    rule: str, name: str, severity: Severity, title: str, op: str, cases: tuple[str, ...],
    message: str = "", *remedies: Remedy,
) -> Finding:  # fmt: skip
    mark = fingerprint(rule, op or title)
    return Finding(rule, name, severity, title, op, cases, mark, message, remedies)


HOSTILE = (
    "a|b `tick` ``` <script>alert(1)</script> @octocat #123 \x1b[31mred\x1b[0m\x1b]0;title\x07"
    "\u202ereversed \ud800 * _x_ [link](http://e) \\ </details>\r\n# heading\n\tend"
)


def hostile(text: str = HOSTILE) -> Report:
    """A report whose every free text is `text`."""
    case = Case(text, text, text, text, {"name": text}, {text: 2}, text, {text: (text,)}, text)
    stat = ErrorStat(float("nan"), float("inf"), 0.0, 0.0, 0.0, float("inf"), 0.0, text)
    failed = Outcome(
        Status.MISSING_STRATEGY, text, text, None, text,
        missing_ops=(MissingOp(text, text, "strategy", text),),
        errors={text: stat}, facts=(Fact(text, text, text),), standins=(text,),
    )  # fmt: skip
    moved = Outcome(Status.REDISTRIBUTED, collectives=(Collective(text, text, text, 1, 2),))
    idle = Outcome(Status.UNAVAILABLE, text, text, Reason.NOT_RUN)
    cases = tuple(CaseResult(case, outcome) for outcome in (failed, moved, idle))
    remedy = Remedy(text, text, text, (text,))
    finding = Finding(text, text, Severity.ERROR, text, text, (text,), text, text, (remedy, remedy))
    names = ("attncheck", "python", "device", "command", "notes", "probe_errors", "standins")
    env = {**dict.fromkeys(names, text), "packages": {text: text}, "phases": {text: text}}
    return Report(env, cases, (finding,))


def check_snapshot(name: str, text: str) -> None:
    """Compare with tests/snapshots/NAME, byte for byte."""
    path = SNAPSHOTS / name
    if os.environ.get("ATTNCHECK_UPDATE_SNAPSHOTS"):
        path.write_bytes(text.encode("utf-8"))
    assert path.exists(), f"no snapshot {name}: run with ATTNCHECK_UPDATE_SNAPSHOTS=1"
    assert text == path.read_bytes().decode("utf-8")


def with_many_missing() -> Report:
    """The sample with a case more, which misses one op more than a headline can hold."""
    report = sample()
    first = next(r for r in report.cases if r.outcome.status is Status.MISSING_STRATEGY)
    more = CaseResult(
        dataclasses.replace(first.case, id="more/1", operator="more_attention"),
        Outcome(
            Status.MISSING_STRATEGY,
            missing_ops=(MissingOp("more.attention.default", "forward", "strategy", "refused"),),
        ),
    )
    return dataclasses.replace(report, cases=(*report.cases, more))
