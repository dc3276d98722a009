"""Counted collectives against what the kernel says gloo sent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="reads bytes_sent from Linux's TCP_INFO"
)


# Four ranks tell a factor of 2 from one of as many as there are.
@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 4])
def traffic(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    ranks = request.param
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
        str(Path(__file__).with_name("gloo_traffic.py")), str(tmp_path_factory.mktemp("traffic")),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    # gloo of torch 2.9 says on stdout whom it is connected to.
    return ranks, json.loads(done.stdout.splitlines()[-1])


# How much more gloo sends than the collective that was asked for: 1 where it is real.
@pytest.mark.parametrize(
    ("name", "emulation"),
    [
        ("all_gather", lambda n: 1),
        ("all_reduce", lambda n: 1),
        ("reduce_scatter", lambda n: 2),
        ("all_to_all", lambda n: n),
    ],
)
def test_counted_bytes_are_what_gloo_sent(traffic: Any, name: str, emulation: Any) -> None:
    ranks, found = traffic
    assert found[name]["collectives"] == [[name, 1]]
    assert found[name]["sent"] == pytest.approx(found[name]["counted"] * emulation(ranks), rel=0.02)


def test_no_collective_no_bytes(traffic: Any) -> None:
    _, found = traffic
    assert found["none"] == {"counted": 0, "sent": 0, "collectives": []}
