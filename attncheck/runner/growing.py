"""Following a file that another process appends lines to: the journal, the queue of a hunt. Torch-free."""

from __future__ import annotations

import time
from pathlib import Path

# Who waits for the next line is answered in milliseconds, or in a while: poll often at first, then seldom.
POLL_SECONDS = (0.001, 0.02)
QUICK_POLLS = 200


def pause(polls: int) -> None:
    """Sleep before looking again, `polls` looks having shown nothing new."""
    time.sleep(POLL_SECONDS[polls > QUICK_POLLS])


class Growing:
    """Reads what was added since the last look; a line that is not whole yet is left for the next."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def added(self) -> list[bytes]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.splitlines()
