"""Shards, their joining, and waivers, from outside."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

YESTERDAY = datetime.date.today() - datetime.timedelta(days=1)
# Communicates unasked with a sharded sequence (ATN301), and is right with a sharded batch.
# How long a first call takes (ATN302) is for the machine to say.
SMALL = (
    *("--operator", "fallback.matmul", "--setting", "plain", "--direction", "forward"),
    *("--ignore", "ATN302"),
)
PLACEMENTS = ("--placement", "sequence", "--placement", "batch")


def attncheck(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "attncheck", *arguments],
        capture_output=True,
        text=True,
        timeout=1800,
        cwd=cwd,
        env={**os.environ, "ATTNCHECK_CACHE": str(cwd / "cache")},
    )


def scan(cwd: Path, name: str, *arguments: str) -> dict[str, Any]:
    done = attncheck("scan", "--seed", "7", "-q", "-o", f"json:{name}", *arguments, cwd=cwd)
    assert done.returncode in (0, 1), done.stderr
    return json.loads((cwd / name).read_text())


def without_times(case: dict[str, Any]) -> dict[str, Any]:
    outcome = {k: v for k, v in case["outcome"].items() if k != "timings"}
    return {**case, "outcome": outcome}


# --- the shards of a scan ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two shards of a scan: a.json, b.json, and the run folder of the second."""
    folder = tmp_path_factory.mktemp("scanned")
    scan(folder, "a.json", *SMALL, *PLACEMENTS, "--shard", "1/2")
    scan(folder, "b.json", *SMALL, *PLACEMENTS, "--shard", "2/2", "--run-dir", "run")
    return folder


def test_shards_are_joined(scanned: Path) -> None:
    done = attncheck("merge", "b.json", "a.json", "-o", "json:m.json", cwd=scanned)
    assert done.returncode == 0, done.stderr
    joined = json.loads((scanned / "m.json").read_text())
    assert [case["placement"] for case in joined["cases"]] == ["batch", "sequence"]
    assert joined["summary"] == {"redistributed": 1, "supported": 1}
    assert {finding["rule"] for finding in joined["findings"]} == {"ATN301"}
    # Judged over all cases: what works with a sharded batch is in the other shard.
    (remedy, *_) = joined["findings"][0]["remedies"]
    assert remedy["evidence"] == [joined["cases"][0]["id"]]


def test_a_resumed_shard_is_the_same_shard(scanned: Path) -> None:
    again = scan(scanned, "again.json", "--resume", "--run-dir", "run")
    before = json.loads((scanned / "b.json").read_text())
    assert again["environment"]["shard"] == before["environment"]["shard"]
    assert again["cases"] == before["cases"]


def test_a_lost_shard_is_inconclusive(scanned: Path) -> None:
    done = attncheck("merge", "a.json", "-o", "table", cwd=scanned)
    assert done.returncode == 3
    assert "no report was given of shard 2/2" in done.stderr
    assert "Incomplete: no report was given of shard 2/2." in done.stdout


def test_the_joined_report_goes_to_stdout_by_default(scanned: Path) -> None:
    done = attncheck("merge", "a.json", "b.json", cwd=scanned)
    assert done.stderr == ""
    assert len(json.loads(done.stdout)["cases"]) == 2


BAD = [
    (["scan", *SMALL, "--shard", "0/2"], ["'0/2'", "1/2"]),
    (["scan", *SMALL, "--shard", "half"], ["'half'", "2/3"]),
    (["scan", *SMALL, *PLACEMENTS, "--shard", "1/3"], ["1/3", "only 2 cases"]),
    (["merge", "a.json", "nowhere.json"], ["nowhere.json"]),
    (["merge", "a.json", "torn.json"], ["torn.json", "not JSON"]),
    (["merge", "a.json", "future.json"], ["future.json", "schema_version 99"]),
    (["merge", "a.json", "older.json"], ["a.json has torch", "older.json 1.0", "--allow-mixed"]),
    (["merge", "a.json", "other.json"], ["a.json", "other.json", "two outcomes"]),
    (["merge", "a.json", "b.json", "-o", "json:no/such.json"], ["no/such.json"]),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_what_does_not_belong_together_is_one_sentence(
    arguments: list[str], words: list[str], scanned: Path
) -> None:
    (scanned / "torn.json").write_text('{"schema_version": 1, "cas')
    (scanned / "future.json").write_text('{"schema_version": 99}')
    report = json.loads((scanned / "a.json").read_text())
    report["environment"]["packages"]["torch"] = "1.0"
    (scanned / "older.json").write_text(json.dumps(report))
    report = json.loads((scanned / "a.json").read_text())
    report["cases"][0]["outcome"]["message"] = "another"
    (scanned / "other.json").write_text(json.dumps(report))
    before = sorted(scanned.iterdir())
    done = attncheck(*arguments, cwd=scanned)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert sorted(scanned.iterdir()) == before


def test_merge_never_imports_torch(scanned: Path) -> None:
    code = (
        "import sys, click.testing\n"
        "from attncheck.cli import main\n"
        "result = click.testing.CliRunner().invoke(main, ['merge', 'a.json', 'b.json'])\n"
        "assert result.exit_code == 0, result.output\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=scanned)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_merge_is_the_unsplit_scan(tmp_path: Path) -> None:
    # On a machine that others use too, the first call of sdpa may take longer than a case is given.
    patient = ("--level", "quick", "--case-timeout", "900")
    chosen = (*patient, "-k", "fallback.*", "-k", "sdpa", "-k", "sdpa[MATH]")
    whole = scan(tmp_path, "whole.json", *chosen)
    names = []
    for index in (1, 2, 3):
        scan(tmp_path, f"{index}.json", *chosen, "--shard", f"{index}/3")
        names.append(f"{index}.json")
    done = attncheck("merge", *names, "-o", "json:joined.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    joined = json.loads((tmp_path / "joined.json").read_text())
    assert len(whole["cases"]) >= 50
    assert [case["id"] for case in joined["cases"]] == [case["id"] for case in whole["cases"]]
    for one, other in zip(joined["cases"], whole["cases"], strict=True):
        assert without_times(one) == without_times(other), one["id"]
    timed = ("ATN302",)  # says how long a first call took
    assert [f for f in joined["findings"] if f["rule"] not in timed] == [
        f for f in whole["findings"] if f["rule"] not in timed
    ]
    for key in ("packages", "mesh", "ranks", "seed", "hash_seeds", "level", "standins"):
        assert joined["environment"][key] == whole["environment"][key]


# --- waivers ----------------------------------------------------------------------------------------

WAIVER = '{rule = "ATN301", placement = "sequence", reason = "we gather anyway"%s}'


@pytest.mark.parametrize(
    ("table", "code", "says"),
    [
        ("", 1, ""),
        (WAIVER % "", 0, "Ignored: 1 case of ATN301 (placement sequence), we gather anyway"),
        (
            WAIVER % f", until = {YESTERDAY}",
            1,
            f"Ignored until {YESTERDAY}, and counts again: 1 case",
        ),
        (WAIVER.replace("sequence", "heads") % "", 1, "Nothing is ignored by ATN301"),
    ],
    ids=["none", "holds", "expired", "another placement"],
)
def test_a_waiver_decides_the_exit_code_and_is_told(
    table: str, code: int, says: str, scanned: Path
) -> None:
    file = scanned / "pyproject.toml"
    file.write_text(f"[tool.attncheck]\nignore = [{table}]\n")
    try:
        options = ("--resume", "--run-dir", "run", "--fail-on", "warning", "-o", "table")
        done = attncheck("scan", *options, "-o", "json:waived.json", cwd=scanned)
    finally:
        file.unlink()
    assert done.returncode == code, done.stdout + done.stderr
    assert says in " ".join(done.stdout.split())
    report = json.loads((scanned / "waived.json").read_text())
    assert bool(report["findings"]) is bool(code)
    assert len(report["cases"]) == 1


def test_a_waiver_without_a_reason_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.attncheck]\nignore = [{rule = "ATN301"}]\n')
    done = attncheck("scan", *SMALL, cwd=tmp_path)
    assert done.returncode == 2
    assert "entry 1 of ignore: reason is missing" in done.stderr
    assert not (tmp_path / "cache").exists()
