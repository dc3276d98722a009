"""What a finding claims, as something that a script can show: by its rule and what the case came to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from attncheck.model import CaseResult, Finding

_OP = re.compile(r"[A-Za-z_]\w*(\.\w+){1,3}", re.ASCII)
_TYPE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


class Kind(str, Enum):
    """How the claim shows."""

    REFUSED = "refused"  # an exception that names the op
    RAISES = "raises"  # an exception of a type
    NO_OP = "no_op"  # a function that is no op is handed a DTensor
    WRONG = "wrong"  # numbers that no rounding explains
    DRIFT = "drift"  # rounding that grew
    REPLICAS = "replicas"  # ranks hold other values of what is said to be the same
    DROPOUT = "dropout"  # shards share a dropout mask
    SHAPE = "shape"  # a local shape that is not what the placement says
    STALE = "stale"  # the second call is worse than the first
    PLAIN = "plain"  # an ordinary tensor comes back
    COMMUNICATES = "communicates"  # collectives that nobody asked for
    SLOW = "slow"  # the first call takes seconds
    CRASH = "crash"  # the process dies
    DIVERGES = "diverges"  # ranks end differently, or never


KINDS = {
    "ATN101": Kind.REFUSED,
    "ATN102": Kind.REFUSED,
    "ATN103": Kind.REFUSED,
    "ATN104": Kind.NO_OP,
    "ATN201": Kind.WRONG,
    "ATN202": Kind.WRONG,
    "ATN203": Kind.DRIFT,
    "ATN204": Kind.REPLICAS,
    "ATN205": Kind.DROPOUT,
    "ATN206": Kind.SHAPE,
    "ATN207": Kind.STALE,
    "ATN209": Kind.PLAIN,
    "ATN301": Kind.COMMUNICATES,
    "ATN302": Kind.SLOW,
    "ATN501": Kind.CRASH,
    "ATN502": Kind.DIVERGES,
    "ATN503": Kind.DIVERGES,
    "ATN504": Kind.RAISES,
}

EXPECTED = {
    Kind.REFUSED: "The call goes through, with the result that it has on whole tensors.",
    Kind.RAISES: "The call goes through, with the result that it has on whole tensors.",
    Kind.NO_OP: "The compiled function is never handed a `DTensor`, whose data pointer is 0: the call is an "
    "op that DTensor can intercept, or it is refused.",
    Kind.WRONG: "The values are those of the same call on whole tensors, up to rounding.",
    Kind.DRIFT: "The error against float64 is about that of the same call on whole tensors.",
    Kind.REPLICAS: "Ranks that hold the same part of a tensor hold the same bits.",
    Kind.DROPOUT: "Each shard draws a dropout mask of its own.",
    Kind.SHAPE: "Each local tensor has the shape that its placement says.",
    Kind.STALE: "The second call gives what the first one gave.",
    Kind.PLAIN: "`DTensor`s come back where `DTensor`s went in.",
    Kind.COMMUNICATES: "No collectives: none was asked for.",
    Kind.SLOW: "The first call takes milliseconds, as the second does.",
    Kind.CRASH: "A result, or an exception.",
    Kind.DIVERGES: "All ranks do the same, whatever their hash seeds.",
}


@dataclass(frozen=True)
class Claim:
    """`op`: the kernel op, checked to be no more than a name; `exception`: a type's name; `mixed`: the op
    met ordinary tensors; `backward`: the case runs it too; `gradients`: only what the backward gives, or
    does, is in question."""

    kind: Kind
    op: str = ""
    exception: str = ""
    mixed: bool = False
    backward: bool = False
    gradients: bool = False

    @property
    def bare_op(self) -> str:
        """As exceptions may write it: without the overload."""
        return self.op.removesuffix(".default")


def claim(finding: Finding, result: CaseResult) -> Claim | None:
    """What the finding says of one of its cases; None for what no script can show (the environment).

    Of the report's text a name of an op or a type is kept, if it is no more than that.
    """
    kind = KINDS.get(finding.rule)
    if kind is None:
        return None
    outcome = result.outcome
    op = finding.kernel_op if _OP.fullmatch(finding.kernel_op) else ""
    exception = outcome.exception_type if _TYPE.fullmatch(outcome.exception_type) else ""
    if kind is Kind.REFUSED and not op:
        return None
    if kind is Kind.COMMUNICATES:
        gradients = [c.phase == "backward" for c in outcome.collectives if c.kernel_op == op]
    else:
        gradients = [f.subject.startswith("grad.") for f in outcome.facts]
    return Claim(
        kind,
        op,
        exception,
        mixed=finding.rule == "ATN103",
        backward=result.case.direction == "backward",
        gradients=finding.rule == "ATN202" or (bool(gradients) and all(gradients)),
    )
