"""Does the checker catch what is planted, and only that? Real processes, the real command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PROBE_FILE = HERE / "planted_probe.py"


def load_expected() -> dict[str, set[str]]:
    from attncheck import plugins

    probe = plugins.load_probe_file(PROBE_FILE)
    module = sys.modules[probe.operators[0].tensors.__module__]
    expected: dict[str, set[str]] = module.EXPECTED
    return expected


EXPECTED = load_expected()


def run_scan(folder: Path, operators: list[str], direction: str, *options: str) -> dict[str, Any]:
    output = folder / f"{direction}.json"
    command = [
        sys.executable, "-m", "attncheck", "scan", "--probe", str(PROBE_FILE), "--level", "quick",
        "--direction", direction, "--case-timeout", "15", "--seed", "5", "-q",
        "--run-dir", str(folder / direction), "--output", f"json:{output}", *options,
    ]  # fmt: skip
    for name in operators:
        command += ["--operator", f"planted.{name}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=folder)
    assert done.returncode == 1, done.stderr  # planted bugs are findings
    document: dict[str, Any] = json.loads(output.read_text())
    return document


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Dropout is judged forward; everything else backward, which runs both."""
    folder = tmp_path_factory.mktemp("planted")
    values = run_scan(folder, [n for n in EXPECTED if not n.startswith("dropout")], "backward")
    masks = run_scan(folder, [n for n in EXPECTED if n.startswith("dropout")], "forward")
    return {key: [*values[key], *masks[key]] for key in ("cases", "findings")}


@pytest.mark.parametrize("name", EXPECTED)
def test_named_by_its_rule_and_no_other(report: dict[str, Any], name: str) -> None:
    ids = [c["id"] for c in report["cases"] if c["operator"] == f"planted.{name}"]
    assert len(ids) == 1
    rules = {f["rule"] for f in report["findings"] if set(f["cases"]) & set(ids)}
    outcome = next(c["outcome"] for c in report["cases"] if c["id"] == ids[0])
    assert rules == EXPECTED[name], outcome


@pytest.mark.parametrize("name", [n for n, rules in EXPECTED.items() if not rules])
def test_healthy_twins_are_supported(report: dict[str, Any], name: str) -> None:
    outcome = next(c["outcome"] for c in report["cases"] if c["operator"] == f"planted.{name}")
    assert outcome["status"] == "supported"
    assert outcome.get("kernel_ops") or name == "bypasses_on_local_tensors"  # there are none to see


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("crash", "Segmentation fault"),
        ("hang", "no answer within"),
        ("diverged_collective", "all_reduce"),
        ("diverged_exception", "only rank 1 refuses"),
        ("check_failed", "reference raised KeyError: 'planted: the reference is broken'"),
        ("reference_of_wrong_shape", "reference gives out of shape (3, 6, 4, 8)"),
        ("reference_forgotten", "reference is missing"),
        ("reference_wrong", "differs from its reference by up to"),
        ("changes_the_process", "(F.scaled_dot_product_attention), so the workers started afresh"),
        ("behind_the_dispatcher", "planted.behind_the_dispatcher is no dispatcher op"),
        ("returns_nothing", "call returned NoneType"),
        ("mutates_argument", "the call changed its argument k"),
        ("calls_exit", "the call on whole plain tensors raised SystemExit"),
        ("op_missing", "planted: no such op"),
        ("bypasses_dispatcher", "no_op is no dispatcher op"),
        ("extension_not_loadable", "planted_extension"),
        ("illegal_placement", "rank 0 holds (3, 2, 6, 8)"),
    ],
)
def test_says_what_happened(report: dict[str, Any], name: str, words: str) -> None:
    outcome = next(c["outcome"] for c in report["cases"] if c["operator"] == f"planted.{name}")
    assert words in json.dumps(outcome)


def test_every_missing_op_is_named_in_one_run(report: dict[str, Any]) -> None:
    outcome = next(
        c["outcome"] for c in report["cases"] if c["operator"] == "planted.missing_forward"
    )
    assert [m["op"] for m in outcome["missing_ops"]] == [
        "planted.missing_forward.default",
        "planted.missing_forward_backward.default",
    ]


def test_every_rule_is_planted() -> None:
    from attncheck import rules

    planted = set().union(*EXPECTED.values())
    # ATN404 is about probe files, not cases that ran: tests/functional/test_cli.py plants it. ATN506 needs
    # two engines: tests/functional/test_engines.py. ATN405 to ATN409 are about environments that are read and
    # not run: tests/unit/test_static_rules.py.
    static = {"ATN405", "ATN406", "ATN407", "ATN408", "ATN409"}
    assert {r.id for r in rules.RULES} - planted == {"ATN404", "ATN506"} | static


NATURES = {
    "healthy": "",
    "drift": "systematic",
    "drift_by_rounding": "rounding",
    "drift_by_order": "order",
    "wrong_result": "systematic",
}


def test_repeats_tell_rounding_from_the_order_of_a_reduction_from_a_bug(tmp_path: Path) -> None:
    report = run_scan(tmp_path, list(NATURES), "forward", "--repeats", "6")
    for case in report["cases"]:
        spread = case["outcome"]["spread"]["out"]
        name = case["operator"].removeprefix("planted.")
        assert spread.get("nature", "") == NATURES[name], spread
        assert spread["repeats"] == 6
        assert spread["repeatable"] == (name != "drift_by_order")
        assert (spread["beyond"] > 0) == (name != "healthy")
    titles = [f["title"] for f in report["findings"] if f["rule"] == "ATN203"]
    assert [t.partition("(")[2] for t in sorted(titles)] == [
        "a bug, by 6 sets of values)",
        "a reduction whose order changes, by 6 sets of values)",
        "rounding, by 6 sets of values)",
    ]
