"""What a pass is asked, and what it answers: JSON between attncheck and the child that runs the user's
code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attncheck.audit.seen import Seen
from attncheck.audited import Audit


@dataclass(frozen=True)
class Pass:
    """One pass, as one `rank` of the `mesh` sees it. `default_inputs`: nobody named `inputs`. `path`: folders
    of provisioned packages; `fixes`: files that register strategies first; `probe_files`: whose operators'
    packages and stand-ins are put in place."""

    target: str
    inputs: str
    mesh: Mapping[str, int]
    default_inputs: bool = False
    rank: int = 0
    path: tuple[str, ...] = ()
    fixes: tuple[str, ...] = ()
    probe_files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """`error`: what the user's code did wrong before there was a model to look at, in one sentence; `audit`
    is None then. `attention`: the calls of one step."""

    audit: Audit | None = None
    attention: tuple[Seen, ...] = ()
    sdpa: Mapping[str, int] | None = None
    error: str = ""
