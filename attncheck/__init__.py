"""attncheck: does an attention operator really work on DTensors?"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attncheck.audit.observing import Observation

__version__ = "0.1.0"
HOMEPAGE = "https://github.com/attncheck/attncheck"


def observe(
    steps: int = 10, output: str | tuple[str, ...] = ("table",), target: str = ""
) -> Observation:
    """Record what DTensor does in a real run, and write a report at its end. Of the first `steps` steps the
    first and the last are recorded.

        with attncheck.observe():
            train()

    A step ends with `optimizer.step()`, with a call of the model without gradients, or where
    `observation.step()` says so. `output`: one or more of FORMAT[:PATH], as for `attncheck scan --output`,
    written by rank 0, and by a rank that fails (to PATH.rankN). `target` names the run in the report. Raises
    UserError for an unknown format.
    """
    from attncheck.audit.observing import Observation
    from attncheck.commands.audit import writer

    outputs = (output,) if isinstance(output, str) else tuple(output)
    return Observation(steps, writer(outputs), target)
