"""Real processes and simulated ranks: the same verdicts, wider worlds, a planted disagreement."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch_here
from click.testing import CliRunner

from attncheck import cli, environment
from attncheck.runner import launch

# Its strategy shards heads; its kernel is as each operator's name says. Sizes fit 64 ranks.
PROBE = """
import os
from functools import cache
from attncheck.probing import (
    BATCH, HEAD_DIM, HEADS, KV_HEADS, KV_SEQUENCE, SEQUENCE, Operator, Probe, Setting, Tensor
)

SIZES = {"batch": 3, "heads": 64, "kv_heads": 64, "sequence": 5, "kv_sequence": 7, "head_dim": 8}
SETTINGS = (
    Setting("wide", SIZES, level="quick"),
    Setting("uneven", {**SIZES, "heads": 5, "kv_heads": 5}, level="quick"),
)
Q_DIMS, KV_DIMS = (BATCH, HEADS, SEQUENCE, HEAD_DIM), (BATCH, KV_HEADS, KV_SEQUENCE, HEAD_DIM)


def tensors(setting):
    s = setting.sizes
    q = (s["batch"], s["heads"], s["sequence"], s["head_dim"])
    k = (s["batch"], s["kv_heads"], s["kv_sequence"], s["head_dim"])
    named = (("q", Q_DIMS, q), ("k", KV_DIMS, k), ("v", KV_DIMS, k))
    return tuple(Tensor(*one, requires_grad=False) for one in named)


def attend(q, k, v):
    import torch
    scores = torch.matmul(q, k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return torch.matmul(torch.softmax(scores, dim=-1), v)


def healthy(q, k, v):
    return attend(q, k, v)


def local_heads(q, k, v):
    return attend(q, k, v) * (1 if q.shape[1] in (64, 5) else 2)


def no_strategy(q, k, v):
    return attend(q, k, v)


def reads_its_rank(q, k, v):
    return attend(q, k, v) * (1 + int(os.environ["RANK"]))


@cache
def op(kernel):
    import torch
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    made = torch.library.custom_op(
        "engines::" + kernel.__name__, kernel, mutates_args=(),
        schema="(Tensor q, Tensor k, Tensor v) -> Tensor",
    )
    made.register_fake(lambda q, k, v: torch.empty_like(q))
    packet = getattr(torch.ops.engines, kernel.__name__)
    if kernel is no_strategy:
        return packet

    @register_sharding(packet.default)
    def strategy(q, k, v):
        return [([Replicate()], [Replicate()] * 3), ([Shard(1)], [Shard(1)] * 3)]

    return packet


def operator(kernel):
    return Operator(
        name="engines." + kernel.__name__,
        call=lambda setting, t: op(kernel)(t["q"], t["k"], t["v"]),
        reference=lambda setting, t: attend(t["q"], t["k"], t["v"]),
        tensors=tensors,
        settings=SETTINGS,
        placements=("heads",),
        output_dims=Q_DIMS,
        kernel_ops=("engines." + kernel.__name__ + ".default",),
    )


KERNELS = (healthy, local_heads, no_strategy, reads_its_rank)
PROBE = Probe("engines", "for the engines", tuple(map(operator, KERNELS)))
"""


def scan(folder: Path, *options: str) -> dict[str, Any]:
    output = folder / "report.json"
    command = [
        sys.executable, "-m", "attncheck", "scan", "-q", "--seed", "5", "--level", "quick",
        "--run-dir", str(folder / "run"), "--output", f"json:{output}", *options,
    ]  # fmt: skip
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=500,
        cwd=folder,
        env={**os.environ, "ATTNCHECK_CACHE": str(folder / "cache")},
    )
    assert done.returncode in (0, 1, 3), done.stderr
    document: dict[str, Any] = json.loads(output.read_text())
    return document


@pytest.fixture
def probe(tmp_path: Path) -> str:
    file = tmp_path / "engines_probe.py"
    file.write_text(PROBE)
    return str(file)


simulated = pytest.mark.skipif(torch_here.before("2.10"), reason=torch_here.NO_SIMULATION)


@simulated
def test_both_engines_agree_on_what_is_right_wrong_refused_and_costly(
    tmp_path: Path, probe: str
) -> None:
    report = scan(
        tmp_path, "--probe", probe, "--engine", "both", "--operator", "engines.*",
        "--operator", "fallback.matmul", "--placement", "heads", "--placement", "sequence",
        "--setting", "plain", "--setting", "wide", "--setting", "uneven", "--direction", "forward",
    )  # fmt: skip
    outcomes = {c["id"].replace("/dtensor/tp=2", ""): c["outcome"] for c in report["cases"]}
    rank = "engines/engines.reads_its_rank"
    planted = {case for case in outcomes if case.startswith(rank)}
    assert {o["status"] for c, o in outcomes.items() if c in planted} == {"unknown"}
    status = {case: o["status"] for case, o in outcomes.items() if case not in planted}
    assert status["engines/engines.healthy/wide/heads/forward"] == "supported"
    assert status["engines/engines.healthy/uneven/heads/forward"] == "supported"
    assert status["engines/engines.local_heads/wide/heads/forward"] == "wrong"
    assert status["fallback/fallback.matmul/plain/sequence/forward"] == "redistributed"
    assert status["engines/engines.no_strategy/wide/heads/forward"] == "missing_strategy"
    disagree = len(planted)
    assert report["environment"]["crosscheck"] == {
        "agree": len(outcomes) - disagree, "disagree": disagree, "not_compared": 0,
    }  # fmt: skip
    (finding,) = (f for f in report["findings"] if f["rule"] == "ATN506")
    assert finding["kernel_op"] == "engines.reads_its_rank.default"
    assert f"{len(outcomes) - disagree} agree" in report["environment"]["notes"][0]
    assert "wrong with processes, supported simulated" in outcomes[min(planted)]["message"]


@simulated
@pytest.mark.slow
def test_64_ranks_in_one_process(tmp_path: Path, probe: str) -> None:
    report = scan(
        tmp_path, "--probe", probe, "--engine", "simulated", "--mesh", "64", "--mesh", "4x16",
        "--operator", "engines.healthy", "--operator", "engines.local_heads", "--setting", "wide",
        "--placement", "heads", "--placement", "replicate,heads", "--placement", "query",
    )  # fmt: skip
    outcomes = {c["id"]: c["outcome"] for c in report["cases"]}
    for mesh, placement in (("tp=64", "heads"), ("dp=4xtp=16", "replicate,heads")):
        at = f"dtensor/{mesh}/{placement}/forward"
        healthy = outcomes[f"engines/engines.healthy/wide/{at}"]
        assert (healthy["status"], len(healthy["ranks"])) == ("supported", 64)
        assert outcomes[f"engines/engines.local_heads/wide/{at}"]["status"] == "wrong"
    # Five rows of q over 64 ranks: most hold none, and DTensor brings them to heads, or together.
    query = outcomes["engines/engines.healthy/wide/dtensor/tp=64/query/forward"]
    assert query["status"] == "redistributed"
    assert sum(c["count"] for c in query["collectives"]) == 1
    assert report["environment"]["engine"] == "simulated"
    assert report["environment"]["hash_seeds"] == [6]
    assert "cannot show ranks that diverge" in report["environment"]["notes"][0]


@pytest.mark.parametrize("engine", ["simulated", "both"])
def test_a_torch_without_it_is_told_before_anything_runs(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert environment.simulates_ranks() is not torch_here.before("2.10")
    monkeypatch.setattr(environment, "simulates_ranks", lambda: False)
    monkeypatch.setattr(launch, "run_workers", lambda *_: pytest.fail("workers were started"))
    done = CliRunner().invoke(cli.main, ["scan", "--engine", engine])
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"--engine {engine} needs torch's LocalTensorMode" in done.stderr
    assert "2.10" in done.stderr
    assert "--engine processes" in done.stderr


IN_ONE_PROCESS = """
import torch, torch.distributed as dist
from pathlib import Path
from attncheck.runner import compat
from attncheck.runner.observe import Observer, StateFile

compat.simulated_group(3)
original = dist.get_rank
with compat.simulated_ranks(3):
    # Whose fault an exception is.
    uneven = compat.map_ranks(lambda rank: torch.ones(3 - rank, 2))
    assert [tuple(t.shape) for t in compat.each_rank(uneven)] == [(3, 2), (2, 2), (1, 2)]
    def why(call):
        try:
            call()
        except Exception as error:
            return compat.not_simulated(error)
    assert "asks for its rank" in why(dist.get_rank)
    assert "LocalTensorMode stopped" in why(lambda: uneven.tolist())
    assert why(lambda: uneven @ torch.ones(3, 3)) == ""  # two columns, three rows: on any rank
    assert why(lambda: [][1]) == ""

    # An op that returns what it writes into beside another tensor: the mode refuses its schema.
    library = torch.library.Library("engines", "DEF")
    library.define("twice(Tensor x, Tensor(out!)? out=None) -> (Tensor(out!), Tensor)")
    library.impl("twice", lambda x, out=None: (x * 2, x + 0), "CPU")
    twice = torch.ops.engines.twice.default
    assert "Unsupported schema" in why(lambda: twice(uneven))
    doubled, same = compat.call_on_ranks(twice, (uneven,), {})
    assert [float(t.sum()) for t in compat.each_rank(doubled)] == [12.0, 8.0, 4.0]

    # Random values are drawn once where no rank is meant.
    with compat.unsimulated():
        assert len(compat.each_rank(torch.randn(4))) == 1

    # Each rank's own bytes.
    observer = Observer(StateFile(Path("state")), ranks=3)
    with observer.watch() as trace:
        observer.phase = "forward"
        observer.current_op = "op"
        observer.record_collective("broadcast", [uneven], 3)
    assert [t.sequence for t in (trace, *observer.peers)] == [
        ["broadcast:24"], ["broadcast:16"], ["broadcast:8"]
    ]
    assert [t.collectives["broadcast", "op", "forward"] for t in (trace, *observer.peers)] == [
        (1, 24), (1, 16), (1, 8)
    ]
assert dist.get_rank is original
assert compat.not_simulated(RuntimeError("LocalTensor")) == ""  # no ranks are simulated
print("all held")
"""


@simulated
def test_whose_fault_it_is_and_what_each_simulated_rank_has(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.stdout == "all held\n", done.stderr
