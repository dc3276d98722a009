"""What a pass must not do: go to the network, take real memory."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from attncheck.audit import guarding
from attncheck.audit.guarding import NetworkAsked, no_network


@pytest.fixture
def server() -> Iterator[tuple[str, int]]:
    """Somebody who would answer."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()


@pytest.mark.parametrize("host", ["127.0.0.1", "huggingface.co"])
def test_a_connection_is_refused_before_it_is_made(host: str) -> None:
    with no_network(), pytest.raises(NetworkAsked, match=f"goes to the network \\({host}\\)"):
        socket.create_connection((host, 443), timeout=5)


def test_so_is_whatever_library_makes_it() -> None:
    with no_network():
        with pytest.raises(NetworkAsked):
            urllib.request.urlopen("http://example.org/weights", timeout=5)
        with pytest.raises(NetworkAsked):
            http.client.HTTPSConnection("example.org", timeout=5).connect()
        with pytest.raises(NetworkAsked):
            socket.gethostbyname("example.org")


def test_outside_of_it_connections_are_the_users(server: tuple[str, int]) -> None:
    with no_network():
        pass
    socket.create_connection(server, timeout=5).close()


def test_one_within_another_ends_only_itself(server: tuple[str, int]) -> None:
    with no_network():
        with no_network():
            pass
        with pytest.raises(NetworkAsked):
            socket.create_connection(server, timeout=5)


def test_it_ends_with_an_exception(server: tuple[str, int]) -> None:
    with pytest.raises(ValueError, match="mine"), no_network():
        raise ValueError("mine")
    socket.create_connection(server, timeout=5).close()


def test_a_socket_of_this_machine_is_no_network(tmp_path: Path) -> None:
    """multiprocessing and debuggers use them."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.listen()
        with no_network(), socket.socket(socket.AF_UNIX) as own:
            own.connect(str(tmp_path / "socket"))


LIMITED = """
import sys
from attncheck.audit.guarding import limit_memory
{before}
limit_memory({more})
try:
    {code}
except MemoryError:
    print("refused")
else:
    print("taken")
"""


def limited(code: str, more: int, before: str = "") -> str:
    source = LIMITED.format(code=code, more=more, before=before)
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip()


needs_limits = pytest.mark.skipif(
    sys.platform != "linux", reason="RLIMIT_DATA counts on Linux alone"
)


@needs_limits
@pytest.mark.parametrize(("mib", "came"), [(16, "taken"), (256, "refused")])
def test_memory_is_limited(mib: int, came: str) -> None:
    assert limited(f"taken = bytes({mib} * 2**20)", more=128 * 2**20) == came


@needs_limits
def test_what_a_process_has_is_not_counted() -> None:
    before = "kept = bytearray(512 * 2**20)"
    assert limited("taken = bytes(16 * 2**20)", more=128 * 2**20, before=before) == "taken"


@needs_limits
def test_a_table_of_numpy_is_memory() -> None:
    code = "taken = numpy.zeros(2**28)"
    assert limited(code, more=2**30, before="import numpy") == "refused"


@needs_limits
def test_a_limit_of_the_machines_own_stays() -> None:
    before = "import resource\nresource.setrlimit(resource.RLIMIT_DATA, (200 * 2**20, 200 * 2**20))"
    assert limited("taken = bytes(512 * 2**20)", more=2**40, before=before) == "refused"


def test_where_there_is_nothing_to_limit_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarding, "Path", lambda _: Path("/nowhere/at/all"))
    guarding.limit_memory(0)
    assert bytes(2**20)
