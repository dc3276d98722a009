"""Commands on saved reports: without torch, in time, and with one sentence for what they cannot read."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sample_report
from click.testing import CliRunner

from attncheck import plugins
from attncheck.cli import main
from attncheck.model import Status, dump_report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two reports, a baseline of the first, and files that are neither."""
    folder = tmp_path_factory.mktemp("saved")
    report = sample_report.sample()
    whole = dump_report(report)
    (folder / "old.json").write_text(whole)
    mended = [
        replace(r, outcome=replace(r.outcome, status=Status.SUPPORTED))
        if r.outcome.status is Status.ERROR
        else r
        for r in report.cases
    ]
    bumped = {**report.environment, "packages": {"torch": "2.14.1", "flash-attn": "2.8.3.post2"}}
    (folder / "new.json").write_text(
        dump_report(replace(report, cases=tuple(mended), environment=bumped))
    )
    (folder / "torn.json").write_text(whole[: len(whole) // 2])
    (folder / "future.json").write_text(
        whole.replace('"schema_version": 1', '"schema_version": 2', 1)
    )
    (folder / "list.json").write_text("[1, 2]")
    (folder / "deep.json").write_text('{"schema_version": 1, "cases": ' + "[" * 100_000)
    (folder / "binary.json").write_bytes(bytes(range(256)))
    (folder / "hostile.json").write_text(
        dump_report(sample_report.hostile()), errors="backslashreplace"
    )
    done = CliRunner().invoke(
        main,
        ["baseline", "write", "--from", f"{folder}/old.json", "--baseline", f"{folder}/b.json"],
    )
    assert done.exit_code == 0, done.output
    return folder


COMMANDS = [
    ["explain", "ATN101"],
    ["explain", "--all"],
    ["diff", "old.json", "new.json"],
    ["merge", "old.json"],
    ["gate", "--from", "old.json", "--baseline", "b.json"],
    ["baseline", "show", "--baseline", "b.json"],
    ["baseline", "write", "--from", "old.json", "--baseline", "b2.json"],
    ["baseline", "prune", "--from", "old.json", "--baseline", "b.json"],
    ["gate", "--help"],
    *(["report", "old.json", "--format", name] for name in plugins.formats()),
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_no_torch(arguments: list[str], folder: Path) -> None:
    code = (
        "import sys, click.testing\n"
        "from attncheck.cli import main\n"
        f"result = click.testing.CliRunner().invoke(main, {arguments!r})\n"
        "assert result.exit_code in (0, 3), result.output\n"
        "loaded = [m for m in ('torch', 'numpy', 'rich') if m in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    return lambda *arguments: CliRunner().invoke(main, arguments)


BAD = {
    "nowhere.json": "Cannot read nowhere.json: No such file or directory.",
    "torn.json": "torn.json is not JSON: ",
    "future.json": "future.json has schema_version 2; this attncheck reads 1.",
    "list.json": "list.json is not an attncheck report: it has no schema_version.",
    "deep.json": "deep.json is not JSON: ",
    "binary.json": "binary.json is not a text file; expected a report written by --output json.",
    "b.json": "b.json is a baseline; expected a report written by --output json.",
}


@pytest.mark.parametrize("file", BAD)
@pytest.mark.parametrize(
    "command",
    [
        ("report", "FILE", "--output", "out.txt"),
        ("report", "FILE", "--format", "markdown", "--finding", "ATN101"),
        ("diff", "old.json", "FILE", "--output", "table:out.txt"),
        ("diff", "FILE", "old.json"),
        ("merge", "old.json", "FILE", "--output", "json:out.txt"),
        ("gate", "--from", "FILE", "--baseline", "b.json", "--output", "table:out.txt"),
        ("baseline", "write", "--from", "FILE", "--baseline", "out.txt"),
    ],
    ids=lambda command: " ".join(command),
)
def test_a_report_that_is_none(run, folder: Path, file: str, command: tuple[str, ...]) -> None:
    """One sentence, exit 2, nothing written, and the file as it was."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = run(*(file if word == "FILE" else word for word in command))
    assert done.exit_code == 2
    assert done.output.startswith(f"attncheck: {BAD[file]}"), done.output
    assert done.output.count("\n") == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("gate", "--from", "old.json"), ["no baseline attncheck-baseline.json", "baseline write"]),
        (("gate", "--baseline", "torn.json", "--from", "old.json"), ["torn.json is not JSON"]),
        (("gate", "--baseline", "old.json", "--from", "old.json"), ["old.json is a report"]),
        (("gate", "--baseline", "b.json", "--allow", "old"), ["'old'", "costlier"]),
        (("gate", "--baseline", "b.json", "--fail-on", "bad"), ["'bad'", "never"]),
        (("gate", "--baseline", "b.json", "--shard", "1/2"), ["--shard", "attncheck merge"]),
        (
            ("gate", "--baseline", "b.json", "--from", "old.json", "--operator", "sdpa"),
            ["--operator", "--from", "one of the two"],
        ),
        (
            ("gate", "--baseline", "b.json", "--from", "old.json", "--ignore", "ATN301"),
            ["--ignore", "--from", "one of the two"],
        ),
        (("baseline", "write", "--baseline", "no/such.json"), ["Cannot write no/such.json"]),
        (("baseline", "prune", "--baseline", "no.json", "--from", "old.json"), ["no.json"]),
        (("baseline", "show"), ["no baseline attncheck-baseline.json"]),
        (("explain",), ["ATN101", "--all"]),
        (("diff", "old.json", "new.json", "--output", "pdf"), ["'pdf'", "markdown"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_input(run, folder: Path, command: tuple[str, ...], words: list[str]) -> None:
    before = sorted(folder.iterdir())
    done = run(*command)
    assert done.exit_code == 2
    assert done.output.count("\n") == 1
    assert all(word in done.output for word in words), done.output
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("name", plugins.formats())
def test_a_hostile_report_and_comparison_render_everywhere(run, name: str) -> None:
    for command in (
        ("report", "hostile.json", "--format", name),
        ("diff", "old.json", "hostile.json", "--output", name),
        ("diff", "hostile.json", "old.json", "--output", name),
        ("gate", "--from", "hostile.json", "--baseline", "b.json", "--output", name),
    ):
        done = run(*command)
        assert done.exit_code in (0, 1, 3), done.output
        assert "\x1b" not in done.output
        if name != "json":  # which changes nothing: it is data
            assert "\u202e" not in done.output


def test_a_report_keeps_its_comparison(run, folder: Path) -> None:
    """What a gate or a diff found is in the JSON, and is rendered again later."""
    first = run("diff", "old.json", "new.json", "--output", "json:both.json", "--output", "table")
    again = run("report", "both.json")
    assert first.output.partition("Against old.json")[2]
    assert again.output in first.output
    (folder / "both.json").unlink()
