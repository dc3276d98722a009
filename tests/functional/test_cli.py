"""The commands from outside: sentences for bad input, exit codes, streams, interruption and resumption."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch_here

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "attncheck" / "schema" / "report.schema.json").read_text())
# A scan of a few cases, for what any scan does.
SMALL = ["--operator", "fallback.matmul", "--setting", "plain", "--seed", "3"]
# What it finds. 4-D matmul folds batch and heads in a view: with heads sharded that gathered q, k and v,
# then it was refused, and from 2.12 or 2.13 on they stay sharded.
SMALL_SUMMARY = torch_here.measured(
    {
        "2.6.0": {"redistributed": 8, "supported": 6},
        "2.9.1": {"error": 2, "redistributed": 6, "supported": 6},
        "2.13.0": {"redistributed": 6, "supported": 8},
    }
)


def attncheck(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "attncheck", *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=cwd,
        env={**os.environ, "ATTNCHECK_CACHE": str(cwd / "cache"), **environment},
    )


def running_workers(run_dir: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(run_dir) in (process / "cmdline").read_bytes().decode(errors="replace"):
                found.append(int(process.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def wait_until(condition: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return bool(condition())


# --- bad input: one sentence, exit 2, nothing run or written ----------------------------------------

BAD = [
    (["scan", "--operator", "spda"], ["'spda'", "sdpa"]),
    (["scan", "--setting", "casual"], ["'casual'", "causal"]),
    (["scan", "--placement", "head"], ["'head'", "heads"]),
    (["scan", "--direction", "backwards"], ["'backwards'", "backward"]),
    (["scan", "--route", "ulysses"], ["'ulysses'", "dtensor"]),
    (["scan", "--select", "ATN110"], ["'ATN110'", "ATN104"]),
    (["scan", "--ignore", "mixed-tensors"], ["'mixed-tensors'", "mixed-tensor"]),
    (["scan", "--output", "pdf:x"], ["'pdf'", "markdown"]),
    (["scan", "--output", "json:no/such/folder.json"], ["no/such", "does not exist"]),
    (["scan", "--level", "fast"], ["'fast'", "quick"]),
    (["scan", "--ranks", "0"], ["--ranks is 0"]),
    (["scan", "--mesh", "2x"], ["'2x'", "2x2"]),
    (["scan", "--mesh", "2x2", "--ranks", "2"], ["'2x2'", "4 ranks", "--ranks is 2"]),
    (["scan", "--mesh", "2", "--mesh", "3", "--ranks", "2"], ["'3'", "3 ranks", "--ranks is 2"]),
    (["scan", "--repeats", "0"], ["--repeats is 0", "at least 1"]),
    (["scan", "--with", "xformrs"], ["'xformrs'", "flash-attn"]),
    (["scan", "--with", "flash-attn==2.4.3"], ["2.4.3", "2.5.9.post1"]),
    (["scan", "--case-timeout", "-1"], ["--case-timeout is -1"]),
    (["scan", "--fail-on", "fatal"], ["'fatal'", "never"]),
    (["scan", "--device", "tpu"], ["'tpu'", "cuda"]),
    (["scan", "--engine", "simulate"], ["'simulate'", "simulated"]),
    (["scan", "--probe", "nowhere.py"], ["nowhere.py", "does not exist"]),
    (["scan", "--import", "nowhere.kernels"], ["nowhere.kernels", "does not import"]),
    (["scan", "--resume"], ["Nothing to resume"]),
    (["new", "probe", "my-kernel"], ["'my-kernel'", "my_kernel"]),
    (["new", "probe", "mine", "--folder", "no/such"], ["no/such/mine.py"]),
    (["list", "--kernel-ops", "--with", "xformrs"], ["'xformrs'", "flash-attn"]),
    (["explain", "ATN110"], ["'ATN110'", "ATN104"]),
    (["report", "nowhere.json"], ["nowhere.json"]),
    (["report", "hollow.json"], ["hollow.json", "schema_version"]),
    (["report", "torn.json"], ["torn.json", "not JSON"]),
    (["report", "future.json"], ["future.json", "schema_version 99"]),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_sentence(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    (tmp_path / "hollow.json").write_text("{}")
    (tmp_path / "torn.json").write_text('{"schema_version": 1, "cas')
    (tmp_path / "future.json").write_text('{"schema_version": 99}')
    before = sorted(tmp_path.iterdir())
    done = attncheck(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("attncheck: running")]
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]
    assert sorted(tmp_path.iterdir()) == before


def test_unknown_configuration_key_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.attncheck]\nlevels = "quick"\n')
    done = attncheck("scan", cwd=tmp_path)
    assert done.returncode == 2
    assert "'levels'" in done.stderr
    assert "level" in done.stderr


# --- without torch, and fast ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["env"], ["explain", "ATN101"], ["scan", "--help"]]
)
def test_never_imports_torch(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys, click.testing\n"
        "from attncheck.cli import main\n"
        f"result = click.testing.CliRunner().invoke(main, {arguments!r})\n"
        "assert result.exit_code == 0, result.output\n"
        "loaded = [m for m in ('torch', 'numpy', 'rich') if m in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_list_names_every_shelf(tmp_path: Path) -> None:
    done = attncheck("list", cwd=tmp_path)
    words = ("sdpa[MATH]", "flash_attn_varlen_func", "fallback.chunked_lse", "ATN503", "markdown")
    assert all(word in done.stdout for word in words)


def test_list_kernel_ops_says_what_dtensor_has(tmp_path: Path) -> None:
    """In a process in which every probe's operators were made available, stand-ins included."""
    import torch

    cuda = ", cuda" if torch.backends.cuda.is_built() else ""
    (tmp_path / "crashes.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    done = attncheck("list", "--kernel-ops", "--import", "crashes", cwd=tmp_path, PYTHONPATH=".")
    assert done.returncode == 0, done.stderr
    rows = [re.split(r"  +", line) for line in done.stdout.splitlines()]
    answers = {row[0]: row[1:] for row in rows if len(row) == 4}
    flash = answers["aten._scaled_dot_product_flash_attention.default"]
    assert flash[:2] == ["strategy", f"cpu (stand-in){cuda}"]
    # No operator names this op: it is the kernel below one of them that is attncheck's.
    below = answers.get("aten._flash_attention_forward_no_dropout_inplace.default")
    stands_in = torch_here.measured({"2.6.0": None, "2.13.0": ["none", f"cpu (stand-in){cuda}"]})
    assert (below and below[:2]) == stands_in
    assert "sdpa_cuda.raw_flash" in answers["aten._flash_attention_forward.default"][2]
    assert answers["aten._flash_attention_forward.default"][0] == "none"
    assert answers["aten.scaled_dot_product_attention.default"][0].startswith("decomposed before")
    assert answers["aten._native_multi_head_attention.default"][:2] == ["none", f"cpu{cuda}"]
    assert "crashes does not import: OSError: libcudart.so.13" in done.stdout
    assert "can depend on arguments" in done.stdout


# --- a small scan -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("small")
    outputs = [
        "--output",
        "json:report.json",
        "--output",
        "markdown:report.md",
        "--output",
        "table",
    ]
    return folder, attncheck("scan", *SMALL, *outputs, "--run-dir", "run", cwd=folder)


def test_report_is_valid_and_complete(small: tuple[Path, Any]) -> None:
    folder, done = small
    # Where none is refused, there are warnings only.
    assert done.returncode == (1 if "error" in SMALL_SUMMARY else 0), done.stderr
    document = json.loads((folder / "report.json").read_text())
    jsonschema.validate(document, SCHEMA)
    assert len(document["cases"]) == 14
    assert document["summary"] == SMALL_SUMMARY
    environment = document["environment"]
    assert environment["seed"] == 3
    assert environment["hash_seeds"] == [6, 7]
    assert environment["packages"]["torch"]
    assert len(environment["peak_rss_mib"]) == 2
    assert max(environment["peak_rss_mib"]) < 1536
    assert {"start_workers", "propagation", "cases", "references", "judge"} <= set(
        environment["phases"]
    )
    case = next(c for c in document["cases"] if c["placement"] == "batch")
    assert case["placements"] == {"q": ["S(0)"], "k": ["S(0)"], "v": ["S(0)"]}
    assert {op["op"] for op in case["outcome"]["kernel_ops"]} >= {"aten.bmm.default"}
    assert case["outcome"]["errors"]["out"]["ratio"] < 1
    assert case["outcome"]["timings"].keys() == {"first", "warm"}


def test_streams(small: tuple[Path, Any]) -> None:
    _, done = small
    assert "fallback.matmul" in done.stdout
    assert "wrote report.json" in done.stderr
    assert "\x1b" not in done.stdout  # no terminal, no colour
    assert "[" not in done.stderr.replace("[0m", "")  # no progress line


def test_saved_report_renders_again(small: tuple[Path, Any]) -> None:
    folder, _ = small
    again = attncheck("report", "report.json", "--format", "markdown", cwd=folder)
    assert again.returncode == 0
    assert again.stdout == (folder / "report.md").read_text()
    copy = attncheck("report", "report.json", "--format", "json", cwd=folder)
    assert json.loads(copy.stdout) == json.loads((folder / "report.json").read_text())


def test_fail_on_warning(small: tuple[Path, Any]) -> None:
    folder, _ = small
    # All has run: the saved outcomes are judged again.
    again = ["scan", "--resume", "--run-dir", "run", "--fail-on", "warning"]
    assert attncheck(*again, cwd=folder).returncode == 1
    costly = ["scan", *SMALL, "--placement", "sequence", "--direction", "forward"]
    ignored = ["--fail-on", "warning", "--ignore", "ATN3"]
    assert attncheck(*costly, *ignored, cwd=folder).returncode == 0


def test_nothing_that_could_run_is_inconclusive(tmp_path: Path) -> None:
    arguments = ["scan", "--operator", "flash_attn_func", "--setting", "plain", "-o", "json:r.json"]
    done = attncheck(*arguments, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    document = json.loads((tmp_path / "r.json").read_text())
    assert set(document["summary"]) == {"unavailable"}
    assert "attncheck scan --with flash-attn" in json.dumps(document["findings"])


def test_a_probe_that_does_not_load_costs_nobody_else(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import surely_not_installed\n")
    arguments = [
        "scan",
        *SMALL,
        "--placement",
        "batch",
        "--probe",
        "broken.py",
        "-o",
        "json:r.json",
    ]
    done = attncheck(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["summary"] == {"supported": 2, "unavailable": 1}
    # Nor is it a fault of the probe's how long a first call takes on a machine that others use too.
    assert {f["rule"] for f in document["findings"]} - {"ATN302"} == {"ATN404"}
    assert "surely_not_installed" in done.stderr


@pytest.mark.slow  # test_fix.py and the oracle scan meshes of two axes in every run
def test_two_axes(tmp_path: Path) -> None:
    arguments = ["scan", "--operator", "fallback.matmul", "--setting", "plain", "--mesh", "2x2"]
    done = attncheck(*arguments, "--placement", "batch,h*", "-o", "json:r.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cases = {c["placement"]: c for c in json.loads((tmp_path / "r.json").read_text())["cases"]}
    assert cases["batch,heads"]["placements"]["q"] == ["S(0)", "S(1)"]
    assert cases["batch,heads"]["outcome"]["status"] == "supported"
    assert len(cases["batch,heads"]["outcome"]["ranks"]) == 4


# --- interruption -----------------------------------------------------------------------------------


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "attncheck", "scan", "--run-dir", str(folder / "run"), *arguments],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=(folder / "stderr.txt").open("wb"),
        env={**os.environ, "ATTNCHECK_CACHE": str(folder / "cache")},
    )


def finished_cases(folder: Path) -> int:
    journal = folder / "run" / "journal.jsonl"
    return journal.read_text().count('"event": "end"') if journal.exists() else 0


# 36 cases that every torch supports.
HEALTHY = [
    *(f"--operator=fallback.{form}" for form in ("matmul", "baddbmm", "einsum")),
    *("--placement=batch", "--placement=replicate"),
]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for workers in /proc")
def test_ctrl_c_keeps_the_journal_and_resume_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path, *HEALTHY, "--seed", "4", "-o", "json:r.json")
    assert wait_until(lambda: finished_cases(tmp_path) >= 3, 180)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert wait_until(lambda: not running_workers(tmp_path / "run"), 15)
    before = finished_cases(tmp_path)
    assert "--resume" in (tmp_path / "stderr.txt").read_text()

    done = attncheck(
        "scan", "--resume", "--run-dir", str(tmp_path / "run"), "-o", "json:r.json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert f"{before} of 36 cases are done" in done.stderr
    document = json.loads((tmp_path / "r.json").read_text())
    # The case that was interrupted is no crash: it was run again.
    assert document["summary"] == {"supported": 36}
    assert document["environment"]["seed"] == 4


@pytest.mark.skipif(sys.platform != "linux", reason="relies on Linux's parent-death signal")
def test_even_sigkill_leaves_no_orphans(tmp_path: Path) -> None:
    process = start(tmp_path, *HEALTHY)
    assert wait_until(lambda: finished_cases(tmp_path) >= 2, 180)
    assert running_workers(tmp_path / "run")
    process.kill()
    process.wait(10)
    assert wait_until(lambda: not running_workers(tmp_path / "run"), 60)


def test_a_used_run_folder_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "journal.jsonl").write_text('{"event": "start", "index": 0}\n')
    done = attncheck("scan", *SMALL, "--run-dir", "run", cwd=tmp_path)
    assert done.returncode == 2
    assert "--resume" in done.stderr
    assert (tmp_path / "run" / "journal.jsonl").read_text().count("\n") == 1


# --- the wheel --------------------------------------------------------------------------------------


def test_wheel_holds_both_shelves_and_no_top_level_names(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "-w",
            str(tmp_path),
            str(ROOT),
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        "attncheck/probes/sdpa.py",
        "attncheck/reports/table.py",
        "attncheck/reports/_html/page.html",
        "attncheck/templates/probe.py",
        "attncheck/py.typed",
    } <= set(names)
    assert "attncheck/schema/report.schema.json" in names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"attncheck"}
