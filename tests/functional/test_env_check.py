"""`attncheck env --check` as it is run: a broken environment in front of this one, a clean one, JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

import attncheck

SCHEMA = Path(attncheck.__file__).parent / "schema" / "report.schema.json"


def env(*arguments: str, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run as a user does, with what lies in `site` in front of what is installed."""
    code = (
        "import sys\nfrom attncheck.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    assert 'torch' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site or "")}
    return subprocess.run(
        [sys.executable, "-c", code, "env", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """xformers for another torch than any that is installed here: 0.0.28 is for 2.4.1."""
    info = tmp_path / "xformers-0.0.28.dist-info"
    info.mkdir()
    metadata = (
        "Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.28\nRequires-Dist: torch==2.4.1\n"
    )
    (info / "METADATA").write_text(metadata)
    return tmp_path


def test_a_broken_environment_fails_and_says_what_to_do(broken: Path) -> None:
    run = env("--check", site=broken)
    assert run.returncode == 1, run.stderr
    assert "- xformers 0.0.28" in run.stdout  # the environment is there as ever
    assert "error: xformers 0.0.28 needs torch==2.4.1, and torch 2." in run.stdout
    assert "      pip install torch==2.4.1\n" in run.stdout
    assert "`attncheck explain ATN405` says more" in run.stdout


def test_without_it_nothing_is_wrong() -> None:
    run = env("--check")
    assert run.returncode == 0, run.stdout
    assert "Nothing wrong was found" in run.stdout


def test_without_check_nothing_is_judged(broken: Path) -> None:
    run = env(site=broken)
    assert run.returncode == 0
    assert "error" not in run.stdout


def test_json_holds_findings_as_a_report_does(broken: Path) -> None:
    run = env("--check", "--json", site=broken)
    assert run.returncode == 1
    document = json.loads(run.stdout)
    assert document["environment"]["packages"]["xformers"] == "0.0.28"
    (finding,) = [f for f in document["findings"] if f["title"].startswith("xformers")]
    assert finding["rule"] == "ATN405"
    schema = json.loads(SCHEMA.read_text())
    jsonschema.validate(finding, {"$ref": "#/$defs/finding", "$defs": schema["$defs"]})
    assert "findings" not in json.loads(env("--json").stdout)
