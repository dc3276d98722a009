"""What `attncheck list` prints: the shelves and the rules, as plain text tables. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from attncheck import plugins, rules
from attncheck.plan import Selection, count_by, plan
from attncheck.probing import PATTERNS, Probe


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


def _probes(probes: Sequence[Probe]) -> str:
    rows = [
        (p.name, o.name, len(o.settings), ", ".join(o.packages) or "torch", ", ".join(o.kernel_ops))
        for p in probes
        for o in p.operators
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
