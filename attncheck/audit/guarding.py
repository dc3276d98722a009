"""What a pass on fake tensors must not do, and user code does all the same: take memory, go to the
network."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MEMORY_BYTES = 4 * 2**30
_NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname")


class NetworkAsked(Exception):
    """The user's code opened a connection."""


_forbidden = False
_installed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _forbidden and event in _NETWORK:
        host = arguments[1] if event == "socket.connect" else arguments[0]
        if isinstance(host, tuple):
            host = host[0]
        elif event == "socket.connect":
            return  # a path: a socket of this machine's own (AF_UNIX)
        raise NetworkAsked(f"it goes to the network ({host})")


@contextlib.contextmanager
def no_network() -> Iterator[None]:
    """A connection that is opened in here raises NetworkAsked."""
    global _forbidden, _installed
    if not _installed:  # an audit hook stays as long as the process
        sys.addaudithook(_hook)
        _installed = True
    before, _forbidden = _forbidden, True
    try:
        yield
    finally:
        _forbidden = before


def limit_memory(more: int = MEMORY_BYTES) -> None:
    """Lets this process take no more than so many bytes over what it has (Linux): a model that is built for
    real fails to allocate, before the machine swaps."""
    status = Path("/proc/self/status")
    if not status.exists():
        return
    words = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    used = int(words["VmData"].split()[0]) * 1024
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = used + more
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
