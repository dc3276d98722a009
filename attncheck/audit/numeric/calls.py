"""Which calls both models get, one after the other. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """One call of a model. `mode`: what it is called in the report; `model`: which one is called, as two
    are built; `flipped`: with each bool keyword the other way round."""

    mode: str
    model: int
    training: bool
    backward: bool
    flipped: bool = False


TRAINING = Call("training", 0, training=True, backward=True)
FLIPPED = Call("second call", 0, training=False, backward=True, flipped=True)
BACK = Call("second call", 0, training=True, backward=True)
# Of a model that was never called before: what it shows is no matter of what was kept.
EVALUATION = Call("evaluation", 1, training=False, backward=False)
SEQUENCE = (TRAINING, FLIPPED, BACK, EVALUATION)


def keywords(given: Mapping[str, Any], call: Call) -> dict[str, Any]:
    """The keywords of this call, of those that `inputs` gives."""
    if not call.flipped:
        return dict(given)
    return {name: not value if isinstance(value, bool) else value for name, value in given.items()}


def flipped(given: Mapping[str, Any]) -> str:
    """`, with causal=True`; '' where no flag is flipped."""
    said = ", ".join(f"{name}={not given[name]}" for name in flags(given))
    return f", with {said}" if said else ""


def flags(given: Mapping[str, Any]) -> list[str]:
    return [name for name, value in given.items() if isinstance(value, bool)]
