"""Scripts for maintainers, run for real: each that is printed was seen to show its finding."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from torch_here import before

from attncheck import plugins
from attncheck.cli import main
from attncheck.model import (
    CaseResult,
    Collective,
    Fact,
    Finding,
    MissingOp,
    Outcome,
    Report,
    Severity,
    Status,
    dump_report,
    fingerprint,
)
from attncheck.plan import Selection, plan
from attncheck.saved import read_report
from attncheck.triage import confirming, triaging

SHELF = plugins.load_probes()
PROBE = Path(__file__).parent / "triage_probe.py"
CPU_FLASH = "aten._scaled_dot_product_flash_attention_for_cpu.default"
MIXED = f"aten.add.Tensor{':' if before('2.10') else ''} got mixed torch.Tensor and DTensor"

Triage = Callable[..., tuple[int, str, str]]


def report_of(
    rule: str, op: str, operator: str, setting: str, placement: str, outcome: Outcome
) -> Report:
    """A report that says this of one case."""
    selection = Selection((operator,), (setting,), (placement,), ("forward",), level="full")
    case = plan(SHELF.probes, {"tp": 2}, selection)[0]
    mark = fingerprint(rule, op)
    finding = Finding(rule, "name", Severity.ERROR, "A title", op, (case.id,), mark)
    return Report({}, (CaseResult(case, replace(outcome, kernel_op=op)),), (finding,))


def refused(op: str, kind: str = "strategy") -> Outcome:
    status = Status.MIXED_TENSOR if kind == "mixed" else Status.MISSING_STRATEGY
    return Outcome(status, missing_ops=(MissingOp(op, "forward", kind, "refused"),))


def wrong(subject: str = "out") -> Outcome:
    return Outcome(Status.WRONG, facts=(Fact("wrong_result", subject),))


@pytest.fixture
def triage(tmp_path: Path) -> Triage:
    def run(report: Report, *arguments: str) -> tuple[int, str, str]:
        file = tmp_path / "report.json"
        file.write_text(dump_report(report), encoding="utf-8")
        done = CliRunner().invoke(
            main, ["report", str(file), "--format", "markdown", *arguments], catch_exceptions=False
        )
        return done.exit_code, done.stdout, done.stderr

    return run


def script_of(page: str) -> str:
    found = re.search(r"^```python\n(\"\"\".*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert found, page
    ast.parse(found[1])
    assert "attncheck" not in found[1]
    return found[1]


CASES: dict[str, tuple[Report, Collection[str]]] = {
    "a missing strategy": (
        report_of("ATN101", CPU_FLASH, "sdpa", "causal", "heads", refused(CPU_FLASH)),
        [
            "    F.scaled_dot_product_attention(q, k, v, is_causal=True)\n",
            f"NotImplementedError: Operator {CPU_FLASH} does not have a sharding strategy",
        ],
    ),
    "a plain tensor": (
        report_of(
            "ATN103",
            "aten.add.Tensor",
            "sdpa[MATH]",
            "causal",
            "batch",
            refused("aten.add.Tensor", "mixed"),
        ),
        [
            "    with sdpa_kernel(SDPBackend.MATH):\n",
            f"RuntimeError: {MIXED}",
        ],
    ),
    "unasked communication": (
        report_of(
            "ATN301",
            "aten._safe_softmax.default",
            "sdpa[MATH]",
            "plain",
            "sequence",
            Outcome(
                Status.REDISTRIBUTED,
                collectives=(
                    Collective("all_gather", "aten._safe_softmax.default", "forward", 1, 1),
                ),
            ),
        ),
        ["collectives: {", 'print(f"output {out.placements}, collectives: {counts}")'],
    ),
    "wrong numbers, on stand-in kernels": (
        report_of(
            "ATN201",
            "aten._scaled_dot_product_flash_attention.default",
            "sdpa_cuda.flash",
            "gqa_12_3",
            "heads",
            wrong(),
        ),
        [
            "torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)",
            "with attncheck's stand-ins in the place of what is not there",
            'device = "cuda" if torch.cuda.is_available() else "cpu"',
            "out, (Shard(dim=1),): largest error ",
        ],
    ),
}


# In every run one that is confirmed, and (below) one that must not be.
SLOW = tuple(name for name in CASES if name != "a missing strategy")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES]
)
def test_a_finding_is_confirmed_by_the_script_that_is_printed(name: str, triage: Triage) -> None:
    report, parts = CASES[name]
    code, page, told = triage(report, "--finding", report.findings[0].fingerprint)
    assert code == 0, page
    script_of(page)
    for part in parts:
        assert part in page
    assert "\nBUG\n```" in page
    assert " shows it" in told


def test_a_finding_that_is_not_so_is_not_confirmed(triage: Triage) -> None:
    """The operator is right, and a doctored report says that it is wrong."""
    report = report_of("ATN201", "aten.bmm.default", "fallback.matmul", "plain", "batch", wrong())
    code, page, told = triage(report, "--finding", "ATN201")
    assert code == 3
    assert "the script does not show it here" in page
    assert "```python" not in page
    assert "does not show it" in told


@pytest.mark.slow
def test_the_printed_script_runs_alone(triage: Triage, tmp_path: Path) -> None:
    """As a maintainer runs it: torchrun, and no attncheck to import."""
    report = CASES["a plain tensor"][0]
    folder = tmp_path / "scripts"
    code, page, _ = triage(report, "--for", "pytorch", "--write-repro", str(folder))
    assert code == 0
    assert page.startswith("# Attention on DTensors: findings for pytorch\n")
    (script,) = folder.iterdir()
    assert script.read_text() == script_of(page)
    blocked = "import sys; sys.modules['attncheck'] = None\n"
    (tmp_path / "sitecustomize.py").write_text(blocked)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            script,
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout.endswith("\nBUG\n")


@pytest.mark.slow
def test_flash_attn_without_its_extension(triage: Triage, tmp_path: Path) -> None:
    """The call never comes to a kernel: an empty module in its place is enough for anybody."""
    op = "flash_attn._flash_attn_forward.default"
    report = report_of("ATN101", op, "flash_attn_func", "causal", "heads", refused(op))
    backward = "flash_attn._flash_attn_backward.default"
    case = plan(
        SHELF.probes,
        {"tp": 2},
        Selection(("flash_attn_func",), ("plain",), ("heads",), ("backward",)),
    )[0]
    both = tuple(
        MissingOp(o, p, "strategy", "") for o, p in ((op, "forward"), (backward, "backward"))
    )
    behind = CaseResult(case, Outcome(Status.MISSING_STRATEGY, kernel_op=op, missing_ops=both))
    finding = replace(
        report.findings[0],
        rule="ATN102",
        kernel_op=backward,
        cases=(case.id,),
        fingerprint="b" * 16,
    )
    report = replace(report, cases=(*report.cases, behind), findings=(*report.findings, finding))
    code, page, _ = triage(report, "--for", "flash-attn", "--with", "flash-attn")
    assert code == 0, page
    assert "    flash_attn_func(q, k, v, causal=True)\n" in page
    assert "    torch.ops.flash_attn._flash_attn_backward(\n" in page
    assert page.count("\nBUG\n```") == 2
    assert page.count("as it is: the call fails before it comes to a kernel.") == 2


def test_a_script_that_never_ends_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confirming, "STOP_SECONDS", 2.0)
    mark = f"triage-{os.getpid()}"
    script = tmp_path / "repro.py"
    script.write_text(
        f"import signal, time\n# {mark}\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open('up', 'w').close()\ntime.sleep(1000)\n"
    )
    for seconds in (10, 60, 300):  # until torchrun has come so far on this machine
        run = confirming.run(script, 2, seconds=seconds)
        assert run.shows is None
        assert f"still running after {seconds} s" in run.why
        if (tmp_path / "up").exists():
            break
    assert (tmp_path / "up").exists()
    running = subprocess.run(
        ["ps", "-A", "-o", "args="], capture_output=True, text=True, check=True
    )
    assert not [line for line in running.stdout.splitlines() if str(tmp_path) in line]


@pytest.mark.slow
def test_a_probe_of_ones_own(tmp_path: Path) -> None:
    """Its code is taken along, and only with --probe: a report alone brings none."""
    probe = plugins.load_probe_file(PROBE)
    case = plan([probe], {"tp": 2}, Selection(("triage.raises",), directions=("forward",)))[0]
    outcome = Outcome(Status.ERROR, "heads must be whole", exception_type="LookupError")
    finding = Finding("ATN504", "name", Severity.ERROR, "A title", "", (case.id,), "c" * 16)
    file = tmp_path / "r.json"
    file.write_text(dump_report(Report({}, (CaseResult(case, outcome),), (finding,))))
    asked = ["report", str(file), "--format", "markdown", "--finding", "ATN504"]
    without = CliRunner().invoke(main, asked)
    assert without.exit_code == 3
    assert "no such case here" in without.stdout
    done = CliRunner().invoke(main, [*asked, "--probe", str(PROBE)])
    assert done.exit_code == 0, done.stdout
    assert f"running the code of {PROBE}" in done.stderr
    assert "def call(mistake, setting, t):" in script_of(done.stdout)
    assert "LookupError: heads must be whole\nBUG" in done.stdout


# --- every kind of finding -----------------------------------------------------------------------------

# What each rule's script prints of the planted mistake.
SHOWN = {
    "ATN103": MIXED,
    "ATN201": "out, (Shard(dim=1),): largest error",
    "ATN202": "gradient of k, (Shard(dim=1),): largest error",
    "ATN203": "error on whole tensors",
    "ATN204": "replicas differ by up to",
    "ATN207": "largest error of the first call 0.0e+00, of the second",
    "ATN209": "{'out': 'Tensor'}",
    "ATN301": "collectives: {",
    "ATN302": "first call 5.",
    "ATN501": "the process is killed by SIGSEGV",
    "ATN503": "rank 1: LookupError: only rank 1 refuses",
    "ATN504": "LookupError: heads must be whole",
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("planted")
    subprocess.run(
        [
            sys.executable, "-m", "attncheck", "scan", "--probe", str(PROBE), "-k", "triage.*",
            "--level", "quick", "--seed", "5", "--case-timeout", "30", "-q", "-o", "json:r.json",
        ],
        cwd=folder,
        timeout=600,
        check=False,
    )  # fmt: skip
    return read_report(folder / "r.json")


@pytest.mark.slow
@pytest.mark.parametrize("rule", SHOWN)
def test_each_kind_of_finding_is_confirmed(rule: str, planted: Report, tmp_path: Path) -> None:
    finding = next(f for f in planted.findings if f.rule == rule)
    shelf = plugins.load_probes([PROBE])
    done = triaging.reproduce(triaging.Workshop(planted, shelf, tmp_path), finding, print)
    assert done.confirmed, done.why_not
    assert SHOWN[rule] in done.actual


@pytest.mark.slow
@pytest.mark.parametrize("rule", SHOWN)
def test_no_kind_of_finding_is_confirmed_of_a_healthy_one(
    rule: str, planted: Report, tmp_path: Path
) -> None:
    """The healthy twin under a report that says of it what is so of the planted one."""
    finding = next(f for f in planted.findings if f.rule == rule)
    by_id = {r.case.id: r for r in planted.cases}
    healthy = {
        r.case.direction: r.case for r in planted.cases if r.case.operator == "triage.healthy"
    }
    results = tuple(
        replace(by_id[case], case=healthy[by_id[case].case.direction]) for case in finding.cases
    )
    said = replace(finding, cases=tuple(r.case.id for r in results))
    report = replace(planted, cases=results, findings=(said,))
    shelf = plugins.load_probes([PROBE])
    done = triaging.reproduce(triaging.Workshop(report, shelf, tmp_path), said, print)
    assert not done.confirmed, done.actual
