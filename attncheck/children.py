"""Child processes that end with their parent, however it ends. Imports nothing of ours."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable


def _end_with_parent() -> None:
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


# The `preexec_fn` of a child that even a SIGKILL of attncheck must not leave behind (Linux): torchrun would
# restart workers for ever, an installer would write into a folder that somebody else makes anew.
END_WITH_PARENT: Callable[[], None] | None = _end_with_parent if sys.platform == "linux" else None
