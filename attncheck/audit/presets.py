"""A known model by name: what its attention calls allow, and what running them says. Torch-free itself.

There is no model to build here, only what `attncheck.models` knows of its calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from attncheck import environment, models
from attncheck.audited import PRESET, AttentionCall, Audit, Degrees, Fit
from attncheck.errors import unknown
from attncheck.model import Report
from attncheck.models.planning import OPERATORS
from attncheck.plan import Selection, matches
from attncheck.runner import scan

# F.scaled_dot_product_attention on a CPU: 7 to 30 s for each new shape, and on no GPU what is run.
SLOW = ("sdpa",)


@dataclass(frozen=True)
class PresetRequest:
    """`name` of a known model, `mesh` with any of the axes dp, tp and cp. `operators`: globs, empty for those
    that answer soon. `scan`: how the calls are run."""

    name: str
    mesh: Mapping[str, int]
    operators: tuple[str, ...] = ()
    scan: scan.ScanRequest = field(default_factory=scan.ScanRequest)


def audit_preset(request: PresetRequest, log: scan.Log, on_progress: scan.Progress) -> Report:
    """Raises UserError for a model or an operator that attncheck does not know."""
    scan.check_request(request.scan)
    model = models.find(request.name)
    dtype = "bfloat16" if request.scan.device == "cuda" else "float32"
    planned = models.settings(model, request.mesh, operators=_operators(request), dtype=dtype)
    report = _run(request, planned, log, on_progress)
    cases: dict[tuple[str, str], list[str]] = {}
    for result in report.cases:
        key = (result.case.operator, result.case.setting_name)
        cases.setdefault(key, []).append(result.case.id)
    by_name = {call.name: call for call in model.calls}
    audit = Audit(
        target=model.name,
        mesh=request.mesh,
        kind=PRESET,
        attention=tuple(_call(one, by_name[one.call], cases) for one in planned),
        fits=tuple(
            Fit(d.call, d.way, d.heads_ranks, d.sequence_ranks, d.verdict.value, d.why)
            for d in models.degrees(model, request.mesh.get("tp", 1), request.mesh.get("cp", 1))
        ),
        degrees=tuple(
            Degrees(d.way, d.works, d.replicate_kv, d.uneven) for d in models.working_degrees(model)
        ),
    )
    return replace(report, audit=audit)


def _operators(request: PresetRequest) -> tuple[str, ...]:
    if not request.operators:
        return tuple(name for name in OPERATORS if name not in SLOW)
    for glob in request.operators:
        if not any(matches(name, (glob,)) for name in OPERATORS):
            raise unknown("operator", glob, OPERATORS)
    return tuple(name for name in OPERATORS if matches(name, request.operators))


def _run(
    request: PresetRequest,
    planned: Sequence[models.PlannedCall],
    log: scan.Log,
    on_progress: scan.Progress,
) -> Report:
    settings = models.by_operator(planned)
    meshes = {tuple(p.mesh.items()): p.mesh for p in planned if p.setting is not None}
    if not settings:
        return Report(environment.describe(()), (), ())
    return scan.scan(
        replace(
            request.scan,
            selection=Selection(operators=tuple(settings), level="full"),
            case_timeout=request.scan.case_timeout or scan.CASE_TIMEOUT["default"],
            meshes=tuple(meshes.values()),
            settings=settings,
            only={name: tuple(s.name for s in own) for name, own in settings.items()},
        ),
        log,
        on_progress,
    )


def _call(
    planned: models.PlannedCall, call: models.Call, cases: Mapping[tuple[str, str], Sequence[str]]
) -> AttentionCall:
    sizes = {"heads": call.heads, "kv_heads": call.kv_heads, "head_dim": call.head_dim}
    if call.sequence:
        sizes |= {"sequence": call.sequence, "kv_sequence": call.kv_sequence or call.sequence}
    options = {"mask": call.mask, **({"window": call.window} if call.window else {})}
    setting = planned.setting
    name = setting.name if setting is not None else ""
    return AttentionCall(
        modules=(f"{call.name} ({planned.way})",),
        function=planned.operator,
        kernel_op="",
        calls=call.layers,
        sizes=sizes,
        options=options,
        placements=dict(setting.explicit) if setting is not None else {},
        operator=planned.operator,
        setting=name,
        cases=tuple(cases.get((planned.operator, name), ())),
        note="; ".join(filter(None, (planned.why, *planned.notes))),
    )
