"""The catalogue of planted bugs: what a mutant is, and where all of them are. Torch-free.

Each file `mutants_*.py` beside this one is a probe file (attncheck loads it with `--probe`) that defines
`MUTANTS`, a tuple of `Mutant`, and `PROBE`, made of their operators by `probe(...)`. A mutant is one
small, realistic mistake; its twin is the same code without that mistake, and must stay silent.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attncheck.probing import Operator, Probe

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Mutant:
    """One planted bug and its healthy twin.

    `family`: `strategy`, `kernel` or `process`. `layer`: `aten` or `custom`, whose op carries the mistake.
    `mistake`: one sentence that a maintainer would write in the commit that mends it. `rules`: every rule
    that must name it, and no other may. `kernel_op`: the op that the findings must name, as PyTorch writes
    it. `mesh`: the smallest mesh on which it shows, as `--mesh` takes it. `direction`: where it shows.
    """

    name: str
    family: str
    layer: str
    mistake: str
    rules: tuple[str, ...]
    kernel_op: str
    operator: Operator
    twin: Operator
    direction: str = "forward"
    mesh: str = "2"


def probe(name: str, mutants: Sequence[Mutant]) -> Probe:
    """The probe of a file of mutants: each operator once (twins may be shared)."""
    operators = {o.name: o for m in mutants for o in (m.operator, m.twin)}
    return Probe(name, "planted bugs and their healthy twins", tuple(operators.values()))


def files() -> list[Path]:
    return sorted(HERE.glob("mutants_*.py"))


def load() -> dict[Path, tuple[Mutant, ...]]:
    """Every mutant by its file."""
    from attncheck import plugins

    out = {}
    for file in files():
        loaded = plugins.load_probe_file(file)
        module = next(
            m
            for m in list(sys.modules.values())
            if getattr(m, "PROBE", None) is loaded and hasattr(m, "MUTANTS")
        )
        out[file] = tuple(module.MUTANTS)
    return out
