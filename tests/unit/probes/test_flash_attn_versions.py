"""The flash-attn probes on the real package, in every version that changed something: each setting on
whole tensors against its reference, and what a scan says where there is no dispatcher op."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import real_scan

from attncheck import provision
from attncheck.plugins import load_probe_file
from attncheck.probing import LEVELS

REPOSITORY = Path(__file__).parents[3]
PROBES = [REPOSITORY / "probes" / f"{name}.py" for name in ("flash_attn", "flash_attn_kvcache")]
NEWEST = "2.8.3.post2"
LEVEL_OF = {
    "2.5.9.post1": "default",
    "2.6.3": "default",
    "2.7.0.post2": "default",
    "2.7.4.post1": "default",
    "2.8.0.post2": "default",
    NEWEST: "full",
}
# Each is a package to install and to run: in every run the oldest, the first with dispatcher ops, the newest.
ALWAYS = ("2.5.9.post1", "2.7.0.post2", NEWEST)
# What 2.5 did not have yet.
OLD = "2.5.9.post1"
LATER = {"softcap": "softcap", "lse": "return_softmax_lse"}


def environment(folder: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)])}


def package(version: str) -> Path:
    return provision.ensure(provision.parse(f"flash-attn=={version}"), log=print)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(version, marks=[] if version in ALWAYS else [pytest.mark.slow])
        for version in LEVEL_OF
    ],
)
def measured(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """The version, and {operator/setting: {tensor: [error, bound]}} or a refusal's text."""
    script = Path(__file__).with_name("flash_attn_errors.py")
    run = subprocess.run(
        [sys.executable, str(script), LEVEL_OF[request.param], *map(str, PROBES)],
        env={**os.environ, **environment(package(request.param))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return request.param, json.loads(run.stdout)


def test_every_setting_agrees_with_its_reference(measured: tuple[str, dict[str, Any]]) -> None:
    version, report = measured
    level = LEVELS.index(LEVEL_OF[version])
    pairs = {
        f"{operator.name}/{setting.name}": operator.tensors(setting)
        for probe in map(load_probe_file, PROBES)
        for operator in probe.operators
        for setting in operator.settings
        if LEVELS.index(setting.level) <= level
    }
    assert set(report) == set(pairs)
    for name, errors in report.items():
        feature = name.partition("/")[2]
        if version == OLD and feature in LATER:
            function = name.partition("/")[0]
            text = f"ValueError: {function} of flash_attn {version} has no {LATER[feature]}"
            assert errors == f"setting_refused: {text}"
            continue
        assert isinstance(errors, dict), f"{name}: {errors}"
        differentiable = any(tensor.requires_grad for tensor in pairs[name])
        assert differentiable == any(tensor.startswith("grad.") for tensor in errors)
        assert ("lse" in errors) == ("attn_probs" in name or name.endswith("/lse"))
        for tensor, (error, bound) in errors.items():
            assert error <= bound, f"{name}, {tensor}: {error} above {bound}"


def test_before_2_7_every_call_ends_in_front_of_the_compiled_module(tmp_path: Path) -> None:
    report = real_scan.scan(
        tmp_path,
        *("--with", "flash-attn==2.6.3", "--setting", "plain", "--operator", "flash_attn_func"),
        *("--operator", "flash_attn_*_func", "--operator", "flash_attn_with_kvcache"),
        codes=(0, 1),
    )
    outcomes = [case["outcome"] for case in report["cases"]]
    assert len(outcomes) >= 40
    for outcome in outcomes:
        assert (outcome["status"], outcome["exception_type"]) == ("error", "BypassesDispatcher")
        assert "is no dispatcher op: DTensor cannot intercept it" in outcome["message"]
    kernels = {outcome["kernel_op"].partition(".")[2] for outcome in outcomes}
    assert kernels == {"fwd", "varlen_fwd", "fwd_kvcache"}
    findings = {finding["kernel_op"]: finding for finding in report["findings"]}
    assert {finding["rule"] for finding in report["findings"]} == {"ATN104"}
    remedies = [r["text"] for r in findings["flash_attn_2_cuda.fwd"]["remedies"]]
    assert any("`local_map` with heads inputs" in text for text in remedies)
    assert any("flash-attn 2.7.0 or newer" in text for text in remedies)
    # No version has a dispatcher op for the cache.
    remedies = [r["text"] for r in findings["flash_attn_2_cuda.fwd_kvcache"]["remedies"]]
    assert remedies
    assert not any("newer" in text for text in remedies)


UNDEFINED = "/lib/flash_attn/rotary.so: undefined symbol: _ZN3c105ErrorC2ENS_14SourceLocationE"


def test_a_package_that_does_not_load_stops_nobody_else(tmp_path: Path) -> None:
    """flash-attn by its metadata; its import dies of an extension, as after an upgrade of torch."""
    folder = tmp_path / "installed"
    info = folder / "flash_attn-2.8.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    (info / "RECORD").write_text("flash_attn/__init__.py,,\n")
    (folder / "flash_attn").mkdir()
    code = f"import flash_attn_2_cuda\nraise ImportError({UNDEFINED!r})\n"
    (folder / "flash_attn" / "__init__.py").write_text(code)
    report = real_scan.scan(
        tmp_path,
        *("--operator", "flash_attn_func", "--operator", "flash_attn_with_kvcache"),
        *("--operator", "fallback.einsum", "--setting", "plain", "--placement", "heads"),
        codes=(0, 1),
        **environment(folder),
    )
    by_operator: dict[str, set[tuple[str, str]]] = {}
    for case in report["cases"]:
        outcome = case["outcome"]
        told = (outcome.get("reason") or outcome["status"], outcome.get("message", ""))
        by_operator.setdefault(case["operator"], set()).add(told)
    broken = {("extension_not_loadable", f"ImportError: {UNDEFINED}")}
    assert by_operator["flash_attn_func"] == broken
    assert by_operator["flash_attn_with_kvcache"] == broken
    assert by_operator["fallback.einsum"] == {("supported", "")}
    rules = {finding["rule"] for finding in report["findings"]}
    assert rules == {"ATN402"}
