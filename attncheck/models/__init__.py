"""Known models: their attention calls, the degrees that divide these, and what to run of them.

    >>> model = find("wan2.1-14b")
    >>> [division.verdict.value for division in degrees(model, tp=8, cp=1)]
    ['works', 'works']

The data are TOML files in this folder, each figure with its source. Torch-free.
"""

from attncheck.models.data import Call, Model, Source, find, load
from attncheck.models.dividing import (
    Division,
    Split,
    Verdict,
    WorkingDegrees,
    degrees,
    working_degrees,
)
from attncheck.models.planning import PlannedCall, by_operator, reduced_mesh, settings
from attncheck.models.reducing import reduce, reduce_length

__all__ = [
    "Call",
    "Division",
    "Model",
    "PlannedCall",
    "Source",
    "Split",
    "Verdict",
    "WorkingDegrees",
    "by_operator",
    "degrees",
    "find",
    "load",
    "reduce",
    "reduce_length",
    "reduced_mesh",
    "settings",
    "working_degrees",
]
