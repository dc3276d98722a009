"""What a script is about: a case as our planner made it, the operator's call in code, and what to show."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from attncheck.model import Case
from attncheck.probing import Setting, Tensor
from attncheck.triage.claims import Claim


class NotWritten(Exception):
    """No script can be written of this case: why."""


@dataclass(frozen=True)
class Call:
    """The operator's call in code. `by_name`: its tensors are variables, else they are in a dict `t`.

    `definitions`: code that it needs in front. `context`: a `with` that it stands in. `picks`: the code
    behind it that takes each output from what it returns.
    """

    imports: tuple[str, ...]
    definitions: tuple[str, ...]
    function: str
    arguments: tuple[str, ...]
    picks: Mapping[str, str]
    context: str = ""
    by_name: bool = True

    @property
    def defines(self) -> frozenset[str]:
        """The functions, classes and constants of its definitions."""
        text = "\n".join(self.definitions)
        return frozenset(re.findall(r"^(?:def |class )?(\w+)\b(?=\(| = |:)", text, re.MULTILINE))


@dataclass(frozen=True)
class Subject:
    """What a script is about. `own_device`: it takes a GPU where there is one, in half precision there.
    `stubs`: modules that are never called, so empty ones will do; `compiled`: those that the operator calls
    behind the dispatcher's back. `leaves`: its tensors require gradients in a forward too."""

    case: Case
    setting: Setting
    specs: tuple[Tensor, ...]
    claim: Claim
    call: Call
    title: str
    own_device: bool = False
    stubs: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ()
    leaves: bool = False

    @property
    def ranks(self) -> int:
        return math.prod(self.case.mesh.values())

    @property
    def name_of_call(self) -> str:
        """What the script calls the function that it makes of the call: nothing that is there already."""
        taken = self.call.defines
        return next(name for name in ("attend", "attention", "call_it") if name not in taken)

    @property
    def gradients_of(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.specs if spec.requires_grad)
