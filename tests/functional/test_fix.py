"""`attncheck fix`, end to end: what it writes was run, what it does not write failed, and WAN 14B works."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from attncheck.cli import main
from attncheck.errors import UserError
from attncheck.fixes import emit, fixing, packages
from attncheck.fixes.notation import Signature
from attncheck.plan import Selection
from attncheck.runner.scan import ScanRequest

PROBE = str(Path(__file__).parent / "fix_probe.py")
FORWARD, BACKWARD = "mended.attention_forward.default", "mended.attention_backward.default"


def attncheck(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "attncheck", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1800,  # three scans of up to four ranks, on a machine that others use too
        check=False,
    )


def test_from_a_report_to_a_module_that_works(tmp_path: Path) -> None:
    """Nobody described these two ops: synthesised, verified, written; and a scan with it is clean."""
    scan = ("scan", "--probe", PROBE, "-k", "mended", "-o", "json:r.json")
    before = attncheck(*scan, folder=tmp_path)
    assert before.returncode == 1, before.stderr
    assert set(json.loads((tmp_path / "r.json").read_text())["summary"]) == {"missing_strategy"}

    fix = ("fix", "--from", "r.json", "--probe", PROBE, "--write", "mine.py", "-o", "json:f.json")
    done = attncheck(*fix, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert f"verified  {FORWARD}" in done.stderr
    assert f"verified  {BACKWARD}" in done.stderr
    text = (tmp_path / "mine.py").read_text()
    assert emit.is_ours(text)
    assert 'queries={"causal": False}' in text

    report = json.loads((tmp_path / "f.json").read_text())
    known = {c["id"] for c in json.loads((tmp_path / "r.json").read_text())["cases"]}
    assert known <= {c["id"] for c in report["cases"]}
    # On one mesh axis and on two, even and uneven, each with what it was before.
    assert {tuple(c["mesh"].values()) for c in report["cases"]} == {(2,), (3,), (2, 2)}
    assert {c["before"] for c in report["cases"]} == {"missing_strategy"}
    assert {c["outcome"]["status"] for c in report["cases"]} <= {"supported", "redistributed"}

    after = attncheck(*scan, "--fix", "mine.py", folder=tmp_path)
    assert after.returncode == 0, after.stdout
    cases = json.loads((tmp_path / "r.json").read_text())["cases"]
    statuses = {(c["setting"]["name"], c["placement"]): c["outcome"]["status"] for c in cases}
    assert statuses == {
        ("plain", "batch"): "supported",
        ("plain", "heads"): "supported",
        ("plain", "query"): "supported",
        ("causal", "heads"): "supported",
        ("causal", "query"): "redistributed",
        ("uneven", "heads"): "redistributed",  # 3 kv heads on 2 ranks: no group may be torn
    }


@pytest.mark.slow
def test_the_module_on_real_ranks_without_attncheck(tmp_path: Path) -> None:
    """The same script was run on torch 2.6.0, 2.9.1 and 2.14.1."""
    known = emit.write_known(tmp_path)
    script = Path(__file__).parent / "emitted_on_ranks.py"
    done = subprocess.run(
        [sys.executable, str(script), str(known)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["ops"]["aten._scaled_dot_product_flash_attention_for_cpu.default"] == "registered"
    assert said["compared"] == 36
    assert said["worst"] < 1e-5
    assert "does not have a sharding strategy registered" in said["before"]
    assert said["after"] == said["before"]


# --- check the checker ---------------------------------------------------------------------------

QKV = {"q": "b h sq d", "k": "b g sk d", "v": "b g sk d"}
RIGHT = (
    Signature(FORWARD, QKV, {"out": "b h sq d", "lse": "b h sq"}, queries={"causal": False}),
    Signature(
        BACKWARD,
        {"dout": "b h sq d", **QKV, "out": "b h sq d", "lse": "b h sq"},
        {"dq": "b h sq d", "dk": "b g sk d, summed over h sq", "dv": "b g sk d, summed over h sq"},
        queries={"causal": False},
    ),
)


def fixed(monkeypatch: pytest.MonkeyPatch, *signatures: Signature, **changes: Any) -> fixing.Fixed:
    """A fix of the heads cases with what `attncheck` is made to believe."""
    monkeypatch.setattr(packages, "known", lambda: signatures)
    monkeypatch.setattr("attncheck.fixes.verify.NEIGHBOUR_MESHES", ())
    selection = Selection(operators=("mended",), placements=("heads", "query"))
    scan = ScanRequest(selection=selection, probe_files=(PROBE,), seed=11)
    request = fixing.FixRequest(None, scan, **changes)
    return fixing.fix(request, lambda text: None, lambda done, total, case: None)


def test_a_wrong_signature_is_never_written_as_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    """dk with its dims swapped: the gradient is wrong, the backward is to blame, and the forward is kept."""
    swapped = {**RIGHT[1].gives, "dk": "b sk g d, summed over h sq"}
    monkeypatch.setattr("attncheck.fixes.verify.flipped", lambda operator: ())
    made = fixed(monkeypatch, RIGHT[0], dataclasses.replace(RIGHT[1], gives=swapped))
    by_op = {e.op: e for e in made.evidence}
    assert by_op[FORWARD].verified
    assert by_op[BACKWARD].failed
    assert f'"{FORWARD}",' in made.text
    assert f'"{BACKWARD}",' not in made.text


# --- WAN 14B -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", ["2", pytest.param("4", marks=pytest.mark.slow)])
def test_wan_14b_heads_sharded_without_communication(ranks: str, tmp_path: Path) -> None:
    """The report that this tool began with: 40 heads of 128 over 2 and 4 ranks, self- and cross-attention."""
    done = attncheck(
        "scan", "--probe", PROBE, "-k", "wan", "--with", "flash-attn", "--fix", "known",
        "--mesh", ranks, "-o", "json:r.json", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    cases = json.loads((tmp_path / "r.json").read_text())["cases"]
    assert len(cases) == 4
    for case in cases:
        assert case["outcome"]["status"] == "supported", case["id"]
        assert not case["outcome"].get("collectives"), case["id"]
        assert "flash_attn._flash_attn_forward.default" in {
            k["op"] for k in case["outcome"]["kernel_ops"]
        }


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--from", "no.json"), "Cannot read no.json"),
        (("--from", "bad.json"), "is not an attncheck report"),
        (("--write", "theirs.py"), "theirs.py exists, and is not as attncheck wrote it"),
        (("--write", "no/folder.py"), "the folder no does not exist"),
        (("--kernel-op", "no::such"), "Unknown kernel op 'no::such'"),
        (("--write", "a.py", "--diff", "b.py"), "expected one of them"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.py").write_text("mine = 1\n")
    (tmp_path / "bad.json").write_text("{}")
    done = CliRunner().invoke(main, ["fix", *arguments])
    assert done.exit_code == 2, done.output
    assert said in done.output
    assert len(done.output.splitlines()) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"theirs.py", "bad.json"}
    assert (tmp_path / "theirs.py").read_text() == "mine = 1\n"


def test_a_report_of_another_torch_is_refused(tmp_path: Path) -> None:
    report = {
        "schema_version": 1,
        "environment": {"packages": {"torch": "2.5.1"}},
        "cases": [],
        "findings": [],
        "summary": {},
    }
    file = tmp_path / "old.json"
    file.write_text(json.dumps(report))
    with pytest.raises(UserError, match=r"old\.json was made with torch 2\.5\.1, and here is"):
        fixing.read(file)
