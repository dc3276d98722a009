"""`attncheck audit` as its users run it: the model whose users were told to give up tensor parallelism."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch_here import FLASH_ATTN_VIEWS, before

from attncheck.audited import Audit, ModuleCommunication
from attncheck.model import Report
from attncheck.saved import load_report

MODELS = Path(__file__).resolve().parents[1] / "models"
FORWARD = "flash_attn._flash_attn_forward.default"
BACKWARD = "flash_attn._flash_attn_backward.default"


def run(
    *arguments: str, folder: Path, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """The command, with the models of the tests where Python finds them."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(MODELS), os.environ.get("PYTHONPATH", "")]),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *launcher, "-m", "attncheck", "audit", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def report(folder: Path, name: str = "report.json") -> Report:
    return load_report((folder / name).read_text())


def audit_of(folder: Path, name: str = "report.json") -> Audit:
    made = report(folder, name).audit
    assert made is not None
    return made


# --- what its users hit --------------------------------------------------------------------------

WAN = ("wan:build_real", "--inputs", "wan:inputs_real", "--mesh", "tp=8", "--with", "flash-attn")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """WAN 2.1 14B, 32,760 tokens, with DiffSynth-Studio's plan on eight ranks."""
    folder = tmp_path_factory.mktemp("wan")
    done = run(*WAN, "--seed", "1", "-o", "json:report.json", "-o", "table", folder=folder)
    return done, folder


def test_it_stops_where_its_users_were_stopped(wan: Any) -> None:
    done, folder = wan
    assert done.returncode == 1, done.stderr
    first = " ".join(done.stdout.split())
    assert first.startswith("wan:build_real on tp=8 stops at blocks.*.self_attn.attn (wan.py:"), (
        done.stdout
    )
    more = 1 + len(FLASH_ATTN_VIEWS)
    told = f"{more} more op{'s' if more > 1 else ''} refused after it"
    assert f"flash_attn._flash_attn_forward, no sharding strategy; {told}" in first
    made = audit_of(folder)
    assert made.layers["blocks.*"] == 40
    assert made.failure == ""  # it went on past each
    assert made.parameters > 14e9


def test_it_names_what_came_after_in_every_layer(wan: Any) -> None:
    made = audit_of(wan[1])
    ours = [op for op in made.ops if op.problem and op.op not in FLASH_ATTN_VIEWS]
    refused = {(op.op, op.module): op.calls for op in ours}
    places = ("blocks.*.self_attn.attn", "blocks.*.cross_attn.attn")
    assert refused == {(op, place): 40 for op in (FORWARD, BACKWARD) for place in places}
    assert {op.problem for op in made.ops if op.problem} == {"strategy"}
    assert {op.line.partition(":")[0] for op in made.ops if op.op == FORWARD} == {"wan.py"}


def test_its_attention_calls_are_run_with_real_numbers(wan: Any) -> None:
    made = report(wan[1])
    assert made.audit is not None
    own, cross = made.audit.attention
    assert (own.sizes["sequence"], own.sizes["kv_sequence"]) == (32760, 32760)
    assert (cross.sizes["sequence"], cross.sizes["kv_sequence"]) == (32760, 512)
    assert own.placements == {"q": ("S(2)",), "k": ("S(2)",), "v": ("S(2)",)}
    outcomes = {r.case.id: r.outcome for r in made.cases}
    for call in (own, cross):
        assert len(call.cases) == 2
        assert {outcomes[case].status.value for case in call.cases} == {"missing_strategy"}
        # They ran: on two ranks, in bfloat16, with as many heads on each as on the eight.
        case = next(r.case for r in made.cases if r.case.id == call.cases[0])
        assert case.mesh == {"tp": 2}
        assert case.setting["heads"] % 2 == 0
        assert case.setting["dtype"] == "bfloat16"


def test_findings_are_those_of_a_scan(wan: Any) -> None:
    findings = {(f.rule, f.kernel_op): f for f in report(wan[1]).findings if f.rule[:4] == "ATN1"}
    ours = {key for key in findings if key[1] not in FLASH_ATTN_VIEWS}
    assert ours == {("ATN101", FORWARD), ("ATN102", BACKWARD)}
    model = "model/wan:build_real/fake/dtensor/tp=8/plan/backward"
    assert all(model in findings[key].cases for key in ours)


def test_it_fits_a_laptop(wan: Any) -> None:
    assert audit_of(wan[1]).peak_mib < 1024


def test_with_the_known_fix_it_goes_through(tmp_path: Path) -> None:
    done = run(*WAN, "--fix", "known", "-o", "json:report.json", "-o", "table", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "goes through: DTensor refuses none of its ops" in done.stdout
    made = report(tmp_path)
    assert made.audit is not None
    assert not any(op.problem for op in made.audit.ops)
    assert len(made.audit.attention) == 2
    assert {r.outcome.status.value for r in made.cases} == {"supported"}


def test_a_fix_is_made_from_its_report(wan: Any) -> None:
    """The module that `attncheck fix` writes was verified with the model's own calls."""
    _, folder = wan
    done = subprocess.run(
        [
            *(sys.executable, "-m", "attncheck", "fix", "--from", "report.json"),
            *("--kernel-op", "flash_attn.*", "--write", "fixes.py"),
            *(word for op in FLASH_ATTN_VIEWS for word in ("--kernel-op", op)),
            *("--output", "json:fixed.json"),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "fixes.py").exists()
    fixed = {r.case.setting_name: r for r in report(folder, "fixed.json").cases}
    for call in ("call1", "call2"):
        assert fixed[call].outcome.status.usable
        assert fixed[call].before is not None
        assert fixed[call].before.value == "missing_strategy"


# --- predicted and measured ----------------------------------------------------------------------

TRAIN = """
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import wan

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
torch.manual_seed(0)
model = getattr(wan, sys.argv[1])(mesh)
inputs = wan.inputs_small(mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
for _ in range(3):
    outputs = model(**inputs)
    outputs.backward(torch.ones_like(outputs))
    optimizer.step()
    optimizer.zero_grad()
print("trained")
dist.barrier()
dist.destroy_process_group()
"""


def torchrun(ranks: int) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")


def traffic(made: Audit) -> dict[tuple[str, ...], tuple[int, int]]:
    out: dict[tuple[str, ...], tuple[int, int]] = {}
    for each in made.communication:
        key = (each.module, each.name, each.phase, each.kernel_op)
        count, size = out.get(key, (0, 0))
        out[key] = (count + each.calls, size + each.bytes)
    return out


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(TRAIN)
    return tmp_path


@pytest.mark.parametrize("build", ["build_small_sdpa_fixed", "build_plan2_fixed"])
def test_bytes_predicted_are_those_of_the_real_run(script: Path, build: str) -> None:
    predicted = run(
        *(f"wan:{build}", "--inputs", "wan:inputs_small", "--mesh", "tp=2", "-q"),
        *("--with", "flash-attn", "-o", "json:predicted.json"),
        folder=script,
    )
    assert predicted.returncode == 0, predicted.stdout + predicted.stderr
    real = run(
        *("--with", "flash-attn", "--script", "train.py", "--steps", "2"),
        *("-o", "json:real.json", "--", build),
        folder=script,
        launcher=torchrun(2),
    )
    assert real.returncode == 0, real.stdout + real.stderr
    assert "trained" in real.stdout  # its arguments reached the script
    seen = audit_of(script, "real.json")
    assert seen.kind == "observed"
    assert seen.steps == 2
    # The pass has no optimizer, whose own communication is told apart.
    model = {key: value for key, value in traffic(seen).items() if key[0] != "(optimizer)"}
    assert model == traffic(audit_of(script, "predicted.json"))
    assert sum(each.bytes for each in seen.communication) > 0


def test_a_real_run_that_dies_leaves_its_report(script: Path) -> None:
    done = run(
        *("--with", "flash-attn", "--script", "train.py", "-o", "json:real.json", "-o", "table"),
        *("--", "build_small"),
        folder=script,
        launcher=torchrun(2),
    )
    assert done.returncode != 0
    assert f"Operator {FORWARD} does not have a sharding strategy registered" in done.stderr
    assert "train.py on tp=2 stops at blocks.0.self_attn.attn (wan.py:" in done.stdout
    made = audit_of(script, "real.json")
    assert [op.op for op in made.ops if op.problem] == [FORWARD]
    assert FORWARD in made.failure


OBSERVED = """
import sys

import attncheck
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import wan

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
model = wan.build_small_sdpa_fixed(mesh)
with attncheck.observe(steps=2, output="json:seen.json", target="small WAN"):
    for _ in range(4):
        with torch.no_grad():
            model(**wan.inputs_small(mesh))
dist.barrier()
dist.destroy_process_group()
"""


def test_observe_in_the_users_own_code(tmp_path: Path) -> None:
    """Without an optimizer a step is a call of the model."""
    (tmp_path / "infer.py").write_text(OBSERVED)
    environment = {**os.environ, "PYTHONPATH": str(MODELS), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, *torchrun(2), "infer.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = audit_of(tmp_path, "seen.json")
    assert (made.target, made.kind, made.steps) == ("small WAN", "observed", 2)
    assert {each.phase for each in made.communication} == {"forward"}
    assert json.loads((tmp_path / "seen.json").read_text())["environment"]["rank"] == 0


# --- on several axes -----------------------------------------------------------------------------


def by_module(made: Audit, name: str) -> list[ModuleCommunication]:
    return [each for each in made.communication if each.module == name]


def test_what_nobody_asked_for_is_told_apart(wan: Any) -> None:
    """The plan gathers what o takes; for the rest of its matrix product DTensor moves weights by itself."""
    made = audit_of(wan[1])
    mine = by_module(made, "blocks.*.self_attn.o")
    assert any(each.asked for each in mine)
    own = [each for each in mine if not each.asked]
    assert {each.kernel_op for each in own} == {"aten.addmm.default", "aten.mm.default"}
    assert all(each.calls % 40 == 0 for each in own)


# --- equal or not --------------------------------------------------------------------------------


rotates = pytest.mark.xfail(
    before("2.9.1"),
    reason="torch 2.6 conjugates wrongly where complex DTensors are multiplied backward (test_wan.py)",
    strict=True,
)


def numeric(build: str, folder: Path, *options: str) -> tuple[int, Report]:
    inputs = "wan:inputs_small" if build.startswith("wan") else f"planted:inputs_{build[14:]}"
    done = run(
        *(build, "--inputs", inputs.removesuffix("_healthy"), "--mesh", "tp=2", "--numeric"),
        *("--seed", "3", "-o", "json:report.json", *options),
        folder=folder,
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, report(folder)


def test_an_equal_model_is_right(tmp_path: Path) -> None:
    code, made = numeric("planted:build_lost_reduction_healthy", tmp_path)
    assert code == 0
    assert made.audit is not None
    assert made.audit.numeric is not None
    assert made.audit.numeric.compared > 20
    assert made.audit.numeric.unequal == ()
    case = "model/planted:build_lost_reduction_healthy/numeric/dtensor/tp=2/plan/backward"
    assert {r.case.id: r.outcome.status.value for r in made.cases} == {case: "supported"}


def test_an_unequal_one_is_wrong_and_says_why(tmp_path: Path) -> None:
    code, made = numeric("planted:build_lost_reduction", tmp_path)
    assert code == 1
    (finding,) = (f for f in made.findings if f.severity.value == "error")
    assert finding.rule == "ATN202"
    assert "nobody added them up over tp" in finding.message
    assert "audit it again with `--numeric`" in finding.remedies[-1].text


@rotates
def test_the_plan_that_came_after_trains_wrong(tmp_path: Path) -> None:
    """DiffSynth-Studio's second plan, mended so that it runs: right outputs, wrong gradients."""
    code, made = numeric("wan:build_plan2", tmp_path, "--with", "flash-attn", "--fix", "known")
    assert code == 1
    assert made.audit is not None
    assert made.audit.numeric is not None
    wrong = {each.subject for each in made.audit.numeric.unequal}
    assert {name for name in wrong if name.endswith("modulation")}
    assert not {name for name in wrong if name.startswith("output")}
    assert all("nobody added them up" in each.cause for each in made.audit.numeric.unequal)


@rotates
def test_the_first_plan_with_the_fix_is_equal(tmp_path: Path) -> None:
    code, made = numeric("wan:build_small", tmp_path, "--with", "flash-attn", "--fix", "known")
    assert made.audit is not None
    assert made.audit.numeric is not None
    assert made.audit.numeric.failure == ""
    assert made.audit.numeric.unequal == ()
    assert code == 0
