"""What `attncheck list` prints: the shelves and the rules, as plain text tables. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

from attncheck import inventory, plugins, provision, rules
from attncheck.inventory import Inventory, RegisteredOp
from attncheck.plan import Selection, count_by, plan
from attncheck.probing import PATTERNS, Probe

Log = Callable[[str], None]


def everything(probe_files: Sequence[str]) -> str:
    shelf = plugins.load_probes([Path(p) for p in probe_files])
    parts = [_probes(shelf.probes), _settings(shelf.probes), _placements(), _rules()]
    parts.append("Formats: " + ", ".join(sorted(plugins.formats())) + "\n")
    parts += [f"not loaded: {path}: {sentence}\n" for path, sentence in shelf.errors]
    return "\n".join(parts)


def cases(level: str, probe_files: Sequence[str]) -> str:
    shelf = plugins.load_probes([Path(p) for p in probe_files])
    planned = plan(shelf.probes, {"tp": 2}, Selection(level=level))
    counts = ", ".join(f"{name} {n}" for name, n in count_by(planned, "operator").items())
    ids = "".join(f"{case.id}\n" for case in planned)
    return f"{ids}{len(planned)} cases at level {level} on 2 ranks: {counts}\n"


def models() -> str:
    """Every model that `attncheck audit --model` knows, a line for each of its attention calls."""
    from attncheck import models as known

    rows = [
        (
            model.name if at == 0 else "",
            call.name,
            call.layers,
            call.heads,
            call.kv_heads,
            f"{call.head_dim}/{call.v_head_dim}" if call.v_head_dim else call.head_dim,
            f"{call.mask} {call.window}" if call.window else call.mask,
            call.sequence or "-",
            call.kv_sequence or "-",
        )
        for model in known.load()
        for at, call in enumerate(model.calls)
    ]
    names = (
        "model",
        "call",
        "layers",
        "heads",
        "kv heads",
        "head_dim",
        "mask",
        "tokens",
        "of keys",
    )
    total = sum(1 for row in rows if row[0])
    return f"{tabulate(rows, names, tablefmt='simple')}\n\n{total} models, {len(rows)} calls\n"


def kernel_ops(
    probe_files: Sequence[str], imports: Sequence[str], with_packages: Sequence[str], log: Log
) -> str:
    """Every attention-like op in a process that has made all probes' operators available. Needs torch."""
    shelf = plugins.load_probes([Path(p) for p in probe_files])
    path = [str(provision.ensure(provision.parse(r), log=log)) for r in with_packages]
    look = inventory.Look(
        imports=tuple(imports),
        probe_files=tuple(str(file) for file in shelf.files),
        path=tuple(path),
    )
    found = inventory.take(look)
    operators: dict[str, list[str]] = {}
    for probe in shelf.probes:
        for operator in probe.operators:
            for op in operator.kernel_ops:
                operators.setdefault(op, []).append(operator.name)
    return _kernel_ops(found, operators)


_ANSWERS = {
    "registered": "strategy",
    "decomposition": "by decomposition, at each call",
    "composite": "decomposed before DTensor sees it",
    "none": "none",
}
_CAVEATS = """\
strategy: registered, which does not mean right: a scan calls it. none: DTensor refuses the op.
The answer can depend on arguments (a decomposition is tried anew for each call, a strategy can refuse a bias
or a number of heads), on the direction (a backward is an op of its own, listed here with its own answer) and
on the mode (in eval without gradients nn.MultiheadAttention and nn.TransformerEncoderLayer take the fast
path of aten._native_multi_head_attention and aten._transformer_encoder_layer_fwd; in training they do not).
"""


def _kernel_ops(found: Inventory, operators: Mapping[str, Sequence[str]]) -> str:
    rows = [
        (op.op, _ANSWERS[op.strategy], _kernels(op), _called_by(operators, op)) for op in found.ops
    ]
    parts = [tabulate(rows, ["kernel op", "DTensor has", "kernels", "scanned by"]) + "\n"]
    parts += [
        "".join(f"{op.op}, {line}\n" for line in op.depends) for op in found.ops if op.depends
    ]
    parts += [f"{p.module} does not import: {p.text}\n" for p in found.problems]
    return "\n".join([*parts, _CAVEATS])


def _kernels(op: RegisteredOp) -> str:
    if len(op.kernels) > 2:  # a default for every device
        return "any device (cpu: stand-in)" if op.standin else "any device"
    ours = " (stand-in)" if op.standin else ""
    return ", ".join(f"{k}{ours}" if k == "cpu" else k for k in op.kernels) or "none here"


def _called_by(operators: Mapping[str, Sequence[str]], op: RegisteredOp) -> str:
    names = operators.get(op.op, [])
    return ", ".join([*names[:2], f"and {len(names) - 2} more"] if len(names) > 2 else names) or "-"


def _probes(probes: Sequence[Probe]) -> str:
    rows: list[tuple[object, ...]] = [
        (p.name, o.name, len(o.settings), ", ".join(o.packages) or "torch", ", ".join(o.kernel_ops))
        for p in probes
        for o in p.operators
    ]
    rows += [
        (p.name, "(one per op that --import registers)", "", "", "") for p in probes if p.discover
    ]
    return tabulate(rows, ["probe", "operator", "settings", "needs", "kernel ops"]) + "\n"


def _settings(probes: Sequence[Probe]) -> str:
    rows = []
    for probe in probes:
        for level in ("quick", "default", "full"):
            names = dict.fromkeys(
                s.name for o in probe.operators for s in o.settings if s.level == level
            )
            if names:
                rows.append((probe.name, level, ", ".join(names)))
    return tabulate(rows, ["probe", "level", "settings"], maxcolwidths=[None, None, 90]) + "\n"


def _placements() -> str:
    rows = [(name, ", ".join(roles) or "-") for name, roles in PATTERNS.items()]
    return tabulate(rows, ["placement", "tensor dims it shards"]) + "\n"


def _rules() -> str:
    rows = [(r.id, r.name, r.severity.value) for r in rules.RULES]
    return tabulate(rows, ["rule", "name", "severity"]) + "\n"
